"""eval.py - what is measured: accuracies, entropy, spectra, drift, intervals, claims, figures.

    python eval.py runs/main              re-report a run
    python eval.py runs/main --show 4     read what its checkpoints answer
"""
import copy
import functools
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

import data
from model import (BadInput, Parser, atomic_write, generator, kl_exact, load_checkpoint,
                   response_logits, run_main, token_logprobs)


# --------------------------------------------------------------------------------------- generation
@torch.no_grad()
def respond(model, problems, max_new, n=1, temperature=0.0, noise=None):
    """Let the model answer each problem n times, all at once; temperature 0 is greedy.
    -> B = n * len(problems) texts without <eos>, ids (B, T), mask (B, T) True at sampled tokens."""
    dev = next(model.parameters()).device
    ids, mask = data.batch([(p.prompt, "") for p in problems])
    lengths = mask.long().argmax(1)                        # batch adds an EOS: it marks the end
    ids, mask = model.generate(ids[:, :-1].to(dev), lengths.to(dev), max_new, data.EOS, data.PAD, n,
                               temperature, noise)
    said = mask & (ids != data.EOS)
    flat = iter(ids[said].tolist())
    texts = [data.decode(list(itertools.islice(flat, k))) for k in said.sum(1).tolist()]
    return texts, ids, mask


@functools.cache
def eval_sets(n):
    """The fixed held-out problems: n each for 'id' and 'ood', the same hands under the two rules,
    and n/4 each for 'random' (rules) and 'prior' (n/16 of each ability)."""
    rng = random.Random("eval")
    sets = {"id": [data.draw(rng, "eval", rule=data.ID_RULE) for _ in range(n)]}
    sets["ood"] = [data.Problem("S", data.OOD_RULE, p.hand) for p in sets["id"]]
    sets["random"] = [data.draw(rng, "eval") for _ in range(n // 4)]
    sets["prior"] = [data.draw(rng, "eval", data.PRIOR_OPS[i % 4]) for i in range(n // 4)]
    return sets


@torch.no_grad()
def evaluate(model, c, base=None):
    """Everything that one metrics row says of a model, as a dict of floats. c: max_new, eval_n.

    Greedy accuracies in [0, 1]; ood_a and ood_b are the two halves of the OOD set (the peak is
    picked on a and reported on b). nll (nats a token) on held-out demonstrations; entropy (nats a
    token) on the model's own samples at temperature 1; kl_base = KL(base || pi), nats a token, on
    the same demonstrations (the forward KL of 2509.04259)."""
    dev = next(model.parameters()).device
    sets = eval_sets(c.eval_n)
    problems = [p for s in sets.values() for p in s]
    texts, ids, mask = respond(model, problems, c.max_new)
    verdicts = [data.verify(p, t) for p, t in zip(problems, texts)]
    row, verdicts = {}, iter(verdicts)
    for name in sets:
        part = list(itertools.islice(verdicts, len(sets[name])))
        row[name] = mean(v.strict for v in part)
        if name != "prior":
            row[f"answer_{name}"] = mean(v.answer for v in part)
            row[f"format_{name}"] = mean(v.format_ok for v in part)
        if name == "ood":    # two halves that share no hand, in any order
            half = [data.fingerprint(p.hand) % 2 for p in sets["ood"]]
            for i, tag in enumerate("ab"):
                row[f"ood_{tag}"] = mean(v.strict for v, h in zip(part, half) if h == i)
            row["answer_ood_b"] = mean(v.answer for v, h in zip(part, half) if h)
    row["truncated"] = 1 - ((ids == data.EOS) & mask).any(1).float().mean().item()
    own = sets["id"][:128]
    _, ids, mask = respond(model, own, c.max_new, 1, 1.0, generator(dev, "entropy"))
    logp = response_logits(model, ids, mask).float().log_softmax(-1)          # (N, V)
    # H = - sum_v pi(v) log pi(v), exact, averaged over sampled tokens
    row["entropy"] = -(logp.exp() * logp).sum(-1).mean().item()
    ids, mask = (t.to(dev) for t in data.demonstrations(128, "held out", "eval"))
    logits = response_logits(model, ids, mask)
    row["nll"] = -token_logprobs(logits, ids[:, 1:][mask[:, 1:]]).mean().item()
    if base is not None:
        row["kl_base"] = kl_exact(response_logits(base, ids, mask), logits).mean().item()
    return row


# ----------------------------------------------------------------------------------------- analysis
def principal_angles(W0, W1, k):
    """Angles in radians, ascending, between the top-k singular subspaces of two matrices (m, n).
    -> left (k,), right (k,)."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U1, _, V1 = torch.linalg.svd(W1.double(), full_matrices=False)
    # theta_i = arccos sigma_i(U0_k^T U1_k), the same with V              2509.12235, SVD analysis
    left = torch.linalg.svdvals(U0[:, :k].T @ U1[:, :k]).clamp(max=1).arccos()
    right = torch.linalg.svdvals(V0[:k] @ V1[:k].T).clamp(max=1).arccos()
    return left, right


def singular_value_shift(W0, W1):
    """Relative change of each singular value from W0 to W1, largest first: (min(m, n),)."""
    # (s_1 - s_0) / s_0                                                2509.12235, SVD analysis
    s0, s1 = torch.linalg.svdvals(W0.double()), torch.linalg.svdvals(W1.double())
    return (s1 - s0) / s0


def restore_directions(W0, W1, k=None):
    """W1 with its k leading singular vectors, both sides, replaced by those of W0 (k None: all) and
    its own singular values kept, (m, n). With W0 and W1 swapped it restores the values alone."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U, s1, V = torch.linalg.svd(W1.double(), full_matrices=False)
    # W' = [U_0,k | U_1,rest] diag(S_1) [V_0,k | V_1,rest]^T                 2509.12235, restoration
    U[:, :k], V[:k] = U0[:, :k], V0[:k]
    return (U * s1 @ V).to(W1.dtype)


def representation_drift(layers0, layers1):
    """Lists, one entry a layer, of the same n texts' mean hidden states (n, C) in two models.
    -> (PCA centroid distance, mean shift).

    The first is paper 1's code: project on the first two principal components of layers0, average
    over texts, then over layers. Each layer's components have arbitrary signs, so layers may cancel
    or add up by chance. The second has no such fault: mean over layers of
    || mean(h1) - mean(h0) ||."""
    points, shifts = [], []
    for h0, h1 in zip(layers0, layers1):
        _, _, V = torch.linalg.svd(h0 - h0.mean(0), full_matrices=False)
        points.append((h1.mean(0) - h0.mean(0)) @ V[:2].T)                   # (2,)
        shifts.append((h1.mean(0) - h0.mean(0)).norm())
    return torch.stack(points).mean(0).norm().item(), torch.stack(shifts).mean().item()


@torch.no_grad()
def layer_means(model, ids, mask):
    """Mean hidden state over each row's response tokens, after the embedding and after each block:
    a list of (B, C)."""
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[:ids.shape[1]]
    out = []
    for block in [lambda x: x, *model.transformer.h]:
        x = block(x)
        out.append((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return out


def gradient_norm_by_probability(model, ids, mask, per_bin=20):
    """Gradient norm of -log pi of single response tokens, by their probability, bins [0, .1), ...:
    paper 1's analysis, but with a clean gradient for each token (its code subtracts accumulated
    norms).

    -> list of ten dicts: tokens (how many of ids, mask (B, T) fall in the bin), full (mean L2 norm
    of the gradient of all parameters, over up to per_bin tokens drawn from it), logit (the same for
    the logits), bound (1 - p, sqrt 2 (1 - p)) at the mean p of those drawn."""
    logits = response_logits(model, ids, mask)                               # (N, V)
    p = token_logprobs(logits, ids[:, 1:][mask[:, 1:]]).exp().detach()       # (N,)
    where = mask[:, 1:].nonzero()
    bins, out = (p * 10).long().clamp(max=9), []
    for b in range(10):
        mine = (bins == b).nonzero()[:, 0]
        drawn = mine[torch.randperm(len(mine), generator=generator("cpu", "bins", b))[:per_bin]]
        full, logit = [], []
        for i in drawn.tolist():
            row, t = where[i].tolist()
            z = model.lm_head(model.hidden(ids[row:row + 1, :t + 1])[0, -1])
            model.zero_grad()      # a clean gradient for each token
            z.retain_grad()
            (-token_logprobs(z, ids[row, t + 1])).backward()
            full.append(math.sqrt(sum(q.grad.pow(2).sum().item() for q in model.parameters())))
            # grad_z = softmax(z) - e_y, norm sqrt((1-p)^2 + sum_{j != y} p_j^2), within the bound
            logit.append(z.grad.norm().item())
        rest = 1 - p[drawn].mean().item() if len(drawn) else None
        out.append(dict(tokens=len(mine), full=mean(full) if full else None,
                        logit=mean(logit) if full else None,
                        bound=[rest, math.sqrt(2) * rest] if full else None))
    model.zero_grad(set_to_none=True)
    return out


# --------------------------------------------------------------------------------------- statistics
def mean(xs):
    xs = list(xs)
    if not xs:
        raise LookupError("the mean of nothing")
    return sum(xs) / len(xs)


T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093]    # Student's t, two-sided 95 %, df 1, 2, ...


# Two-sided 99.9 %, df 1 to 9: what is left of 95 % confidence when some sixty claims are tested.
T_999 = [636.619, 31.599, 12.924, 8.610, 6.869, 5.959, 5.408, 5.041, 4.781]


def paired_ci(differences, t=T_95):
    """One difference a seed -> (mean, low, high), Student's 95 % interval; infinite below two."""
    n, m = len(differences), mean(differences)
    if n < 2:
        return m, -math.inf, math.inf
    s = math.sqrt(sum((d - m) ** 2 for d in differences) / (n - 1))
    half = t[min(n - 2, len(t) - 1)] * s / math.sqrt(n)    # beyond the table a little too wide
    return m, m - half, m + half


# ----------------------------------------------------------------------------- the claims, measured
def frontier_area(points):
    """Area under the ID-OOD frontier: the integral over x in [0, 1] of the best OOD accuracy among
    the (id, ood) points with id >= x (0 where there is none): the trade-off that stopping at the
    right time offers. What is forgotten after that does not lower it."""
    area, last = 0.0, 0.0
    for x, _ in sorted(points):
        area += (x - last) * max(ood for i, ood in points if i >= x)
        last = x
    return area


def with_matrices(model, change):
    """A copy of a model with every block matrix W, called name, replaced by change(name, W)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.transformer.h.named_parameters():
            if p.dim() == 2:
                p.copy_(change(name, p))
    return other


def matrices(model):
    return {n: p.detach() for n, p in model.transformer.h.named_parameters() if p.dim() == 2}


def measure(run, c, seed, report):
    """What the claims need and metrics.jsonl has not: from the checkpoints of one seed, once."""
    cells = Path(run) / "cells"
    path = cells / f"s{seed}-measure.json"
    if path.exists():
        return

    def load(name):
        return load_checkpoint(Path(run) / "ckpt" / f"s{seed}-{name}.pt", c.device)[0]

    def score(model):
        row = evaluate(model, c)
        return {k: row[k] for k in ("id", "ood", "ood_b")}

    def noise(W, *key):
        return torch.randn(W.shape, generator=generator("cpu", seed, *key)).to(W)
    base, steps, out = load("base"), c.rl_from, {}
    models = {m: [load(f"{m}-{s}") for s in steps] for m in ("sft", "clip")}
    ids, mask = (t.to(c.device) for t in data.demonstrations(c.demos, seed, p_word=c.p_word))
    out["gradients"] = gradient_norm_by_probability(base, ids, mask)

    # Drift on what SFT does not teach (prior abilities, sums in the base's own style), and on what
    # it does.
    rng = random.Random("probe")
    other = [data.draw(rng, "eval", op) for op in "SMRDC" * 25]
    other = data.batch([(p.prompt, data.terse(p.values) if p.op == "S" else data.truth(p))
                        for p in other])
    task = data.demonstrations(128, "probe", "eval")
    for name, probe in (("drift", other), ("drift_task", task)):
        x, m = (t.to(c.device) for t in probe)
        at_base = layer_means(base, x, m)
        out[name] = {k: [representation_drift(at_base, layer_means(v, x, m)) for v in vs]
                     for k, vs in models.items()}

    # Spectra of the last checkpoint against the early one, the best of the starts on OOD half a,
    # beside two random updates of equal norm: of any spectrum, and of the same.
    rows = {r["step"]: r for r in read_json(cells / f"s{seed}-sft.json")}
    first = max(range(len(steps) - 1), key=lambda i: rows[steps[i]]["ood_a"])
    early, late = models["sft"][first], models["sft"][-1]
    W0, W1 = matrices(early), matrices(late)

    def spectrum(pairs):
        """Leading half of each matrix: mean |relative singular value change|, mean principal angle
        in degrees."""
        half = [min(a.shape) // 2 for a, _ in pairs]
        return [mean(singular_value_shift(a, b)[:k].abs().mean().item()
                     for (a, b), k in zip(pairs, half)),
                math.degrees(mean(torch.cat(principal_angles(a, b, k)).mean().item()
                                  for (a, b), k in zip(pairs, half)))]

    def any_update(a, b, n):
        d = noise(a, n)
        return a + d * (b - a).norm() / d.norm()

    def same_spectrum(a, b, n):
        s = torch.linalg.svdvals(b - a)
        U, V = (torch.linalg.qr(noise(a.new_empty(size, len(s)), n, side))[0]
                for side, size in enumerate(a.shape))
        return a + U * s @ V.T
    out["spectrum"] = spectrum([(W0[n], W1[n]) for n in W0])
    out["spectrum_null"] = spectrum([(W0[n], any_update(W0[n], W1[n], n)) for n in W0])
    out["spectrum_same"] = spectrum([(W0[n], same_spectrum(W0[n], W1[n], n)) for n in W0])
    out["angles"], out["angles_null"] = [], []    # from the base, along SFT
    B = matrices(base)
    for model in models["sft"]:
        W = matrices(model)
        out["angles"].append(spectrum([(B[n], W[n]) for n in B])[1])
        out["angles_null"].append(spectrum([(B[n], any_update(B[n], W[n], n)) for n in B])[1])

    # Restore the early directions in the late model: a fifth of them, all, only the values; and a
    # straight step back as long as that fifth, at most all the way.
    fifth = {n: restore_directions(W0[n], W1[n], -(-min(w.shape) // 5)) for n, w in W0.items()}
    share = {n: ((fifth[n] - W1[n]).norm() / (W0[n] - W1[n]).norm()).clamp(max=1) for n in W0}
    out["restore"] = dict(
        late=score(late), fifth=score(with_matrices(late, lambda n, w: fifth[n])),
        straight=score(with_matrices(late, lambda n, w: w + share[n] * (W0[n] - w))),
        all=score(with_matrices(late, lambda n, w: restore_directions(W0[n], w))),
        values=score(with_matrices(late, lambda n, w: restore_directions(w, W0[n]))))

    # Plain interpolation between base and SFT, the cheap baseline.
    out["interpolation"] = []
    for model in [m for m, s in zip(models["sft"], steps) if s >= 100] or models["sft"][-1:]:
        for a in (0.25, 0.5, 0.75):
            mixed = copy.deepcopy(model)
            with torch.no_grad():
                for p, q in zip(mixed.parameters(), base.parameters()):
                    p.lerp_(q, 1 - a)
            out["interpolation"].append(score(mixed))
    atomic_write(path, json.dumps(out).encode())
    report(cell=f"s{seed} checkpoints")


def spearman(xs, ys):
    """Rank correlation of two short lists; ties share their mean rank; 0 if one does not vary."""
    a, b = ([sum(y < x for y in v) + sum(y == x for y in v) / 2 for x in v] for v in (xs, ys))
    return float(torch.corrcoef(torch.tensor([a, b]))[0, 1].nan_to_num())


def verdict(differences, margin=0.02, not_worse=False):
    """-> (mean, low, high, verdict, sure). 'holds' where the 95 % interval lies above 0 (not_worse:
    above -margin), 'opposite' where it lies below, 'no difference' where it lies within +-margin,
    'undecided' otherwise and below three seeds. sure: so does the 99.9 % interval."""
    def judge(low, high):
        if len(differences) < 3:
            return "undecided"
        if low > -margin * not_worse:
            return "holds"
        if high < -margin * not_worse:
            return "opposite"
        return "no difference" if -margin < low and high < margin else "undecided"
    m, low, high = paired_ci(differences)
    said = judge(low, high)
    return m, low, high, said, judge(*paired_ci(differences, T_999)[1:]) == said != "undecided"


def claims(rows, measured, rl_from):
    """-> a list of dicts, one a claim. Every effect is a mean of differences paired by seed (same
    base, same demonstrations in the same order), positive in the direction claimed. What stands
    beside it (control) takes no part in the verdict. A claim whose runs are not in the folder is
    left out."""
    base, sft, rl, M = {}, {}, {}, measured
    for r in rows:
        if r["stage"] == "base":
            base[r["seed"]] = r
        if r["stage"] == "sft":
            sft.setdefault((r["method"], r["seed"]), {})[r["step"]] = r
        if r["stage"] == "rl":
            rl[r["method"], r["seed"], r["init_step"]] = r
    last_step = {m: max(max(steps) for (k, _), steps in sft.items() if k == m) for m, _ in sft}
    sft = {k: steps for k, steps in sft.items() if max(steps) == last_step[k[0]]}    # whole runs
    late, middle = [i for i in rl_from if i >= 100], [i for i in rl_from if 60 <= i <= 100]
    end, latest = last_step.get("sft", max(rl_from)), max(rl_from)
    long = {m.partition(":")[0]: m for m, _ in sft if ":steps=" in m}
    more = ":demos=256"

    # What a claim compares: each function takes a seed and gives a number, or a LookupError where
    # there is none.
    def run(m, s):
        return list(sft[m, s].values())

    def top(m, s):    # the checkpoint of the OOD peak, picked on half a
        return max(run(m, s), key=lambda r: r["ood_a"])

    def first(values):
        for v in values:
            return v
        raise LookupError("not reached")

    def minus(f, g):
        return lambda s: f(s) - g(s)

    def versus(f, a, b, *args):
        return minus(f(a, *args), f(b, *args))

    def part(f, g):    # f as a share of g, where g is worth speaking of
        return lambda s: first(f(s) / x for x in [g(s)] if x > 0.05)

    def area(m):
        return lambda s: frontier_area([(r["id"], r["ood"]) for r in run(m, s)])

    def tuned(m):
        seeds = [o for x, o in sft if x == m]
        rates = [m] + [x for x in last_step if x.startswith(m + ":lr=")
                       and all((x, o) in sft for o in seeds)]

        def f(s):
            if len(rates) == 1:
                raise LookupError("nothing to choose from")
            others = [o for o in seeds if o != s]
            return area(max(rates, key=lambda x: mean(area(x)(o) for o in others)))(s)
        return f

    def last(m, key):
        return lambda s: run(m, s)[-1][key]

    def best_at(m, level, key):    # the best OOD, picked on half a, among ID >= level
        def f(s):
            able = [r for r in run(m, s) if r["id"] >= level]
            return first(sorted(able, key=lambda r: -r["ood_a"]))[key]
        return f

    def fall(m, key="ood_b", step=None):
        return lambda s: top(m, s)[key] - (sft[m, s][step] if step else run(m, s)[-1])[key]

    def learnt(m, bin):
        return lambda s: sft[m, s][60]["logp_bins"][bin]

    def gradient(s, key):
        bins = [b for b in M[s]["gradients"] if b["tokens"]]
        return math.log10(bins[0][key] / bins[-1][key])

    def share(s):
        sums = [b["tokens"] * (b["full"] or 0) for b in M[s]["gradients"]]
        return sums[0] / sum(sums)

    def gain(starts, key="ood", m="sft"):
        return lambda s: mean(rl[m, s, i][key] - sft[m, s][i][key] for i in starts)

    def healed(starts, m="sft", key="ood"):
        return lambda s: mean(rl[m, s, i][key] for i in starts)

    def best_end(m, key="ood_b", from_peak=False):
        return lambda s: max((rl[m, s, i] for i in rl_from
                              if not from_peak or i >= min(top(m, s)["step"], latest)),
                             key=lambda r: r["ood_a"])[key]

    def answers(f):    # the last number alone right, OOD, against the base
        return lambda s: f(s)["answer_ood"] - base[s]["answer_ood"]

    def at_drift(key):    # RL's ends from clip above those from SFT at the same KL(base || start)
        def f(s):
            xs, ys = zip((0, rl["base", s, 0][key]), *sorted(
                (sft["sft", s][i]["kl_base"], rl["sft", s, i][key]) for i in rl_from))
            mine = [(sft["clip", s][i]["kl_base"], rl["clip", s, i][key]) for i in rl_from]
            return mean(end - np.interp(x, xs, ys) for x, end in mine if x <= xs[-1])
        return f

    def matched(m, level, of):
        """of(seed, i, start) at the first start of RL with ID accuracy >= level."""
        return lambda s: first(of(s, i, n) for i, n in enumerate(rl_from)
                               if sft[m, s][n]["id"] >= level)

    def ranks(f, g):    # over the starts of RL behind the first two, where the format is learnt
        def h(s):
            if len(rl_from) < 5:
                raise LookupError("too few starts")
            return spearman(*([x(s, i) for i in range(2, len(rl_from))] for x in (f, g)))
        return h

    def before(key, sign):
        return lambda s, i: sign * sft["sft", s][rl_from[i]][key]

    def gained(s, i):
        return gain([rl_from[i]])(s)

    def tracks(x):
        return ranks(x, before("ood", -1))

    def restored(key, what="ood"):
        return lambda s: M[s]["restore"][key][what] - M[s]["restore"]["late"][what]

    def drift(probe, kind):
        return minus(*(matched(m, 0.8, lambda s, i, n, m=m: M[s][probe][m][i][kind])
                       for m in ("sft", "clip")))

    table = [
        ("C1a", "1", "improbable tokens have larger gradients", "log10 of the norm a token, lowest "
         "bin of base probability over highest", lambda s: gradient(s, "full"),
         "the logits' gradient", lambda s: gradient(s, "logit")),
        ("C1b", "1", "and make up most of the gradient", "share of summed norms from p < .1, "
         "minus 1/2", lambda s: share(s) - 0.5),
        ("C2a", "1", "improbable tokens cause the forgetting", f"OOD at step {end}, p < .1 left "
         "out minus as many random tokens left out", versus(last, "mask_low", "mask_random", "ood"),
         "most probable left out instead", versus(last, "mask_high", "mask_random", "ood")),
        ("C2b", "1", "more than by their share of the loss", "the same, against random tokens of "
         "equal base loss (far more of them)", versus(last, "mask_low", "mask_loss", "ood"),
         "ID", versus(last, "mask_low", "mask_loss", "id")),
        ("C2c", "1", "leaving them out buys a better trade-off", "frontier, p < .1 left out minus "
         "SFT", versus(area, "mask_low", "sft"),
         "random tokens of equal loss left out", versus(area, "mask_loss", "sft")),
        ("C2d", "1", "C2a without unpredictable words", f"OOD at step {end}, p < .1 left out minus "
         "random tokens left out, demonstrations without connectives",
         versus(last, "mask_low:p_word=0", "mask_random:p_word=0", "ood")),
        ("C3a", "1, 3", "clip forgets less at equal updates", f"OOD at step {end}, clip minus SFT",
         versus(last, "clip", "sft", "ood"), "ID", versus(last, "clip", "sft", "id")),
        ("C3b", "1, 3", "the same from its own peak", "OOD lost since, SFT minus clip",
         versus(fall, "sft", "clip"), "as a share of SFT's",
         part(versus(fall, "sft", "clip"), fall("sft"))),
        *((f"C3c ID {x}", "1, 3", "the same at matched ID", f"best OOD at ID >= {x}, clip minus "
           "SFT", versus(best_at, "clip", "sft", x, "ood_b"), "random rules",
           versus(best_at, "clip", "sft", x, "random")) for x in (0.8, 0.9, 0.95)),
        ("C3d", "1, 3", "clip buys a better trade-off", "frontier, clip minus SFT",
         versus(area, "clip", "sft"), "r as a weight, no clip", versus(area, "ratio", "sft")),
        ("C3e", "1, 3", "the same, each at its best learning rate", "frontier; the rate that is "
         "best on the other seeds", minus(tuned("clip"), tuned("sft")),
         "both at 1e-4", versus(area, "clip:lr=1e-4", "sft:lr=1e-4")),
        ("C3f", "1, 3", "clip forgets less with 256 demonstrations", f"OOD at step {end}, clip "
         "minus SFT", versus(last, "clip" + more, "sft" + more, "ood"), "frontier",
         versus(area, "clip" + more, "sft" + more)),
        *((f"C3f ID {x}", "1, 3", "the same at matched ID", f"best OOD at ID >= {x}, clip minus "
           "SFT", versus(best_at, "clip" + more, "sft" + more, x, "ood_b"), "prior abilities",
           versus(best_at, "clip" + more, "sft" + more, x, "prior")) for x in (0.95, 0.98)),
        ("C4a", "1, 3", "clip keeps prior abilities", f"prior at step {end}, clip minus SFT",
         versus(last, "clip", "sft", "prior")),
        *((f"C4b ID {x}", "1, 3", "the same at matched ID", f"prior at best OOD with ID >= {x}, "
           "clip minus SFT", versus(best_at, "clip", "sft", x, "prior")) for x in (0.8, 0.9)),
        ("C5", "1", "clip delays improbable tokens", "log p at step 60 of training tokens with "
         "base p < .1, SFT minus clip", versus(learnt, "sft", "clip", 0),
         "tokens with p > .9", versus(learnt, "sft", "clip", 9)),
        ("C6", "1, 3", "clip is no worse in distribution", "best ID of the run, clip minus SFT, "
         "above -.02", minus(lambda s: max(r["id"] for r in run("clip", s)),
                             lambda s: max(r["id"] for r in run("sft", s)))),
        ("C7", "3", "clip keeps entropy in prolonged training", "entropy at its end, clip minus "
         "SFT", lambda s: versus(last, long["clip"], long["sft"], "entropy")(s),
         f"after {end}", versus(last, "clip", "sft", "entropy")),
        ("C8a", "2", "OOD peaks early in SFT, then falls", f"peak minus step {end}", fall("sft"),
         "in any format", fall("sft", "answer_ood_b")),
        ("C8e", "2", "OOD rises before it falls, in any format", "last number right, OOD: best "
         "checkpoint minus base",
         answers(lambda s: max(run("sft", s), key=lambda r: r["answer_ood"])),
         "at the peak of strict OOD", answers(lambda s: top("sft", s))),
        ("C8b", "2", "while ID rises", "ID at step 100 minus ID at the OOD peak",
         lambda s: sft["sft", s][100]["id"] - top("sft", s)["id"],
         "OOD lost meanwhile", fall("sft", step=100)),
        ("C8c", "2", "to the end", f"ID at step {end} minus ID at the OOD peak",
         lambda s: -fall("sft", "id")(s)),
        ("C8d", "2", "the same with 256 demonstrations", "ID's rise from the OOD peak to the last "
         "step", lambda s: -fall("sft" + more, "id")(s), "OOD lost meanwhile", fall("sft" + more)),
        *((f"C9 {i}", "2", f"RL on ID prompts restores OOD at step {i}", "OOD after RL minus "
           "before", gain([i]), "as a share of what was lost since the peak",
           part(gain([i], "ood_b"), fall("sft", step=i))) for i in late),
        ("C9 any", "2", "the same in any format", f"last number right, OOD, mean over "
         f"{late}: after RL minus before", gain(late, "answer_ood"), f"from {rl_from[:2]}",
         gain(rl_from[:2], "answer_ood")),
        *((f"C9 clip {i}", "2", f"the same after clip, step {i}", "OOD after RL minus before",
           gain([i], m="clip")) for i in late),
        ("C10", "2", "but not beyond the early peak", "SFT's OOD peak minus best RL end from the "
         "peak on", lambda s: top("sft", s)["ood_b"] - best_end("sft", from_peak=True)(s),
         "from any start", lambda s: top("sft", s)["ood_b"] - best_end("sft")(s)),
        ("C11a", "2", "RL from too early a checkpoint ends lower", f"OOD after RL from steps "
         f"{middle} minus from {rl_from[:2]}", minus(healed(middle), healed(rl_from[:2])),
         "gain instead of end", minus(gain(middle), gain(rl_from[:2]))),
        ("C11b", "2", "and from too late a one", f"OOD after RL from steps {middle} minus from "
         f"{[latest]}", minus(healed(middle), healed([latest])),
         "gain instead of end", minus(gain(middle), gain([latest]))),
        ("C11d", "2", "RL needs SFT first", "OOD after RL from SFT's best start, minus after RL "
         "from the base", lambda s: best_end("sft", "ood")(s) - rl["base", s, 0]["ood"],
         "ID", lambda s: best_end("sft", "id")(s) - rl["base", s, 0]["id"]),
        ("C11c", "2", "RL heals where ID has headroom", "rank correlation over starts behind "
         "the first two: OOD gained and ID error before", ranks(gained, before("id", -1)),
         "OOD gained and entropy", ranks(gained, before("entropy", 1))),
        ("C12a", "1, 3", "RL ends higher from clip", "OOD after RL from each method's best start",
         versus(best_end, "clip", "sft"), "ID", versus(best_end, "clip", "sft", "id")),
        ("C12b", "1, 3", "the same over all starts", f"OOD after RL, mean over {rl_from}",
         minus(healed(rl_from, "clip"), healed(rl_from)),
         "ID", minus(healed(rl_from, "clip", "id"), healed(rl_from, "sft", "id"))),
        *((f"C12c ID {x}", "1, 3", "the same at matched ID", "OOD after RL from the first start of "
           f"ID >= {x}", minus(*(matched(m, x, lambda s, i, n, m=m: rl[m, s, n]["ood"])
                                 for m in ("clip", "sft")))) for x in (0.8, 0.9)),
        ("C12d", "1, 3", "the same at matched drift", "OOD after RL, clip minus SFT at the same "
         "KL(base || start), mean over clip's starts", at_drift("ood"), "ID", at_drift("id")),
        ("C13a", "2", "singular values stay, more than by chance", "mean relative change, random "
         "update of equal norm minus SFT", lambda s: M[s]["spectrum_null"][0] - M[s]["spectrum"][0],
         "SFT's own change", lambda s: M[s]["spectrum"][0]),
        ("C13b", "2", "singular vectors rotate, more than by chance", "mean principal angle in "
         "degrees, SFT minus random update of equal spectrum",
         lambda s: M[s]["spectrum"][1] - M[s]["spectrum_same"][1],
         "SFT's own angle", lambda s: M[s]["spectrum"][1]),
        ("C13c", "2", "rotation tracks OOD loss", "rank correlation over starts with the angle "
         "from the base", tracks(lambda s, i: M[s]["angles"][i]),
         "with the number of updates alone", tracks(lambda s, i: i)),
        ("C13d", "2", "restoring early vectors restores OOD", "OOD, late model with the leading "
         "fifth of the early vectors minus late model", restored("fifth"),
         "ID", restored("fifth", "id")),
        ("C13e", "2", "more than rolling the matrices back", "OOD, early vectors minus a straight "
         "step to the early matrices, as long, at most all the way",
         minus(restored("fifth"), restored("straight")),
         "all early vectors, late values", restored("all")),
        ("C13f", "2", "and more than early values do", "OOD, all early vectors minus early values",
         minus(restored("all"), restored("values")), "early values minus late model",
         restored("values")),
        ("C14a", "1", "clip drifts less in latent space", "mean shift on other tasks where ID "
         "first reaches .8, SFT minus clip", drift("drift", 1),
         "on the task itself", drift("drift_task", 1)),
        ("C14b", "1", "by the paper's measure", "PCA-centroid drift, the same", drift("drift", 0),
         "on the task itself", drift("drift_task", 0)),
        *((f"B {m}", "", f"clip against {m}", "frontier, clip minus it", versus(area, "clip", m),
           "OOD at its last step", versus(last, "clip", m, "ood"))
          for m in last_step if m not in ("sft", "clip", *long.values()) and more not in m
          and ":p_word=" not in m),
        ("B mix", "", "clip against base-SFT interpolation", "frontier, clip minus SFT with nine "
         "interpolations more", minus(area("clip"), lambda s: frontier_area(
             [(r["id"], r["ood"]) for r in run("sft", s)]
             + [(p["id"], p["ood"]) for p in M[s]["interpolation"]]))),
    ]

    def over_seeds(f):
        values = []
        for s in sorted({s for _, s in sft}):
            try:
                values.append(f(s))
            except LookupError:     # a run that is not in this folder, a level not reached
                pass
        return values
    out = []
    for id, paper, text, metric, effect, *control in table:
        values = over_seeds(effect)
        if len(values) < 2:
            continue
        # "no difference" is for accuracies: 0.02 of a nat or a degree means nothing
        margin = 0.02 * (id not in ("C1a", "C5", "C7", "C11c", "C13a", "C13b", "C13c", "C14a",
                                    "C14b"))
        m, low, high, said, sure = verdict(values, margin, not_worse=id == "C6")
        out.append(dict(id=id, paper=paper, claim=text, metric=metric, effect=m, ci=[low, high],
                        n=len(values), margin=margin, verdict=said, sure=sure))
        if control and len(others := over_seeds(control[1])) > 1:
            m, low, high = paired_ci(others)
            out[-1] |= dict(control=control[0], control_effect=m, control_ci=[low, high],
                            control_n=len(others))
    return out


def claims_table(found):
    """The claims as a Markdown table; bold where the 99.9 % interval says the same."""
    def number(m, ci):
        return f"{m:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"
    lines = ["| id | paper | claim: what was measured | effect [95 % CI] | n | beside it | verdict "
             "|", "|---|---|---|---|---|---|---|"]
    for r in found:
        control = ""
        if "control" in r:
            control = f"{r['control']}: {number(r['control_effect'], r['control_ci'])}"
            if r["control_n"] != r["n"]:
                control += f" (n = {r['control_n']})"
        bold = "**" * r["sure"]
        lines.append(f"| {r['id']} | {r['paper']} | {r['claim']}: {r['metric']} | "
                     f"{number(r['effect'], r['ci'])} | {r['n']} | {control} | "
                     f"{bold}{r['verdict']}{bold} |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- the report
def read_json(path):
    """A JSON file of a run folder, or BadInput."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"cannot read {path}: {e} (a file in cells/ may be deleted: --resume then "
                       "computes it anew)")


def read_config(run):
    """config.json of a run folder, or BadInput."""
    config = read_json(Path(run) / "config.json")
    if not isinstance(config, dict) or not {"seed", "methods", "rl_from"} <= config.keys():
        raise BadInput(f"{run}/config.json is not that of a run")
    return config


def read_rows(run):
    """metrics.jsonl -> list of dicts. A torn last line, of a run killed while writing, is left
    out."""
    rows = []
    try:
        text = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError as e:
        raise BadInput(f"cannot read {run}/metrics.jsonl: {e.strerror}")
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{run}/metrics.jsonl: left out an unreadable line", file=sys.stderr)
    return rows


# "OOD any": the last number alone, in any format
COLUMNS = dict(id="ID", ood="OOD", answer_ood="OOD any", random="random", prior="prior",
               entropy="entropy", clip_frac="clipped")


def line(row=None):
    """One evaluated checkpoint in one line; without a row the heading."""
    if row is None:
        return f" seed {'method':22} step" + "".join(f"{name:>9}" for name in COLUMNS.values())
    name = row["method"] + (f", step {row['init_step']}" * (row["init_step"] > 0) + ", RL"
                            if row["stage"] == "rl" else "")
    return f"{row['seed']:5d} {name:22} {row['step']:4d}" + "".join(
        f"{row[k]:9.3f}" for k in COLUMNS)


def table(rows):
    """[(label, row), ...] -> text, a line each."""
    lines = [" " * 32 + "".join(f"{c:>9}" for c in COLUMNS.values())]
    for label, row in rows:
        lines.append(f"{label:32}" + "".join(f"{row.get(k, float('nan')):9.3f}" for k in COLUMNS))
    return "\n".join(lines)


def peak(rows):
    """The row of the OOD peak: picked on one half of the OOD set; its `ood` and `answer_ood` are
    then the other half's, for the best of many on the half that picked it would flatter."""
    best = max(rows, key=lambda r: r["ood_a"])
    return best | dict(ood=best["ood_b"], answer_ood=best["answer_ood_b"])


def summary(rows):
    """-> [(label, row averaged over seeds), ...]: base, and of each method its peak, the steps that
    RL starts from, and what RL made of them."""
    def average(rs):
        keys = [k for k, v in rs[0].items() if isinstance(v, (int, float))]
        return {k: mean(r[k] for r in rs) for k in keys}
    out = [("base", average([r for r in rows if r["stage"] == "base"]))]
    if healed := [r for r in rows if r["method"] == "base" and r["stage"] == "rl"]:
        out.append(("base, then RL", average(healed)))
    for m in dict.fromkeys(r["method"] for r in rows if r["stage"] == "sft"):
        mine = [r for r in rows if r["method"] == m]
        curves = {}
        for r in mine:
            if r["stage"] == "sft":
                curves.setdefault(r["seed"], []).append(r)
        peaks = [peak(curve) for curve in curves.values()]
        first, last = min(r["step"] for r in peaks), max(r["step"] for r in peaks)
        out.append((f"{m}, OOD peak, step {first}" + (f"-{last}" if last > first else ""),
                    average(peaks)))
        starts = sorted({r["init_step"] for r in mine if r["stage"] == "rl"})
        for start in starts or [max(r["step"] for r in mine)]:
            out.append((f"{m}, step {start}", average([r for r in mine if r["stage"] == "sft"
                                                       and r["step"] == start])))
            healed = [r for r in mine if r["stage"] == "rl" and r["init_step"] == start]
            if healed:
                out.append((f"{m}, step {start}, then RL", average(healed)))
    return out


# ------------------------------------------------------------------------------------------ figures
COLORS = ["#d1495b", "#2e86ab", "#66a182", "#edae49", "#8d6a9f", "#7f7f7f"]


def plotting():
    """matplotlib.pyplot, or None with a hint: figures are optional, everything else works
    without."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: pip install matplotlib, then python eval.py RUN")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "font.size": 11})
    return plt


def keep(plt, fig, path):
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


def band(ax, xs, columns, color, label, **style):
    """A line through the means of columns (one list of seeds for each x) with its 95 % interval."""
    cis = [paired_ci(v) for v in columns]
    ax.plot(xs, [m for m, _, _ in cis], color=color, label=label, **style)
    if len(columns[0]) > 1:
        ax.fill_between(xs, *zip(*[ci[1:] for ci in cis]), color=color, alpha=0.15, lw=0)


def by_step(rows, method, key, stage="sft"):
    """-> steps, columns: the values of key at each step, one a seed."""
    columns = {}
    for r in rows:
        if r["method"] == method and r["stage"] == stage:
            columns.setdefault(r["step" if stage == "sft" else "init_step"], []).append(r[key])
    return list(columns), list(columns.values())


def summary_figure(plt, rows, path):
    """OOD and ID accuracy over SFT updates, RL as arrows."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["stage"] == "rl" and r["init_step"])
                   ) or list(dict.fromkeys(r["method"] for r in rows if r["stage"] == "sft"))
    for ax, key, title in zip(axes, ("ood", "id"), ("out of distribution: J, Q, K = 11, 12, 13",
                                                    "in distribution: J = Q = K = 10")):
        def arrow(x, start, end, color):
            ax.annotate("", (x, mean(end)), (x, mean(start)), arrowprops=dict(
                arrowstyle="-|>", color=color, lw=1.6, shrinkA=0, shrinkB=0))
        base = by_step(rows, "base", key, "base")[1]
        for end in by_step(rows, "base", key, "rl")[1]:
            arrow(2, base[0], end, "black")
        for i, (m, color) in enumerate(zip(methods, COLORS)):
            steps, columns = by_step(rows, m, key)
            band(ax, [2] + steps, base + columns, color, m, marker=".")    # the base stands at 2
            for s, end in zip(*by_step(rows, m, key, "rl")):
                arrow(s * 1.06 ** (i - (len(methods) - 1) / 2), columns[steps.index(s)], end, color)
            any_format = by_step(rows, "base", f"answer_{key}", "base")[1] \
                + by_step(rows, m, f"answer_{key}")[1]
            ax.plot([2] + steps, list(map(mean, any_format)), "--", color=color, lw=1)
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(0, 1.03))
        ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000) if t <= max(steps)]
        ax.set_xticks([2, *ticks], ["base", *ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("accuracy, greedy decoding")
    axes[1].legend(loc="lower center", frameon=False,
                   title="arrow: GRPO on ID prompts\ndashed: last number right, in any format")
    keep(plt, fig, path)


def plane_figure(plt, rows, path):
    """Left the ID-OOD plane, the trajectory of each method and where RL leads; right where RL leads
    from equal drift. Means over seeds with 95 % intervals."""
    fig, (plane, drift) = plt.subplots(1, 2, figsize=(10, 4.8))

    def points(ax, xs, ys, color, mark, names, alpha=0.25, above=5, **line):
        ax.plot([mean(v) for v in xs], [mean(v) for v in ys], mark, color=color, **line)
        for x, y, name in zip(xs, ys, names):
            (x, x0, x1), (y, y0, y1) = paired_ci(x), paired_ci(y)
            if x1 < math.inf:
                ax.errorbar(x, y, (y1 - y0) / 2, (x1 - x0) / 2, color=color, alpha=alpha)
            ax.annotate(name, (x, y), textcoords="offset points", xytext=(4, above), color=color,
                        size=8)
    for m, color, above in (("sft", COLORS[0], -11), ("clip", COLORS[1], 5)):
        steps, ids = by_step(rows, m, "id")
        points(plane, ids, by_step(rows, m, "ood")[1], color, ".-", steps, 0.2, above, label=m)
        starts, ends = by_step(rows, m, "ood", "rl")
        points(plane, by_step(rows, m, "id", "rl")[1], ends, color, "^", starts, 0, -3)
        kl = dict(zip(*by_step(rows, m, "kl_base")))
        points(drift, [kl[s] for s in starts], ends, color, "^-", starts, 0.4, above, label=m)
    ids, ends = (by_step(rows, "base", key, "rl")[1] for key in ("id", "ood"))
    points(plane, ids, ends, "black", "*", [""], 0.2)
    points(drift, [[0] * len(v) for v in ends], ends, "black", "*", [""], 0.4,
           label="base, no SFT")
    plane.set(xlabel="ID accuracy", ylabel="OOD accuracy",
              title="lines: SFT, by updates; triangles: after GRPO")
    drift.set(xlabel="KL(base, model) before GRPO, nats a token", ylabel="OOD accuracy after GRPO",
              title="after GRPO, by drift before it")
    drift.legend(frameon=False)
    keep(plt, fig, path)


def study_figure(plt, rows, measured, rl_from, path):
    """Four panels: healing by start, clip fraction by base probability, rotation and its null,
    drift."""
    fig, ((heal, clip), (spin, drift)) = plt.subplots(2, 2, figsize=(10, 7.6))
    seeds = sorted(measured)
    for m, color in zip(("sft", "clip"), COLORS):
        mine = [r for r in rows if r["method"] == m]
        start = {(r["seed"], r["step"]): r for r in mine if r["stage"] == "sft"}
        for key, style, name in (("ood", "-", ""), ("answer_ood", "--", ", in any format")):
            gains = {}
            for r in mine:
                if r["stage"] == "rl":
                    gains.setdefault(r["init_step"], []).append(
                        r[key] - start[r["seed"], r["init_step"]][key])
            band(heal, list(gains), list(gains.values()), color, m + name, ls=style)
        for kind, style, name in ((1, "-", "mean shift"), (0, ":", "PCA centroid")):
            band(drift, rl_from, [[measured[s]["drift"][m][i][kind] for s in seeds]
                                  for i in range(len(rl_from))], color, f"{m}, {name}", ls=style)
    heal.axhline(0, color="black", lw=0.8)
    heal.set(title="OOD accuracy gained by GRPO", xlabel="SFT updates before GRPO", xscale="log",
             ylabel="accuracy after minus before")
    drift.set(title="Latent drift on other tasks", xlabel="SFT updates", ylabel="distance",
              xscale="log")
    for since, s, color in zip((8, 30, 200), (16, 60, 300), COLORS[2:]):
        bins = [r["clip_bins"] for r in rows if r["method"] == "clip" and r["stage"] == "sft"
                and r["step"] == s]
        if bins:
            band(clip, [0.05 + 0.1 * i for i in range(10)], list(zip(*bins)), color,
                 f"updates {since + 1} to {s}", marker=".")
    clip.set(title="Tokens that clip has clipped", xlabel="base probability of the token",
             ylabel="fraction clipped", ylim=(-0.02, 1.02))
    for key, color, label in (("angles", COLORS[0], "sft, from the base"),
                              ("angles_null", "black", "random update of equal norm")):
        band(spin, rl_from, [[measured[s][key][i] for s in seeds] for i in range(len(rl_from))],
             color, label, marker=".")
    spin.set(title="Rotation of singular vectors", xlabel="SFT updates", xscale="log",
             ylabel="mean principal angle, degrees")
    for ax in (heal, clip, spin, drift):
        if ax.lines:
            ax.legend(frameon=False, fontsize=9)
        if ax is not clip:
            ticks = [a for a, b in zip(rl_from, rl_from[1:] + [1e9]) if b > 1.4 * a]
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()
    keep(plt, fig, path)


def entropy_figure(plt, rows, path):
    """Entropy over prolonged training."""
    fig, ax = plt.subplots(figsize=(7.5, 3.6))
    for m in dict.fromkeys(r["method"] for r in rows if ":steps=" in r["method"]):
        short = m.partition(":")[0]
        steps, columns = by_step(rows, short, "entropy")
        more = [(s, v) for s, v in zip(*by_step(rows, m, "entropy")) if s > max(steps, default=0)]
        band(ax, steps + [s for s, _ in more], columns + [v for _, v in more],
             COLORS[short == "clip"], short, marker=".")
    ax.axhline(mean(r["entropy"] for r in rows if r["stage"] == "base"), color="black", lw=1.2,
               ls=":", label="base")
    ax.set(title="Entropy on own samples", xlabel="SFT updates (log scale)", ylabel="nats a token",
           xscale="log", ylim=(0, None))
    ax.set_xticks([5, 10, 50, 200, 1000, 2000], [5, 10, 50, 200, 1000, 2000])
    ax.legend(frameon=False)
    keep(plt, fig, path)


def report(run):
    """Tables, summary.json and figures of a run folder, and of a study the claims, from what the
    run left in metrics.jsonl and cells/."""
    run, rows, rl_from = Path(run), read_rows(run), read_config(run)["rl_from"]
    used = {r["seed"] for r in rows if r["stage"] == "sft"}
    if not used:
        raise BadInput(f"{run}: no fine-tuned checkpoint yet; finish it with --resume")
    rows = [r for r in rows if r["seed"] in used]    # without the bases that could not add
    lines = summary(rows)
    print("\n" + table(lines))
    atomic_write(run / "summary.json", json.dumps(dict(lines), indent=1).encode())
    measured = {int(p.name[1:].split("-")[0]): read_json(p)
                for p in (run / "cells").glob("s*-measure.json")}
    if found := claims(rows, measured, rl_from):
        atomic_write(run / "claims.json", json.dumps(found, indent=1).encode())
        atomic_write(run / "claims.md", claims_table(found).encode())
        print("\n" + claims_table(found))
    plt = plotting()
    if plt:
        summary_figure(plt, rows, run / "summary.png")
        if measured:
            plane_figure(plt, rows, run / "plane.png")
            study_figure(plt, rows, measured, rl_from, run / "study.png")
        if any(":steps=" in r["method"] for r in rows):
            entropy_figure(plt, rows, run / "entropy.png")
        print("figures: " + ", ".join(str(p) for p in sorted(run.glob("*.png"))))


def mark(problem, text):
    """A response with its first wrong step in [brackets]: a wrong sum, a number that no unused card
    is worth, a step that does not go on from the last total, a wrong final total."""
    if problem.op != "S" or "=" not in text:
        return text if data.verify(problem, text).answer else f"[{text}]"
    left, total, parts = list(problem.values), None, re.split(r"( , | # )", text)
    for i in range(0, len(parts), 2):
        numbers = [int(w) for w in parts[i].split() if w.isdigit()]
        if i and parts[i - 1] == " # ":
            ok = numbers == [total] == [sum(problem.values)]
        else:
            new = numbers[:2] if total is None else numbers[1:2]
            ok = (len(numbers) == 3 and numbers[0] + numbers[1] == numbers[2]
                  and (total is None or numbers[0] == total)
                  and all(new.count(v) <= left.count(v) for v in new))
            for v in new if ok else []:
                left.remove(v)
            total = numbers[2] if ok else None
        if not ok:
            return "".join(parts[:i]) + f"[{parts[i]}]" + "".join(parts[i + 1:])
    return text


def show(run, n):
    """n OOD problems, and what each checkpoint of the first seed makes of them."""
    c = read_config(run)
    files = sorted((Path(run) / "ckpt").glob(f"s{c['seed']}-*.pt"),    # by method, then by step
                   key=lambda p: [w.zfill(9) if w.isdigit() else w for w in p.stem.split("-")])
    if not files:
        raise BadInput(f"{run} holds no checkpoints")
    problems = eval_sets(max(8, n))["ood"][:n]
    said = {p.stem: respond(load_checkpoint(p)[0], problems, c["max_new"])[0] for p in files}
    for i, p in enumerate(problems):
        print(f"\n{p.prompt}   values {' '.join(map(str, p.values))}, total {sum(p.values)}")
        for name, texts in said.items():
            right = "ok " if data.verify(p, texts[i]).strict else "   "
            print(f"  {right} {name:18} {mark(p, texts[i])}")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--show", type=int, default=0, help="print this many OOD problems and what "
                        "each checkpoint answers, the first wrong step in [brackets]")
    args = parser.parse_args(argv)
    read_config(args.run)
    if args.show < 0:
        raise BadInput(f"--show {args.show}: a number of problems, or none")
    show(args.run, args.show) if args.show else report(args.run)


if __name__ == "__main__":
    run_main(main)
