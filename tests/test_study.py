"""study/claims.py and study/speed.py: verdicts, picks and spectra by hand, both in miniature."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "study"))
import claims  # noqa: E402
import speed  # noqa: E402

nan = math.nan


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
def row(method, step, ID, ood, stage="sft", seed=0, ood_a=None):
    return dict(seed=seed, method=method, stage=stage, step=step, id=ID, ood=ood,
                ood_a=ood if ood_a is None else ood_a, ood_b=ood - 0.1)


CURVE = [row("sft", 4, 0.5, 0.4), row("sft", 8, 0.96, 0.8), row("sft", 12, 0.97, 0.9),
         row("sft", 300, 0.95, 0.3)]
ENDS = [row("sft", 4, 1, 0.6, "rl"), row("sft", 8, 1, 0.7, "rl", ood_a=0.2),
        row("sft", 300, 1, 0.5, "rl", ood_a=0.9)]


@pytest.mark.parametrize("pick, expected", [
    (claims.at_end, 0.3), (claims.at_step(8), 0.8), (claims.at_id(0.97), 0.9),
    (claims.at_peak, 0.8),    # .9 on half a, minus .1 on half b
    (claims.at_best_id, 0.9), (claims.start_at_id, 0.8), (claims.after_rl(4), 0.6),
    (claims.best_after_rl((4, 8)), 0.6),    # picked on half a: .6 and .2
    (claims.best_after_rl((4, 8, 300)), 0.5), (claims.after_rl_from_equal_id, 0.7)])
def test_a_pick_finds_its_row(pick, expected):
    assert pick(CURVE + ENDS, "sft", 0)["ood"] == pytest.approx(expected)
    assert pick(CURVE + ENDS, "clip", 0) is None
    assert pick(CURVE + ENDS, "sft", 1) is None


def test_values_are_means_over_picks_and_gains_are_after_minus_before():
    rows = CURVE + ENDS
    assert claims.values(rows, "ood", "sft", claims.at_step(4), claims.at_step(8)) == \
        pytest.approx([0.6])
    assert claims.gain_by_rl(rows, "ood", "sft", (4, 300)) == pytest.approx([(0.2 + 0.2) / 2])


def test_a_missing_row_is_nan_and_never_0():
    other_seed = [row("clip", 8, 0.99, 0.2, seed=1), row("sft", 8, 0.99, 0.5, seed=1),
                  row("clip", 8, 1, 0.9, "rl", seed=1)]    # SFT has no row after RL
    rows = CURVE + ENDS + other_seed
    pick = claims.after_rl_from_equal_id
    np.testing.assert_allclose(claims.values(rows, "ood", "sft", pick), [0.7, nan])
    np.testing.assert_allclose(claims.difference(rows, "ood", "clip", "sft", pick), [nan, nan])
    both = claims.values(rows, "ood", "sft", claims.at_step(4), claims.at_step(8))
    np.testing.assert_allclose(both, [0.6, nan])
    np.testing.assert_allclose(claims.column([dict(shift=2), {}], "shift"), [2, nan])


def test_a_claim_without_any_row_is_undecided_and_its_numbers_are_null():
    base_alone = [row("base", 0, 0, 0, "base")]
    for claim in claims.all_claims(base_alone, [{}]):
        entry = claims.as_json(claim)
        assert (entry["verdict"], entry["n"]) == ("undecided", 0)
        assert entry["effect"] is None
        assert entry["half"] is None


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
@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One command in miniature: two seeds, starts at 2 and 4, no variants but one."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "STARTS", (2, 4))
        patch.setattr(claims, "CORE", ("sft", "clip"))
        patch.setattr(claims, "VARIANTS", ("dft",))
        argv = [str(folder / "run"), "--seeds", "2", "--out", str(folder / "out"), "--flags",
                "--preset", "smoke", "--steps", "4", "--rl_steps", "1"]
        claims.main(argv)
        yield folder, argv


def test_one_command_writes_claims_tables_and_figures(study):
    out = study[0] / "out"
    entries = json.loads((out / "claims.json").read_text())
    assert len(entries) == 27
    keep_prior = next(entry for entry in entries if entry["id"] == "keep prior")
    assert (keep_prior["n"], keep_prior["verdict"]) == (0, "undecided")    # ID .95 is not reached
    assert keep_prior["beside"] == "at the end"
    text = (out / "claims.md").read_text(encoding="utf-8")
    for name in ("| keep prior |", "| restore |", "| clip |", "| dft |"):
        assert name in text
    for name in ("summary.png", "trade.png", "idea.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_measurements_are_made_again_when_a_checkpoint_is_newer(study, monkeypatch):
    run = study[0] / "run"
    rows = claims.ev.read_rows(run)
    kept = claims.measured(run, 100, rows)
    monkeypatch.setattr(claims, "measure", lambda *args: dict(shift=7.0, angle=nan))
    assert claims.measured(run, 100, rows)["shift"] == kept["shift"]
    later = (run / "measured-s100.json").stat().st_mtime + 1
    os.utime(run / "s100-sft-4.pt", (later, later))
    again = claims.measured(run, 100, rows)
    assert again["shift"] == 7
    assert math.isnan(again["angle"])    # null in the file


def test_a_failing_experiment_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="clipsft.py failed"):
        claims.run_experiment(tmp_path / "run", range(2), ["sft"], ["--eval_n", "0"])


@pytest.mark.parametrize("decode, group", [(4, 4), (20, 4), (256, 8), (7, 1)])
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


@pytest.mark.parametrize("decode", [4, 20])
def test_speed_in_miniature(decode):
    done = subprocess.run(
        [sys.executable, ROOT / "study" / "speed.py", "--rounds", "1", "--rows", "2", "--n_layer",
         "1", "--n_head", "1", "--n_embd", "8", "--vocab_size", "40", "--block_size", "8",
         "--threads", "1", "--decode", str(decode)], capture_output=True, text=True, check=True)
    for name in ("product", "copy", "train, plain loop", "train, here", "decode, here"):
        assert f"\n{name}  " in done.stdout
    assert "GRPO" not in done.stdout    # not the vocabulary of the cards


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
