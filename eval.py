"""eval.py - what is measured: accuracies, entropy, spectra, drift, differences between methods.

    python eval.py runs/main        reports a run folder once more
"""
import functools
import json
import math
import random
import statistics
import sys
from pathlib import Path

import torch

import data
from model import (BadInput, atomic, generator, kl_exact, response_logits, response_logprobs,
                   token_logprobs)

@torch.no_grad()
def respond(model, problems, n=1, temperature=0.0, noise=None):
    """Let the model answer each problem n times, all at once; temperature 0 is greedy.
    -> B = n * len(problems) texts without <eos>, ids (B, T), mask (B, T) True at sampled tokens."""
    prompts = torch.tensor([data.encode(p.prompt) for p in problems])
    ids, mask = model.generate(prompts.to(next(model.parameters()).device), data.MAX_NEW, data.EOS,
                               data.PAD, n, temperature, noise)
    said = mask & (ids != data.EOS)
    texts = ids[said].cpu().split(said.sum(1).tolist())
    return [data.decode(t.tolist()) for t in texts], ids, mask

@functools.cache
def eval_sets(n):
    """The fixed held-out problems, n of each: 'id' and 'ood', the same hands under the two rules;
    'explained', the same as ood, asked by E; 'prior', M, R, D and C under random rules."""
    rng = random.Random("eval")
    problems = [data.draw(rng, "eval", rules=data.ID_RULES) for _ in range(n)]
    ood = [p._replace(rule=data.OOD_RULE) for p in problems]
    return dict(id=problems, ood=ood, explained=[p._replace(op="E") for p in ood],
                prior=[data.draw(rng, "eval", "MRDC"[i % 4]) for i in range(n)])

@torch.no_grad()
def evaluate(model, base, n):
    """Everything that one metrics row says of a model, as a dict of floats; n as in eval_sets.
    Greedy accuracies in [0, 1]: strict (id, ood, explained, prior), of the last number in any
    format (id_any, ...), on halves of the OOD set that share no hand (ood_a, ood_b). In nats a
    token: entropy on own samples at temperature 1; on held-out demonstrations nll, kl_base =
    KL(base || pi) (the forward KL of 2509.04259), and log pi where the base gives p < .1
    (logp_low) or p > .9 (logp_high)."""
    dev, sets = next(model.parameters()).device, eval_sets(n)
    texts, ids, mask = respond(model, [p for s in sets.values() for p in s])
    row, texts = dict(truncated=1 - (ids == data.EOS).any(1).float().mean().item()), iter(texts)
    for name, problems in sets.items():
        verdicts = [data.verify(p, next(texts)) for p in problems]
        row[name] = mean(v.strict for v in verdicts)
        row[f"{name}_any"] = mean(v.any for v in verdicts)
        for half in (0, 1) if name == "ood" else ():
            row[f"ood_{'ab'[half]}"] = mean(v.strict for v, p in zip(verdicts, problems)
                                            if data.fingerprint(p.hand) % 2 == half)
    _, ids, mask = respond(model, sets["id"][:128], 1, 1.0, generator(dev, "entropy"))
    logp = response_logits(model, ids, mask).float().log_softmax(-1)         # (N, V)
    # H = - sum_v pi(v) log pi(v), exact, averaged over sampled tokens
    row["entropy"] = -(logp.exp() * logp).sum(-1).mean().item()
    ids, mask = (t.to(dev) for t in data.demonstrations(128, "held out", "eval"))
    y, (logits, base_logits) = ids[:, 1:][mask[:, 1:]], (
        response_logits(m, ids, mask) for m in (model, base))
    logp, p = token_logprobs(logits, y), token_logprobs(base_logits, y).exp()    # (N,)
    return row | dict(nll=-logp.mean().item(), kl_base=kl_exact(base_logits, logits).mean().item(),
                      logp_low=logp[p < 0.1].mean().item(), logp_high=logp[p > 0.9].mean().item())

def principal_angles(W0, W1, k):
    """Angles in radians, ascending, between the top-k singular subspaces of two matrices (m, n).
    -> left (k,), right (k,), on the CPU in float64."""
    U0, _, V0 = torch.linalg.svd(W0.cpu().double(), full_matrices=False)
    U1, _, V1 = torch.linalg.svd(W1.cpu().double(), full_matrices=False)
    # theta_i = arccos sigma_i(U0_k^T U1_k), the same with V              2509.12235, SVD analysis
    left = torch.linalg.svdvals(U0[:, :k].T @ U1[:, :k]).clamp(max=1).arccos()
    right = torch.linalg.svdvals(V0[:k] @ V1[:k].T).clamp(max=1).arccos()
    return left, right

def singular_value_shift(W0, W1):
    """Relative change of each singular value from W0 to W1, largest first: (min(m, n),) float64."""
    # (s_1 - s_0) / s_0                                                2509.12235, SVD analysis
    s0, s1 = torch.linalg.svdvals(W0.cpu().double()), torch.linalg.svdvals(W1.cpu().double())
    return (s1 - s0) / s0

def restore_directions(W0, W1, k=None):
    """W1 with its k leading singular vectors, both sides, replaced by those of W0 (k None: all) and
    its own singular values kept, (m, n). With W0 and W1 swapped it restores the values alone."""
    U0, _, V0 = torch.linalg.svd(W0.cpu().double(), full_matrices=False)
    U, s1, V = torch.linalg.svd(W1.cpu().double(), full_matrices=False)
    # W' = [U_0,k | U_1,rest] diag(S_1) [V_0,k | V_1,rest]^T                 2509.12235, restoration
    U[:, :k], V[:k] = U0[:, :k], V0[:k]
    return (U * s1 @ V).to(W1)

def representation_drift(layers0, layers1):
    """Lists, one entry a layer, of the same n texts' mean hidden states (n, C) in two models.
    -> (PCA centroid distance, mean shift). The first is paper 1's code: project on the first two
    principal components of layers0, average over texts, then layers, whose arbitrary signs may
    cancel. The second has no such fault: the mean over layers of || mean(h1) - mean(h0) ||."""
    points, shifts = [], []
    for h0, h1 in zip(layers0, layers1):
        _, _, V = torch.linalg.svd(h0 - h0.mean(0), full_matrices=False)
        shifts.append(h1.mean(0) - h0.mean(0))                               # (C,)
        points.append(shifts[-1] @ V[:2].T)                                  # (2,)
    return torch.stack(points).mean(0).norm().item(), mean(s.norm().item() for s in shifts)

def gradient_norm_by_probability(model, ids, mask, per_bin=20):
    """Paper 1's analysis: the L2 norm of the gradient of -log pi (all parameters) of single
    response tokens of ids, mask (B, T), by their probability in ten bins, [0, .1) first; with a
    clean gradient for each token (its code subtracts accumulated norms).
    -> list of ten (tokens in the bin, mean norm of up to per_bin of them; nan without any)."""
    p = response_logprobs(model, ids, mask)[mask[:, 1:]].exp().detach()
    where, bins, out = mask[:, 1:].nonzero(), (p * 10).long().clamp(max=9), []
    for b in range(10):
        mine = (bins == b).nonzero()[:, 0].cpu()
        drawn = mine[torch.randperm(len(mine), generator=generator("cpu", "bins", b))[:per_bin]]
        norms = []
        for row, t in where[drawn].tolist():
            z = model.lm_head(model.hidden(ids[row:row + 1, :t + 1])[0, -1])
            # of the logits z it is softmax(z) - e_y, of norm 1 - p to sqrt 2 (1 - p)
            grads = torch.autograd.grad(-token_logprobs(z, ids[row, t + 1]), model.parameters())
            norms.append(math.sqrt(sum(g.pow(2).sum().item() for g in grads)))
        out.append((len(mine), mean(norms)))
    return out

T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093]    # Student's t, two-sided 95 %, df 1, 2, ...

def mean(xs):
    """The mean of any iterable; nan of none."""
    return statistics.fmean(x) if (x := list(xs)) else math.nan

def interval(xs, t=T_95):
    """One value a seed -> (mean, half the width of Student's interval); infinite below two."""
    n = len(xs)
    if n < 2:
        return mean(xs), math.inf
    # beyond the table a little too wide
    return mean(xs), t[min(n - 2, len(t) - 1)] * statistics.stdev(xs) / math.sqrt(n)

def peak(curve):
    """The row of the OOD peak: picked on half a of the OOD set; its `ood` is that of half b."""
    best = max(curve, key=lambda r: r["ood_a"])
    return best | dict(ood=best["ood_b"])

def first_at(curve, level):
    """The first row of a run with ID accuracy of at least level, or None. Two methods are compared
    there (matched ID): at equal updates the one that learns more slowly would also forget less."""
    return next((r for r in curve if r["id"] >= level), None)

# ================================================================= below: what it takes to report
# Of a row, step counts SFT updates: 0 for the base; where stage is "rl" those before RL.
COLUMNS = dict(id="ID", ood="OOD", ood_any="OOD any", explained="explain", prior="M R D C",
               entropy="entropy", clip_frac="clipped")    # OOD any: in any format

def table(rows):
    """[(label, row), ...] -> text, a line each."""
    return "\n".join([" " * 32 + "".join(f"{c:>9}" for c in COLUMNS.values())] + [label.ljust(
        32) + "".join(f"{row.get(k, 0.0):9.3f}" for k in COLUMNS) for label, row in rows])

def name_of(row, what=""):
    step = f", step {row['step']:.0f}" * (row["method"] != "base")
    return row["method"] + what + step + ", then RL" * (row["stage"] == "rl")

def average(rows):
    """The mean of each number over a list of dicts, beside the words of the first."""
    return {k: v if isinstance(v, str) else mean(r[k] for r in rows) for k, v in rows[0].items()}

def curves_of(rows):
    """-> {method: {seed: rows of SFT in the order of their steps}}."""
    out = {}
    for r in rows:
        if r["stage"] == "sft":
            out.setdefault(r["method"], {}).setdefault(r["seed"], []).append(r)
    return out

def summary(rows):
    """-> [(label, mean row), ...]: base; peak, last step and starts of RL of each method; RL."""
    curves, groups = curves_of(rows), {}
    healed = {(r["method"], r["step"]) for r in rows if r["stage"] == "rl"}
    for r in rows:
        m, curve = r["method"], curves.get(r["method"], {}).get(r["seed"])
        if r["stage"] == "sft" and r is curve[0]:
            groups.setdefault((m, "peak"), []).append(peak(curve))
        if r["stage"] != "sft" or (m, r["step"]) in healed or r is curve[-1]:
            groups.setdefault((m, r["step"], r["stage"]), []).append(r)
    means = ((key, average(rs)) for key, rs in groups.items())
    return [(name_of(r, ", OOD peak" * ("peak" in key)), r) for key, r in means]

def compare(rows):
    """Text: differences to sft and to clip, paired by seed: same base, same data, same order."""
    keys, curves, lines = ("ood", "ood_any", "explained", "prior"), curves_of(rows), []
    for where, at in (("at the end", lambda curve: curve[-1]),
                      ("at ID .95", lambda curve: first_at(curve, 0.95))):
        for m, ref in [(m, ref) for ref in ("sft", "clip") if ref in curves for m in curves]:
            pairs = [(at(curves[m][s]), at(curves[ref][s])) for s in {*curves[m]} & {*curves[ref]}]
            pairs = [(a, b) for a, b in pairs if a and b]
            if pairs and m not in (ref, "sft"):
                ci = [interval([a[k] - b[k] for a, b in pairs]) for k in keys]
                lines.append(f"{m} - {ref}, {where}".ljust(43) + f"{len(pairs):4d}" + "".join(
                    f"{d:+8.3f} +-{half:5.3f}" for d, half in ci).replace("+-  inf", " " * 7))
    head = "paired differences, mean +- 95 %".ljust(43) + "   n" + "".join(
        f"{COLUMNS[k]:>15}" for k in keys)
    return "\n".join(["", head, *lines] if lines else [])

def draw(ax, points, color, **style):
    """A line through the means of points {x: [a value a seed]}, with its 95 % band."""
    means, halves = torch.tensor([interval(v) for v in points.values()]).T
    ax.plot(list(points), means, color=color, **style)
    if halves.isfinite().all():
        ax.fill_between(list(points), means - halves, means + halves, color=color, alpha=0.15, lw=0)

def by_step(rows, method, key, stage="sft"):
    """-> {step: [the value of key of each seed]}; of SFT with the base at 2, for a log scale."""
    out = {}
    for r in rows:
        if (r["method"], r["stage"]) == (method, stage) or r["stage"] == "base" and stage == "sft":
            out.setdefault(r["step"] or 2, []).append(r[key])
    return out

def summary_figure(fig, rows):
    """ID, OOD and prior abilities over SFT updates, of the first four methods; arrows: RL."""
    panels = (("id", "ID: J = Q = K = 10 or 14"), ("ood", "OOD: J, Q, K = 11, 12, 13"),
              ("prior", "prior abilities: M, R, D, C"))
    axes, names = fig.subplots(1, 3, sharey=True), ["base", *curves_of(rows)]
    colors = ("black", "#d1495b", "#2e86ab", "#66a182", "#edae49")
    for ax, (key, title) in zip(axes, panels):
        for m, color, shift in zip(names, colors, (1, 0.96, 1.04, 0.92, 1.08)):
            points = by_step(rows, m, key)
            if m != "base":
                draw(ax, points, color, label=m, marker=".")
            for s, ends in by_step(rows, m, key, "rl").items():
                ax.annotate("", (s * shift, mean(ends)), (s * shift, mean(points[s])),
                            arrowprops=dict(arrowstyle="-|>", color=color))
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(-0.03, 1.03))
        ax.set_xticks([2, 4, 8, 16, 32, 64, 128, 300], ["base", 4, 8, 16, 32, 64, 128, 300])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy, greedy decoding")
    axes[0].legend(loc="lower right", frameon=False, title="arrow: GRPO on ID prompts")

def read_json(path):
    """A JSON file of a run folder, or BadInput."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"error: cannot read {path} ({e}); delete it and run the same command again")

def read_rows(run):
    """The rows of a run folder's cells, in order; without bases that have no SFT."""
    rows = [r for p in sorted((Path(run) / "cells").glob("*.json")) for r in read_json(p)]
    used, first = {r["seed"] for r in rows if r["stage"] == "sft"}, ["base", "sft", "clip"]
    if not used:
        raise BadInput(f"error: {run} holds no fine-tuned checkpoint yet")
    order = first + sorted({r["method"] for r in rows}.difference(first))
    return sorted([r for r in rows if r["seed"] in used], key=lambda r: (
        r["seed"], order.index(r["method"]), r["step"], r["stage"] == "rl"))

def save_figure(path, draw_into, *args, size=(13, 4.4)):
    try:    # an optional extra may fail in any way
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except Exception as e:
        return print(f"no figures: matplotlib does not work here ({ascii(e)})")
    draw_into(fig := matplotlib.figure.Figure(size, layout="tight"), *args)
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=100, format="png")
    print(f"figure: {ascii(str(path))}")

def report(run):
    """Tables, metrics.jsonl and summary.png of a run folder, from its cells."""
    run, rows = Path(run), read_rows(run)
    with atomic(run / "metrics.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(f"\n{table(summary(rows))}\n{compare(rows)}")
    save_figure(run / "summary.png", summary_figure, rows)

if __name__ == "__main__":
    report(sys.argv[1] if sys.argv[1:] else "runs/main")
