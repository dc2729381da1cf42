import copy
import json
import math
import random
import sys

import pytest
import torch

import data
import eval as ev
from model import BadInput, generator


class Ctx:
    max_new, eval_n = 28, 16


def rotation(n, i, j, angle):
    R = torch.eye(n, dtype=torch.double)
    R[i, i] = R[j, j] = math.cos(angle)
    R[i, j], R[j, i] = -math.sin(angle), math.sin(angle)
    return R


def matrix_with_known_spectrum(m=6, n=5):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, k, dtype=torch.double))[0] for k in (m, n))
    s = torch.tensor([8.0, 5, 3, 2, 1], dtype=torch.double)
    return U, s, V, U[:, :5] * s @ V.T


# ---- spectra
def test_principal_angles_of_a_planar_rotation():
    U, s, V, W = matrix_with_known_spectrum()
    # turn the second left singular vector by 0.3 rad towards the sixth, which is outside the top 2
    turned = U @ rotation(6, 1, 5, 0.3)
    left, right = ev.principal_angles(W, turned[:, :5] * s @ V.T, 2)
    assert left.tolist() == pytest.approx([0, 0.3], abs=1e-6)
    assert right.tolist() == pytest.approx([0, 0], abs=1e-6)
    turned = V @ rotation(5, 0, 4, 0.7)
    left, right = ev.principal_angles(W, U[:, :5] * s @ turned.T, 1)
    assert (left.item(), right.item()) == pytest.approx((0, 0.7), abs=1e-6)


def test_principal_angles_ignore_singular_values_and_turns_within_the_subspace():
    U, s, V, W = matrix_with_known_spectrum()
    other = U[:, :5] * (s * torch.tensor([1.5, 1.1, 1.2, 0.9, 0.3])) @ V.T
    assert max(a.max() for a in ev.principal_angles(W, other, 3)) < 1e-6
    inside = (U @ rotation(6, 0, 1, 0.5))[:, :5] * s @ V.T
    assert ev.principal_angles(W, inside, 2)[0].max() < 1e-6


def test_no_angle_between_a_matrix_and_itself():
    """A cosine may exceed 1 by rounding: not NaN, 0."""
    for seed in range(20):
        W = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
        assert all((a >= 0).all() and a.max() < 1e-6 for a in ev.principal_angles(W, W, 4))


def test_singular_value_shift_of_a_scaled_spectrum():
    U, s, V, W = matrix_with_known_spectrum()
    scaled = U[:, :5] * (s * torch.tensor([1.1, 1, 1, 1, 0.5], dtype=torch.double)) @ V.T
    shift = ev.singular_value_shift(W, scaled).tolist()
    assert shift == pytest.approx([0.1, 0, 0, 0, -0.5], abs=1e-9)


def test_restore_directions():
    U, s, V, W = matrix_with_known_spectrum()
    turned = (U @ rotation(6, 1, 5, 0.3))[:, :5] * (2 * s) @ V.T
    back = ev.restore_directions(W, turned)
    assert torch.allclose(back, 2 * W)                    # its own values, the old vectors
    assert torch.allclose(ev.restore_directions(turned, W), turned / 2)    # swapped: values alone
    first = ev.restore_directions(W, turned, 1)           # the first vector never turned
    assert torch.allclose(first, turned)
    assert not torch.allclose(first, back)
    assert ev.restore_directions(W, W.float()).dtype == torch.float32


# ---- drift
def test_drift_by_hand():
    # two texts along x; PCA axes x then y. Layer 2 shifts against layer 1: the centroids cancel.
    h = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])
    shift = torch.tensor([0.5, 0, 0])
    far, plain = ev.representation_drift([h, h], [h + shift, h + shift])
    assert (far, plain) == pytest.approx((0.5, 0.5))
    far, plain = ev.representation_drift([h, h], [h + shift, h - shift])
    assert (far, plain) == pytest.approx((0, 0.5))
    # PCA sees two directions only, the plain shift all
    far, plain = ev.representation_drift([h], [h + torch.tensor([0, 0, 2.0])])
    assert (far, plain) == pytest.approx((0, 2))
    # away from the origin: the axes are those of the spread, not of the mean
    far, plain = ev.representation_drift([h + 9], [h + 9 + torch.tensor([0.3, 0.4, 5])])
    assert (far, plain) == pytest.approx((0.5, 25.25 ** 0.5), abs=1e-4)
    far, plain = ev.representation_drift([h + torch.tensor([1.0, 2, 9])], [h])
    assert (far, plain) == pytest.approx((5 ** 0.5, 86 ** 0.5), abs=1e-4)


def test_layer_means_are_the_models_own_hidden_states(tiny):
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])
    layers = ev.layer_means(tiny, ids, mask)
    assert len(layers) == 3 and layers[0].shape == (2, 32)
    h = tiny.transformer.wte(ids[1, :3]) + tiny.transformer.wpe.weight[:3]
    assert torch.allclose(layers[0][1], h[1:3].mean(0), atol=1e-6)    # response: '9' and EOS
    x = tiny.transformer.h[1](tiny.transformer.h[0](h[None]))[0]
    assert torch.allclose(layers[2][1], x[1:3].mean(0), atol=1e-5)


# ---- gradient norms
def test_gradient_norms_by_probability(tiny):
    ids, mask = data.batch([("S 10 >", "7 # 17"), ("M >", "9")])
    with torch.no_grad():      # push one token's probability up, so that two bins are filled
        tiny.lm_head.weight[9] += 1.2 * tiny.hidden(ids)[1, 1] / tiny.hidden(ids)[1, 1].norm()
    out = ev.gradient_norm_by_probability(tiny, ids, mask)
    assert sum(b["tokens"] for b in out) == 6 and len(out) == 10
    logits = tiny(ids)
    p = logits.softmax(-1)
    by_bin = {}
    for i, t in (mask[:, 1:]).nonzero().tolist():
        grad = torch.autograd.grad(-logits[i, t].log_softmax(-1)[ids[i, t + 1]],
                                   list(tiny.parameters()), retain_graph=True)
        full = torch.cat([g.flatten() for g in grad]).norm().item()
        e = torch.zeros(124)
        e[ids[i, t + 1]] = 1
        prob = p[i, t, ids[i, t + 1]].item()
        by_bin.setdefault(int(prob * 10), []).append((full, (p[i, t] - e).norm().item(), prob))
    assert len(by_bin) >= 2
    for b, items in by_bin.items():
        n = len(items)
        assert out[b]["tokens"] == n
        assert out[b]["full"] == pytest.approx(sum(x[0] for x in items) / n, rel=1e-3)
        assert out[b]["logit"] == pytest.approx(sum(x[1] for x in items) / n, rel=1e-3)
        low, high = out[b]["bound"]
        assert low == pytest.approx(1 - sum(x[2] for x in items) / n, abs=1e-4)
        assert low - 1e-6 <= out[b]["logit"] <= high + 1e-6 and high == low * 2 ** 0.5
    assert all(q.grad is None for q in tiny.parameters())
    empty = next(b for b in range(10) if b not in by_bin)
    assert out[empty] == dict(tokens=0, full=None, logit=None, bound=None)


def test_gradient_norms_are_of_a_few_tokens_drawn_from_each_bin(tiny):
    tiny.transformer.ln_f.weight.data.mul_(8)      # surer of itself: tokens in every bin
    ids, mask = tiny.generate(torch.arange(8)[:, None], torch.ones(8).long(), 9, -1, data.PAD, 16,
                              1.0, torch.Generator().manual_seed(0))
    p = tiny(ids).softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, :, 0]
    count = [((p >= b / 10) & (p < (b + 1) / 10) & mask[:, 1:]).sum().item() for b in range(10)]
    out = ev.gradient_norm_by_probability(tiny, ids, mask, 2)
    assert [b["tokens"] for b in out] == count and min(count) > 2
    twenty = ev.gradient_norm_by_probability(tiny, ids, mask, 20)
    assert max(count) > 20 and ev.gradient_norm_by_probability(tiny, ids, mask) == twenty != out
    where = mask[:, 1:].nonzero()
    for b in (0, 4, 9):
        mine = ((p[mask[:, 1:]] * 10).long() == b).nonzero()[:, 0]
        drawn = mine[torch.randperm(count[b], generator=generator("cpu", "bins", b))[:2]]
        norms = []
        for i, t in where[drawn].tolist():
            grad = torch.autograd.grad(p[i, t].log(), list(tiny.parameters()), retain_graph=True)
            norms.append(torch.cat([g.flatten() for g in grad]).norm().item())
        assert out[b]["full"] == pytest.approx(sum(norms) / 2, rel=1e-3)


# ---- statistics
def test_paired_ci_by_hand():
    # mean 2, s = 1, t(2) = 4.303: half-width 4.303 / sqrt 3 = 2.4843
    assert ev.paired_ci([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert ev.paired_ci([0.5] * 10) == (0.5, 0.5, 0.5)
    assert ev.paired_ci([1.0]) == (1, -math.inf, math.inf)
    assert ev.paired_ci([0.0, 2.0]) == pytest.approx((1, 1 - 12.706, 1 + 12.706))
    for n in (20, 26):      # s = 1 / sqrt(n - 1) * sqrt(n) of n halves of -1 and 1; t(19) = 2.093
        half = 2.093 / math.sqrt(n - 1)
        assert ev.paired_ci([-1.0, 1.0] * (n // 2)) == pytest.approx((0, -half, half))
    ten = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]        # s = sqrt(10 / 36), t(9) = 2.262
    assert ev.paired_ci(ten)[2] == pytest.approx(0.5 + 2.262 * math.sqrt(10 / 36 / 10), abs=1e-4)


def test_paired_ci_covers_at_its_rate():
    rng = random.Random(0)
    hits = sum(low <= 0 <= high for _, low, high in
               (ev.paired_ci([rng.gauss(0, 1) for _ in range(5)]) for _ in range(4000)))
    assert abs(hits / 4000 - 0.95) < 0.012


# ---- evaluation
def test_eval_sets_pair_the_same_hands_under_two_rules():
    sets = ev.eval_sets(40)
    assert [p.hand for p in sets["id"]] == [p.hand for p in sets["ood"]]
    assert {p.rule for p in sets["id"]} == {(10, 10, 10)} and {p.rule for p in sets["ood"]} == {
        (11, 12, 13)}
    assert len(sets["random"]) == len(sets["prior"]) == 10
    assert [p.op for p in sets["prior"][:4]] == ["M", "R", "D", "C"]
    assert all(set(p.hand) & set("JQK") for s in sets.values() for p in s)


def test_evaluate_counts_what_the_verifier_says(tiny, monkeypatch):
    """A model that answers half of each set as a lookup table would: accuracies known by hand."""
    def fake(model, problems, max_new, n=1, temperature=0.0, noise=None):
        if temperature:
            return real(model, problems, max_new, n, temperature, noise)
        texts = []
        for i, p in enumerate(problems):
            if p.op != "S":
                texts.append(data.truth(p) if p.op == "M" else "0")          # a quarter is right
            elif p.rule == data.ID_RULE:
                texts.append(data.chain(p.values) if i % 2 else data.terse(p.values))
            elif p.rule == data.OOD_RULE:                                    # the wrong rule
                texts.append(data.chain(data.Problem("S", data.ID_RULE, p.hand).values))
            else:
                texts.append("7")
        ids, mask = data.batch([(p.prompt, t) for p, t in zip(problems, texts)])
        return texts, ids, mask
    real = ev.respond
    monkeypatch.setattr(ev, "respond", fake)
    row = ev.evaluate(tiny, Ctx, tiny)
    assert (row["id"], row["answer_id"], row["format_id"]) == (0.5, 1.0, 0.5)
    assert (row["ood"], row["answer_ood"], row["format_ood"]) == (0.0, 0.0, 1.0)
    assert (row["random"], row["prior"], row["truncated"]) == (0.0, 0.25, 0.0)
    assert row["kl_base"] == pytest.approx(0, abs=1e-6)


def test_likelihood_metrics_against_a_uniform_model(tiny):
    uniform = copy.deepcopy(tiny)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    row = ev.evaluate(uniform, Ctx, tiny)
    assert row["entropy"] == pytest.approx(math.log(124), abs=1e-3)
    assert row["nll"] == pytest.approx(math.log(124), abs=1e-3)
    ids, mask = data.demonstrations(128, "held out", "eval")
    total, n = 0.0, 0
    with torch.no_grad():
        p = tiny(ids).double().softmax(-1)
        for i, t in mask[:, 1:].nonzero().tolist():
            total, n = total + (p[i, t] * (p[i, t] * 124).log()).sum().item(), n + 1
    # KL(base || uniform) = sum p log(124 p): the base comes first. The reverse is 3 % larger here.
    assert row["kl_base"] == pytest.approx(total / n, rel=0.005)
    assert ev.evaluate(tiny, Ctx, uniform)["kl_base"] != pytest.approx(row["kl_base"], rel=0.005)


def test_respond_reads_ragged_prompts_and_drops_eos(tiny):
    problems = [data.Problem("S", (10, 10, 10), ("7", "K", "3", "J"))] * 2
    texts, ids, mask = ev.respond(tiny, problems, 8, 3, 1.0, torch.Generator().manual_seed(0))
    assert len(texts) == 6 and ids.shape == (6, 18) and not mask[:, :10].any()
    for text, row, m in zip(texts, ids, mask):
        said = row[m].tolist()
        assert data.encode(text) == [t for t in said if t < len(data.WORDS)] or data.PAD in said


# ---- reports
def row(**kw):
    return dict(dict(seed=0, method="sft", stage="sft", init_step=0, step=1, id=0.5, ood=0.5,
                     ood_a=0.5, ood_b=0.5, answer_ood=0.5, answer_ood_b=0.5, random=0.5, prior=1.0,
                     entropy=0.1, clip_frac=0.0), **kw)


def test_the_peak_is_picked_on_one_half_and_reported_on_the_other():
    rows = [row(step=2, ood_a=0.9, ood_b=0.6, ood=0.75, answer_ood_b=0.7),
            row(step=4, ood_a=0.8, ood_b=0.9, ood=0.85)]
    best = ev.peak(rows)
    assert best["step"] == 2 and best["ood"] == 0.6 and best["answer_ood"] == 0.7


def test_summary_averages_over_seeds():
    rows = [row(stage="base", method="base", step=0, id=0.1),
            row(stage="base", method="base", seed=1, step=0, id=0.3),
            row(step=10, ood=0.4), row(step=10, ood=0.6, seed=1),
            row(stage="rl", init_step=10, step=80, ood=0.9),
            row(stage="rl", init_step=10, step=80, ood=0.7, seed=1)]
    lines = dict(ev.summary(rows))
    assert lines["base"]["id"] == pytest.approx(0.2)
    assert lines["sft, step 10"]["ood"] == pytest.approx(0.5)
    assert lines["sft, step 10, then RL"]["ood"] == pytest.approx(0.8)


def test_without_matplotlib_there_is_a_hint_and_no_figure(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ev.plotting() is None and "pip install matplotlib" in capsys.readouterr().out


def test_a_torn_last_line_is_left_out(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row())[:30])
    assert len(ev.read_rows(tmp_path)) == 1
    assert "unreadable" in capsys.readouterr().err


def test_reports_of_nothing_are_refused(tmp_path):
    with pytest.raises(BadInput, match="config.json"):
        ev.read_config(tmp_path)
    for text in ("{}", "[]", "{torn", '{"seed": 0}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match="config.json"):
            ev.main([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"seed": 0, "methods": [], "rl_from": []}')
    for args in ([], ["--show", "1"], ["--show", "-1"]):      # no metrics, no checkpoints, no sense
        with pytest.raises(BadInput, match="metrics.jsonl|checkpoints|--show"):
            ev.main([str(tmp_path), *args])
    assert len(list(tmp_path.iterdir())) == 1


# ---- claims
def study(n=3):
    """A made-up study of n seeds, in which every effect is known."""
    rows, measured = [], {}
    for s in range(n):
        j = 0.01 * s       # seeds differ, pairs do not
        for m, lift in (("sft", 0.0), ("clip", 0.1), ("dft", 0.1 + 0.2 * (s - 1))):
            for step, i, o, right, drift in (
                    (4, 0.5, 0.4, 0.9, 0.1), (8, 0.85, 0.8, 0.8, 0.2), (60, 0.9, 0.7, 0.75, 0.3),
                    (100, 0.95, 0.5, 0.7, 0.4), (200, 0.8, 0.3, 0.6, 0.5)):
                if m == "clip":
                    drift = {4: 0.05, 200: 0.6}.get(step, drift)
                o = o + lift * (step > 4) + j
                rows.append(row(seed=s, method=m, step=step, id=i, ood=o, ood_a=o, ood_b=o,
                                answer_ood=right, answer_ood_b=0.9, kl_base=drift,
                                prior=1 - step / 400 + lift,
                                logp_bins=[-3.0 - lift] + [-1.0] * 9))
            for start in (4, 8, 60, 100, 200) if m != "dft" else ():
                rows.append(row(seed=s, method=m, stage="rl", init_step=start, step=20, id=1.0,
                                answer_ood=0.8, ood=0.6 + lift + j, ood_a=0.6 + lift + j,
                                ood_b=0.6 + lift + j))
        rows.append(row(seed=s, method="base", stage="rl", init_step=0, step=20, id=0.9,
                        ood=0.9 + j, ood_a=0.9 + j, ood_b=0.9 + j))
        rows.append(row(seed=s, method="base", stage="base", step=0, answer_ood=0.95))
        g = [dict(tokens=10, full=10.0, logit=1.0), dict(tokens=90, full=1.0, logit=0.1)]
        measured[s] = dict(gradients=g, spectrum=[0.02, 3.0], spectrum_null=[0.08, 4.0],
                           spectrum_same=[0.08, 3.0 + j], angles=[1.0, 0.0, 2.0, 3.0, 4.0],
                           restore={k: dict(ood=v, id=v / 2) for k, v in dict(
                               late=0.3, fifth=0.5, values=0.3, straight=0.6, all=0.7).items()},
                           drift=dict(sft=[[1, 1]] * 5, clip=[[0.5, 2]] * 5),
                           drift_task=dict(sft=[[1, 1]] * 5, clip=[[1, 1]] * 5),
                           interpolation=[dict(id=0.99, ood=0.9)])
    return {c["id"]: c for c in ev.claims(rows, measured, [4, 8, 60, 100, 200])}


def test_claims_on_a_study_whose_effects_are_known():
    c = study()

    def effect(id):
        return c[id]["effect"], c[id]["verdict"]
    near = pytest.approx
    assert effect("C1a") == (near(1.0), "holds")                      # log10(10 / 1)
    assert effect("C1b") == (near(100 / 190 - 0.5), "holds")
    # the frontier: .1 higher wherever step > 4 matters: on all of [0, .95]
    assert effect("C3d") == (near(0.095), "holds") and effect("C3a") == (near(0.1), "holds")
    assert effect("C3b") == (near(0.0), "no difference")              # both lose .5
    assert c["C3b"]["control_effect"] == near(0)
    assert effect("C3c ID 0.95") == (near(0.1), "holds") and effect("C4a") == (near(0.1), "holds")
    assert effect("C5") == (near(0.1), "holds") and c["C5"]["control_effect"] == near(0)
    assert effect("C6") == (near(0), "holds")                         # equal: within the margin
    assert effect("C8a") == (near(0.5), "holds") and c["C8a"]["control_effect"] == near(0)
    assert effect("C8b") == (near(0.1), "holds")                      # .85 at the peak, .95 at 100
    assert c["C8b"]["control_effect"] == near(0.3)                    # OOD .8 to .5 meanwhile
    assert effect("C8c") == (near(-0.05), "opposite")                 # .80 at the end
    assert effect("C8e") == (near(-0.05), "opposite")                 # best .9 of the base's .95
    assert c["C8e"]["control_effect"] == near(-0.15)                  # .8 at the strict peak
    assert effect("C9 any") == (near((0.1 + 0.2) / 2), "holds")       # .8 after .7, after .6
    assert c["C9 any"]["control_effect"] == near((-0.1 + 0) / 2)
    assert effect("C9 200") == (near(0.3), "holds")                   # .6 after .3
    assert c["C9 200"]["control_effect"] == near(0.3 / 0.5)           # of .5 lost since the peak
    assert effect("C10") == (near(0.2), "holds")                      # .8 against .6
    assert effect("C11a") == (near(0.0), "no difference")             # all end at .6
    assert c["C11a"]["control_effect"] == near((-0.1 + 0.1) / 2 - (0.2 - 0.2) / 2)
    assert c["C11b"]["control_effect"] == near(0 - 0.3)
    # starts 60, 100, 200: gained -.1 .1 .3, ranks 1 2 3; ID .9 .95 .8, ranks 2 3 1: rho -1/2
    assert effect("C11c") == (near(0.5), "holds") and c["C11c"]["control_effect"] == 0
    assert effect("C12a") == (near(0.1), "holds") and effect("C12c ID 0.9") == (near(0.1), "holds")
    # clip's .7 against .75, half-way from the base's .9 to .6, then three times .6; the last start
    # has drifted further than any of SFT's
    assert effect("C12d") == (near((-0.05 + 3 * 0.1) / 4), "holds")
    assert c["C12d"]["control_effect"] == near((1 - 0.95) / 4)
    assert effect("C13a") == (near(0.06), "holds")
    assert effect("C13b") == (near(-0.01), "undecided")
    assert effect("C13c") == (near(1.0), "holds") and c["C13c"]["control_effect"] == near(1.0)
    assert effect("C13d") == (near(0.2), "holds") and effect("C13e") == (near(-0.1), "opposite")
    assert c["C13d"]["control_effect"] == near(0.1)                   # ID: .25 after .15
    assert c["C13e"]["control_effect"] == near(0.4)
    assert effect("C13f") == (near(0.4), "holds") and c["C13f"]["control_effect"] == near(0)
    assert effect("C11d") == (near(-0.3), "opposite") and c["C11d"]["control_effect"] == near(0.1)
    assert effect("C9 clip 100") == (near(0.1), "holds")              # .7 after .6
    assert effect("C14a") == (near(-1), "opposite") and effect("C14b") == (near(0.5), "holds")
    assert c["C14a"]["control_effect"] == 0
    assert effect("B dft")[1] == "undecided"                          # its lift is .1 on average
    assert effect("B mix")[1] == "opposite"
    assert not {"C2a", "C3e", "C3f", "C7", "C8d"} & set(c)            # no such runs in this folder
    assert all(x["n"] == 3 for x in c.values())


def test_claims_need_neither_rl_nor_measurements():
    rows = [row(seed=s, method=m, step=4, id=0.5, ood=o + 0.01 * s, ood_a=o, ood_b=o)
            for s in range(3) for m, o in (("sft", 0.2), ("clip", 0.3))]
    rows.append(row(seed=3, method="sft", step=2))     # a run that is not finished
    found = {c["id"]: c for c in ev.claims(rows, {}, [100, 300])}
    assert found["C3a"]["effect"] == pytest.approx(0.1) and found["C3a"]["n"] == 3
    assert "C9 100" not in found and "C13a" not in found


@pytest.mark.parametrize("values, said, sure", [
    ([0.1, 0.1, 0.1], "holds", True), ([-0.1, -0.1, -0.1], "opposite", True),
    ([0.0, 0.001, -0.001], "no difference", True), ([0.0, 0.002, -0.002], "no difference", False),
    ([0.1, 0.1], "undecided", False),
    ([0.0, 0.1, -0.1], "undecided", False),
    # mean .1, s.d. .1, n 9: +- .0769 at 95 % (t 2.306), +- .168 at 99.9 % (t 5.041)
    ([0.1] + [0.2] * 4 + [0.0] * 4, "holds", False)])
def test_verdicts_by_hand(values, said, sure):
    assert ev.verdict(values)[3:] == (said, sure)


def test_no_worse_means_above_minus_the_margin():
    assert ev.verdict([-0.01, -0.011, -0.012], not_worse=True)[3] == "holds"
    assert ev.verdict([-0.03, -0.031, -0.032], not_worse=True)[3] == "opposite"
    assert ev.verdict([-0.01, -0.012, 0.001], not_worse=True)[3] == "undecided"
    with pytest.raises(LookupError, match="mean of nothing"):
        ev.verdict([])


def test_frontier_area_by_hand():
    # best OOD with id >= x: .8 up to .5, .6 up to .9, nothing beyond
    assert ev.frontier_area([(0.5, 0.8), (0.9, 0.6), (0.4, 0.1)]) == pytest.approx(0.4 + 0.24)
    assert ev.frontier_area([(1.0, 1.0)]) == 1.0


def test_spearman_by_hand():
    assert ev.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert ev.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert ev.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    # ties share a rank: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert ev.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5 ** 0.5)


@pytest.mark.parametrize("text,marked", [
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", None),
    ("13 + 11 = 24 , 24 + 7 = 32 , 32 + 3 = 35 # 35",
     "13 + 11 = 24 , [24 + 7 = 32] , 32 + 3 = 35 # 35"),
    ("13 + 13 = 26 , 26 + 3 = 29 , 29 + 5 = 34 # 34",
     "[13 + 13 = 26] , 26 + 3 = 29 , 29 + 5 = 34 # 34"),
    ("so 13 + 11 = 24 , 20 + 7 = 27 # 27", "so 13 + 11 = 24 , [20 + 7 = 27] # 27"),
    ("13 + 11 = 24 , 24 + 7 = 31 # 31", "13 + 11 = 24 , 24 + 7 = 31 # [31]"),
    ("7 20 23 35", "[7 20 23 35]"), ("7 20 23 34", None)])
def test_the_first_wrong_step_is_marked(text, marked):
    p = data.Problem("S", (11, 12, 13), ("7", "K", "3", "J"))
    assert ev.mark(p, text) == (marked or text)
