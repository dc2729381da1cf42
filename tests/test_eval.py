import copy
import json
import math
import os
import statistics
import subprocess
import sys
import zlib

import pytest
import torch

import data
import eval as ev
from model import BadInput, generator

near = pytest.approx

def rotation(n, i, j, angle):
    R = torch.eye(n, dtype=torch.double)
    R[i, i] = R[j, j] = math.cos(angle)
    R[i, j], R[j, i] = -math.sin(angle), math.sin(angle)
    return R

torch.manual_seed(0)
U, V = (torch.linalg.qr(torch.randn(k, k, dtype=torch.double))[0] for k in (6, 5))
S = torch.tensor([8.0, 5, 3, 2, 1], dtype=torch.double)
W = U[:, :5] * S @ V.T

def matrix(U=U, s=S, V=V):    # of known singular values and vectors
    return U[:, :5] * s @ V.T

def test_principal_angles_of_planar_rotations():
    # the second left vector turned by 0.3 towards the sixth, which is outside the top 2
    left, right = ev.principal_angles(W, matrix(U @ rotation(6, 1, 5, 0.3)), 2)
    assert (left.tolist(), right.tolist()) == (near([0, 0.3], abs=1e-6), near([0, 0], abs=1e-6))
    left, right = ev.principal_angles(W, matrix(V=V @ rotation(5, 0, 4, 0.7)), 1)
    assert (left.item(), right.item()) == near((0, 0.7), abs=1e-6)
    # other values of the same order, turns within the subspace, a cosine above 1: no angle
    other = matrix(s=S * torch.tensor([1.5, 1.1, 1.2, 0.9, 0.3]))
    for same, k in ((other, 3), (matrix(U @ rotation(6, 0, 1, 0.5)), 2), (W, 5)):
        assert max(a.max() for a in ev.principal_angles(W, same, k)) < 1e-6

def test_singular_value_shift_of_a_scaled_spectrum():
    scaled = matrix(s=S * torch.tensor([1.1, 1, 1, 1, 0.5]))
    assert ev.singular_value_shift(W, scaled).tolist() == near([0.1, 0, 0, 0, -0.5], abs=1e-6)
    # a device may have no float64: to the CPU first, then to double
    device = type("Device", (), dict(cpu=lambda self: W.float()))()
    assert ev.singular_value_shift(device, device).dtype == torch.float64
    assert ev.principal_angles(device, device, 2)[0].dtype == torch.float64

def test_restore_directions():
    turned = V @ rotation(5, 2, 3, 0.2)
    late = matrix(U @ rotation(6, 1, 5, 0.3), 2 * S, turned)
    for W0, W1, k, expected in (
            (W, late, None, 2 * W), (late, W, None, late / 2),    # own values; swapped: old values
            (W, late, 1, late), (W, late, 2, matrix(s=2 * S, V=turned))):    # the second turned
        assert torch.allclose(ev.restore_directions(W0, W1, k), expected)
    assert ev.restore_directions(W, W.float()).dtype == torch.float32

def test_drift_by_hand():
    # four texts: PCA axes x, then y. Where layer 2 shifts against layer 1 the centroids cancel.
    h = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])
    x, z = torch.tensor([0.5, 0, 0]), torch.tensor([0, 0, 2.0])
    for before, after, pca, plain in (
            ([h, h], [h + x, h + x], 0.5, 0.5), ([h, h], [h + x, h - x], 0, 0.5),
            ([h], [h + z], 0, 2),    # PCA sees two directions only, those of the spread:
            ([h + 9], [h + 9 + torch.tensor([0.3, 0.4, 5])], 0.5, 25.25 ** 0.5),
            ([h + torch.tensor([1.0, 2, 9])], [h], 5 ** 0.5, 86 ** 0.5)):
        assert ev.representation_drift(before, after) == near((pca, plain), abs=1e-4)

def test_gradient_norms_of_each_token_by_its_probability(tiny):
    tiny.transformer.ln_f.weight.data.mul_(8)      # sure of itself: tokens in all ten bins
    ids, mask = tiny.generate(torch.arange(8)[:, None], 9, -1, data.PAD, 14, 1.0,
                               torch.Generator().manual_seed(0))
    mask = mask & (torch.arange(10) > 3)
    p = tiny(ids).softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, :, 0]
    bins = [[(i, t) for i, t in mask[:, 1:].nonzero().tolist() if b <= 10 * p[i, t] < b + 1]
            for b in range(10)]
    two, out = (ev.gradient_norm_by_probability(tiny, ids, mask, *n) for n in ((2,), ()))
    assert [n for n, _ in two] == [n for n, _ in out] == [*map(len, bins)]
    for b, found, k in ((0, two, 2), (4, two, 2), (9, two, 2), (9, out, 20)):
        order = torch.randperm(len(bins[b]), generator=generator("cpu", "bins", b))
        grads = [torch.autograd.grad(p[bins[b][n]].log(), [*tiny.parameters()], retain_graph=True)
                 for n in order[:k]]
        norms = [torch.cat([g.flatten() for g in grad]).norm().item() for grad in grads]
        assert len(norms) == k and found[b][1] == near(statistics.fmean(norms), rel=1e-3)
    assert math.isnan(ev.gradient_norm_by_probability(tiny, ids[:1, :6], mask[:1, :6])[9][1])

def coverage(x, df, n=20000):
    """Of Student's t within +-x, by the midpoint rule over u, t = sqrt(df) tan u."""
    end = math.atan(x / math.sqrt(df))
    cos = torch.cos((torch.arange(n).double() + 0.5) / n * end)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 2 * scale * end * (cos ** (df - 1)).mean().item()

def test_mean_and_interval_by_hand():
    assert ev.mean(x for x in (1, 2, 6)) == 3 and math.isnan(ev.mean([]))
    assert ev.interval([1.0]) == (1, math.inf) and math.isnan(ev.interval([])[0])
    assert ev.interval([0.0, 2.0], [5.0]) == near((1, 5))     # s / sqrt n = 1
    for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (20, 2.093), (30, 2.093)):
        xs = [math.sin(i) for i in range(n)]
        assert ev.interval(xs) == near((statistics.fmean(xs), t * statistics.stdev(xs) / n ** 0.5))
    for df, t in enumerate(ev.T_95, 1):      # right to the last digit
        assert coverage(t - 6e-4, df) < 0.95 < coverage(t + 6e-4, df)
    assert df == 19

def test_respond_gives_each_problem_n_texts_without_eos(tiny):
    problems = [data.Problem("S", (10, 10, 10), ("7", "K", "3", c)) for c in "234"]
    tiny.transformer.ln_f.weight.data.mul_(8)
    tiny.lm_head.weight.data[data.EOS] *= 2.5      # some answers end, at different places
    texts, ids, mask = ev.respond(tiny, problems, 16, 1.0, torch.Generator().manual_seed(0))
    for i, (text, row, m) in enumerate(zip(texts, ids, mask, strict=True)):
        assert row[:10].tolist() == data.encode(problems[i // 16].prompt) and not m[:10].any()
        assert text == data.decode([t for t in row[m].tolist() if t != data.EOS])
    assert len(texts) == 48 and len({m.sum().item() for m in mask}) > 3
    twice, once = ev.respond(tiny, problems, 2)[0], ev.respond(tiny, problems)[0]    # greedy
    assert twice[::2] == twice[1::2] == once

def test_eval_sets_are_fixed_and_ask_the_same_hands_under_two_rules():
    sets = ev.eval_sets(40)
    assert {p.rule for p in sets["id"]} == {(10, 10, 10), (14, 14, 14)}
    for a, b, c in zip(sets["id"], sets["ood"], sets["explained"]):
        assert a.hand == b.hand == c.hand and (a.op, b.op, c.op) == ("S", "S", "E")
        assert b.rule == c.rule == (11, 12, 13)
    assert "".join(p.op for p in sets["prior"]) == "MRDC" * 10 and len(sets["ood"]) == 40
    assert len({p.rule for p in sets["prior"]}) > 20
    assert all(data.split_of(p.hand) == "eval" for s in sets.values() for p in s)
    ev.eval_sets.cache_clear()
    assert ev.eval_sets(40) == sets and ev.eval_sets(16)["id"] == sets["id"][:16]

def scripted(p, i):    # the answer of a made-up model to problem i of its set; None: never ends
    right, terse = data.chain(p.values), data.terse(p.values)
    if p.rule in data.ID_RULES:       # all right, terse, the wrong total, cut off
        return [right, terse, right[:-1], None][i % 4]
    half = zlib.crc32(" ".join(sorted(p.hand)).encode()) % 2
    return dict(M=str(max(p.values)), E=terse, S=terse if half else right).get(p.op, "0")

def test_evaluate_by_plain_loops(tiny):
    """Accuracies of a model whose answers are scripted; the rest from its probabilities."""
    asked, sampled = [p for s in ev.eval_sets(160).values() for p in s], []
    said = [scripted(p, i % 160) for i, p in enumerate(asked)]

    def generate(prompts, max_new, eos, pad, n, temperature, noise):
        if temperature:
            sampled.append((prompts.tolist(), n, temperature))
            return tiny.generate(prompts, max_new, eos, pad, n, temperature, noise)
        ids, mask = data.batch([(p.prompt, t or "0 " * 27) for p, t in zip(asked, said)])
        ids[torch.tensor([t is None for t in said]), 37] = 0     # no EOS
        assert prompts.tolist() == ids[:, :10].tolist()
        return ids, mask
    model, base = copy.deepcopy(tiny), copy.deepcopy(tiny)
    model.generate = generate
    base.transformer.ln_f.weight.data.mul_(3)      # of '+' it is .1 to .99 sure
    base.transformer.ln_f.bias.data += 14 * base.lm_head.weight[data.encode("+")[0]]
    row = ev.evaluate(model, base, 160)
    for name, numbers in dict(id=(0.25, 0.5), explained=(0, 1), prior=(0.25, 0.25)).items():
        assert (row[name], row[f"{name}_any"]) == numbers
    assert (row["ood_a"], row["ood_b"], row["truncated"]) == (1, 0, near(40 / 640))
    assert 0.3 < row["ood"] < 0.7 and row["ood_any"] == 1 and len(row) == 16
    # entropy: own samples at temperature 1 for the first 128 ID problems
    assert sampled == [([data.encode(p.prompt) for p in asked[:128]], 1, 1.0)]
    ids, mask = tiny.generate(torch.tensor(sampled[0][0]), 28, data.EOS, data.PAD, 1, 1.0,
                              generator("cpu", "entropy"))
    p = tiny(ids).detach().double().softmax(-1)[:, :-1][mask[:, 1:]]
    assert row["entropy"] == near(statistics.fmean(-(q * q.log()).sum().item() for q in p))
    ids, mask = data.demonstrations(128, "held out", "eval")
    ps = zip(*(m(ids).detach().double().softmax(-1)[:, :-1][mask[:, 1:]] for m in (tiny, base)))
    logp, kl, low, high = [], [], [], []
    for y, (p, b) in zip(ids[:, 1:][mask[:, 1:]], ps):
        logp.append(math.log(p[y]))
        kl.append((b * (b / p).log()).sum().item())
        if not 0.1 <= b[y] <= 0.9:
            (low if b[y] < 0.1 else high).append(logp[-1])
    assert [-row["nll"], *(row[k] for k in ("kl_base", "logp_low", "logp_high"))] == near(
        [*map(statistics.fmean, (logp, kl, low, high))], rel=1e-4)

def row(**kw):
    return dict(seed=0, method="sft", stage="sft", step=1, id=0.5, ood=0.5, ood_a=0.5, ood_b=0.5,
                ood_any=0.5, explained=0.5, prior=1.0, entropy=0.1) | kw

def test_peak_and_first_row_at_a_level_by_hand():
    """The peak is picked on half a and reported on half b."""
    curve = [row(step=2, id=0.94, ood_a=0.8, ood_b=0.9, ood=0.85),
             row(step=4, id=0.95, ood_a=0.9, ood_b=0.6, ood=0.75), row(step=8, id=0.99, ood=0.9)]
    assert [ev.peak(curve)[k] for k in ("step", "ood", "ood_a")] == [4, 0.6, 0.9]
    assert [(ev.first_at(curve, v) or {}).get("step") for v in (0, 0.95, 0.96, 1)] == [
        2, 4, 8, None]

def made_up():
    rows = []    # two seeds: sft, clip, kl at steps 10 and 20; RL from the base and step 10 of sft
    for s, up in ((0, 0.0), (1, 0.2)):
        rows += [row(seed=s, method="base", stage="base", step=0),
                 row(seed=s, method="base", stage="rl", step=0, ood=0.05),
                 row(seed=s, stage="rl", step=10, ood=0.8 + up)]
        for m, more in (("sft", 0), ("clip", 0.1 + up), ("kl", 0.05)):
            r = row(seed=s, method=m, step=10, id=0.95, ood=0.6 + more, ood_a=0.6, ood_b=0.55)
            rows += [r | dict(prior=0.9 - more),
                     r | dict(step=20, id=0.99, ood=0.4 + 2 * more, ood_a=0.5)]
    return rows

def test_summary_table_and_points_by_hand():
    found = dict(ev.summary(made_up()))
    assert [(k, near(r["ood"])) for k, r in found.items()] == [*{
        "base": 0.5, "base, then RL": 0.05, "sft, step 10, then RL": 0.9,
        "sft, OOD peak, step 10": 0.55, "sft, step 10": 0.6, "sft, step 20": 0.4,
        "clip, OOD peak, step 10": 0.55, "clip, step 20": 0.8, "kl, OOD peak, step 10": 0.55,
        "kl, step 20": 0.5}.items()]
    head, line = ev.table([("mine", dict(id=0.25, ood=1, prior=0.125, clip_frac=2))]).split("\n")
    assert head.split() == "ID OOD OOD any explain M R D C entropy clipped".split()
    assert line.split() == "mine 0.250 1.000 0.000 0.000 0.125 0.000 2.000".split()
    points = [ev.by_step(made_up(), "sft", "ood", stage) for stage in ("sft", "rl")]
    assert points == [{2: [0.5, 0.5], 10: [0.6, 0.6], 20: [0.4, 0.4]}, {10: [0.8, 1.0]}]

def test_compare_by_hand():
    rows = [r for r in made_up() if (r["method"], r["seed"]) != ("kl", 1)]   # kl: one seed only
    for r in rows:      # clip reaches .95 at step 20 of seed 1
        r["id"] -= 0.02 * ((r["method"], r["seed"]) == ("clip", 1))
    rows.append(row(seed=2, method="clip", step=10, ood=99))                 # no sft to pair with
    head, *lines = ev.compare(rows).split("\n")[1:]
    assert head.split()[-8:] == "n OOD OOD any explain M R D C".split()[-8:]
    got = {line[:44].strip(): line[44:].replace("+-", "").split() for line in lines}
    end, level = "at the end", "at ID .95"
    # clip - sft: OOD .2 and .6 at the end; at the level .1, and 1.0 - .6; s / sqrt 2 .2 and .15
    for name, numbers in {f"clip - sft, {end}": "2 +0.400 2.541" + " +0.000 0.000" * 3,
                          f"clip - sft, {level}": "2 +0.250 1.906 +0.000 0.000 +0.000 0.000 +0.000 "
                          "1.271", f"kl - sft, {end}": "1 +0.100" + " +0.000" * 3}.items():
        assert got.pop(name) == numbers.split()
    assert [(*v[:2], v[-1]) for v in got.values()] == [
        ("1", "-0.100", "+0.000"), ("1", "+0.050", "-0.050"), ("1", "-0.050", "+0.050")]
    sft_alone = [r | dict(id=r["id"] * (r["method"] == "sft")) for r in rows]
    assert level not in ev.compare(sft_alone) and not ev.compare(rows[:2])

def folder(path, rows):    # a cell for each row, their names in reverse order
    (path / "cells").mkdir(parents=True)
    for i, r in enumerate(rows):
        (path / "cells" / f"{99 - i}.json").write_text(json.dumps([r]))
    return path

def test_rows_are_ordered_and_bases_without_sft_left_out(tmp_path):
    rows = [*made_up(), row(seed=5, method="base", stage="base", step=0)]
    got = ev.read_rows(folder(tmp_path, rows))
    assert [(r["seed"], r["method"], r["step"], r["stage"]) for r in got] == [
        (s, m, n, stage) for s in (0, 1) for m, n, stage in (
            ("base", 0, "base"), ("base", 0, "rl"), ("sft", 10, "sft"), ("sft", 10, "rl"),
            ("sft", 20, "sft"), *((m, n, "sft") for m in ("clip", "kl") for n in (10, 20)))]

def test_a_damaged_cell_is_named_and_nothing_to_report_is_said(tmp_path):
    folder(tmp_path, [row(method="base", stage="base", step=0)])
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="no fine-tuned"):
            ev.report(path)
    for content in (b"", b'[{"seed": 0, "st', b"\x00\x00", b"\xff\xfe"):
        (tmp_path / "cells" / "s0-sft.json").write_bytes(content)
        with pytest.raises(BadInput, match=r"s0-sft\.json.*delete it"):
            ev.report(tmp_path)

def test_report_from_a_notebooks_shell_and_a_narrow_console(tmp_path):
    """A backend of another environment, a folder that the console cannot show."""
    pytest.importorskip("matplotlib")
    run, env = folder(tmp_path / "läufe 実験", made_up()), dict(
        os.environ, PYTHONIOENCODING="cp1252", MPLBACKEND="module://no_such.backend")
    done = subprocess.run([sys.executable, ev.__file__, run], env=env, capture_output=True)
    assert done.returncode == 0 and b"paired differences" in done.stdout, done.stderr
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ev.read_rows(run)

@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "ValueError", "OSError"])
def test_a_broken_matplotlib_costs_only_the_figure(tmp_path, monkeypatch, capsys, error):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "matplotlib.py").write_text(f"raise {error}('numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    ev.report(folder(tmp_path / "run", made_up()))
    assert f"matplotlib does not work here ({error}('numpy'))" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["cells", "metrics.jsonl"]

def test_the_figure_draws_the_first_four_methods():
    figure = pytest.importorskip("matplotlib.figure")
    for names, drawn in (("sft sqrt", "sft sqrt"), ("sft clip a b", "sft clip a b"),
                         ("sft clip a b c", "sft clip a b"), ("own", "own")):
        rows = [dict(seed=0, method="base", stage="base", step=0, id=0.0, ood=0.0, prior=1.0)]
        rows += [dict(rows[0], method=m, stage="sft", step=n, id=n / 9, ood=0.5)
                 for m in names.split() for n in (4, 8)]
        ev.summary_figure(fig := figure.Figure(), rows)
        lines = fig.axes[0].get_lines()
        assert [x.get_label() for x in lines] == drawn.split()
        assert lines[0].get_ydata().tolist() == pytest.approx([0, 4 / 9, 8 / 9])
