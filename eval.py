"""eval.py - what is measured: accuracies, entropy, spectra, drift, differences between methods.

    python eval.py runs/main              report a run folder once more
    python eval.py runs/main --show 4     read what its checkpoints answer

Above the ruled line: the measurements; below: tables and figure.
"""
import argparse
import functools
import json
import math
import random
from pathlib import Path

import torch

import data
from model import (BadInput, atomic, generator, kl_exact, load_checkpoint, response_logits,
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
    """The fixed held-out problems: n each for 'id' and 'ood', the same hands under the two rules,
    and n/4 each for 'random' (rules) and 'prior' (n/16 of each ability)."""
    rng = random.Random("eval")
    sets = {"id": [data.draw(rng, "eval", rule=data.ID_RULE) for _ in range(n)]}
    sets["ood"] = [p._replace(rule=data.OOD_RULE) for p in sets["id"]]
    sets["random"] = [data.draw(rng, "eval") for _ in range(n // 4)]
    sets["prior"] = [data.draw(rng, "eval", data.PRIOR_OPS[i % 4]) for i in range(n // 4)]
    return sets

@torch.no_grad()
def evaluate(model, base, n):
    """Everything that one metrics row says of a model, as a dict of floats; n as in eval_sets.

    Greedy accuracies in [0, 1]: strict (id, ood, random, prior), of the last number in any format
    (id_any, ...), of the format alone (id_format, ...), on two halves of the OOD set that share no
    hand (ood_a, ood_b). In nats a token: entropy on the model's own samples at temperature 1; on
    held-out demonstrations nll, kl_base = KL(base || pi) (the forward KL of 2509.04259), and log pi
    where the base gives p < .1 (logp_low) or p > .9 (logp_high)."""
    dev, sets = next(model.parameters()).device, eval_sets(n)
    texts, ids, mask = respond(model, [p for s in sets.values() for p in s])
    row = dict(truncated=1 - ((ids == data.EOS) & mask).any(1).float().mean().item())
    texts = iter(texts)
    for name, problems in sets.items():
        verdicts = [data.verify(p, next(texts)) for p in problems]
        row[name] = mean(v.strict for v in verdicts)
        row[f"{name}_any"] = mean(v.any for v in verdicts)
        row[f"{name}_format"] = mean(v.format for v in verdicts)
        if name == "ood":
            for half in (0, 1):
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
    principal components of layers0, average over texts, then over layers, where arbitrary signs may
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
    p = token_logprobs(response_logits(model, ids, mask), ids[:, 1:][mask[:, 1:]]).exp().detach()
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
    xs = list(xs)
    return sum(xs) / len(xs) if xs else math.nan

def interval(xs, t=T_95):
    """One value a seed -> (mean, half the width of Student's interval); infinite below two."""
    n, m = len(xs), mean(xs)
    if n < 2:
        return m, math.inf
    s = math.sqrt(sum((x - m) ** 2 for x in xs) / (n - 1))
    return m, t[min(n - 2, len(t) - 1)] * s / math.sqrt(n)    # beyond the table a little too wide

def peak(curve):
    """The row of the OOD peak: picked on one half of the OOD set; its `ood` is then the other
    half's, for the best of many on the half that picked it would flatter."""
    best = max(curve, key=lambda r: r["ood_a"])
    return best | dict(ood=best["ood_b"])

def first_at(curve, level):
    """The first row of a run with ID accuracy of at least level, or None. Two methods are compared
    there (matched ID): at equal updates the one that learns more slowly would also forget less."""
    return next((r for r in curve if r["id"] >= level), None)

# ================================================================= below: what it takes to report
# Of a row, step counts SFT updates: 0 for the base; where stage is "rl" those before RL.
COLUMNS = dict(id="ID", ood="OOD", ood_any="OOD any", random="random", prior="prior",
               entropy="entropy", clip_frac="clipped")    # OOD any: in any format

def table(rows):
    """[(label, row), ...] -> text, a line each."""
    lines = [label.ljust(32) + "".join(f"{row.get(k, 0.0):9.3f}" for k in COLUMNS)
             for label, row in rows]
    return "\n".join([" " * 32 + "".join(f"{c:>9}" for c in COLUMNS.values()), *lines])

def name_of(row, what=""):
    """What a row is of, in words."""
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
    """-> [(label, row averaged over seeds), ...]: base, and of each method its peak, the steps that
    RL starts from or the last, and what RL made of them."""
    curves, groups = curves_of(rows), {}
    healed = {(r["method"], r["step"]) for r in rows if r["stage"] == "rl"}
    for r in rows:
        m, curve = r["method"], curves.get(r["method"], {}).get(r["seed"])
        if r["stage"] == "sft" and r is curve[0]:
            groups.setdefault((m, "peak"), []).append(peak(curve))
        if r["stage"] != "sft" or (m, r["step"]) in healed or r is curve[-1]:
            groups.setdefault((m, r["step"], r["stage"]), []).append(r)
    means = {key: average(rs) for key, rs in groups.items()}
    return [(name_of(r, ", OOD peak" * ("peak" in key)), r) for key, r in means.items()]

def compare(rows):
    """Text: differences of each method to sft and to clip, paired by seed (same base, same data in
    the same order), at the end and where ID first reaches .95 (n: seeds in which both did)."""
    keys, curves, lines = ("id", "ood", "ood_any", "prior"), curves_of(rows), []
    for where, at in (("at the end", lambda curve: curve[-1]),
                      ("where ID first reaches .95", lambda curve: first_at(curve, 0.95))):
        for m, ref in [(m, ref) for ref in ("sft", "clip") if ref in curves for m in curves]:
            pairs = [(at(curves[m][s]), at(curves[ref][s])) for s in {*curves[m]} & {*curves[ref]}]
            pairs = [(a, b) for a, b in pairs if a and b]
            if pairs and m not in (ref, "sft"):
                ci = [interval([a[k] - b[k] for a, b in pairs]) for k in keys]
                lines.append(f"{m} - {ref}, {where}".ljust(44) + f"{len(pairs):2d}" + "".join(
                    f"{d:+8.3f} +-{half:5.3f}" for d, half in ci))
    head = "paired differences, mean +- 95 %".ljust(44) + " n" + "".join(
        f"{COLUMNS[k]:>15}" for k in keys)
    return "\n".join(["", head, *lines] if lines else [])

def draw(ax, points, color, **style):
    """A line through the means of points {x: [a value a seed]}, with its 95 % band."""
    means, halves = zip(*map(interval, points.values()))
    ax.plot(list(points), means, color=color, **style)
    if max(halves) < math.inf:
        low, high = ([m + sign * h for m, h in zip(means, halves)] for sign in (-1, 1))
        ax.fill_between(list(points), low, high, color=color, alpha=0.15, lw=0)

def by_step(rows, method, key, stage="sft"):
    """-> {step: [the value of key of each seed]}; of SFT with the base at 2, for a log scale."""
    out = {}
    for r in rows:
        if (r["method"], r["stage"]) == (method, stage) or r["stage"] == "base" and stage == "sft":
            out.setdefault(r["step"] or 2, []).append(r[key])
    return out

def summary_figure(fig, rows):
    """OOD and ID accuracy over SFT updates, RL as arrows."""
    axes = fig.subplots(1, 2, sharey=True)
    for ax, key, title in zip(axes, ("ood", "id"), ("out of distribution: J, Q, K = 11, 12, 13",
                                                    "in distribution: J = Q = K = 10")):
        for m, color, shift in (("base", "black", 1), ("sft", "#d1495b", 0.97),
                                ("clip", "#2e86ab", 1.03)):
            points = by_step(rows, m, key)
            if len(points) > 1:
                draw(ax, points, color, label=m, marker=".")
                draw(ax, by_step(rows, m, f"{key}_any"), color, ls="--", lw=1)
            for s, ends in by_step(rows, m, key, "rl").items():
                ax.annotate("", (s * shift, mean(ends)), (s * shift, mean(points[s])),
                            arrowprops=dict(arrowstyle="-|>", color=color, lw=1.6, shrinkA=0))
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(0, 1.03))
        ax.set_xticks([2, 5, 10, 20, 50, 100, 200], ["base", 5, 10, 20, 50, 100, 200])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy, greedy decoding")
    axes[1].legend(loc="lower center", frameon=False,
                   title="arrow: GRPO on ID prompts\ndashed: last number right, in any format")

def read_json(path):
    """A JSON file of a run folder, or BadInput."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"error: cannot read {path} ({e}); a file in cells/ may be deleted: the same "
                       "command then computes it anew")

def read_rows(run):
    """The rows of a run folder's cells, by seed, method, step and stage; no bases without SFT."""
    rows = [r for p in sorted((Path(run) / "cells").glob("*.json")) for r in read_json(p)]
    used, first = {r["seed"] for r in rows if r["stage"] == "sft"}, ["base", "sft", "clip"]
    if not used:
        raise BadInput(f"error: {run} holds no fine-tuned checkpoint yet")
    order = first + sorted({r["method"] for r in rows}.difference(first))
    return sorted([r for r in rows if r["seed"] in used], key=lambda r: (
        r["seed"], order.index(r["method"]), r["step"], r["stage"] == "rl"))

def save_figure(path, draw_into, *args, size=(10, 4.4)):
    """Write a figure; a hint alone where matplotlib is missing or broken."""
    try:
        from matplotlib.figure import Figure
    except Exception as e:
        return print(f"no figures: matplotlib does not work here ({type(e).__name__}: {e})")
    fig = Figure(size, layout="tight")
    draw_into(fig, *args)
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

def show(run, n):
    """n OOD problems, and what each checkpoint of a run makes of them; ok: strictly right."""
    problems = eval_sets(max(16, n))["ood"][:n]
    paths = sorted(Path(run).glob("ckpt/*.pt"), key=lambda p: [w.zfill(9) for w in p.stem.split("-")])
    said = {p.stem: respond(load_checkpoint(p), problems)[0] for p in paths}
    for i, p in enumerate(problems):
        print(f"\n{p.prompt}   values {' '.join(map(str, p.values))}, total {sum(p.values)}")
        for name, texts in said.items():
            print(f"  {'ok' * data.verify(p, texts[i]).strict:2} {name:20} {texts[i]}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--show", type=int, default=0, help="print so many OOD problems and answers")
    args = parser.parse_args()
    show(args.run, args.show) if args.show > 0 else report(args.run)
