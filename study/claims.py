"""study/claims.py - what the three papers say, measured over fresh seeds, each with its interval.

    python study/claims.py runs/study --seed 100 --seeds 20

First runs clipsft.py with the flags below (nothing that is there is computed again), then a few
measurements on its checkpoints; writes claims.md, claims.json and the figures beside this file.
A claim is one line of claims(): effects, one a seed, of runs on the same base and the same data.
"""
import argparse
import copy
import json
import math
import random
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import eval as ev  # noqa: E402
from model import atomic, generator, load_checkpoint  # noqa: E402

STARTS = (4, 8, 16, 32, 64, 300)
EARLY, MIDDLE, LATE = STARTS[:2], STARTS[2:4], STARTS[4:]
LONG = ("sft:steps=1200", "clip:steps=1200")
CORE = ("sft", "clip", "sft:lr=1e-4", "clip:lr=1e-4")
VARIANTS = ("sft:skip=low", "sft:skip=random", *LONG, "sft:lr=3e-5", "clip:eps_high=0.1",
            "clip:eps_high=inf", "clip:old_every=24", "clip:old_every=24,passes=3,eps_high=0.5",
            "sft:old_every=24,passes=3", "clip:old_every=300", "dft", "kl")    # on a third of seeds
T_999 = [
    636.619, 31.599, 12.924, 8.610, 6.869, 5.959, 5.408, 5.041, 4.781, 4.587, 4.437, 4.318, 4.221,
    4.140, 4.073, 4.015, 3.965, 3.922, 3.883]    # Student's t, 99.9 %: thirty claims are tested

@torch.no_grad()
def layer_means(model, ids, mask):
    """Mean hidden state of each row's response after the embedding and each block: [(B, C), ...]"""
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[:ids.shape[1]]
    out = []
    for block in (torch.nn.Identity(), *model.transformer.h):
        x = block(x)
        out.append((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return out

def matrices(model):
    return {n: p.detach() for n, p in model.transformer.h.named_parameters() if p.dim() == 2}

def spectrum(pairs):
    """Of each matrix' leading half: mean |relative change of a value|, mean angle in degrees."""
    half = [min(a.shape) // 2 for a, _ in pairs]
    return (ev.mean(ev.singular_value_shift(a, b)[:k].abs().mean().item()
                    for (a, b), k in zip(pairs, half)),
            math.degrees(ev.mean(torch.cat(ev.principal_angles(a, b, k)).mean().item()
                                 for (a, b), k in zip(pairs, half))))

def measure(run, seed):
    """-> one flat dict of numbers on the checkpoints of a seed."""
    torch.set_num_threads(1)
    rows = {(r["method"], r["stage"], r["step"]): r for r in ev.read_rows(run) if r["seed"] == seed}
    config = ev.read_json(Path(run) / "config.json")

    def load(*parts):
        return load_checkpoint(Path(run) / "ckpt" / f"{'-'.join(map(str, parts))}.pt")

    def random_like(W, *key):
        return torch.randn(W.shape, generator=generator("cpu", seed, *key))
    base, out = load(f"s{seed}", "base"), dict(seed=seed)
    bins = ev.gradient_norm_by_probability(base, *data.demonstrations(256, seed))
    total = sum(n * norm for n, norm in bins if n)
    out["gradient"] = math.log10(bins[0][1] / bins[9][1])
    out["gradient_share"] = bins[0][0] * bins[0][1] / total
    out["low_share"] = bins[0][0] / sum(n for n, _ in bins)

    # Latent drift on what SFT does not teach, where ID first reaches .95 among the starts of RL.
    rng = random.Random("probe")
    asked = [data.draw(rng, "eval", op) for op in "EMRDC" * 25]
    other = data.batch([(p.prompt, data.chain(p.values) if p.op == "E" else data.truth(p))
                        for p in asked])
    at_base = layer_means(base, *other)
    for m in ("sft", "clip"):
        step = next((n for n in STARTS if rows[m, "sft", n]["id"] >= 0.95), None)
        if step:
            drift = ev.representation_drift(at_base, layer_means(load(f"s{seed}", m, step), *other))
            out[f"pca_{m}"], out[f"drift_{m}"] = drift
    # Spectra from the early checkpoint (the best start of RL on OOD half a) to the last, beside two
    # random updates of equal norm: of any spectrum, and of the same.
    first = max(STARTS[:-1], key=lambda n: rows["sft", "sft", n]["ood_a"])
    early, late = load(f"s{seed}", "sft", first), load(f"s{seed}", "sft", STARTS[-1])
    W0, W1 = matrices(early), matrices(late)
    any_update, same_spectrum = {}, {}
    for n, a in W0.items():
        noise = random_like(a, n)
        any_update[n] = a + noise * (W1[n] - a).norm() / noise.norm()
        s = torch.linalg.svdvals(W1[n] - a)
        U, V = (torch.linalg.qr(random_like(a.new_empty(size, len(s)), n, side))[0]
                for side, size in enumerate(a.shape))
        same_spectrum[n] = a + U * s @ V.T
    for name, other in ("", W1), ("_null", any_update), ("_same", same_spectrum):
        out["shift" + name], out["angle" + name] = spectrum([(W0[n], other[n]) for n in W0])
    # The leading fifth of the early directions put back into the late model, beside a straight step
    # towards the early matrices that is as long.
    fifth = {n: ev.restore_directions(W0[n], W1[n], -(-min(w.shape) // 5)) for n, w in W0.items()}
    share = {n: ((fifth[n] - W1[n]).norm() / (W0[n] - W1[n]).norm()).clamp(max=1) for n in W0}
    for name, new in (("late", W1), ("fifth", fifth),
                      ("straight", {n: W1[n] + share[n] * (W0[n] - W1[n]) for n in W0})):
        model = copy.deepcopy(late)
        model.transformer.h.load_state_dict(new, strict=False)
        out["ood_" + name] = ev.evaluate(model, base, config["eval_n"])["ood"]
    return out

def verdict(effect, atleast=0.0, margin=0.03):
    """-> (mean, half of the 95 % interval, n, verdict, sure). 'holds' where the interval lies above
    atleast, 'opposite' where below, 'no difference' within +-margin of it, 'undecided' otherwise
    and below three seeds. sure: the 99.9 % interval says the same."""
    x = [float(v) for v in effect if np.isfinite(v)]

    def judge(m, half):
        low, high = m - half - atleast, m + half - atleast
        return "undecided" if len(x) < 3 else "holds" if low > 0 else "opposite" if high < 0 else \
            "no difference" if max(-low, high) < margin else "undecided"
    said = judge(*ev.interval(x)) if x else "undecided"
    sure = said != "undecided" and judge(*ev.interval(x, T_999)) == said
    return *(ev.interval(x) if x else (math.nan, math.nan)), len(x), said, sure

def selectors(rows):
    """-> (at, after): arrays over seeds, nan where there is no such row."""
    curves, seeds = ev.curves_of(rows), sorted({r["seed"] for r in rows})
    ends = {(r["method"], r["step"], r["seed"]): r for r in rows if r["stage"] == "rl"}

    def at(key, method, where):
        """key of the row that where(curve) finds in each seed's SFT run."""
        found = [curves.get(method, {}).get(s) for s in seeds]
        return np.array([(curve and where(curve) or {}).get(key, np.nan) for curve in found])

    def after(key, method, *starts):
        """key after RL, the mean over starts."""
        return np.mean([[ends.get((method, n, s), {}).get(key, np.nan) for s in seeds]
                        for n in starts], 0)
    return at, after

def end(curve):
    return curve[-1]

def at_id(level):
    return lambda curve: ev.first_at(curve, level)

def at_step(n):
    return lambda curve: next((r for r in curve if r["step"] == n), None)

def best(method, rows, key, pick="ood_a", starts=STARTS):
    """key after RL from each seed's best start, picked by half a of the OOD set."""
    ends = [r for r in rows if r["stage"] == "rl" and r["method"] == method and r["step"] in starts]
    return np.array([max((r for r in ends if r["seed"] == s), key=lambda r: r[pick],
                         default={}).get(key, np.nan) for s in sorted({r["seed"] for r in rows})])

def claims(rows, extra):
    """-> [(id, paper, what it says, what was measured, effects, {atleast, margin, beside}), ...]"""
    at, after = selectors(rows)
    x = defaultdict(lambda: np.full(len(extra), np.nan),
                    {k: np.array([r.get(k, np.nan) for r in extra]) for k in set().union(*extra)})

    def differ(key, where, a="clip", b="sft"):
        return at(key, a, where) - at(key, b, where)

    def gain(*starts, key="ood", method="sft"):
        return after(key, method, *starts) - np.mean([at(key, method, at_step(n))
                                                      for n in starts], 0)

    def keeps(key, a="clip", b="sft"):    # where ID first reaches .95 and where .98: the mean
        return np.mean([differ(key, at_id(level), a, b) for level in (0.95, 0.98)], 0)

    def from_best(key):
        return best("clip", rows, key) - best("sft", rows, key)

    def from_equal_id(key):
        """key after RL from the first start with ID of .95, clip minus SFT."""
        steps = {m: at("step", m, lambda curve: next((r for r in curve if r["step"] in STARTS
                                                      and r["id"] >= 0.95), None))
                 for m in ("clip", "sft")}
        ends = {m: np.nansum([np.where(steps[m] == n, after(key, m, n), np.nan) for n in STARTS], 0)
                + 0 * steps[m] for m in steps}
        return ends["clip"] - ends["sft"]
    free = dict(margin=0.0)    # nats, degrees: "no difference" has no meaning
    top, slow = at("ood", "sft", ev.peak), ("clip:lr=1e-4", "sft:lr=1e-4")
    return [
        ("gradient", "1", "improbable tokens have larger gradients", "log10 of the gradient norm "
         "of a token, base p < .1 over p > .9", x["gradient"],
         free | dict(beside=("share of the norms minus of the tokens",
                             x["gradient_share"] - x["low_share"]))),
        ("skip", "1", "improbable tokens cause the forgetting", "M, R, D, C at the end: p < .1 "
         "left out, minus as many random tokens left out",
         differ("prior", end, "sft:skip=low", "sft:skip=random"),
         dict(beside=("ID", differ("id", end, "sft:skip=low", "sft:skip=random")))),
        ("order", "1", "clip learns improbable tokens later", "log p at update 16 where base "
         "p < .1, SFT minus clip", differ("logp_low", at_step(16), "sft", "clip"),
         free | dict(beside=("p > .9", differ("logp_high", at_step(16), "sft", "clip")))),
        *((f"keep {key}", "1, 3", f"clip keeps {what}", "at ID .95 and .98, clip minus SFT",
           keeps(key), dict(beside=("at the end", differ(key, end))))
          for key, what in (("prior", "M, R, D, C"), ("explained", "E under the OOD rule"),
                            ("ood_any", "OOD in any format"), ("ood", "OOD, strict"))),
        *((f"best rate {key}", "1, 3", f"also against SFT at its best rate: {what}",
           "the same, both with lr 1e-4", keeps(key, *slow),
           dict(beside=("clip with 3e-4", keeps(key, "clip", slow[1]))))
          for key, what in (("prior", "M, R, D, C"), ("ood", "OOD, strict"))),
        ("ID parity", "1, 3", "clip is no worse in distribution", "best ID of the run, clip minus "
         "SFT, above -.02", at("id", "clip", lambda c: max(c, key=lambda r: r["id"]))
         - at("id", "sft", lambda c: max(c, key=lambda r: r["id"])), dict(atleast=-0.02)),
        ("peak", "2", "OOD peaks early, then falls while ID rises", "peak minus end of SFT",
         top - at("ood_b", "sft", end),
         dict(beside=("ID, end minus peak", at("id", "sft", end) - at("id", "sft", ev.peak)))),
        ("cold start", "2", "RL needs SFT first", "OOD after RL from SFT's best start, minus from "
         "the base", best("sft", rows, "ood_b") - after("ood_b", "base", 0),
         dict(beside=("ID after RL from the base", after("id", "base", 0)))),
        *((f"heal {name}", "2", f"RL on ID prompts heals OOD, {name}", f"OOD after RL minus "
           f"before: {starts}", gain(*starts), dict(beside=("clip", gain(*starts, method="clip"))))
          for name, starts in (("early", EARLY), ("middle", MIDDLE), ("late", LATE))),
        ("bound", "2", "but not beyond the early peak", "SFT's peak minus RL's best end from "
         "updates 16 on", top - best("sft", rows, "ood_b", starts=STARTS[2:]),
         dict(beside=("from any start", top - best("sft", rows, "ood_b")))),
        ("too early", "2", "RL from too early a checkpoint ends lower", f"OOD after RL from steps "
         f"{MIDDLE} minus from 4", after("ood", "sft", *MIDDLE) - after("ood", "sft", 4), {}),
        ("too late", "2", "and from too late a one", f"the same minus from {LATE}",
         after("ood", "sft", *MIDDLE) - after("ood", "sft", *LATE), {}),
        *((f"RL {name} {key}", "1, 3", f"RL ends higher from clip: {what}",
           f"after RL from {start}, clip minus SFT", effect(key), {})
          for name, effect, start in (
              ("best", from_best, "each one's best start"),
              ("equal", from_equal_id, "the first start with ID of .95"))
          for key, what in (("ood_b", "OOD"), ("prior", "M, R, D, C"))),
        ("values", "2", "singular values stay, more than by chance", "mean relative change, random "
         "update of equal norm minus SFT", x["shift_null"] - x["shift"],
         free | dict(beside=("SFT's own", x["shift"]))),
        ("vectors", "2", "singular vectors rotate, more than by chance", "mean angle in degrees, "
         "SFT minus random update of equal spectrum", x["angle"] - x["angle_same"],
         free | dict(beside=("SFT's own", x["angle"]))),
        ("restore", "2", "restoring early vectors restores OOD", "OOD, late model with the leading "
         "fifth of the early vectors, minus with a straight step back as long",
         x["ood_fifth"] - x["ood_straight"],
         dict(beside=("minus late model", x["ood_fifth"] - x["ood_late"]))),
        ("drift", "1", "clip drifts less in latent space", "mean shift on other tasks at the "
         "first start of RL with ID of .95, SFT minus clip", x["drift_sft"] - x["drift_clip"],
         free | dict(beside=("the paper's PCA centroid", x["pca_sft"] - x["pca_clip"]))),
        ("entropy", "3", "clip keeps entropy in prolonged training", "entropy after 1,200 updates, "
         "clip minus SFT", differ("entropy", end, LONG[1], LONG[0]),
         free | dict(beside=("ID of SFT then", at("id", LONG[0], end)))),
    ]

def tables(rows, extra):
    """-> (list of dicts, one a claim; Markdown of the claims and of the variants)."""
    def show(m, half):
        return f"{m:+.3f} ± {half:.3f}"
    found, text = [], ["| claim | paper | what it says: what was measured | effect ± 95 % | n "
                       "| verdict | beside it |", "|---|---|---|---|---|---|---|"]
    for id, paper, says, what, effect, more in claims(rows, extra):
        beside, more = more.get("beside"), {k: v for k, v in more.items() if k != "beside"}
        m, half, n, said, sure = verdict(effect, **more)
        r = dict(id=id, paper=paper, claim=says, metric=what, effect=m, half=half, n=n,
                 verdict=said, sure=sure, **more)
        if beside:
            r |= dict(zip(("beside", "beside_effect", "beside_half"),
                          (beside[0], *verdict(beside[1])[:2])))
        found.append(r)
        aside = f"{beside[0]} {show(*verdict(beside[1])[:2])}" if beside else ""
        text.append(f"| {id} | {paper} | {says}: {what} | {show(m, half)} | {n} | "
                    f"{'**' * sure}{said}{'**' * sure} | {aside} |")
    at, _ = selectors(rows)
    keys = ("id", "ood", "ood_any", "explained", "prior")
    text += ["", "| variant | " + " | ".join(f"{ev.COLUMNS[k]} at the end" for k in keys)
             + " | M R D C where ID first reaches .95, minus SFT | OOD there | n |",
             "|---" * (len(keys) + 4) + "|"]
    for m in ev.curves_of(rows):
        ends = " | ".join(f"{np.nanmean(at(k, m, end)):.3f}" for k in keys)
        gaps = [verdict(at(k, m, at_id(0.95)) - at(k, "sft", at_id(0.95)))
                for k in ("prior", "ood")]
        text.append(f"| {m} | {ends} | " + " | ".join(
            show(*g[:2]) if g[2] else "not reached" for g in gaps) + f" | {gaps[0][2]} |")
    return found, "\n".join(text) + "\n"

def idea_figure(fig):
    """The weight on grad log pi of a token against r, with p_old = .2."""
    ax, r = fig.subplots(), np.linspace(0.3, 2, 500)
    for name, weight, style in (("SFT", np.ones_like(r), "-"), ("DFT: the probability, here .2 r",
                                                               0.2 * r, "--"),
                                ("clip = GRPO, A = 1", np.where(r <= 1.28, r, 0), "-"),
                                ("GRPO, A = -1", np.where(r >= 0.8, -r, 0), ":")):
        ax.plot(r, weight, style, label=name, lw=2)
    ax.set(xlabel="r = probability now / at the last refresh", ylabel="weight on its gradient")
    ax.axvline(1, color="gray", lw=0.8)
    ax.legend(loc="lower left", frameon=False, fontsize=8)
    ax.grid(alpha=0.25)

def trade_figure(fig, rows):
    """M, R, D, C against ID accuracy along SFT and clip at two rates; RL's ends by start."""
    left, right = fig.subplots(1, 2)
    at, _ = selectors(rows)
    colors = dict(zip(CORE, ("#d1495b", "#2e86ab", "#66a182", "#edae49")))
    for m, color in colors.items():
        points = {lv: [v for v in at("prior", m, at_id(lv)) if np.isfinite(v)]
                  for lv in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)}
        if points := {lv: v for lv, v in points.items() if v}:
            ev.draw(left, points, color, label=m, marker=".")
    left.set(xlabel="ID accuracy first reached (matched ID)", ylabel="M, R, D, C", xlim=(0.65, 1))
    for m in ("sft", "clip"):
        before = ev.by_step([r for r in rows if r["step"] in STARTS], m, "ood")
        ev.draw(right, before, colors[m], ls="--", label=f"{m}, before RL")
        ev.draw(right, ev.by_step(rows, m, "ood", "rl"), colors[m], marker="^", label=f"{m}, after")
    right.set(xscale="log", xlabel="SFT updates before RL (log scale)", ylabel="OOD accuracy")
    right.set_xticks(STARTS, STARTS)
    right.minorticks_off()
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9)
        ax.grid(alpha=0.25)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder, made or finished first")
    parser.add_argument("--seed", type=int, default=100, help="first seed")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more for clipsft.py")
    args = parser.parse_args()
    here, run = Path(__file__).parent, Path(args.run)
    for seeds, methods in (args.seeds, CORE), (-(-args.seeds // 3), VARIANTS):
        done = subprocess.run([sys.executable, here.parent / "clipsft.py", "--out_dir", run,
                               "--seed", str(args.seed), "--seeds", str(seeds), "--rl_from",
                               *map(str, STARTS), "--methods", *methods, *args.flags])
        done.returncode and sys.exit(done.returncode)
    rows = ev.read_rows(run)
    seeds = sorted({r["seed"] for r in rows})
    todo = [s for s in seeds if not (run / f"measure-{s}.json").exists()]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for s, row in zip(todo, pool.map(measure, [args.run] * len(todo), todo)):
            with atomic(run / f"measure-{s}.json") as tmp:
                tmp.write_text(json.dumps(row))
    found, text = tables(rows, [ev.read_json(run / f"measure-{s}.json") for s in seeds])
    for name, content in (("claims.json", json.dumps(found, indent=1)), ("claims.md", text)):
        with atomic(here / name) as tmp:
            tmp.write_text(content, encoding="utf-8")
    print(text)
    both = [r for r in rows if r["method"] in ("base", "sft", "clip")]
    ev.save_figure(here / "summary.png", ev.summary_figure, both)
    ev.save_figure(here / "trade.png", trade_figure, rows)
    ev.save_figure(here / "idea.png", idea_figure, size=(5, 3.4))

if __name__ == "__main__":
    main()
