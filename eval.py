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
        logq, logp = (x.float().log_softmax(-1) for x in (response_logits(base, ids, mask), logits))
        row["kl_base"] = (logq.exp() * (logq - logp)).sum(-1).mean().item()
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


def restore_directions(W0, W1):
    """W1 with its singular vectors, both sides, replaced by those of W0 and its own singular values
    kept, (m, n). With W0 and W1 swapped it restores the values alone."""
    U0, _, V0 = torch.linalg.svd(W0.double(), full_matrices=False)
    # W' = U_0 diag(S_1) V_0^T                                               2509.12235, restoration
    return (U0 * torch.linalg.svdvals(W1.double()) @ V0).to(W1.dtype)


def representation_drift(layers0, layers1):
    """Lists, one entry a layer, of the same n texts' mean hidden states (n, C) in two models.
    -> (PCA centroid distance, mean shift).

    The first is paper 1's code: project on the first two principal components of layers0, average
    over texts, then over layers, signs included, so that opposite shifts cancel. The second does
    not: mean over layers of || mean(h1) - mean(h0) ||."""
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


def paired_ci(differences):
    """One difference a seed -> (mean, low, high), Student's 95 % interval; infinite below two."""
    n, m = len(differences), mean(differences)
    if n < 2:
        return m, -math.inf, math.inf
    s = math.sqrt(sum((d - m) ** 2 for d in differences) / (n - 1))
    half = T_95[min(n - 2, len(T_95) - 1)] * s / math.sqrt(n)    # beyond df 19 a little too wide
    return m, m - half, m + half


# ----------------------------------------------------------------------------- the claims, measured
def frontier_area(points):
    """Area under the ID-OOD frontier: the integral over x in [0, 1] of the best OOD accuracy among
    the (id, ood) points with id >= x (0 where there is none). One number for a whole trajectory."""
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
    # The spectrum against the early checkpoint, beside an update of equal norm in a random
    # direction.
    early, late = models["sft"][1], models["sft"][-1]
    W0 = {n: p.detach() for n, p in early.transformer.h.named_parameters() if p.dim() == 2}
    W1 = {n: p.detach() for n, p in late.transformer.h.named_parameters() if p.dim() == 2}
    noise = {n: torch.randn(w.shape, generator=generator("cpu", seed, n)).to(w)
             for n, w in W0.items()}

    def spectrum(pairs):
        """Mean |relative singular value change| and mean principal angle of the leading half,
        degrees."""
        shift = mean(singular_value_shift(a, b).abs().mean().item() for a, b in pairs)
        angle = mean(torch.cat(principal_angles(a, b, min(a.shape) // 2)).mean().item()
                     for a, b in pairs)
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
    step = {n: (back[n] - W1[n]).norm() / (W0[n] - W1[n]).norm() for n in W0}    # straight back
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
    """Rank correlation of two short lists; ties share their mean rank; 0 if one does not vary."""
    a, b = ([sum(y < x for y in v) + sum(y == x for y in v) / 2 for x in v] for v in (xs, ys))
    return float(torch.corrcoef(torch.tensor([a, b]))[0, 1].nan_to_num())


def claims(rows, measured, rl_from):
    """-> a list of dicts, one a claim. Every effect is a mean of differences paired by seed (same
    base, same demonstrations in the same order), positive in the direction claimed. Verdict:
    'holds' where its 95 % interval lies above -margin, 'opposite' where it lies below, else 'no
    difference'. A claim whose runs are not in the folder is left out."""
    sft, rl, M = {}, {}, measured
    for r in rows:
        if r["stage"] == "sft":
            sft.setdefault((r["method"], r["seed"]), {})[r["step"]] = r
        if r["stage"] == "rl":
            rl[r["method"], r["seed"], r["init_step"]] = r
    late, middle = [i for i in rl_from if i >= 100], [i for i in rl_from if 60 <= i <= 150]
    long = {m.partition(":")[0]: m for m, _ in sft if ":steps=" in m}
    more = ":demos=256"

    # What a claim compares: each function takes a seed and gives a number, None if it has none
    # there.
    def run(m, s):
        return list(sft[m, s].values())

    def area(m):
        return lambda s: frontier_area([(r["id"], r["ood"]) for r in run(m, s)])

    def tuned(m):
        rates = [m] + [x for x in dict.fromkeys(x for x, _ in sft) if x.startswith(m + ":lr=")]

        def f(s):
            best = max(rates, key=lambda x: mean(area(x)(o) for o in M if o != s))
            return area(best)(s)
        return f

    def last(m, key):
        return lambda s: run(m, s)[-1][key]

    def minus(f, g):
        return lambda s: None if f(s) is None or g(s) is None else f(s) - g(s)

    def versus(f, a, b, *args):
        return minus(f(a, *args), f(b, *args))

    def at_id(m, level, key):
        return lambda s: next((r[key] for r in run(m, s) if r["id"] >= level), None)

    def gradient(s, key):
        bins = [b for b in M[s]["gradients"] if b["tokens"]]
        return math.log10(bins[0][key] / bins[-1][key])

    def share(s):
        sums = [b["tokens"] * (b["full"] or 0) for b in M[s]["gradients"]]
        return sums[0] / sum(sums)

    def learnt(m, bin):
        return lambda s: sft[m, s][12]["logp_bins"][bin]

    def fall(m, key="ood_b"):
        return lambda s: max(run(m, s), key=lambda r: r["ood_a"])[key] - run(m, s)[-1][key]

    def rise(m, step):
        return lambda s: sft[m, s][step]["id"] - peak(run(m, s))["id"]

    def gain(m, starts, key="ood"):
        return lambda s: mean(rl[m, s, i][key] - sft[m, s][i][key] for i in starts)

    def best_end(m, key):
        return lambda s: max((rl[m, s, i] for i in rl_from), key=lambda r: r["ood_a"])[key]

    def mean_end(m, key):
        return lambda s: mean(rl[m, s, i][key] for i in rl_from)

    def matched(m, of):
        """of(i, start) at the first start of RL with ID accuracy >= .9."""
        return lambda s: next((of(s, i, n) for i, n in enumerate(rl_from)
                               if sft[m, s][n]["id"] >= 0.9), None)

    def widens(key):    # over the starts of RL
        return lambda s: spearman([sft["sft", s][i][key] for i in rl_from],
                                  [gain("sft", [i])(s) for i in rl_from])

    def tracks(key):    # over the checkpoints behind the early one
        return lambda s: spearman(M[s][key][2:], [-sft["sft", s][i]["ood"] for i in rl_from[2:]])

    def restored(key):
        return lambda s: M[s]["restore"][key][1] - M[s]["restore"]["late"][1]

    table = [
        ("C1a", 1, "improbable tokens have larger gradients", "log10 of the norm a token, lowest "
         "bin of base probability over highest", lambda s: gradient(s, "full"),
         "the logits' gradient", lambda s: gradient(s, "logit")),
        ("C1b", 1, "and make up most of the gradient", "share of summed norms from p < .1, "
         "minus 1/2", lambda s: share(s) - 0.5),
        ("C2", 1, "improbable tokens cause the forgetting", "frontier, p < .1 masked minus as many "
         "random tokens masked", versus(area, "mask_low", "mask_random"),
         "most probable masked instead", versus(area, "mask_high", "mask_random")),
        ("C3", "1, 3", "clip forgets less OOD", "frontier, clip minus SFT",
         versus(area, "clip", "sft"), "r as a weight, no clip", versus(area, "ratio", "sft")),
        *((f"C3 ID {x}", "1, 3", "the same at matched ID", f"OOD where ID first reaches {x}",
           versus(at_id, "clip", "sft", x, "ood"), "random rules",
           versus(at_id, "clip", "sft", x, "random")) for x in (0.9, 0.95)),
        ("C3 256", "1, 3", "the same with 256 demonstrations", "frontier, clip minus SFT",
         versus(area, "clip" + more, "sft" + more), "OOD at the last step",
         versus(last, "clip" + more, "sft" + more, "ood")),
        *((f"C3 256 ID {x}", "1, 3", "the same at matched ID", f"OOD where ID first reaches {x}",
           versus(at_id, "clip" + more, "sft" + more, x, "ood"), "prior abilities",
           versus(at_id, "clip" + more, "sft" + more, x, "prior")) for x in (0.95, 0.98)),
        ("C3 tuned", "1, 3", "the same, each at its better learning rate", "frontier; the rate is "
         "picked on the other seeds", minus(tuned("clip"), tuned("sft")),
         "both at 1e-4", versus(area, "clip:lr=1e-4", "sft:lr=1e-4")),
        ("C3 end", "1, 3", "the same at the last step", "OOD, clip minus SFT",
         versus(last, "clip", "sft", "ood"), "ID", versus(last, "clip", "sft", "id")),
        ("C3 forgets", "1, 3", "the same as forgetting", "OOD lost from its own peak to the last "
         "step, SFT minus clip", versus(fall, "sft", "clip"), "as a share of SFT's",
         lambda s: 1 - fall("clip")(s) / fall("sft")(s)),
        *((f"C4 ID {x}", "1, 3", "clip keeps prior abilities", f"prior where ID first reaches {x}",
           versus(at_id, "clip", "sft", x, "prior")) for x in (0.9, 0.95)),
        ("C4 end", "1, 3", "the same at the last step", "prior, clip minus SFT",
         versus(last, "clip", "sft", "prior")),
        ("C5", 1, "clip delays improbable tokens", "log p at step 12 of training tokens with base "
         "p < .1, SFT minus clip", versus(learnt, "sft", "clip", 0),
         "tokens with p > .9", versus(learnt, "sft", "clip", 9)),
        ("C6", "1, 3", "clip matches SFT in distribution", "best ID of the run, clip minus SFT, "
         "margin .02", minus(lambda s: max(r["id"] for r in run("clip", s)),
                      lambda s: max(r["id"] for r in run("sft", s)))),
        ("C7", 3, "clip keeps entropy in prolonged training", "entropy after prolonged training",
         lambda s: versus(last, long["clip"], long["sft"], "entropy")(s), "after 500",
         lambda s: sft[long["clip"], s][500]["entropy"] - sft[long["sft"], s][500]["entropy"]),
        ("C8a", 2, "OOD peaks early in SFT, then falls", "peak, picked on half a, minus last step, "
         "both on b", fall("sft"), "in any format", fall("sft", "answer_ood")),
        ("C8b", 2, "while ID rises", "ID at step 100 minus ID at the OOD peak", rise("sft", 100),
         "at the last step", rise("sft", max(rl_from))),
        ("C8 256", 2, "the same with 256 demonstrations", "OOD at its peak minus last step",
         fall("sft" + more), "ID's rise meanwhile", rise("sft" + more, max(rl_from))),
        ("C9", 2, "RL on ID prompts restores OOD", f"after RL minus before, SFT steps {late}",
         gain("sft", late), "ID", gain("sft", late, "id")),
        ("C10", 2, "but not beyond the early peak", "peak minus best RL end", minus(
            lambda s: peak(run("sft", s))["ood"], best_end("sft", "ood_b"))),
        ("C11a", 2, "RL helps less from too early a checkpoint", f"gain from steps {middle} minus "
         f"from {rl_from[:2]}", minus(gain("sft", middle), gain("sft", rl_from[:2]))),
        ("C11b", 2, "and less from too late a one", f"gain from steps {middle} minus from "
         f"{rl_from[-1:]}", minus(gain("sft", middle), gain("sft", rl_from[-1:]))),
        ("C11c", 2, "where ID has headroom, RL heals", "rank correlation over starts: ID accuracy "
         "before RL and OOD gained, sign turned", lambda s: -widens("id")(s),
         "entropy and OOD gained", widens("entropy")),
        ("C12a", "1, 3", "RL ends higher from clip", "OOD after RL from each method's best start",
         versus(best_end, "clip", "sft", "ood_b"), "ID", versus(best_end, "clip", "sft", "id")),
        ("C12b", "1, 3", "the same over all checkpoints", f"OOD after RL, mean over {rl_from}",
         versus(mean_end, "clip", "sft", "ood"), "ID", versus(mean_end, "clip", "sft", "id")),
        ("C12c", "1, 3", "the same at matched ID", "OOD after RL from the first start of ID >= .9",
         minus(*(matched(m, lambda s, i, n, m=m: rl[m, s, n]["ood"]) for m in ("clip", "sft")))),
        ("C13a", 2, "singular values stay, more than by chance", "mean relative change, random "
         "update of equal norm minus SFT", lambda s: M[s]["spectrum_null"][0] - M[s]["spectrum"][0],
         "SFT's own change", lambda s: M[s]["spectrum"][0]),
        ("C13b", 2, "singular vectors rotate, more than by chance", "mean principal angle "
         "(degrees), SFT minus random update",
         lambda s: M[s]["spectrum"][1] - M[s]["spectrum_null"][1],
         "SFT's own angle", lambda s: M[s]["spectrum"][1]),
        ("C13c", 2, "rotation tracks OOD loss", "rank correlation over checkpoints",
         tracks("angles"), "distance instead of angle", tracks("norms")),
        ("C13d", 2, "restoring early vectors restores OOD", "OOD, late model with early vectors "
         "minus late model", restored("directions"), "early values only", restored("values")),
        ("C13e", 2, "more than a straight step back as long", "OOD, early vectors minus "
         "interpolation by the same norm (all the way at most)",
         minus(restored("directions"), restored("straight")),
         "interpolation's own gain", restored("straight")),
        *(("C14" + "ab"[kind], 1, "clip drifts less in latent space", f"{name} where ID first "
           "reaches .9, SFT minus clip", minus(*(matched(m, lambda s, i, n, m=m, k=kind:
                                                         M[s]["drift"][m][i][k])
                                                 for m in ("sft", "clip"))))
          for kind, name in ((0, "PCA-centroid drift"), (1, "mean shift"))),
        *((f"B {m}", "", f"clip beats {m}", "frontier, clip minus it", versus(area, "clip", m))
          for m in dict.fromkeys(m for m, _ in sft)
          if m not in ("sft", "clip") and not m.startswith("mask") and ":steps=" not in m
          and more not in m),
        ("B mix", "", "clip beats base-SFT interpolation", "frontier, clip minus SFT with its "
         "interpolations", minus(area("clip"), lambda s: frontier_area(
             [(r["id"], r["ood"]) for r in run("sft", s)] + [tuple(p) for p in
                                                             M[s]["interpolation"]]))),
    ]

    def over_seeds(f):
        values = []
        for s in sorted(M):
            try:
                values.append(f(s))
            except LookupError:     # a run that is not in this folder
                pass
        return [v for v in values if v is not None]
    out = []
    for id, paper, text, metric, effect, *control in table:
        values = over_seeds(effect)
        if len(values) < 2:
            continue
        margin, (m, low, high) = 0.02 * (id == "C6"), paired_ci(values)
        out.append(dict(id=id, paper=paper, claim=text, metric=metric, effect=m, ci=[low, high],
                        n=len(values), verdict="holds" if low > -margin else
                        "opposite" if high < -margin else "no difference"))
        if control and (others := over_seeds(control[1])):
            m, low, high = paired_ci(others)
            out[-1] |= dict(control=control[0], control_effect=m, control_ci=[low, high])
    return out


def claims_table(found):
    """The claims as a Markdown table."""
    def number(m, ci):
        return f"{m:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}]"
    lines = ["| id | claim: what was measured | effect [95 % CI] | n | control | verdict |",
             "|---|---|---|---|---|---|"]
    for r in found:
        control = ""
        if "control" in r:
            control = f"{r['control']}: {number(r['control_effect'], r['control_ci'])}"
        lines.append(f"| {r['id']} | {r['claim']}: {r['metric']} | {number(r['effect'], r['ci'])} "
                     f"| {r['n']} | {control} | **{r['verdict']}** |")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------- the report
def read_config(run):
    """config.json of a run folder, or BadInput."""
    try:
        return json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"{run} is not a run folder: config.json: {e}")


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


COLUMNS = dict(id="ID", ood="OOD", random="random", prior="prior", entropy="entropy",
               clip_frac="clipped")


def line(row=None):
    """One evaluated checkpoint in one line; without a row the heading."""
    if row is None:
        return f" seed {'method':22} step" + "".join(f"{name:>9}" for name in COLUMNS.values())
    name = row["method"] + (f", step {row['init_step']}, RL" if row["stage"] == "rl" else "")
    return f"{row['seed']:5d} {name:22} {row['step']:4d}" + "".join(
        f"{row[k]:9.3f}" for k in COLUMNS)


def table(rows):
    """[(label, row), ...] -> text, a line each."""
    lines = [" " * 32 + "".join(f"{c:>9}" for c in COLUMNS.values())]
    for label, row in rows:
        lines.append(f"{label:32}" + "".join(f"{row.get(k, float('nan')):9.3f}" for k in COLUMNS))
    return "\n".join(lines)


def peak(rows):
    """The row of the OOD peak: picked on one half of the OOD set; its `ood` is then the other
    half's, for the best of many on the half that picked it would flatter."""
    best = max(rows, key=lambda r: r["ood_a"])
    return best | dict(ood=best["ood_b"])


def summary(rows):
    """-> [(label, row averaged over seeds), ...]: base, and of each method its peak, the steps that
    RL starts from, and what RL made of them."""
    def average(rs):
        keys = [k for k, v in rs[0].items() if isinstance(v, (int, float))]
        return {k: mean(r[k] for r in rs) for k in keys}
    used = {r["seed"] for r in rows if r["stage"] == "sft"}
    out = [("base", average([r for r in rows if r["stage"] == "base" and r["seed"] in used]))]
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
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["stage"] == "rl")) or \
        list(dict.fromkeys(r["method"] for r in rows if r["stage"] == "sft"))
    for ax, key, title in zip(axes, ("ood", "id"), ("out of distribution: J, Q, K = 11, 12, 13",
                                                    "in distribution: J = Q = K = 10")):
        for i, (m, color) in enumerate(zip(methods, COLORS)):
            steps, columns = by_step(rows, m, key)
            band(ax, steps, columns, color, m, marker=".")
            for s, healed in zip(*by_step(rows, m, key, "rl")):
                x = s * 1.06 ** (i - (len(methods) - 1) / 2)
                ax.annotate("", (x, mean(healed)), (x, mean(columns[steps.index(s)])),
                            arrowprops=dict(arrowstyle="-|>", color=color, lw=1.6, shrinkA=0,
                                            shrinkB=0))
        ax.set(title=title, xlabel="SFT updates (log scale)", xscale="log", ylim=(0, 1.03))
        ticks = [t for t in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= max(steps)]
        ax.set_xticks(ticks, ticks)
    axes[0].set_ylabel("accuracy, greedy decoding")
    axes[0].legend(loc="lower center", title="arrow: then GRPO on ID prompts", frameon=False,
                   ncols=2)
    keep(plt, fig, path)


def plane_figure(plt, rows, path):
    """The ID-OOD plane: the trajectory of each method, means over seeds, and where RL leads from
    it."""
    fig, ax = plt.subplots(figsize=(7.5, 5.5))
    for m, color in zip(("sft", "clip"), COLORS):
        steps, xs = by_step(rows, m, "id")
        x, y = [mean(v) for v in xs], [mean(v) for v in by_step(rows, m, "ood")[1]]
        ax.plot(x, y, ".-", color=color, label=m)
        for s, end_x, end_y in zip(*by_step(rows, m, "id", "rl"), by_step(rows, m, "ood", "rl")[1]):
            i = steps.index(s)
            ax.plot(mean(end_x), mean(end_y), "^", color=color, alpha=0.6)
            ax.annotate("", (mean(end_x), mean(end_y)), (x[i], y[i]), arrowprops=dict(
                arrowstyle="-", color=color, alpha=0.45, lw=1.2, ls=":"))
            ax.annotate(s, (x[i], y[i]), textcoords="offset points", xytext=(4, 4), color=color,
                        size=9)
    ax.set(xlabel="ID accuracy", ylabel="OOD accuracy",
           title="SFT along the lines (numbers: updates), then GRPO (triangles)")
    ax.legend(frameon=False, loc="lower left")
    keep(plt, fig, path)


def study_figure(plt, rows, measured, rl_from, path):
    """Four panels: healing by start, clip fraction by base probability, rotation and its null,
    drift."""
    fig, ((heal, clip), (spin, drift)) = plt.subplots(2, 2, figsize=(10, 7.6))
    seeds = sorted(measured)
    for m, color in zip(("sft", "clip"), COLORS):
        mine = [r for r in rows if r["method"] == m]
        start = {(r["seed"], r["step"]): r["ood"] for r in mine if r["stage"] == "sft"}
        gains = {}
        for r in mine:
            if r["stage"] == "rl":
                gains.setdefault(r["init_step"], []).append(
                    r["ood"] - start[r["seed"], r["init_step"]])
        band(heal, list(gains), list(gains.values()), color, m, marker=".")
        for kind, style, name in ((1, "-", "mean shift"), (0, ":", "PCA centroid")):
            band(drift, rl_from, [[measured[s]["drift"][m][i][kind] for s in seeds]
                                  for i in range(len(rl_from))], color, f"{m}, {name}", ls=style)
    heal.axhline(0, color="black", lw=0.8)
    heal.set(title="OOD accuracy gained by GRPO", xlabel="SFT updates before GRPO", xscale="log",
             ylabel="accuracy after minus before")
    drift.set(title="Latent drift from the base", xlabel="SFT updates", ylabel="distance",
              xscale="log")
    for since, s, color in zip((8, 30, 200), (12, 60, 300), COLORS[2:]):
        bins = [r["clip_bins"] for r in rows if r["method"] == "clip" and r["stage"] == "sft"
                and r["step"] == s]
        if bins:
            band(clip, [0.05 + 0.1 * i for i in range(10)], list(zip(*bins)), color,
                 f"updates {since + 1} to {s}", marker=".")
    clip.set(title="Tokens clipped, by base probability", xlabel="base probability of the token",
             ylabel="fraction clipped", ylim=(-0.02, 1.02))
    band(spin, rl_from, [[measured[s]["angles"][i] for s in seeds] for i in range(len(rl_from))],
         COLORS[0], "sft, from its early checkpoint", marker=".")
    null = [measured[s]["spectrum_null"][1] for s in seeds]
    m, low, high = paired_ci(null)
    spin.errorbar([rl_from[-1] * 1.08], [m], [[m - low], [high - m]], fmt="s", color="black",
                  capsize=3, label="random update of the last one's norm")
    spin.set(title="Rotation of singular vectors", xlabel="SFT updates", xscale="log",
             ylabel="mean principal angle, degrees")
    for ax in (heal, clip, spin, drift):
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
    ax.set(title="Entropy on own samples", xlabel="SFT updates (log scale)", ylabel="nats a token",
           xscale="log", ylim=(0, None))
    ax.set_xticks([2, 10, 50, 200, 1000, 2000], [2, 10, 50, 200, 1000, 2000])
    ax.legend(frameon=False)
    keep(plt, fig, path)


def report(run):
    """Tables, summary.json and figures of a run folder, and of a study the claims, from what the
    run left in metrics.jsonl and cells/."""
    run, rows, rl_from = Path(run), read_rows(run), read_config(run)["rl_from"]
    if not any(r["stage"] == "sft" for r in rows):
        raise BadInput(f"{run}: no fine-tuned checkpoint yet; finish it with --resume")
    lines = summary(rows)
    print("\n" + table(lines))
    atomic_write(run / "summary.json", json.dumps(dict(lines), indent=1).encode())
    measured = {int(p.name[1:].split("-")[0]): json.loads(p.read_text(encoding="utf-8"))
                for p in (run / "cells").glob("s*-measure.json")}
    if measured:
        found = claims(rows, measured, rl_from)
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
    parser.add_argument("--show", type=int, default=0, help="print this many OOD problems and what "
                        "each checkpoint answers, the first wrong step in [brackets]")
    args = parser.parse_args(argv)
    read_config(args.run)
    show(args.run, args.show) if args.show > 0 else report(args.run)


if __name__ == "__main__":
    run_main(main)
