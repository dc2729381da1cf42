"""The README cannot rot: what it points at exists, what it shows is what the code gives."""
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import clipsft
import eval as ev
import model as M
import rl

ROOT = Path(clipsft.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = ("clipsft.py", "data.py", "eval.py", "model.py", "rl.py")
MODULES = {"clipsft.py": clipsft, "eval.py": ev, "model.py": M, "rl.py": rl}
MAP = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+\.py):(\w+)` \|$", README, re.M)
FOUND = {r["id"]: r for r in json.loads((ROOT / "study" / "claims.json").read_text())}

def test_sizes_that_were_promised():
    lines = {f: (ROOT / f).read_text(encoding="utf-8").splitlines() for f in CODE}
    assert sum(map(len, lines.values())) <= 1200 and max(map(len, lines.values())) <= 330
    assert max(len(x) for text in lines.values() for x in text) <= 100
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 16384

def test_the_equation_map_is_not_empty():
    assert len(MAP) == 13

@pytest.mark.parametrize("equation,paper,file,name", MAP)
def test_equation_map_points_at_code_that_names_its_source(equation, paper, file, name):
    source = inspect.getsource(getattr(MODULES[file], name))
    numbers = re.findall(r"\d{4}\.\d{5}", paper)
    names = re.findall(r"paper 1|DAPO|GRPO|PSFT|Schulman", paper, re.I)
    assert any(x.lower() in source.lower() for x in numbers + names) or paper == "all", name
    above = (ROOT / file).read_text(encoding="utf-8").split("# =====")[0]
    assert f"def {name}(" in above                     # above the ruled line

def paste(*functions):
    """Their source alone, in a namespace that holds nothing but torch."""
    space = {}
    exec("import torch\n" + "\n".join(inspect.getsource(f) for f in functions), space)
    return space

def test_the_pure_functions_work_when_pasted_alone():
    logp, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]])
    mask = torch.tensor([[True, False]])
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert paste(clipsft.sft_loss)["sft_loss"](logp).tolist() == [[1.0, 2.0]]
    assert paste(clipsft.dft_loss)["dft_loss"](torch.zeros(1)).item() == 0
    clip = paste(rl.clipped_surrogate, clipsft.clip_loss)["clip_loss"]
    assert torch.allclose(clip(logp, old, 0.2, 0.28), torch.tensor([[-1.0, -1.28]]))
    assert paste(rl.group_advantage)["group_advantage"](torch.ones(1, 2)).tolist() == [[0, 0]]
    assert paste(rl.masked_mean)["masked_mean"](logp, mask).item() == -1
    assert paste(M.kl_exact)["kl_exact"](logp, logp).item() == 0
    assert paste(rl.kl_k3)["kl_k3"](logp, logp).tolist() == [[0, 0]]
    z = torch.tensor([[[0.0, 0.0]]])
    assert paste(M.token_logprobs)["token_logprobs"](z, torch.tensor([[1]])).item() == \
        pytest.approx(-0.6931472)
    assert paste(ev.principal_angles)["principal_angles"](W, 2 * W, 2)[0].max() < 1e-6
    assert torch.allclose(paste(ev.singular_value_shift)["singular_value_shift"](W, 2 * W),
                          torch.ones(3).double())

def test_files_flags_and_methods_named_exist():
    for name in re.findall(r"\]\(([\w/.]+)\)|`(study/[\w.]+)`", README):
        assert (ROOT / (name[0] or name[1])).exists(), name
    study = (ROOT / "study" / "claims.py").read_text() + (ROOT / "study" / "speed.py").read_text()
    flags = {f"--{f.name}" for f in dataclasses.fields(clipsft.Config)}
    for flag in re.findall(r"--[a-z_]+", README):
        assert flag in flags or f'"{flag}"' in study or f"{flag[2:]}=" in study, flag
    c = clipsft.Config()
    for text in re.findall(r"(?<![\w.])((?:sft|clip):[a-z_]+=[\w.=,-]+)", README):
        assert clipsft.variant(text, c)[0] in clipsft.METHODS

def test_the_new_loss_of_the_readme_runs():
    block = re.search(r"```python\n(def sqrt_loss.*?)\n\n", README, re.S).group(1)
    exec(block, space := {})
    logp = torch.tensor([-2.0], requires_grad=True)
    space["sqrt_loss"](logp).backward()
    assert logp.grad.item() == pytest.approx(-0.3678794)          # the square root of exp(-2)

def test_effects_and_verdicts_are_those_of_the_study():
    shown = re.findall(r"^\| `([\w .]+)` \| .*? \| ([+-][\d.]+) ± ([\d.]+) \| \**([a-z ]+?)\** \|",
                       README, re.M)
    assert len(shown) >= 12
    for id, effect, half, verdict in shown:
        r = FOUND[id]
        assert (effect, half, verdict) == (f"{r['effect']:+.3f}", f"{r['half']:.3f}",
                                           r["verdict"]), id

def test_the_count_of_verdicts_and_the_names_of_the_contrary_ones():
    by = {v: [id for id, r in FOUND.items() if r["verdict"] == v] for v in (
        "holds", "opposite", "no difference", "undecided")}
    said = re.search(r"Of (\d+) claims (\d+) hold, (\d+) come out opposite \((.*?)\), (\d+) shows? "
                     r"no difference \((.*?)\), (\d+) (?:is|are) undecided \((.*?)\)",
                     " ".join(README.split())).groups()
    assert [int(said[i]) for i in (0, 1, 2, 4, 6)] == [len(FOUND), *map(len, by.values())]
    for names, kind in zip(said[3::2], ("opposite", "no difference", "undecided"), strict=True):
        assert set(re.findall(r"`(.*?)`", names)) == set(by[kind])

def test_verdicts_follow_from_their_intervals():
    for r in FOUND.values():
        low, high = (r["effect"] + s * r["half"] - r.get("atleast", 0) for s in (-1, 1))
        margin = r.get("margin", 0.03)
        assert r["verdict"] == ("undecided" if r["n"] < 3 else "holds" if low > 0 else
                                "opposite" if high < 0 else "no difference"
                                if max(-low, high) < margin else "undecided"), r["id"]
