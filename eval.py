"""eval.py - what is measured: accuracies, entropy, spectra, drift, intervals, claims, figures.

    python eval.py runs/main              re-report a run
    python eval.py runs/main --show 4     read what its checkpoints answer
"""
import argparse
import copy
import functools
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import torch

import data
from model import (BadInput, atomic_write, generator, load_checkpoint, response_logits, run_main,
                   token_logprobs)


# -------------------------------------------------------------------------------------- generation
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
    """The fixed held-out problems: n each for 'id' and 'ood', the same hands under the two rules, and
    n/4 each for 'random' (rules) and 'prior' (n/16 of each ability)."""
    rng = random.Random("eval")
    sets = {"id": [data.draw(rng, "eval", rule=data.ID_RULE) for _ in range(n)]}
    sets["ood"] = [data.Problem("S", data.OOD_RULE, p.hand) for p in sets["id"]]
    sets["random"] = [data.draw(rng, "eval") for _ in range(n // 4)]
    sets["prior"] = [data.draw(rng, "eval", data.PRIOR_OPS[i % 4]) for i in range(n // 4)]
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
    row, verdicts = {}, iter(verdicts)
    for name in sets:
        part = list(itertools.islice(verdicts, len(sets[name])))
        row[name] = mean(v.strict for v in part)
        if name != "prior":
            row[f"answer_{name}"] = mean(v.answer for v in part)
            row[f"format_{name}"] = mean(v.format_ok for v in part)
        if name == "ood":
            row["ood_a"] = mean(v.strict for v in part[::2])
            row["ood_b"] = mean(v.strict for v in part[1::2])
    row["truncated"] = 1 - ((ids == data.EOS) & mask).any(1).float().mean().item()
    own = sets["id"][:256]
    _, ids, mask = respond(model, own, c.max_new, 1, 1.0, generator(dev, "entropy"))
    logp = response_logits(model, ids, mask).float().log_softmax(-1)          # (N, V)
    # H = - sum_v pi(v) log pi(v), exact, averaged over sampled tokens
    row["entropy"] = -(logp.exp() * logp).sum(-1).mean().item()
    ids, mask = (t.to(dev) for t in data.demonstrations(256, "held out", "eval"))
    logits = response_logits(model, ids, mask)
    row["nll"] = -token_logprobs(logits, ids[:, 1:][mask[:, 1:]]).mean().item()
    if base is not None:
        logq, logp = (x.float().log_softmax(-1) for x in (response_logits(base, ids, mask), logits))
        row["kl_base"] = (logq.exp() * (logq - logp)).sum(-1).mean().item()
    return row


# ------------------------------------------------------------------------------------------ analysis
def principal_angles(W0, W1, k):
    """Angles in radians, ascending, between the top-k singular subspaces of two matrices (m, n).
    -> left (k,), right (k,)."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U1, _, V1 = torch.linalg.svd(W1.double(), full_matrices=False)
    # theta_i = arccos sigma_i(U0_k^T U1_k), the same with V                 2509.12235, SVD analysis
    left = torch.linalg.svdvals(U0[:, :k].T @ U1[:, :k]).clamp(max=1).arccos()
    right = torch.linalg.svdvals(V0[:k] @ V1[:k].T).clamp(max=1).arccos()
    return left, right


def singular_value_shift(W0, W1):
    """Relative change of each singular value from W0 to W1, largest first: (min(m, n),)."""
    s0, s1 = torch.linalg.svdvals(W0.double()), torch.linalg.svdvals(W1.double())
    return (s1 - s0) / s0


def restore_directions(W0, W1, k=None):
    """W1 with its top-k singular vectors, both sides, replaced by those of W0 and its own singular
    values kept; k None replaces all. With W0 and W1 swapped it restores the values alone."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    U1, s1, V1 = torch.linalg.svd(W1.double(), full_matrices=False)
    # W' = [U0_k | U1_rest] diag(S1) [V0_k | V1_rest]^T                      2509.12235, restoration
    U, V = torch.cat([U0[:, :k], U1[:, U0[:, :k].shape[1]:]], 1), \
        torch.cat([V0[:k], V1[V0[:k].shape[0]:]], 0)
    return (U * s1 @ V).to(W1.dtype)


def representation_drift(layers0, layers1):
    """Lists, one entry a layer, of the same n texts' mean hidden states (n, C) in two models.
    -> (PCA centroid distance, mean shift).

    The first is paper 1's code: project on the first two principal components of layers0, average over
    texts, then over layers, signs included, so that opposite shifts cancel. The second does not:
    mean over layers of || mean(h1) - mean(h0) ||."""
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
    """Gradient norm of -log pi of single response tokens, by their probability, bins [0, .1), ...

    -> list of ten dicts: tokens (how many of ids, mask (B, T) fall in the bin), full (mean L2 norm of
    the gradient of all parameters, over up to per_bin tokens drawn from it), logit (the same for the
    logits), bound (1 - p, sqrt 2 (1 - p)) at the mean p of those drawn."""
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
    return sum(xs) / len(xs)


T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093]    # two-sided 95 % quantiles of Student's t, df 1...


def paired_ci(differences):
    """One difference a seed -> (mean, low, high), Student's 95 % interval; infinite below two."""
    n, m = len(differences), mean(differences)
    if n < 2:
        return m, -math.inf, math.inf
    s = math.sqrt(sum((d - m) ** 2 for d in differences) / (n - 1))
    half = (T_95[n - 2] if n - 2 < len(T_95) else 2.0) * s / math.sqrt(n)
    return m, m - half, m + half


# ------------------------------------------------------------------------------- the claims, measured
def frontier_area(points):
    """Area under the ID-OOD frontier: the integral over x in [0, 1] of the best OOD accuracy among the
    (id, ood) points with id >= x (0 where there is none). One number for a whole trajectory."""
    area, last = 0.0, 0.0
    for x, _ in sorted(points):
        area += (x - last) * max(ood for i, ood in points if i >= x)
        last = x
    return area


def first_reach(rows, level):
    """The first row with id >= level, or None."""
    return next((r for r in rows if r["id"] >= level), None)


def with_matrices(model, change):
    """A copy of a model with every block matrix W, called name, replaced by change(name, W)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.transformer.h.named_parameters():
            if p.dim() == 2:
                p.copy_(change(name, p))
    return other


def measure(run, c, seed, report):
    """What the claims need and metrics.jsonl has not: from the checkpoints of one seed, once."""
    path = Path(run) / "cells" / f"s{seed}-measure.json"
    if path.exists():
        return

    def load(name):
        return load_checkpoint(Path(run) / "ckpt" / f"s{seed}-{name}.pt", c.device)[0]

    def score(model):
        row = evaluate(model, c)
        return [row["id"], row["ood"]]
    base, steps, out = load("base"), c.rl_from, {}
    models = {m: [load(f"{m}-{s}") for s in steps] for m in ("sft", "clip")}
    ids, mask = (t.to(c.device) for t in data.demonstrations(c.demos, seed, p_word=c.p_word))
    out["gradients"] = gradient_norm_by_probability(base, ids, mask)
    probe, pmask = (t.to(c.device) for t in data.demonstrations(128, "probe", "eval"))
    at_base = layer_means(base, probe, pmask)
    out["drift"] = {m: [representation_drift(at_base, layer_means(x, probe, pmask)) for x in xs]
                    for m, xs in models.items()}
    # The spectrum against the early checkpoint, beside an update of equal norm in a random direction.
    early, late = models["sft"][1], models["sft"][-1]
    W0 = {n: p.detach() for n, p in early.transformer.h.named_parameters() if p.dim() == 2}
    W1 = {n: p.detach() for n, p in late.transformer.h.named_parameters() if p.dim() == 2}
    noise = {n: torch.randn(w.shape, generator=generator("cpu", seed, n)).to(w) for n, w in W0.items()}

    def spectrum(pairs):
        """Mean |relative singular value change| and mean principal angle of the leading half, degrees."""
        shift = mean(singular_value_shift(a, b).abs().mean().item() for a, b in pairs)
        angle = mean(torch.cat(principal_angles(a, b, min(a.shape) // 2)).mean().item() for a, b in pairs)
        return [shift, math.degrees(angle)]
    out["spectrum"] = spectrum([(W0[n], W1[n]) for n in W0])
    out["spectrum_null"] = spectrum([
        (W0[n], W0[n] + noise[n] * (W1[n] - W0[n]).norm() / noise[n].norm()) for n in W0])
    out["angles"], out["norms"] = [], []
    for model in models["sft"]:
        W = dict(model.transformer.h.named_parameters())
        out["angles"].append(spectrum([(W0[n], W[n].detach()) for n in W0])[1])
        out["norms"].append(math.sqrt(sum((W[n] - W0[n]).pow(2).sum().item() for n in W0)))
    # Restore the early directions in the late model; the controls no paper ran.
    back = {n: restore_directions(W0[n], W1[n]) for n in W0}
    step = {n: (back[n] - W1[n]).norm() / (W0[n] - W1[n]).norm() for n in W0}    # as far, straight back
    out["restore"] = dict(
        early=score(early), late=score(late),
        directions=score(with_matrices(late, lambda n, w: back[n])),
        values=score(with_matrices(late, lambda n, w: restore_directions(W1[n], W0[n]))),
        straight=score(with_matrices(late, lambda n, w: w + step[n].clamp(max=1) * (W0[n] - w))))
    # Plain interpolation between base and SFT, the cheap baseline.
    out["interpolation"] = []
    for a in (0.25, 0.5, 0.75, 1.0):
        mixed = copy.deepcopy(models["sft"][len(steps) // 2])
        with torch.no_grad():
            for p, q in zip(mixed.parameters(), base.parameters()):
                p.lerp_(q, 1 - a)
        out["interpolation"].append(score(mixed))
    atomic_write(path, json.dumps(out).encode())
    report(cell=f"s{seed} checkpoints")


def spearman(xs, ys):
    """Rank correlation of two short lists without ties."""
    n, rank = len(xs), lambda v: {i: r for r, i in enumerate(sorted(range(len(v)), key=v.__getitem__))}
    a, b = rank(xs), rank(ys)
    return 1 - 6 * sum((a[i] - b[i]) ** 2 for i in range(n)) / (n * (n * n - 1))


def claims(rows, measured, rl_from):
    """-> a list of dicts, one a claim. Every effect is a mean of differences paired by seed (same base,
    same demonstrations in the same order), positive in the direction claimed. Verdict: 'holds' where
    its 95 % interval lies above -margin, 'opposite' where it lies below, else 'no difference'."""
    sft, rl = {}, {}
    for r in rows:
        if r["stage"] == "sft":
            sft.setdefault((r["method"], r["seed"]), []).append(r)
        if r["stage"] == "rl":
            rl[r["method"], r["seed"], r["init_step"]] = r
    seeds = sorted(measured)
    out = []

    def claim(id, paper, text, metric, effect, control=None, margin=0.0):
        """effect, control: functions of a seed; None where a seed has no such number."""
        values = [v for v in map(effect, seeds) if v is not None]
        if not values:
            return
        m, low, high = paired_ci(values)
        verdict = "holds" if low > -margin else "opposite" if high < -margin else "no difference"
        row = dict(id=id, paper=paper, claim=text, metric=metric, effect=m, ci=[low, high],
                   n=len(values), verdict=verdict)
        if control:
            name, f = control
            m, low, high = paired_ci([v for v in map(f, seeds) if v is not None])
            row |= dict(control=name, control_effect=m, control_ci=[low, high])
        out.append(row)

    def step(m, s, n):
        return next(r for r in sft[m, s] if r["step"] == n)

    def area(m, key="ood"):
        return lambda s: frontier_area([(r["id"], r[key]) for r in sft[m, s]])

    def vs(f, a, b):
        return lambda s: f(a)(s) - f(b)(s)

    def reach(level, key):
        def difference(s):
            a, b = first_reach(sft["clip", s], level), first_reach(sft["sft", s], level)
            return a[key] - b[key] if a and b else None
        return difference

    def grad(s):
        bins = [b for b in measured[s]["gradients"] if b["tokens"]]
        return bins[0]["full"] / bins[-1]["full"], bins[0]["logit"] / bins[-1]["logit"], \
            bins[0]["tokens"] * bins[0]["full"] / sum(b["tokens"] * b["full"] for b in bins)
    claim("C1a", 1, "improbable tokens have the larger gradients", "log10 of the gradient norm a token, "
          "p < .1 over p > .9", lambda s: math.log10(grad(s)[0]),
          ("the same for the logits", lambda s: math.log10(grad(s)[1])))
    claim("C1b", 1, "they make up most of the gradient", "share of the summed norms from tokens with "
          "p < .1, minus one half", lambda s: grad(s)[2] - 0.5)
    claim("C2", 1, "the improbable tokens cause the forgetting", "ID-OOD frontier area, training without "
          "tokens of p < .1, minus without as many random ones", vs(area, "mask_low", "mask_random"),
          ("without the most probable ones instead", vs(area, "mask_high", "mask_random")))
    claim("C3a", "1, 3", "clipping forgets less OOD", "ID-OOD frontier area, clip minus SFT",
          vs(area, "clip", "sft"), ("r as a weight, no clip, minus SFT", vs(area, "ratio", "sft")))
    for level in (0.90, 0.95):
        claim(f"C3 @{level:.2f}", "1, 3", f"clipping forgets less OOD at matched ID", "OOD accuracy where "
              f"ID first reaches {level:.2f}, clip minus SFT", reach(level, "ood"))
        claim(f"C4 @{level:.2f}", "1, 3", "clipping keeps prior abilities at matched ID", "prior accuracy "
              f"where ID first reaches {level:.2f}, clip minus SFT", reach(level, "prior"))
    claim("C3b", "1, 3", "clipping forgets less OOD in the end", "OOD accuracy at the last step, clip "
          "minus SFT", lambda s: sft["clip", s][-1]["ood"] - sft["sft", s][-1]["ood"])

    def gain(m, s, b):
        """Log-probability gained by step 12 on training tokens of base-probability bin b."""
        first = [x for x in step(m, s, 12)["logp_bins"]][b]
        return first
    claim("C5", 1, "clipping delays improbable tokens", "mean log p of training tokens of base p < .1 at "
          "step 12, SFT minus clip", lambda s: gain("sft", s, 0) - gain("clip", s, 0),
          ("tokens of p > .9", lambda s: gain("sft", s, 9) - gain("clip", s, 9)))
    claim("C6", "1, 3", "clipping matches SFT in distribution", "best ID accuracy of the run, clip minus "
          "SFT, margin .02", lambda s: max(r["id"] for r in sft["clip", s]) -
          max(r["id"] for r in sft["sft", s]), margin=0.02)
    long = [m for m, _ in sft if "steps=" in m]
    if {"sft", "clip"} <= {m.partition(":")[0] for m in long}:
        name = {m.partition(":")[0]: m for m in long}
        claim("C7", 3, "clipping keeps entropy up in prolonged training", "entropy (nats a token) after "
              f"{sft[name['sft'], seeds[0]][-1]['step']} steps, clip minus SFT",
              lambda s: sft[name["clip"], s][-1]["entropy"] - sft[name["sft"], s][-1]["entropy"])

    def fall(key):
        def f(s):
            best = max(sft["sft", s], key=lambda r: r["ood_a"])
            return (best["ood_b"] if key == "ood" else best[key]) - sft["sft", s][-1][
                "ood_b" if key == "ood" else key]
        return f
    claim("C8a", 2, "OOD accuracy peaks early in SFT, then falls", "OOD accuracy at its peak minus at the "
          "last step", fall("ood"), ("any format (answer verdict)", fall("answer_ood")))
    claim("C8b", 2, "while ID rises", "best ID accuracy after the OOD peak minus ID at the peak",
          lambda s: max(r["id"] for r in sft["sft", s] if r["step"] >= peak(sft["sft", s])["step"]) -
          peak(sft["sft", s])["id"], margin=0.0)

    def heal(m, starts, key="ood"):
        return lambda s: mean(rl[m, s, i][key] - step(m, s, i)[key] for i in starts)
    late = [i for i in rl_from if i >= 100]
    claim("C9", 2, "RL on ID prompts restores OOD", f"OOD accuracy after RL minus before, SFT checkpoints "
          f"{late}", heal("sft", late), ("ID accuracy", heal("sft", late, "id")))
    claim("C10", 2, "RL does not exceed the early OOD peak", "peak of SFT minus the best RL end (picked "
          "and reported on different halves)", lambda s: peak(sft["sft", s])["ood"] -
          max((rl["sft", s, i] for i in rl_from), key=lambda r: r["ood_a"])["ood_b"])
    middle = [i for i in rl_from if 100 <= i <= 200]
    claim("C11", 2, "RL helps only from a bounded range of checkpoints", f"OOD gain by RL from {middle} "
          f"minus from the ends {rl_from[:2]}", lambda s: heal("sft", middle)(s) - heal("sft",
          rl_from[:2])(s), (f"minus from the last, {rl_from[-1]}", lambda s: heal("sft", middle)(s) -
                            heal("sft", rl_from[-1:])(s)))

    def end(m, s, key):
        best = max((rl[m, s, i] for i in rl_from), key=lambda r: r["ood_a"])
        return best["ood_b" if key == "ood" else key]
    claim("C12a", "1, 3", "RL ends higher from clip, best checkpoint of each", "OOD accuracy after RL, clip "
          "minus SFT", lambda s: end("clip", s, "ood") - end("sft", s, "ood"),
          ("ID accuracy", lambda s: end("clip", s, "id") - end("sft", s, "id")))
    claim("C12b", "1, 3", "RL ends higher from clip, all checkpoints", "OOD accuracy after RL, mean over "
          "the same start steps, clip minus SFT", lambda s: mean(
              rl["clip", s, i]["ood"] - rl["sft", s, i]["ood"] for i in rl_from),
          ("ID accuracy", lambda s: mean(rl["clip", s, i]["id"] - rl["sft", s, i]["id"] for i in rl_from)))

    def matched(s):
        """RL ends from the first RL start with ID >= .9, of clip and of SFT."""
        ends = [next((rl[m, s, i]["ood"] for i in rl_from if step(m, s, i)["id"] >= 0.9), None)
                for m in ("clip", "sft")]
        return ends[0] - ends[1] if None not in ends else None
    claim("C12c", "1, 3", "RL ends higher from clip, at matched ID", "OOD accuracy after RL from the first "
          "checkpoint with ID >= .90, clip minus SFT", matched)
    M = measured
    claim("C13a", 2, "singular values stay, more than by chance", "mean relative change under a random "
          "update of equal norm minus under SFT", lambda s: M[s]["spectrum_null"][0] - M[s]["spectrum"][0],
          ("SFT's own change", lambda s: M[s]["spectrum"][0]))
    claim("C13b", 2, "singular vectors rotate, more than by chance", "mean principal angle (degrees) under "
          "SFT minus under a random update of equal norm", lambda s: M[s]["spectrum"][1] -
          M[s]["spectrum_null"][1], ("SFT's own angle", lambda s: M[s]["spectrum"][1]))

    def tracks(key):
        return lambda s: spearman(M[s][key][2:], [-step("sft", s, i)["ood"] for i in rl_from[2:]])
    claim("C13c", 2, "rotation tracks OOD loss", "rank correlation over checkpoints of angle to the early "
          "one with OOD lost", tracks("angles"), ("plain distance instead of angle", tracks("norms")))

    def restored(key):
        return lambda s: M[s]["restore"][key][1] - M[s]["restore"]["late"][1]
    claim("C13d", 2, "restoring early singular vectors restores OOD", "OOD accuracy, late model with early "
          "vectors minus late model", restored("directions"), ("early values only", restored("values")))
    claim("C13e", 2, "it restores more than a straight step back of equal length", "OOD accuracy, early "
          "vectors minus interpolation of equal norm", lambda s: restored("directions")(s) -
          restored("straight")(s))

    def drift(kind):
        def f(s):
            at = [next((i for i, n in enumerate(rl_from) if step(m, s, n)["id"] >= 0.9), None)
                  for m in ("sft", "clip")]
            return None if None in at else \
                M[s]["drift"]["sft"][at[0]][kind] - M[s]["drift"]["clip"][at[1]][kind]
        return f
    claim("C14", 1, "clipping drifts less in latent space", "PCA centroid drift where ID first reaches .90,"
          " SFT minus clip", drift(0), ("plain mean shift", drift(1)))
    for m in dict.fromkeys(m for m, _ in sft):
        if m not in ("sft", "clip") and not m.startswith("mask") and m not in long:
            claim(f"B {m}", "-", f"clip beats {m}", f"ID-OOD frontier area, clip minus {m}",
                  vs(area, "clip", m))
    claim("B interpolation", "-", "clip beats interpolation of base and SFT", "ID-OOD frontier area, clip "
          "minus SFT and its interpolations", lambda s: area("clip")(s) - frontier_area(
              [(r["id"], r["ood"]) for r in sft["sft", s]] + M[s]["interpolation"]))
    return out


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


def line(row=None):
    """One evaluated checkpoint in one line; without a row the heading."""
    if row is None:
        return " seed method                        step     ID    OOD random  prior  entropy  clipped"
    name = row["method"] + (f", step {row['init_step']}, RL" if row["stage"] == "rl" else "")
    return (f"{row['seed']:5d} {name:28} {row['step']:5d} {row['id']:6.3f} {row['ood']:6.3f} "
            f"{row['random']:6.3f} {row['prior']:6.3f} {row['entropy']:8.3f} {row['clip_frac']:8.3f}")


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


def claims_table(found):
    """The claims as a Markdown table."""
    def number(m, ci):
        return f"{m:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"
    lines = ["| id | claim: what was measured | effect [95 % CI] | control | verdict |",
             "|---|---|---|---|---|"]
    for r in found:
        control = f"{r['control']}: {number(r['control_effect'], r['control_ci'])}" if "control" in r else ""
        lines.append(f"| {r['id']} | {r['claim']}: {r['metric']} | {number(r['effect'], r['ci'])} | "
                     f"{control} | **{r['verdict']}** |")
    return "\n".join(lines) + "\n"


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
    measured = {int(p.name[1:].split("-")[0]): json.loads(p.read_text(encoding="utf-8"))
                for p in (run / "cells").glob("s*-measure.json")}
    if measured:
        found = claims(rows, measured, read_config(run)["rl_from"])
        atomic_write(run / "claims.json", json.dumps(found, indent=1).encode())
        text = claims_table(found)
        atomic_write(run / "claims.md", text.encode())
        print("\n" + text)
    if summary_figure(rows, run / "summary.png"):
        print(f"figure: {run / 'summary.png'}")


def mark(problem, text):
    """A response with its first wrong step in [brackets]: a wrong sum, a number that no unused card is
    worth, a step that does not go on from the last total, a wrong final total."""
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
    files = sorted((Path(run) / "ckpt").glob(f"s{c['seed']}-*.pt"), key=lambda p: p.stat().st_mtime)
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--show", type=int, default=0, help="print this many OOD problems and what each "
                        "checkpoint answers, the first wrong step in [brackets]")
    args = parser.parse_args(argv)
    read_config(args.run)
    show(args.run, args.show) if args.show > 0 else report(args.run)


if __name__ == "__main__":
    run_main(main)
