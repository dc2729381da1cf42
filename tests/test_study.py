"""study/claims.py and study/speed.py: verdicts, picks and spectra by hand, both in miniature."""
import json
import math
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "study"))
import claims  # noqa: E402
import clipsft  # noqa: E402
import speed  # noqa: E402

nan = math.nan
near = pytest.approx


def said(effects, **options):
    found = claims.verdict(effects, **options)
    return found.verdict, found.sure


# ================================================================= verdicts
def test_an_interval_above_holds_and_one_below_is_opposite():
    # mean .1, s .1, n 9: +- .0769 (t 2.306), at 99.9 % +- .168 (t 5.041)
    effects = [0.1, nan, 0, 0.2, 0, 0.2, 0, 0.2, 0, 0.2]
    assert said(effects, at_least=0.02) == ("holds", False)
    assert said(effects, at_least=0.03) == ("undecided", False)
    assert said(effects, at_least=0.18) == ("opposite", False)


def test_an_interval_within_the_margin_is_no_difference():
    # mean 0, s .001 and .002: +- .0025 and .0050 (t 4.303), at 99.9 % .018 and .036 (t 31.599)
    assert said([0, 0.001, -0.001]) == ("no difference", True)
    assert said([0, 0.002, -0.002]) == ("no difference", False)
    assert said([0, 0.001, -0.001], margin=0) == ("undecided", False)


def test_below_three_seeds_nothing_is_decided():
    assert said([]) == ("undecided", False)
    assert said([0.1, 0.1, nan]) == ("undecided", False)


def test_effect_interval_and_counts_by_hand():
    found = claims.verdict([1, 2, nan, 3, -1e-17, -6])
    # mean 0; squares 1 + 4 + 9 + 0 + 36 = 50, s sqrt(50 / 4); t of 4 degrees is 2.776
    assert found.effect == pytest.approx(0)
    assert found.half == pytest.approx(2.776 * math.sqrt(12.5) / math.sqrt(5))
    assert (found.n, found.above) == (5, 3)


def test_constant_effects_within_rounding_are_no_difference():
    for tiny in (5.6e-17, -1.1e-16):
        assert said([tiny] * 3) == ("no difference", True)
        assert said([tiny] * 3, margin=0) == ("undecided", False)
        assert claims.verdict([tiny] * 3).above == 0
    assert said([-0.02 + 1e-17] * 3, at_least=-0.02) == ("no difference", True)
    assert said([0.1] * 3) == ("holds", True)


# ================================================================= picks
def row(method, step, ID, ood, stage="sft", seed=0, **others):
    numbers = dict(seed=seed, method=method, stage=stage, step=step, id=ID, ood=ood, ood_a=ood,
                   ood_b=ood - 0.1)
    return numbers | others


CURVE = [row("sft", 4, 0.5, 0.4), row("sft", 6, 0.96, 0.6), row("sft", 8, 0.96, 0.8),
         row("sft", 12, 0.97, 0.9), row("sft", 300, 0.95, 0.3), row("sft", 600, 0.94, 0.2)]
ENDS = [row("sft", 4, 1, 0.6, "rl", zero_spread=0), row("sft", 8, 1, 0.7, "rl", ood_a=0.2,
        zero_spread=0), row("sft", 12, 1, 0.1, "rl", zero_spread=0),
        row("sft", 300, 1, 0.5, "rl", ood_a=0.9, zero_spread=0.25)]


@pytest.mark.parametrize("pick, expected", [
    (claims.at_end, 0.2), (claims.at_step(8), 0.8), (claims.at_300, 0.3),
    (claims.at_id(0.73), 0.5),                    # half of the way from .4 to .6
    (claims.at_peak, (0.8 + 0.9) / 2),            # step 12 by either half, seen on the other
    (claims.at_best_id, 0.9), (claims.start_at_id, 0.8), (claims.after_rl(4), 0.6),
    (claims.best_after_rl, (0.4 + 0.2) / 2),      # 300 by half a, 8 by half b
    (claims.after_rl_from_equal_id, 0.7)])
def test_a_pick_finds_its_row(pick, expected):
    assert pick(CURVE + ENDS, "sft", 0)["ood"] == near(expected)
    assert pick(CURVE + ENDS, "clip", 0) is None
    assert pick(CURVE + ENDS, "sft", 1) is None


# The peak is step 12 by either half: .8 on half b, .9 on half a. Before it RL starts at 4 and 8,
# after it at 300; each is seen on half b, then on half a.
@pytest.mark.parametrize("when, number, expected", [
    ("before", claims.gain, (0.2 - 0.1 + 0.2 - 0.6) / 4), ("after", claims.gain, (0.2 + 0.6) / 2),
    ("before", claims.loss, (0.5 + 0.1 + 0.5 + 0.1) / 4), ("after", claims.loss, 0.6),
    ("before", claims.end, (0.5 + 0.6 + 0.6 + 0.2) / 4), ("after", claims.end, (0.4 + 0.9) / 2),
    ("after", claims.above_peak, (-0.4 + 0) / 2), ("after", claims.no_spread, 0.25)])
def test_what_rl_changes_before_and_after_the_runs_own_peak(when, number, expected):
    other = [row("sft", 4, 0.5, 0.9, seed=1), row("sft", 8, 0.9, 0.1, seed=1),    # peak: step 4
             row("sft", 8, 0.9, 0.3, "rl", seed=1, zero_spread=0.5)]
    of_other = dict(gain=0.2, loss=0.8, end=0.25, above_peak=-0.6, no_spread=0.5)
    second = nan if when == "before" else of_other[number.__name__]
    found = claims.by_rl(CURVE + ENDS + other, "sft", when, number)
    np.testing.assert_allclose(found, [expected, second])


def test_a_missing_row_is_nan_and_never_0():
    other_seed = [row("clip", 8, 0.99, 0.2, seed=1), row("sft", 8, 0.99, 0.5, seed=1),
                  row("clip", 8, 1, 0.9, "rl", seed=1)]    # SFT has no row after RL
    rows = CURVE + ENDS + other_seed
    pick = claims.after_rl_from_equal_id
    np.testing.assert_allclose(claims.values(rows, "ood", "sft", pick), [0.7, nan])
    np.testing.assert_allclose(claims.difference(rows, "ood", "clip", "sft", pick), [nan, nan])
    both = claims.values(rows, "ood", "sft", claims.at_step(4), claims.at_step(8))
    np.testing.assert_allclose(both, [0.6, nan])
    np.testing.assert_allclose(claims.by_rl(rows, "clip", "before", claims.gain), [nan, nan])
    np.testing.assert_allclose(claims.column([dict(shift=2), {}], "shift"), [2, nan])


def test_what_is_forgotten_in_per_cent_of_the_base_by_hand():
    rows = [row("base", 0, 0, 0, "base", prior=0.8, explained=0.5),
            row("sft", 8, 1, 1, prior=0.4, explained=0.4)]    # 50 and 20 %
    np.testing.assert_allclose(claims.forgotten(rows, "sft", claims.at_end), [35])


def test_a_claim_without_any_row_is_undecided_and_its_numbers_are_null():
    base_alone = [row("base", 0, 0, 0, "base", prior=1, explained=1)]
    for claim in claims.all_claims(base_alone, [{}]):
        entry = claims.as_json(claim)
        assert (entry["verdict"], entry["n"]) == ("undecided", 0)
        assert entry["effect"] is None
        assert entry["half"] is None


def numbers(**given):
    """All numbers of a row that claims look at; .5 but for those given."""
    keys = ("id", "ood", "ood_a", "ood_b", "ood_any", "ood_rule", "ood_unread", "ood_format",
            "ood_sums", "prior", "explained", "entropy", "logp_low", "logp_high", "clip_frac",
            "clip_connectives", "clip_numbers", "clip_signs", "zero_spread")
    return dict.fromkeys(keys, 0.5) | given


def made_up(seed):
    """What three papers would expect, of a seed."""
    def of(method, step, stage="sft", **given):
        return dict(seed=seed, method=method, stage=stage, step=step) | numbers(**given)
    rows = [of("base", 0, "base", prior=1, explained=1), of("base", 0, "rl", ood=0, id=0.1)]
    for method, up in (("sft", 0), ("clip", 0.1)):
        early = dict(ood=0.7, ood_a=0.7, ood_b=0.7)
        rows += [of(method, 8, id=0.5, ood=0.4, ood_a=0.4, ood_b=0.4),
                 of(method, 16, id=0.96, prior=0.6 + up, **early),
                 of(method, 300, id=1, ood=0.5, ood_any=0.5 + up, prior=0.5 + up),
                 of(method, 1200, id=1, ood=0.3, ood_a=0.3, ood_b=0.3, ood_unread=0.6),
                 of(method, 8, "rl", ood=0.6, ood_a=0.6),
                 of(method, 1200, "rl", ood=0.45, ood_a=0.4)]
    return rows


@pytest.mark.parametrize("name, effect, said", [
    ("peak", 0.4, "holds"), ("rule", 0.6 / 0.7, "holds"), ("heals", 0.15, "holds"),
    ("completes", 0.15, "holds"), ("cold start", 0.55, "holds"), ("too late", 0.1, "holds"),
    ("bound", (0.2 + 0.3) / 2, "holds"), ("ID parity", 0, "holds"), ("rotation", None, "undecided"),
    # at .95, 45/46 of the way from update 8, where both have .5
    ("keep prior", 0.1 * 45 / 46, "holds"), ("keep ood", 0, "no difference"),
    ("not a step back", (0.2 + 0.15) / 2 - 0.2, "opposite"), ("turns back", 2, "holds")])
def test_claims_of_made_up_rows_by_hand(name, effect, said):
    rows = [line for seed in range(3) for line in made_up(seed)]
    measurements = [dict(gain_toward_base=0.2, angle_late=9, angle_rl=7)] * 3
    found = {claim.id: claim for claim in claims.all_claims(rows, measurements)}
    entry = claims.as_json(found[name])
    assert entry["effect"] == (None if effect is None else near(effect))
    assert entry["verdict"] == said


# ================================================================= measurements
def test_spectral_change_by_hand():
    W = torch.diag(torch.tensor([4.0, 2, 1, 0.5]))
    after = torch.diag(torch.tensor([4.4, 1, 0.9, 0.1]))    # the leading half: + 10 %, - 50 %
    angle = math.radians(20)
    turn = torch.eye(4)    # of the second axis towards the third, on the left alone
    turn[1:3, 1:3] = torch.tensor([[math.cos(angle), -math.sin(angle)],
                                   [math.sin(angle), math.cos(angle)]])
    shift, degrees = claims.spectral_change(dict(a=W, b=W), dict(a=after, b=turn @ W))
    assert shift == pytest.approx((0.3 + 0) / 2, abs=1e-5)
    assert degrees == pytest.approx((0 + 20 / 4) / 2, abs=0.02)    # of two left, two right angles


def test_random_updates_have_the_norm_or_the_spectrum_of_the_real_one():
    update = torch.diag(torch.tensor([3.0, 4.0, 0.0]))[:2]    # (2, 3), of norm 5
    assert claims.random_update(update, 0, "name").norm().item() == pytest.approx(5)
    same = claims.same_spectrum(update, 0, "name")
    assert torch.linalg.svdvals(same).tolist() == pytest.approx([4, 3])
    assert not torch.allclose(same, claims.same_spectrum(update, 1, "name"))


def test_layer_means_are_over_the_response_alone(tiny):
    ids = torch.tensor([[1, 2, 3]])
    means = claims.layer_means(tiny, ids, torch.tensor([[False, True, True]]))
    embedded = tiny.transformer.wte.weight[[2, 3]] + tiny.transformer.wpe.weight[1:3]
    assert torch.allclose(means[0][0], embedded.mean(0), atol=1e-6)
    of_the_last = claims.layer_means(tiny, ids, torch.tensor([[False, False, True]]))
    assert torch.allclose(tiny.transformer.ln_f(of_the_last[2]), tiny.hidden(ids)[:, 2], atol=1e-5)


# ================================================================= the commands
class InProcess:
    """In the place of subprocess.Popen: clipsft.py here and now."""
    def __init__(self, command, env):
        assert command[1] == ROOT / "clipsft.py"
        claims.clipsft.main([str(word) for word in command[2:]])

    def wait(self):
        return 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The command in miniature: two seeds, starts at 2 and 4, a variant of each kind."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims.subprocess, "Popen", InProcess)
        patch.setattr(claims.ev, "report", lambda *args: None)
        patch.setattr(claims.data, "MAX_NEW", 4)    # short answers take less time
        for kind, methods in dict(CORE=("sft", "clip"), RATES=("sft-1e-4",), LATE=("rpsft",),
                                  EARLY=("dft",)).items():
            patch.setattr(claims, kind, methods)
        flags = ("--preset smoke --n_layer 1 --base_steps 4 --steps 4 --rl_from 2 4 --rl_steps 1 "
                 "--eval_n 16 --demos 64")
        claims.main([str(folder / "run"), "--seeds", "2", "--few_seeds", "1", "--out",
                     str(folder / "out"), "--flags", *flags.split()])
    return folder


def test_one_command_writes_rows_claims_tables_and_figures(study):
    out = study / "out"
    rows = claims.read_lines(out / "rows.jsonl")
    assert {(row["seed"], row["method"]) for row in rows} == {
        (600, "base"), (600, "sft"), (600, "clip"), (600, "sft-1e-4"), (600, "rpsft"), (600, "dft"),
        (601, "base"), (601, "sft"), (601, "clip"), (601, "sft-1e-4")}
    assert len([row for row in rows if row["method"] == "base"]) == 4    # before and after RL
    assert [row["seed"] for row in claims.read_lines(out / "measured.jsonl")] == [600, 601]
    for numbers in claims.read_lines(out / "measured.jsonl"):
        assert {numbers[f"spreadless_{name}"] for name in claims.TRIES} == {1}    # all wrong
        assert all(numbers[f"gain_{name}"] == 0 for name in claims.TRIES)
    entries = json.loads((out / "claims.json").read_text())
    keep_prior = next(entry for entry in entries if entry["id"] == "keep prior")
    assert (keep_prior["n"], keep_prior["verdict"]) == (0, "undecided")    # ID .95 is not reached
    assert keep_prior["beside"]["at ID .98"] == [None, None]
    assert keep_prior["beside"]["at the end"][0] is not None
    text = (out / "claims.md").read_text(encoding="utf-8")
    for name in ("| keep prior |", "| restore |", "| clip |", "| dft |"):
        assert name in text
    for name in ("summary.png", "trade.png", "idea.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_committed_rows_are_judged_once_more_without_a_run_folder(study, tmp_path, monkeypatch):
    monkeypatch.setattr(claims.ev, "figure", lambda *args: None)
    monkeypatch.setattr(claims, "trade_figure", lambda *args: None)
    for name in ("rows.jsonl", "measured.jsonl"):
        (tmp_path / name).write_bytes((study / "out" / name).read_bytes())
    claims.main(["--out", str(tmp_path)])
    for name in ("claims.json", "claims.md"):
        assert (tmp_path / name).read_bytes() == (study / "out" / name).read_bytes()


def test_lines_keep_nan_and_five_places(tmp_path):
    claims.write_lines(tmp_path / "rows", [dict(seed=1, ood=1 / 3, nll=nan, sample="S ±")])
    assert json.loads((tmp_path / "rows").read_text(encoding="utf-8"))["nll"] is None
    back, = claims.read_lines(tmp_path / "rows")
    assert math.isnan(back.pop("nll"))
    assert back == dict(seed=1, ood=0.33333, sample="S ±")


def test_measurements_are_made_again_when_a_checkpoint_is_newer(study, monkeypatch):
    run = study / "run"
    rows = claims.ev.read_rows(run)
    kept = claims.measured(run, 600, rows)
    monkeypatch.setattr(claims, "measure", lambda *args: dict(shift=7.0, angle=nan))
    assert claims.measured(run, 600, rows)["shift"] == kept["shift"]
    later = (run / "measured-s600.json").stat().st_mtime + 1
    os.utime(run / "s600-sft-4.pt", (later, later))
    assert claims.measured(run, 600, rows) == dict(shift=7, angle=None)


def test_two_processes_share_the_seeds_and_a_failing_one_ends_the_study(tmp_path, monkeypatch):
    commands = []

    def start(command, env):
        commands.append([str(word) for word in command])
        return SimpleNamespace(wait=lambda: len(commands) - 1)
    monkeypatch.setattr(claims.subprocess, "Popen", start)
    with pytest.raises(SystemExit, match="clipsft.py failed"):
        claims.run_experiment(tmp_path, range(7, 12), ("sft", "dft"), 600, (64, 600), ["--lr", "1"])
    flags = [clipsft.read_flags(command[2:]) for command in commands]
    assert [(c.seed, c.seeds) for c in flags] == [(7, 3), (10, 2)]
    c = flags[0]
    assert (c.methods, c.rl_methods, c.rl_from) == (["sft", "dft"], ["sft"], [64, 600])
    assert (c.steps, c.lr, c.out_dir) == (600, 1, str(tmp_path))


@pytest.mark.parametrize("decode, group", [(20, 4), (256, 8), (7, 1)])
def test_speed_decodes_as_many_rows_as_it_counts(decode, group):
    c = speed.read_flags(["--decode", str(decode)])
    ids, _ = speed.training_batch(c)
    rows = []

    class Model:
        def generate(self, prompts, max_new, n, **options):
            rows.append((n, n * len(prompts), prompts.shape[1], max_new))
    speed.decode_here(c, Model(), speed.decoding_prompts(c, ids))()
    assert rows == [(group, decode, 10, 30)]    # of 40 places a quarter is the prompt
    assert speed.done_by(c, "decode", 0) == (30 * decode, "tokens")


def test_speed_in_miniature(capsys):
    with warnings.catch_warnings():
        speed.main("--rounds 1 --rows 2 --n_layer 1 --n_head 1 --n_embd 8 --vocab_size 40 "
                   "--block_size 8 --threads 1 --decode 4".split())
    out = capsys.readouterr().out
    for name in ("product", "copy", "train, plain loop", "train, here", "decode, here"):
        assert f"\n{name}  " in out
    assert "GRPO" not in out    # not the vocabulary of the cards


def test_peak_memory_in_gib(monkeypatch):
    """ru_maxrss counts KiB, on macOS bytes; Windows has no such module."""
    resource = pytest.importorskip("resource")
    used = SimpleNamespace(ru_maxrss=3 * 2 ** 20)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    c = speed.read_flags([])
    for platform, gib in (("linux", 3), ("darwin", 3 / 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert speed.peak_memory(c) == gib
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(speed.peak_memory(c))
