"""The README cannot rot: what it points at exists, what it shows is what the rows give."""
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import clipsft
import eval as ev
import model as M
import rl

ROOT = Path(clipsft.__file__).parent
sys.path.insert(0, str(ROOT / "study"))
import llm  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
MODULES = {"clipsft.py": clipsft, "eval.py": ev, "model.py": M, "rl.py": rl}
MAP = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+\.py):(\w+)` \|$", README, re.M)
CLAIMS = {r["id"]: r for r in json.loads((ROOT / "study" / "claims.json").read_text())}
SHOWN = re.findall(r"^\| `([\w ,]+)` \| .*? \| ([+-][\d.]+) ± ([\d.]+) \| \**([a-z ]+?)\** \|",
                   README, re.M)


def test_it_is_short():
    assert len(README.splitlines()) <= 260
    assert len(README.encode()) <= 18400


def test_the_equation_map_is_not_empty():
    assert len(MAP) >= 14


@pytest.mark.parametrize("equation, paper, file, name", MAP)
def test_the_equation_map_points_above_the_ruled_line(equation, paper, file, name):
    above = (ROOT / file).read_text(encoding="utf-8").split("# =====")[0]
    assert f"def {name}(" in above


@pytest.mark.parametrize("equation, paper, file, name", MAP)
def test_the_code_names_the_source_that_the_map_names(equation, paper, file, name):
    source = inspect.getsource(getattr(MODULES[file], name)).lower()
    numbers = re.findall(r"\d{4}\.\d{5}", paper)
    names = re.findall(r"paper 1|dapo|grpo|psft", paper.lower())
    assert paper == "all" or any(word in source for word in numbers + names)


def test_every_link_leads_somewhere():
    for text, folder in ((README, ROOT), (PAGE, ROOT / "recipes")):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (folder / target).exists(), target


def test_every_flag_is_one():
    files = [ROOT / "study" / name for name in ("claims.py", "speed.py", "llm.py")]
    others = "".join(path.read_text(encoding="utf-8") for path in files)
    flags = {f"--{field.name}" for field in dataclasses.fields(clipsft.Config)} | {"--preset"}
    for flag in re.findall(r"(?<![\w-])--[a-z_]+", README):
        assert flag in flags or f'"{flag}"' in others or f"{flag[2:]}=" in others, flag


def test_every_method_is_one():
    for command in re.findall(r"--methods ((?:[a-z0-9-]+ ?)+)", README):
        for name in command.split():
            if name.startswith("--"):
                break
            assert name in clipsft.METHODS or name == "sqrt", name


def test_the_new_loss_of_the_readme_has_the_gradient_of_the_square_root():
    lines = re.search(r"```python\n(def sqrt_loss.*?)\n\n", README, re.S).group(1)
    space = {}
    exec(lines, space)
    logp = torch.tensor([-2.0], requires_grad=True)
    space["sqrt_loss"](logp).backward()
    assert logp.grad.item() == pytest.approx(-0.3678794)          # the square root of exp(-2)


def test_between_ten_and_fifteen_claims_are_shown():
    assert 10 <= len(SHOWN) <= 15


@pytest.mark.parametrize("id, effect, half, verdict", SHOWN)
def test_a_claim_that_is_shown_is_that_of_the_study(id, effect, half, verdict):
    entry = CLAIMS[id]
    assert (effect, half) == (f"{entry['effect']:+.3f}", f"{entry['half']:.3f}")
    assert verdict == entry["verdict"]


def test_the_counts_of_bold_verdicts_are_those_of_the_study():
    said = re.search(r"Of (\d+) claims, (\d+) hold and (\d+) come out opposite", README)
    sure = [entry["verdict"] for entry in CLAIMS.values() if entry["sure"]]
    counts = [len(CLAIMS), sure.count("holds"), sure.count("opposite")]
    assert [int(number) for number in said.groups()] == counts


def test_contrary_claims_are_all_named():
    names = re.search(r"opposite at 99\.9 % \((.*?)\)", " ".join(README.split())).group(1)
    contrary = {id for id, entry in CLAIMS.items()
                if entry["sure"] and entry["verdict"] == "opposite"}
    assert set(re.findall(r"`(.*?)`", names)) == contrary


def test_verdicts_follow_from_their_intervals():
    for entry in CLAIMS.values():
        if entry["n"] < 3:
            assert entry["verdict"] == "undecided"
            continue
        low = entry["effect"] - entry["half"] - entry["at_least"]
        high = entry["effect"] + entry["half"] - entry["at_least"]
        if entry["verdict"] == "holds":
            assert low > 0
        elif entry["verdict"] == "opposite":
            assert high < 0
        else:
            assert low <= 1e-9 and high >= -1e-9


LLM_SHOWN = re.findall(r"^\| .*? \(`(\w+)`\) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)


def test_differences_of_the_real_model_are_those_of_the_committed_rows():
    lines = (ROOT / "study" / "llm.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {key for key, *_ in LLM_SHOWN} >= {"facts", "text", "kl"}
    for key, *cells in LLM_SHOWN:
        for cell, (method, reference) in zip(cells, llm.PAIRS):
            middle, half = ev.interval(llm.differences(rows, method, reference, key))
            assert cell == f"{middle:+.3f} ± {half:.3f}"
