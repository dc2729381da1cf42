"""eval.py - what is measured: accuracies, entropy, spectra, drift, intervals, claims, figures.

    python eval.py runs/main              re-report a run
"""
import functools
import json
import math
import random
import sys
from pathlib import Path

import torch

import data
from model import (BadInput, atomic_write, generator, response_logits, run_main, token_logprobs)


# -------------------------------------------------------------------------------------- generation
@torch.no_grad()
def respond(model, problems, max_new, temperature=0.0, noise=None):
    """Let the model answer, all problems at once; temperature 0 is greedy.
    -> texts without <eos>, ids (B, T), mask (B, T) True at sampled tokens."""
    dev = next(model.parameters()).device
    prompts = [data.encode(p.prompt) for p in problems]
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.full((len(prompts), int(lengths.max())), data.PAD)
    for i, p in enumerate(prompts):
        padded[i, :len(p)] = torch.tensor(p)
    ids, mask = model.generate(padded.to(dev), lengths.to(dev), max_new, data.EOS, data.PAD,
                               temperature, noise)
    texts = []
    for row, n, k in zip(ids.tolist(), lengths.tolist(), mask.sum(1).tolist()):
        texts.append(data.decode(row[n:n + k - (row[n + k - 1] == data.EOS)]))
    return texts, ids, mask


@functools.cache
def eval_sets(n):
    """The fixed held-out problems: {'id', 'ood', 'random', 'prior'}, n each. id and ood are the same
    hands under the two rules; prior is n/4 problems of each prior ability."""
    rng = random.Random("eval")
    sets = {"id": [data.draw(rng, "eval", rule=data.ID_RULE) for _ in range(n)]}
    sets["ood"] = [data.Problem("S", data.OOD_RULE, p.hand) for p in sets["id"]]
    sets["random"] = [data.draw(rng, "eval") for _ in range(n)]
    sets["prior"] = [data.draw(rng, "eval", data.PRIOR_OPS[i % 4]) for i in range(n)]
    return sets


@torch.no_grad()
def evaluate(model, c, base=None):
    """Everything that one metrics row says of a model, as a dict of floats. c: max_new, eval_n.

    Greedy accuracies in [0, 1]; ood_a and ood_b are the two halves of the OOD set (the peak is picked
    on a and reported on b). nll (nats a token) on held-out demonstrations; entropy (nats a token) on
    the model's own samples at temperature 1; kl_base = KL(base || pi), nats a token, on the same
    demonstrations (the forward KL of 2509.04259)."""
    dev = next(model.parameters()).device
    sets = eval_sets(c.eval_n)
    problems = [p for s in sets.values() for p in s]
    texts, ids, mask = respond(model, problems, c.max_new)
    verdicts = [data.verify(p, t) for p, t in zip(problems, texts)]
    row = {}
    for i, name in enumerate(sets):
        part = verdicts[i * c.eval_n:(i + 1) * c.eval_n]
        row[name] = mean(v.strict for v in part)
        if name != "prior":
            row[f"answer_{name}"] = mean(v.answer for v in part)
            row[f"format_{name}"] = mean(v.format_ok for v in part)
        if name == "ood":
            row["ood_a"] = mean(v.strict for v in part[::2])
            row["ood_b"] = mean(v.strict for v in part[1::2])
    row["truncated"] = 1 - ((ids == data.EOS) & mask).any(1).float().mean().item()
    own = sets["id"][:256]
    _, ids, mask = respond(model, own, c.max_new, 1.0, generator(dev, "entropy"))
    logp = response_logits(model, ids, mask).float().log_softmax(-1)          # (N, V)
    # H = - sum_v pi(v) log pi(v), exact, averaged over sampled tokens
    row["entropy"] = -(logp.exp() * logp).sum(-1).mean().item()
    ids, mask = held_out_demonstrations(256)
    ids, mask = ids.to(dev), mask.to(dev)
    logits = response_logits(model, ids, mask)
    row["nll"] = -token_logprobs(logits, ids[:, 1:][mask[:, 1:]]).mean().item()
    if base is not None:
        logq, logp = (x.float().log_softmax(-1) for x in (response_logits(base, ids, mask), logits))
        row["kl_base"] = (logq.exp() * (logq - logp)).sum(-1).mean().item()
    return row


@functools.cache
def held_out_demonstrations(n):
    rng = random.Random("held-out")
    problems = [data.draw(rng, "eval", rule=data.ID_RULE) for _ in range(n)]
    return data.batch([(p.prompt, data.expert(p, rng)) for p in problems])


# --------------------------------------------------------------------------------------- statistics
def mean(xs):
    xs = list(xs)
    return sum(xs) / len(xs)


# -------------------------------------------------------------------------------------- the report
def read_config(run):
    """config.json of a run folder, or BadInput."""
    try:
        return json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"{run} is not a run folder: config.json: {e}")


def read_rows(run):
    """metrics.jsonl -> list of dicts. A torn last line, of a run killed while writing, is left out."""
    rows = []
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{run}/metrics.jsonl: left out an unreadable line", file=sys.stderr)
    return rows


COLUMNS = dict(id="ID", ood="OOD", random="random", prior="prior", entropy="entropy", clip_frac="clipped")


def table(rows):
    """[(label, row), ...] -> text, a line each."""
    lines = [" " * 26 + "".join(f"{c:>9}" for c in COLUMNS.values())]
    for label, row in rows:
        lines.append(f"{label:26}" + "".join(f"{row.get(k, float('nan')):9.3f}" for k in COLUMNS))
    return "\n".join(lines)


def peak(rows):
    """The row of the OOD peak: picked on one half of the OOD set; its `ood` is then the other half's,
    for the best of many on the half that picked it would flatter."""
    best = max(rows, key=lambda r: r["ood_a"])
    return best | dict(ood=best["ood_b"])


def summary(rows, rl_from):
    """-> [(label, row averaged over seeds), ...]: base, and of each method its peak, the steps that
    RL starts from, and what RL made of them."""
    def average(rs):
        keys = [k for k, v in rs[0].items() if isinstance(v, (int, float))]
        return {k: mean(r[k] for r in rs) for k in keys}
    out = [("base", average([r for r in rows if r["stage"] == "base"]))]
    for m in dict.fromkeys(r["method"] for r in rows if r["stage"] == "sft"):
        mine = [r for r in rows if r["method"] == m]
        seeds = {r["seed"] for r in mine}
        peaks = [peak([r for r in mine if r["seed"] == s and r["stage"] == "sft"]) for s in seeds]
        steps = sorted(r["step"] for r in peaks)
        out.append((f"{m}, OOD peak at {steps[0]}" + (f"-{steps[-1]}" if len(steps) > 1 else ""),
                    average(peaks)))
        for start in rl_from:
            for stage, key, label in (("sft", "step", f"{m}, step {start}"),
                                      ("rl", "init_step", f"{m}, step {start}, then RL")):
                rs = [r for r in mine if r["stage"] == stage and r[key] == start]
                if rs:
                    out.append((label, average(rs)))
    return out


COLORS = ["#d1495b", "#2e86ab", "#66a182", "#edae49", "#8d6a9f", "#7f7f7f"]


def summary_figure(rows, path):
    """OOD and ID accuracy over SFT updates, RL as arrows. False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib, then python eval.py RUN")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["stage"] == "sft"))[:len(COLORS)]
    for ax, key, title in zip(axes, ("ood", "id"), ("out of distribution: J Q K = 11 12 13",
                                                    "in distribution: J = Q = K = 10")):
        for m, color in zip(methods, COLORS):
            curve = {}
            for r in rows:
                if r["method"] == m and r["stage"] == "sft":
                    curve.setdefault(r["step"], []).append(r[key])
            ax.plot(curve.keys(), [mean(v) for v in curve.values()], ".-", color=color, label=m)
            for s in sorted({r["init_step"] for r in rows if r["method"] == m and r["stage"] == "rl"}):
                end = mean(r[key] for r in rows if r["method"] == m and r["init_step"] == s
                           and r["stage"] == "rl")
                x = s * (0.97 if m == methods[0] else 1.03)
                ax.annotate("", (x, end), (x, mean(curve[s])),
                            arrowprops=dict(arrowstyle="-|>", color=color, lw=1.5, alpha=0.8))
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(0, 1.02))
        ax.set_xticks([2, 5, 10, 20, 50, 100, 200], [2, 5, 10, 20, 50, 100, 200])
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="lower left", title="arrow: then GRPO")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True


def report(run):
    """Table, summary.json and summary.png of a run folder, from its metrics.jsonl alone."""
    run, rows = Path(run), read_rows(run)
    lines = summary(rows, read_config(run)["rl_from"])
    print("\n" + table(lines))
    atomic_write(run / "summary.json", json.dumps(dict(lines), indent=1).encode())
    if summary_figure(rows, run / "summary.png"):
        print(f"figure: {run / 'summary.png'}")


def main(argv=None):
    if len(sys.argv) != 2:
        raise BadInput("usage: python eval.py RUN")
    report(sys.argv[1])


if __name__ == "__main__":
    run_main(main)
