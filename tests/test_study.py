import copy
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval import coverage, near, rotation

import clipsft
import data
import eval as ev

sys.path.insert(0, str(Path(__file__).parent.parent / "study"))
import claims  # noqa: E402

STEPS, nan = (4, 8, 16, 32, 64, 128, 300), math.nan

@pytest.mark.parametrize("x, options, said, sure", [
    ([0.1] * 3, {}, "holds", 1), ([-0.1] * 3, {}, "opposite", 1), ([], {}, "undecided", 0),
    ([0.1, 0.1, nan], {}, "undecided", 0), ([0, 1, -1], {}, "undecided", 0),
    ([-0.046, -0.03, -0.014], {}, "undecided", 0),       # +- .040
    # mean 0, s .001 and .002: +- .0025 and .0050 (t 4.303), at 99.9 % .018 and .036 (t 31.599)
    ([0, 0.001, -0.001], {}, "no difference", 1), ([0, 0.002, -0.002], {}, "no difference", 0),
    ([0, 0.001, -0.001], dict(margin=0), "undecided", 0),
    # mean .1, s .1, n 9: +- .0769 (t 2.306), at 99.9 % +- .168 (t 5.041)
    ([0.1, nan] + [0, 0.2] * 4, dict(atleast=0.02), "holds", 0),
    ([0.1] + [0, 0.2] * 4, dict(atleast=0.03), "undecided", 0),
    ([-0.03] * 3, dict(atleast=-0.02), "opposite", 1),
    ([-0.01] * 3, dict(atleast=-0.02), "holds", 1)])
def test_verdicts_by_hand(x, options, said, sure):
    assert claims.verdict(x, **options)[2:] == (sum(v == v for v in x), said, sure)

def test_the_table_of_the_sure_is_right_to_its_last_digit():
    for df, t in enumerate(claims.T_999, 1):
        assert coverage(t - 6e-4, df) < 0.999 < coverage(t + 6e-4, df)
    assert claims.verdict([1, 2, 3, nan])[:2] == near((2, 4.303 / 3 ** 0.5)) and df == 19

def study(n=4):
    """Rows and measurements of n seeds, in which every effect is known: a method's lift raises
    strict OOD by itself, M R D C by twice, E by three, OOD any by four times as much."""
    rows, lifts = [], {"sft": 0, "clip": 0.1, "sft:lr=1e-4": 0.25, "sft:skip=low": 0.3,
                       "sft:skip=random": 0.05, "sft:steps=1200": 0, "clip:steps=1200": 0.5,
                       "clip:lr=1e-4": 0.4}
    for s, (m, up) in itertools.product(range(n), lifts.items()):
        j, late = 0.01 * s, m == "clip"       # seeds differ, pairs do not; clip learns ID later
        for step, i, o, after, after_a in zip(
                STEPS, [0.4] * late + [0.5, 0.85, 0.9, 0.95, 0.98, 0.99, 0.97],
                (0.4, 0.8, 0.7, 0.6, 0.45, 0.4, 0.3), (0.5, 0.6, 0.7, 0.8, 0.75, 0.45, 0.35),
                (0.95, 0.92, 0.9, 0.6, 0.6, 0.4, 0.3)):
            o, after, r = o + j + up * (step > 4), after + j + up, dict(seed=s, method=m, step=step)
            rows.append(r | dict(
                stage="sft", id=i - 0.1 * (m == "sft:skip=low"), ood=o, ood_a=o, ood_b=o - 0.05,
                prior=0.9 - step / 1000 + 2 * up, explained=0.8 - step / 1000 + 3 * up, entropy=up,
                ood_any=0.7 + 4 * up, logp_low=-3 - 10 * up - step / 64, logp_high=-0.1 - up))
            if m in ("sft", "clip"):
                rows.append(r | dict(stage="rl", id=1.0, ood=after, ood_a=after_a,
                                     ood_b=after + 0.02, prior=step / 1000 + 2 * up))
    rows += [dict(seed=s, method="base", stage="rl", step=0, ood=9, ood_b=0.05 + s / 100, id=0.2)
             for s in range(n)]
    return rows, [dict(
        gradient=1 + s / 100, gradient_share=0.6, low_share=0.1, shift=0.02, shift_null=0.08,
        angle=5, angle_same=3 + s / 50, ood_late=0.3, ood_fifth=0.5, pca_sft=0.2,
        ood_straight=0.6, pca_clip=0.5, drift_sft=1 + s, drift_clip=0.4 + s) for s in range(n)]

EFFECTS = {    # effect, verdict if it does not hold, what stands beside it
    "gradient": [1.015, 0.5], "skip": [0.5, -0.1], "order": [1, 0.1], "ID parity": [0],
    # ID .95 at steps 32 of sft and 64 of clip, .98 at 64 and 128; the mean of both
    "keep prior": [(0.168 + 0.136) / 2, 0.2], "keep explained": [(0.268 + 0.236) / 2, 0.3],
    "keep ood_any": [0.4, 0.4], "keep ood": [(0.55 - 0.6 + 0.5 - 0.45) / 2, "no difference", 0.1],
    "best rate prior": [0.3, -(0.332 + 0.364) / 2], "best rate ood": [0.15, -(0.3 + 0.2) / 2],
    "peak": [0.5, 0.97 - 0.85], "cold start": [0.52 - 0.05, 0.2],
    "heal early": [(0.1 - 0.2) / 2, "opposite", 0], "heal middle": [(0 + 0.2) / 2, 0.1],
    "heal late": [(0.3 + 0.05) / 2, 0.175],
    "bound": [0.75 - 0.72, 0.75 - 0.52],     # start 16, of all start 4, are best on half a
    "too early": [0.75 - 0.5], "too late": [0.75 - (0.75 + 0.35) / 2],
    "RL best ood_b": [0.1], "RL best prior": [0.2], "RL equal ood_b": [0.85 - 0.8],
    "RL equal prior": [0.264 - 0.032], "values": [0.06, 0.02], "vectors": [5 - 3.03, 5],
    "restore": [-0.1, "opposite", 0.2], "drift": [0.6, -0.3], "entropy": [0.5, 0.97]}

def test_claims_on_a_study_whose_effects_are_known():
    found, text = claims.tables(*study())
    got = {c["id"]: c for c in json.loads(json.dumps(found))}
    assert list(got) == [c["id"] for c in found] and set(got) == set(EFFECTS)
    for id, (effect, *rest) in EFFECTS.items():
        said = [v for v in rest if isinstance(v, str)] or ["holds"]
        assert [got[id][k] for k in ("verdict", "n")] == [*said, 4], id
        assert [v for k, v in got[id].items() if k in ("effect", "beside_effect")] == near(
            [effect, *(v for v in rest if v not in said)], abs=1e-9), id
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    mine, variants = lines[2:2 + len(got)], lines[5 + len(got):]
    assert [r[0] for r in mine] == list(got) and mine[1][6] == "ID -0.100 ± 0.000"
    assert mine[-3][3:] == ["-0.100 ± 0.000", "4", "**opposite**",
                            "minus late model +0.200 ± 0.000"]
    assert {r[0] for r in variants} == {r["method"] for r in study()[0]} - {"base"}
    assert variants[3][-3:] == ["not reached", "not reached", "0"]
    assert " ".join(variants[1]) == \
        "clip 0.990 0.415 1.100 0.800 0.800 +0.168 ± 0.000 -0.050 ± 0.000 4"

def test_what_a_seed_lacks_is_nan_and_leaves_the_others_alone():
    rows = [r for r in study(3)[0] if not (r["seed"] == 1 and (
        r["method"] == "clip" or (r["method"], r["stage"], r["step"]) == ("sft", "rl", 16)))]
    (at, after), best, none = claims.selectors(rows), claims.best, [nan] * 3
    for found, expected in (
            (at("ood", "clip", claims.end), [0.4, nan, 0.42]), (after("ood", "kl", 4), none),
            (at("ood", "sft", claims.at_step(8)), [0.8, 0.81, 0.82]),
            (at("ood", "sft", claims.at_step(9)), none), (at("id", "sft", claims.at_id(1)), none),
            (at("step", "sft", claims.at_id(0.951)), [64] * 3),
            (after("ood", "sft", 16, 32), [0.75, nan, 0.77]), (best("sft", rows, "step"), [4] * 3),
            (best("sft", rows, "step", "ood"), [32] * 3),
            (best("sft", rows, "step", starts=STEPS[2:]), [16, 32, 16]),
            (best("clip", rows, "ood_b"), [0.62, nan, 0.64])):
        assert found == near(np.array(expected), nan_ok=True)

def test_spectrum_and_layer_means_by_hand(tiny):
    a, b = torch.diag(torch.tensor([4.0, 2, 1, 0.5])), torch.diag(torch.tensor([4.4, 1, 0.9, 9e-9]))
    # of the leading two values .1 and .5, then none; the second vector turns on the left alone
    assert claims.spectrum([(a, b), (a, rotation(4, 1, 2, 0.3).float() @ a)]) == near(
        (0.15, math.degrees(0.3 / 8)), abs=1e-3)
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])             # response: '9' and EOS
    h = tiny.transformer.wte(ids[1:, :3]) + tiny.transformer.wpe.weight[:3]
    after = [h, tiny.transformer.h[0](h), tiny.transformer.h[1](tiny.transformer.h[0](h))]
    for layer, x in zip(claims.layer_means(tiny, ids, mask), after, strict=True):
        assert torch.allclose(layer[1], x[0, 1:].mean(0), atol=1e-5)

def test_measurements_of_a_seed(tiny, monkeypatch):
    """Which checkpoints are read, by the names clipsft gives them, and what is done to them."""
    c, rows, saved, calls = clipsft.Config(), [], {}, {}
    for m, *n in [("base",), *((m, n) for m in ("sft", "clip") for n in STEPS)]:
        for p in tiny.parameters():
            p.data += 0.03 * torch.randn_like(p)
        saved[Path(f"{clipsft.file(c, 'ckpt', 's7', m, *n)}.pt")] = copy.deepcopy(tiny)
        step, first = sum(n), dict(base=0, sft=16, clip=64)[m]
        rows.append(dict(seed=7, method=m, stage="sft" if n else "base", step=step,
                         id=0.95 - 0.01 * (step < first), ood_a={8: 0.5, 300: 0.9}.get(step, 0.1)))
    base, sft8, sft16, sft300, clip64 = (saved[Path(c.out_dir, "ckpt", f"s7-{m}.pt")] for m in (
        "base", "sft-8", "sft-16", "sft-300", "clip-64"))
    bins = [(10, 6.0), (0, nan), *[(5, 1.0)] * 7, (60, 0.6)]
    for module, name, result in (
            (claims, "layer_means", claims.layer_means), (claims, "spectrum", claims.spectrum),
            (ev, "gradient_norm_by_probability", lambda *args: bins),
            (ev, "evaluate", lambda *args: dict(ood=len(calls["evaluate"]))),
            (claims, "load_checkpoint", saved.get),
            (ev, "read_rows", lambda run: rows), (ev, "read_json", lambda path: dict(eval_n=16))):
        monkeypatch.setattr(module, name, lambda *args, name=name, result=result: (
            calls.setdefault(name, []).append(args), result(*args))[1])
    out = claims.measure(c.out_dir, 7)
    assert all(math.isfinite(v) for v in out.values()) and set(study()[1][0]) < set(out)
    (model, ids, _), = calls["gradient_norm_by_probability"]
    assert model is base and torch.equal(ids, data.demonstrations(256, 7)[0])
    assert [out[k] for k in ("gradient", "gradient_share", "low_share")] == near(
        [1, 60 / (60 + 35 + 36), 10 / 105])
    # drift: 125 held-out questions, answered right, where ID first reaches .95
    assert [m for m, *_ in calls["layer_means"]] == [base, sft16, clip64]
    words = [data.decode(row.tolist()).split() for row in calls["layer_means"][2][1]]
    problems = [data.Problem(w[0], tuple(map(int, w[1:4])), tuple(w[5:9])) for w in words]
    assert Counter(p.op for p in problems) == Counter("EMRDC" * 25)
    for p, w in zip(problems, words):
        assert data.verify(p, " ".join(w[10:w.index("<eos>")])).strict
        assert data.split_of(p.hand) == "eval"
    # spectra and restorations, from step 8 (best on half a but for the last) to 300
    assert [out[f"ood_{k}"] for k in ("late", "fifth", "straight")] == [1, 2, 3]
    assert all(b is base and n == 16 and torch.equal(m.lm_head.weight, sft300.lm_head.weight)
               for m, b, n in calls["evaluate"])
    late, fifth, straight = (claims.matrices(m) for m, *_ in calls["evaluate"])
    W0, W1, norm = *map(claims.matrices, (sft8, sft300)), torch.linalg.norm
    for n, *pairs in zip(W0, *(pairs for (pairs,) in calls["spectrum"])):
        (w0, w1), (_, random), (_, alike) = pairs
        assert torch.equal(W0[n], w0) and torch.equal(W1[n], w1) and torch.equal(w1, late[n])
        assert torch.allclose(fifth[n], ev.restore_directions(w0, w1, 7), atol=1e-5)    # of 32
        share = min(1, norm(fifth[n] - w1) / norm(w0 - w1))
        assert torch.allclose(straight[n], w1 + share * (w0 - w1), atol=1e-5)
        assert norm(random - w0).item() == near(norm(w1 - w0).item(), rel=1e-4)
        assert torch.allclose(*(torch.linalg.svdvals(w - w0) for w in (alike, w1)), atol=1e-3)
        assert min(norm(a - b) for a in (random, alike) for b in (w0, w1)) > 0.1
