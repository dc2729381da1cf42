"""eval.py - what is measured: accuracies, entropy, spectra, drift, differences between methods.

    python eval.py runs/main                 reports a run folder once more
    python eval.py runs/main runs/tight      compares methods across folders, paired by seed

Above the ruled line: what a row says of a model, and the papers' analyses of weights, hidden states
and gradients. Below: averages over seeds, tables, the figure.
"""
import argparse
import functools
import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path

import torch

import data
from model import (generator, kl_exact, response_logits, response_logprobs, response_targets,
                   temporary, token_logprobs)
from rl import respond


@functools.cache
def eval_sets(n, seed):
    """Held-out problems of a seed, n of each: 'id'; 'ood', the same hands under other rules;
    'explained', the same as ood, asked by E; 'prior', M, R, D and C."""
    rng = random.Random(f"{seed}/eval")
    pairs = [data.draw_pair(rng, "eval") for _ in range(n)]
    id_problems = [problem for problem, _ in pairs]
    ood = [twin for _, twin in pairs]
    explained = [problem._replace(op="E") for problem in ood]
    prior = [data.draw(rng, "eval", "MRDC"[i % 4]) for i in range(n)]
    return dict(id=id_problems, ood=ood, explained=explained, prior=prior)


@torch.no_grad()
def accuracies(model, n, seed):
    """Greedy accuracies in [0, 1] on the sets of eval_sets, as a dict:
    id, ood, explained, prior: strict
    id_any, ...: of the last number, in any format
    ood_a, ood_b: strict, on two halves of the OOD set that share no hand
    ood_format, ood_rule, ood_face, ood_values, ood_sums: the shares of OOD answers that are wrong
        in this way (data.verify); with ood they add up to 1
    ood_unread: ood_rule + ood_face, a face card does not count what the rule says
    and sample: one OOD answer."""
    row = {}
    for name, problems in eval_sets(n, seed).items():
        texts, _, _ = respond(model, problems)
        verdicts = [data.verify(problem, text) for problem, text in zip(problems, texts)]
        row[name] = mean(verdict.strict for verdict in verdicts)
        row[f"{name}_any"] = mean(verdict.any for verdict in verdicts)
        if name == "ood":
            half = [data.fingerprint(problem.hand) % 2 for problem in problems]
            row["ood_a"] = mean(v.strict for v, h in zip(verdicts, half) if h == 0)
            row["ood_b"] = mean(v.strict for v, h in zip(verdicts, half) if h == 1)
            for error in data.ERRORS:
                row[f"ood_{error}"] = mean(verdict.error == error for verdict in verdicts)
            row["ood_unread"] = row["ood_rule"] + row["ood_face"]
            row["sample"] = f"{problems[0].prompt} {texts[0]}"
    return row


@torch.no_grad()
def entropy(model, problems):
    """Nats a token on the model's own samples at temperature 1, over the whole vocabulary."""
    _, ids, mask = respond(model, problems, 1, 1.0, generator(model.device, "entropy"))
    logp = response_logits(model, ids, mask).float().log_softmax(-1)         # (N, V)
    # H = - sum_v pi(v) log pi(v), averaged over sampled tokens; 0 log 0 is 0
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1).mean().item()


@torch.no_grad()
def on_demonstrations(model, base):
    """Nats a token on held-out demonstrations: nll; kl_base = KL(base || pi) (the forward KL of
    2509.04259); log pi where the base gives p < .1 (logp_low) or p > .9 (logp_high)."""
    ids, mask = data.demonstrations(128, "held out", "eval")
    ids, mask = ids.to(model.device), mask.to(model.device)
    targets = response_targets(ids, mask)                                    # (N,)
    logits = response_logits(model, ids, mask)                               # (N, V)
    base_logits = response_logits(base, ids, mask)                           # (N, V)
    logp = token_logprobs(logits, targets)                                   # (N,)
    base_p = token_logprobs(base_logits, targets).exp()                      # (N,)
    return dict(nll=-logp.mean().item(),
                kl_base=kl_exact(base_logits, logits).mean().item(),
                logp_low=logp[base_p < 0.1].mean().item(),
                logp_high=logp[base_p > 0.9].mean().item())


def evaluate(model, base, n, seed):
    """All that a row says of a model; n and seed as in eval_sets. FloatingPointError if the model
    gives no finite log-probabilities."""
    row = accuracies(model, n, seed)
    row.update(on_demonstrations(model, base))
    if not math.isfinite(row["nll"]):
        raise FloatingPointError(f"nll is {row['nll']}: try a lower learning rate")
    row["entropy"] = entropy(model, eval_sets(n, seed)["id"][:128])
    return row


def clipped_shares(recent):
    """Of the last updates (statistics of finetune) the share of trained tokens that are clipped:
    of all (clip_frac), of connectives, numbers and signs (nan where none was trained)."""
    tokens = torch.cat([stats["tokens"][stats["mask"]] for stats in recent])     # (N,)
    clipped = torch.cat([stats["clipped"][stats["mask"]] for stats in recent])   # (N,)
    first = data.WORDS.index(data.CONNECTIVES[0])    # connectives are the last words
    connective = (tokens >= first) & (tokens < data.EOS)
    number = tokens < len(data.NUMBERS)
    kinds = dict(clip_frac=torch.ones_like(clipped), clip_connectives=connective,
                 clip_numbers=number, clip_signs=~connective & ~number)
    return {name: mean(clipped[kind].float().tolist()) for name, kind in kinds.items()}


def principal_angles(W0, W1, k):
    """Angles in radians, ascending, between the top-k singular subspaces of two matrices (m, n).
    -> left (k,), right (k,), on the CPU in float64."""
    U0, _, Vh0 = torch.linalg.svd(W0.cpu().double(), full_matrices=False)
    U1, _, Vh1 = torch.linalg.svd(W1.cpu().double(), full_matrices=False)
    # theta_i = arccos sigma_i(U0_k^T U1_k), the same with V              2509.12235, SVD analysis
    left = torch.linalg.svdvals(U0[:, :k].T @ U1[:, :k])
    right = torch.linalg.svdvals(Vh0[:k] @ Vh1[:k].T)
    return left.clamp(max=1).arccos(), right.clamp(max=1).arccos()


def singular_value_shift(W0, W1):
    """Relative change of each singular value from W0 to W1, largest first: (min(m, n),) float64."""
    s0 = torch.linalg.svdvals(W0.cpu().double())
    s1 = torch.linalg.svdvals(W1.cpu().double())
    # (s_1 - s_0) / s_0                                                2509.12235, SVD analysis
    return (s1 - s0) / s0


def restore_directions(W0, W1, k=None):
    """W1 with its k leading singular vectors, both sides, replaced by those of W0 (k None: all) and
    its own singular values kept, (m, n). (W1, W0, None) restores the singular values alone."""
    U0, _, Vh0 = torch.linalg.svd(W0.cpu().double(), full_matrices=False)
    U, s1, Vh = torch.linalg.svd(W1.cpu().double(), full_matrices=False)
    # W' = [U_0,k | U_1,rest] diag(S_1) [V_0,k | V_1,rest]^T                 2509.12235, restoration
    U[:, :k] = U0[:, :k]
    Vh[:k] = Vh0[:k]
    return (U * s1 @ Vh).to(W1)


def representation_drift(layers0, layers1):
    """Lists, one entry a layer, of the same n texts' mean hidden states (n, C) in two models.
    -> (PCA centroid distance, mean shift). The first is paper 1's code: project on the first two
    principal components of layers0, average over texts, then over layers, where shifts may cancel:
    the sign of a component is arbitrary. The second cannot: the mean over layers of
    || mean(h1) - mean(h0) ||."""
    points = []
    distances = []
    for h0, h1 in zip(layers0, layers1):
        _, _, Vh = torch.linalg.svd(h0 - h0.mean(0), full_matrices=False)
        shift = h1.mean(0) - h0.mean(0)                                      # (C,)
        points.append(Vh[:2] @ shift)                                        # (2,)
        distances.append(shift.norm().item())
    return torch.stack(points).mean(0).norm().item(), mean(distances)


def gradient_norm_by_probability(model, ids, mask, per_bin=20):
    """Paper 1's analysis: the L2 norm of the gradient of -log pi (all parameters) of single
    response tokens of ids, mask (B, T), by their probability in ten bins, [0, .1) first. Each
    token has a backward pass of its own (the paper's code takes differences of accumulated norms).
    With respect to the logits alone it is softmax - one_hot(y), of norm 1 - p to sqrt 2 (1 - p).
    -> list of ten (tokens in the bin, mean norm of up to per_bin of them; nan without any)."""
    with torch.no_grad():
        p = response_logprobs(model, ids, mask)[mask[:, 1:]].exp()           # (N,)
    places = mask[:, 1:].nonzero()                                           # (N, 2): row, t
    bins = (p * 10).long().clamp(max=9)                                      # (N,)
    found = []
    for b in range(10):
        tokens = (bins == b).nonzero()[:, 0].cpu()
        order = torch.randperm(len(tokens), generator=generator("cpu", "bins", b))
        norms = []
        chosen = tokens[order[:per_bin]]
        for row, t in places[chosen].tolist():
            logits = model.lm_head(model.hidden(ids[row:row + 1, :t + 1])[0, -1])    # (V,)
            nll = -token_logprobs(logits, ids[row, t + 1])
            grads = torch.autograd.grad(nll, list(model.parameters()))
            norms.append(math.sqrt(sum(g.pow(2).sum().item() for g in grads)))
        found.append((len(tokens), mean(norms)))
    return found


T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093]    # Student's t, two-sided 95 %, df 1, 2, ...


def mean(values):
    """Of any iterable; nan of none."""
    values = list(values)
    if len(values) == 0:
        return math.nan
    return statistics.fmean(values)


def interval(values, t=T_95):
    """One value a seed -> (mean, half the width of Student's interval); infinite below two."""
    n = len(values)
    if n < 2:
        return mean(values), math.inf
    df = min(n - 1, len(t))    # beyond the table a little too wide
    return mean(values), t[df - 1] * statistics.stdev(values) / math.sqrt(n)


def peak(curve):
    """The OOD peak of a run -> a row. The best of many evaluations flatters, so it is picked on one
    half of the OOD set and its ood is that of the other half; both ways, the mean."""
    by_a = max(curve, key=lambda row: row["ood_a"])
    by_b = max(curve, key=lambda row: row["ood_b"])
    return average([dict(by_a, ood=by_a["ood_b"]), dict(by_b, ood=by_b["ood_a"])])


def at_id(curve, level):
    """The row where a run first reaches this ID accuracy, interpolated between the evaluations
    before and after; None if it never does, or had passed it at its first evaluation. Two methods
    are compared there (matched ID): at equal updates the one that learns more slowly would also
    forget less."""
    before = None
    for row in curve:
        if row["id"] == level:
            return row
        if row["id"] > level:
            if before is None:
                return None
            share = (level - before["id"]) / (row["id"] - before["id"])
            return between(before, row, share)
        before = row
    return None


def between(row, other, share):
    """Each number of a row moved by a share of the way to another row."""
    out = {}
    for key, value in row.items():
        out[key] = value if isinstance(value, str) else value + share * (other[key] - value)
    return out


# ================================================================= below: what it takes to report
# A row: seed, method, stage (base, sft, rl), step (SFT updates; of rl those before RL), numbers.
COLUMNS = dict(id="ID", ood="OOD", ood_unread="unread", ood_any="OOD any", explained="explain",
               prior="M R D C", entropy="entropy", clip_frac="clipped")
LEGEND = """accuracies, greedy:
    ID        the task of SFT
    OOD       the same hands under another rule; OOD any: its last number alone
    unread    of OOD, the share of answers in which a face card does not count what the rule says
    explain   the OOD problems asked by E; M R D C: the other abilities
entropy: nats a token; clipped: the share of tokens past the bound in the last K updates (after RL:
in its last ten steps)"""
COMPARED = ("id", "ood", "ood_any", "explained", "prior")


def write_json(path, content):
    """Written beside its place and then renamed: a file that is there is whole."""
    temporary(path).write_text(json.dumps(content, allow_nan=False))
    temporary(path).replace(path)


def read_json(path):
    """ValueError names a file that is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def finite(value):
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_rows(run, suffix=""):
    """All rows of a run folder, in the order of their seeds; suffix is added to each method."""
    rows = []
    for path in sorted(Path(run).glob("s[0-9]*-*.json")):
        for row in read_json(path)["rows"]:
            numbers = {key: math.nan if value is None else value for key, value in row.items()}
            if row["method"] != "base":
                numbers["method"] += suffix
            rows.append(numbers)
    return sorted(rows, key=lambda row: row["seed"])


def average(rows):
    """The mean of each number over a list of rows, beside the words of the first."""
    out = {}
    for key, value in rows[0].items():
        out[key] = value if isinstance(value, str) else mean(row[key] for row in rows)
    return out


def run_of(rows, method, seed, stage="sft"):
    """The rows of one run, in the order of their steps."""
    mine = [r for r in rows if (r["method"], r["seed"], r["stage"]) == (method, seed, stage)]
    return sorted(mine, key=lambda row: row["step"])


def row_at(rows, step):
    for row in rows:
        if row["step"] == step:
            return row
    return None


def seeds_of(rows):
    return sorted({row["seed"] for row in rows})


def methods_of(rows):
    """sft first, the base not among them."""
    names = sorted({row["method"] for row in rows if row["method"] != "base"})
    if "sft" in names:
        names.remove("sft")
        names.insert(0, "sft")
    return names


def steps_of(rows, method, stage):
    return sorted({r["step"] for r in rows if r["method"] == method and r["stage"] == stage})


def header():
    titles = "".join(f"{title:>9}" for title in COLUMNS.values())
    return f"{'':32}{titles}"


def line(row, label=""):
    """One row as one line of text."""
    if not label:
        label = f"seed {row['seed']} {row['method']}, step {row['step']}"
        if row["stage"] == "rl":
            label += ", then RL"
    cells = ""
    for key in COLUMNS:
        cells += f"{row[key]:9.3f}" if key in row else f"{'-':>9}"
    return f"{label:32}{cells}"


def summary(rows):
    """Lines of text, means over seeds, n of them: the base, each method's OOD peak and last step,
    what RL starts from and ends in."""
    lines = [f"{header()}    n"]

    def add(some, label):
        there = [row for row in some if row is not None]
        if there:
            lines.append(f"{line(average(there), label)}{len(there):5d}")
    add([row for row in rows if row["stage"] == "base"], "base")
    add([row for row in rows if row["method"] == "base" and row["stage"] == "rl"], "base, then RL")
    for method in methods_of(rows):
        curves = [run_of(rows, method, seed) for seed in seeds_of(rows)]
        curves = [curve for curve in curves if curve]
        after_rl = [row for row in rows if row["method"] == method and row["stage"] == "rl"]
        add([peak(curve) for curve in curves], f"{method}, OOD peak")
        last = max(steps_of(rows, method, "sft"))
        for step in sorted({last, *steps_of(rows, method, "rl")}):
            add([row_at(curve, step) for curve in curves], f"{method}, step {step}")
            add([row for row in after_rl if row["step"] == step], f"{method}, step {step}, then RL")
    return "\n".join(lines)


def paired_differences(rows, method, reference, pick):
    """For each metric the list, over seeds, of method minus reference in the row that
    pick(rows, method, seed) finds: same base, same data, same order. Seeds in which either has no
    such row are left out."""
    differences = {key: [] for key in COMPARED}
    for seed in seeds_of(rows):
        mine = pick(rows, method, seed)
        other = pick(rows, reference, seed)
        if mine is None or other is None:
            continue
        for key in COMPARED:
            differences[key].append(mine[key] - other[key])
    return differences


def pick_end(rows, method, seed):
    curve = run_of(rows, method, seed)
    return curve[-1] if curve else None


def pick_matched(rows, method, seed):
    return at_id(run_of(rows, method, seed), 0.95)


def pick_rl(step):
    """-> a pick of what RL makes of the checkpoint at this step."""
    def pick(rows, method, seed):
        return row_at(run_of(rows, method, seed, "rl"), step)
    return pick


def compare(rows):
    """Lines of text: differences to sft and to clip, paired by seed."""
    methods = methods_of(rows)
    references = [name for name in ("sft", "clip") if name in methods]
    if not references:
        references = methods[:1]
    picks = {"at the end": pick_end, "at ID .95": pick_matched}
    for step in sorted({row["step"] for row in rows if row["stage"] == "rl"}):
        picks[f"RL from {step}"] = pick_rl(step)
    table = [["paired differences, mean +- 95 %", "n", *(COLUMNS[key] for key in COMPARED)]]
    for where, pick in picks.items():
        for reference in references:
            for method in methods:
                if method in (reference, "sft"):    # sft is what the others are compared with
                    continue
                differences = paired_differences(rows, method, reference, pick)
                n = len(differences["ood"])
                if n == 0:
                    continue
                cells = [f"{method} - {reference}, {where}", str(n)]
                for values in differences.values():
                    middle, half = interval(values)
                    width = f" +- {half:.3f}" if n > 1 else ""    # one seed has no interval
                    cells.append(f"{middle:+.3f}{width}")
                table.append(cells)
    return in_columns(table)


def in_columns(table):
    """Lists of cells -> lines of text, each column as wide as its longest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    lines = []
    for label, *cells in table:
        text = label.ljust(widths[0])
        for cell, width in zip(cells, widths[1:]):
            text += f"  {cell:>{width}}"
        lines.append(text)
    return "\n".join(lines)


def samples(rows, seed):
    """Lines of text: one OOD hand of a seed at the base, at each method's OOD peak and end."""
    lines = [f"one OOD problem of seed {seed}, greedy answers"]
    for row in run_of(rows, "base", seed, "base"):
        lines.append(f"{'base':32}{row['sample']}")
    for method in methods_of(rows):
        curve = run_of(rows, method, seed)
        if not curve:
            continue
        best = max(curve, key=lambda row: row["ood"])
        for row, name in ((best, ", OOD peak"), (curve[-1], "")):
            label = f"{method}, step {row['step']}{name}"
            lines.append(f"{label:31} {row['sample']}")
    return "\n".join(lines)


def by_step(rows, method, stage, key):
    """-> steps, means over seeds, halves of the 95 % interval (0 with one seed)."""
    steps = steps_of(rows, method, stage)
    means = []
    halves = []
    for step in steps:
        mine = [r for r in rows if (r["method"], r["stage"], r["step"]) == (method, stage, step)]
        middle, half = interval([row[key] for row in mine])
        means.append(middle)
        halves.append(half if math.isfinite(half) else 0)
    return steps, means, halves


def draw_band(ax, steps, means, halves, **style):
    """A line with its interval -> its colour."""
    drawn = ax.plot(steps, means, **style)
    low = [m - h for m, h in zip(means, halves)]
    high = [m + h for m, h in zip(means, halves)]
    ax.fill_between(steps, low, high, color=drawn[0].get_color(), alpha=0.15, linewidth=0)
    return drawn[0].get_color()


def draw_accuracy(ax, rows, key):
    """An accuracy of each method over SFT updates; large markers: what RL makes of a checkpoint,
    those of the first method on top."""
    methods = methods_of(rows)
    for method, marker, order in zip(methods, itertools.cycle("^sDv"), range(len(methods), 0, -1)):
        color = draw_band(ax, *by_step(rows, method, "sft", key), marker=".", label=method)
        steps, means, _ = by_step(rows, method, "rl", key)
        if steps:
            ax.plot(steps, means, marker, color=color, markersize=8, markeredgecolor="black",
                    label=f"{method}, then RL", zorder=2 + order)


def draw_errors(ax, rows, method):
    """Of a method's OOD answers the shares that are right and wrong in each way, stacked."""
    labels = dict(ood="right", ood_rule="rule not read: a face card counts 10",
                  ood_face="rule not read: a face card counts else",
                  ood_values="another card is wrong", ood_sums="wrong sums",
                  ood_format="not in the format")
    colors = ("#d5e8d4", "#d1495b", "#eb9a9f", "#edae49", "#8d96a3", "#3a3a3a")
    shares = [by_step(rows, method, "sft", key)[1] for key in labels]
    ax.stackplot(steps_of(rows, method, "sft"), shares, labels=labels.values(), colors=colors)


def figure(rows, path):
    """ID, OOD, the OOD errors by kind, prior abilities: over SFT updates, means over seeds with
    their 95 % band."""
    import matplotlib.backends.backend_agg    # no display is needed
    import matplotlib.figure
    fig = matplotlib.figure.Figure((13, 4), layout="tight")
    axes = fig.subplots(1, 4, sharex=True)
    first = methods_of(rows)[0]
    draw_accuracy(axes[0], rows, "id")
    draw_accuracy(axes[1], rows, "ood")
    draw_errors(axes[2], rows, first)
    draw_accuracy(axes[3], rows, "prior")
    titles = ("ID: the rule of SFT", "OOD: the same hands, other rules", f"OOD answers of {first}",
              "prior abilities: M, R, D, C")
    ticks = steps_of(rows, first, "sft")[::2]
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(0, 1.02))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy, greedy decoding")
    axes[0].legend(loc="lower right", frameon=False)
    axes[2].legend(loc="lower left", fontsize=7)
    fig.savefig(temporary(path), format="png", dpi=130)
    temporary(path).replace(path)


def report(runs, show=print):
    """Tables of one run folder, with metrics.jsonl and summary.png, or of several."""
    rows = read_rows(runs[0])
    for run in runs[1:]:
        more = read_rows(run, f" ({run})")
        if not methods_of(more):
            raise ValueError(f"{run} holds no finished job")
        for seed in seeds_of(more):
            first = run_of(rows, "base", seed, "base")
            second = run_of(more, "base", seed, "base")
            if first and second and first[0]["nll"] != second[0]["nll"]:
                show(f"note: seed {seed} has another base in {run}")
        rows += [row for row in more if row["method"] != "base"]
    if not methods_of(rows):
        raise ValueError(f"{runs[0]} holds no finished job")
    out = Path(runs[0])
    if len(runs) == 1:
        lines = []
        for row in rows:
            lines.append(json.dumps({key: finite(value) for key, value in row.items()}))
        temporary(out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        temporary(out / "metrics.jsonl").replace(out / "metrics.jsonl")
        figure(rows, out / "summary.png")
    show(f"\n{LEGEND}\n\n{summary(rows)}\n\n{samples(rows, seeds_of(rows)[0])}")
    if len(methods_of(rows)) > 1:
        show(f"\n{compare(rows)}")
    if len(runs) == 1:
        show(f"\nrows: {out / 'metrics.jsonl'}, figure: {out / 'summary.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; the first is the reference")
    runs = parser.parse_args().runs
    try:
        report(runs)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
