"""study/claims.py - what the three papers say, measured over fresh seeds, each with its interval.

    python study/claims.py runs/study

Runs clipsft.py in two processes, then measures on its checkpoints (what is in the run folder is
not computed again), then judges the claims; writes claims.json, claims.md and the figures beside
this file. Every effect is a difference within a seed: the same base, the same data.

In this order: the experiment, measurements, picks of rows, verdicts, claims, tables, figures.
"""
import argparse
import copy
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clipsft  # noqa: E402
import data  # noqa: E402
import eval as ev  # noqa: E402
from model import generator, load_checkpoint  # noqa: E402

FIRST_SEED = 100    # nothing was tuned on these
SEEDS = 20
PROCESSES = 2
STARTS = (4, 8, 16, 32, 64, 300)    # SFT updates that RL starts from
EARLY = (4, 8)
MIDDLE = (16, 32)
LATE = (64, 300)
CORE = ("sft", "clip", "sft-slow", "clip-slow")
VARIANTS = ("sft-skip-low", "sft-skip-random", "sft-long", "clip-long", "sft-slower", "clip-tight",
            "clip-unbounded", "clip-every-24", "clip-paper1", "sft-three-passes", "clip-frozen",
            "dft", "kl")    # on the first third of the seeds

LEVELS = (0.95, 0.98)    # of ID accuracy, where methods are compared
MARGIN = 0.03            # an accuracy that differs by less does not differ
NO_MARGIN = 0.0          # nats, degrees: "no difference" has no meaning there
ROUNDING = 1e-9          # an effect of less is none: 1/3 + 1/3 - 2/3 need not be 0
T_999 = [
    636.619, 31.599, 12.924, 8.610, 6.869, 5.959, 5.408, 5.041, 4.781, 4.587, 4.437, 4.318, 4.221,
    4.140, 4.073, 4.015, 3.965, 3.922, 3.883]    # Student's t, 99.9 %: many claims are tested


# ================================================================= the experiment
def run_experiment(run, seeds, methods, flags):
    """Run clipsft.py on seeds, a share of them in each process. Ends here if one of them fails."""
    share = math.ceil(len(seeds) / PROCESSES)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    processes = []
    for first in range(0, len(seeds), share):
        mine = seeds[first:first + share]
        command = [sys.executable, HERE.parent / "clipsft.py", "--out_dir", run,
                   "--seed", str(mine[0]), "--seeds", str(len(mine)),
                   "--rl_from", *map(str, STARTS), "--methods", *methods, *flags]
        processes.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("error: clipsft.py failed, see above")


# ================================================================= measurements on checkpoints
def load(run, seed, name):
    """The checkpoint "base", or that of a method and a step, "sft-300" -> model."""
    return load_checkpoint(Path(run) / f"s{seed}-{name}.pt")


def gradients(base, seed):
    """The gradient of an improbable token (base p < .1) beside that of a probable one (p > .9):
    log10 of the ratio of their norms; its share of the summed norms, and of the tokens."""
    bins = ev.gradient_norm_by_probability(base, *data.demonstrations(256, seed))
    low_tokens, low_norm = bins[0]
    _, high_norm = bins[9]
    tokens = 0
    norms = 0.0
    for count, norm in bins:
        tokens += count
        if count > 0:
            norms += count * norm
    return dict(gradient=math.log10(low_norm / high_norm),
                gradient_share=low_tokens * low_norm / norms,
                token_share=low_tokens / tokens)


def other_tasks():
    """Held-out questions that SFT does not teach, answered right -> ids (125, T), mask (125, T)."""
    rng = random.Random("probe")
    pairs = []
    for op in "EMRDC" * 25:
        problem = data.draw(rng, "eval", op)
        answer = data.chain(problem.values) if op == "E" else data.truth(problem)
        pairs.append((problem.prompt, answer))
    return data.batch(pairs)


def response_mean(x, mask):
    """The mean over each row's response: x (B, T, C), mask (B, T) -> (B, C)."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def layer_means(model, ids, mask):
    """response_mean of the hidden states after the embedding and after each block: ids, mask
    (B, T) -> a list of (B, C)."""
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[:ids.shape[1]]
    means = [response_mean(x, mask)]
    for block in model.transformer.h:
        x = block(x)
        means.append(response_mean(x, mask))
    return means


def drift(run, seed, rows):
    """How far SFT and clip have moved the hidden states on other tasks at the first start of RL
    with ID accuracy of .95, as representation_drift says it; without such a start nothing."""
    ids, mask = other_tasks()
    at_base = layer_means(load(run, seed, "base"), ids, mask)
    numbers = {}
    for method in ("sft", "clip"):
        row = start_at_id(rows, method, seed)
        if row is None:
            continue
        model = load(run, seed, f"{method}-{row['step']}")
        centroid, shift = ev.representation_drift(at_base, layer_means(model, ids, mask))
        numbers[f"centroid_{method}"] = centroid
        numbers[f"drift_{method}"] = shift
    return numbers


def matrices(model):
    """The weight matrices of the blocks by name."""
    return {name: p.detach() for name, p in model.transformer.h.named_parameters() if p.dim() == 2}


def normal(shape, *key):
    return torch.randn(shape, generator=generator("cpu", *key))


def random_update(update, *key):
    """A random matrix (m, n) with the norm of `update`."""
    noise = normal(update.shape, *key)
    return noise * update.norm() / noise.norm()


def same_spectrum(update, *key):
    """A random matrix (m, n) with the singular values of `update`."""
    s = torch.linalg.svdvals(update)
    U, _ = torch.linalg.qr(normal((update.shape[0], len(s)), *key, 0))
    V, _ = torch.linalg.qr(normal((update.shape[1], len(s)), *key, 1))
    return U * s @ V.T


def spectral_change(before, after):
    """Of the leading half of each matrix, means over matrices: |relative change of a singular
    value|, angle between the singular subspaces in degrees. Both arguments as from matrices()."""
    shifts = []
    angles = []
    for name, W0 in before.items():
        half = min(W0.shape) // 2
        shift = ev.singular_value_shift(W0, after[name])[:half]
        left, right = ev.principal_angles(W0, after[name], half)
        shifts.append(shift.abs().mean().item())
        angles.append(torch.cat([left, right]).mean().item())
    return ev.mean(shifts), math.degrees(ev.mean(angles))


def spectra(early, late, seed):
    """spectral_change from the early model to the late one, beside what random updates do: of the
    same norm (_null), of the same spectrum (_same)."""
    before = matrices(early)
    after = matrices(late)
    null = {}
    same = {}
    for name, W0 in before.items():
        update = after[name] - W0
        null[name] = W0 + random_update(update, seed, name)
        same[name] = W0 + same_spectrum(update, seed, name)
    shift, angle = spectral_change(before, after)
    shift_null, angle_null = spectral_change(before, null)
    shift_same, angle_same = spectral_change(before, same)
    return dict(shift=shift, angle=angle, shift_null=shift_null, angle_null=angle_null,
                shift_same=shift_same, angle_same=angle_same)


def with_matrices(model, weights):
    """A copy of the model with these weight matrices in its blocks."""
    model = copy.deepcopy(model)
    model.transformer.h.load_state_dict(weights, strict=False)
    return model


def restoration(early, late, base, eval_n):
    """OOD accuracy of the late model; with the leading fifth of the early singular vectors put
    back; with a straight step towards the early matrices that is as long, at most all the way."""
    fifth = {}
    straight = {}
    before = matrices(early)
    for name, W1 in matrices(late).items():
        W0 = before[name]
        fifth[name] = ev.restore_directions(W0, W1, math.ceil(min(W1.shape) / 5))
        share = (fifth[name] - W1).norm() / (W0 - W1).norm()
        straight[name] = W1 + share.clamp(max=1) * (W0 - W1)
    models = dict(late=late, fifth=with_matrices(late, fifth),
                  straight=with_matrices(late, straight))
    numbers = {}
    for name, model in models.items():
        numbers[f"ood_{name}"] = ev.evaluate(model, base, eval_n)["ood"]
    return numbers


def best_early_step(rows, seed):
    """The step among STARTS but the last at which SFT has its best OOD, on half a."""
    curve = ev.run_of(rows, "sft", seed)
    early = [row for row in curve if row["step"] in STARTS[:-1]]
    return ev.peak(early)["step"]


def measure(run, seed, rows, eval_n):
    """All measurements on the checkpoints of a seed -> a dict of numbers."""
    base = load(run, seed, "base")
    early = load(run, seed, f"sft-{best_early_step(rows, seed)}")
    late = load(run, seed, f"sft-{STARTS[-1]}")
    numbers = gradients(base, seed)
    numbers.update(drift(run, seed, rows))
    numbers.update(spectra(early, late, seed))
    numbers.update(restoration(early, late, base, eval_n))
    return numbers


def measured(run, seed, rows):
    """measure(), kept in the run folder beside the settings that it depends on. Made anew if they
    differ or a checkpoint is newer; after a change of the measurements delete measured-*.json."""
    path = Path(run) / f"measured-s{seed}.json"
    settings = dict(starts=list(STARTS))
    for method in ("base", "sft", "clip"):
        settings[method] = ev.read_json(clipsft.job_path(run, seed, method))["settings"]
    if not is_current(path, settings, Path(run).glob(f"s{seed}-*.pt")):
        numbers = measure(run, seed, rows, settings["base"]["eval_n"])
        numbers = {name: ev.finite(number) for name, number in numbers.items()}
        ev.write_json(path, dict(settings=settings, numbers=numbers))
    numbers = ev.read_json(path)["numbers"]
    return {name: math.nan if number is None else number for name, number in numbers.items()}


def is_current(path, settings, checkpoints):
    """Whether a file of measurements has these settings and is as new as every checkpoint."""
    if not path.exists():
        return False
    newest = max(checkpoint.stat().st_mtime for checkpoint in checkpoints)
    return path.stat().st_mtime >= newest and ev.read_json(path)["settings"] == settings


# ================================================================= picks of rows
# A pick is a function (rows, method, seed) -> the row that is looked at, or None without one.
at_end = ev.pick_end
after_rl = ev.pick_rl    # after_rl(step) is a pick


def at_step(step):
    def pick(rows, method, seed):
        return ev.row_at(ev.run_of(rows, method, seed), step)
    return pick


def at_id(level):
    """The first row with ID accuracy of at least level."""
    def pick(rows, method, seed):
        return ev.first_at(ev.run_of(rows, method, seed), level)
    return pick


def at_peak(rows, method, seed):
    """The row of the best OOD, picked on half a of the problems; its `ood` is that of half b."""
    curve = ev.run_of(rows, method, seed)
    return ev.peak(curve) if curve else None


def at_best_id(rows, method, seed):
    curve = ev.run_of(rows, method, seed)
    return max(curve, key=lambda row: row["id"], default=None)


def start_at_id(rows, method, seed, level=0.95):
    """The first start of RL with ID accuracy of at least level, before RL."""
    starts = [row for row in ev.run_of(rows, method, seed) if row["step"] in STARTS]
    return ev.first_at(starts, level)


def after_rl_from_equal_id(rows, method, seed):
    """What RL makes of start_at_id."""
    start = start_at_id(rows, method, seed)
    if start is None:
        return None
    return after_rl(start["step"])(rows, method, seed)


def best_after_rl(starts):
    """After RL from its best start among these, picked on half a of the OOD problems."""
    def pick(rows, method, seed):
        ends = [row for row in ev.run_of(rows, method, seed, "rl") if row["step"] in starts]
        return max(ends, key=lambda row: row["ood_a"], default=None)
    return pick


def values(rows, key, method, *picks):
    """One value a seed of rows: key of the picked row, the mean over picks -> (seeds,). nan where
    a row is missing: it never counts as 0, nor is a mean taken over the others."""
    found = []
    for seed in ev.seeds_of(rows):
        numbers = []
        for pick in picks:
            row = pick(rows, method, seed)
            numbers.append(math.nan if row is None else row[key])
        found.append(ev.mean(numbers))
    return np.array(found)


def difference(rows, key, method, other, *picks):
    """method minus other, one value a seed."""
    return values(rows, key, method, *picks) - values(rows, key, other, *picks)


def gain_by_rl(rows, key, method, starts):
    """After RL minus before it, the mean over starts, one value a seed."""
    after = values(rows, key, method, *[after_rl(step) for step in starts])
    before = values(rows, key, method, *[at_step(step) for step in starts])
    return after - before


def column(measurements, name):
    """One measured number a seed, nan where it is missing -> (seeds,)."""
    return np.array([numbers.get(name, math.nan) for numbers in measurements])


# ================================================================= verdicts
@dataclass
class Verdict:
    effect: float    # the mean over seeds
    half: float      # half of its 95 % interval
    n: int           # seeds with a value
    verdict: str     # holds, opposite, no difference or undecided
    sure: bool       # the 99.9 % interval says the same
    above: int       # seeds with a value above 0


def judge(low, high, margin):
    """What an interval of an effect says, at_least already taken off."""
    if low > ROUNDING:
        return "holds"
    if high < -ROUNDING:
        return "opposite"
    if -margin < low and high < margin:
        return "no difference"
    return "undecided"


def verdict(effects, at_least=0.0, margin=MARGIN):
    """One effect a seed -> Verdict: 'holds' where the interval lies above at_least, 'opposite'
    where below, 'no difference' where within +-margin of it; 'undecided' otherwise, and below
    three seeds. nan is a seed without a value."""
    finite = [float(effect) for effect in effects if math.isfinite(effect)]
    n = len(finite)
    middle, half = ev.interval(finite)
    above = sum(effect > ROUNDING for effect in finite)
    if n < 3:
        return Verdict(middle, half, n, "undecided", False, above)
    _, wide = ev.interval(finite, T_999)
    distance = middle - at_least
    said = judge(distance - half, distance + half, margin)
    said_wide = judge(distance - wide, distance + wide, margin)
    sure = said != "undecided" and said_wide == said
    return Verdict(middle, half, n, said, sure, above)


# ================================================================= claims
@dataclass
class Claim:
    id: str
    paper: str
    says: str
    measured: str
    effects: np.ndarray     # one a seed
    at_least: float = 0.0
    margin: float = MARGIN
    beside: str = ""        # what else is shown
    beside_effects: tuple = ()

    def verdict(self):
        return verdict(self.effects, self.at_least, self.margin)


ABILITIES = dict(prior="M, R, D, C", explained="E under the OOD rule",
                 ood_any="OOD in any format", ood="OOD, strict")


def claims_on_improbable_tokens(rows, measurements):
    share = column(measurements, "gradient_share") - column(measurements, "token_share")
    yield Claim("gradient", "1", "improbable tokens have larger gradients",
                "log10 of the gradient norm of a token, base p < .1 over p > .9",
                column(measurements, "gradient"), margin=NO_MARGIN,
                beside="share of the norms minus of the tokens", beside_effects=share)
    yield Claim("skip", "1", "improbable tokens cause the forgetting",
                "M, R, D, C at the end: p < .1 left out, minus as many random tokens left out",
                difference(rows, "prior", "sft-skip-low", "sft-skip-random", at_end),
                beside="ID",
                beside_effects=difference(rows, "id", "sft-skip-low", "sft-skip-random", at_end))
    yield Claim("order", "1", "clip learns improbable tokens later",
                "log p at update 16 where base p < .1, SFT minus clip",
                difference(rows, "logp_low", "sft", "clip", at_step(16)), margin=NO_MARGIN,
                beside="p > .9",
                beside_effects=difference(rows, "logp_high", "sft", "clip", at_step(16)))


def claims_on_forgetting(rows):
    matched = [at_id(level) for level in LEVELS]
    for key, ability in ABILITIES.items():
        yield Claim(f"keep {key}", "1, 3", f"clip keeps {ability}",
                    "at ID .95 and .98, clip minus SFT",
                    difference(rows, key, "clip", "sft", *matched),
                    beside="at the end",
                    beside_effects=difference(rows, key, "clip", "sft", at_end))
    for key in ("prior", "ood"):
        yield Claim(f"best rate {key}", "1, 3",
                    f"also against SFT at its best rate: {ABILITIES[key]}",
                    "the same, both with lr 1e-4",
                    difference(rows, key, "clip-slow", "sft-slow", *matched),
                    beside="clip with 3e-4",
                    beside_effects=difference(rows, key, "clip", "sft-slow", *matched))
    yield Claim("ID parity", "1, 3", "clip is no worse in distribution",
                "best ID of the run, clip minus SFT, above -.02",
                difference(rows, "id", "clip", "sft", at_best_id), at_least=-0.02)
    yield Claim("peak", "2", "OOD peaks early, then falls while ID rises", "peak minus end of SFT",
                values(rows, "ood", "sft", at_peak) - values(rows, "ood_b", "sft", at_end),
                beside="ID, end minus peak",
                beside_effects=(values(rows, "id", "sft", at_end)
                                - values(rows, "id", "sft", at_peak)))


def claims_on_rl(rows):
    peak = values(rows, "ood", "sft", at_peak)
    best = values(rows, "ood_b", "sft", best_after_rl(STARTS))
    yield Claim("cold start", "2", "RL needs SFT first",
                "OOD after RL from SFT's best start, minus from the base",
                best - values(rows, "ood_b", "base", after_rl(0)),
                beside="ID after RL from the base",
                beside_effects=values(rows, "id", "base", after_rl(0)))
    for name, starts in dict(early=EARLY, middle=MIDDLE, late=LATE).items():
        yield Claim(f"heal {name}", "2", f"RL on ID prompts heals OOD, {name}",
                    f"OOD after RL minus before: {starts}",
                    gain_by_rl(rows, "ood", "sft", starts),
                    beside="clip", beside_effects=gain_by_rl(rows, "ood", "clip", starts))
    yield Claim("bound", "2", "but not beyond the early peak",
                f"SFT's peak minus RL's best end from updates {MIDDLE[0]} on",
                peak - values(rows, "ood_b", "sft", best_after_rl(MIDDLE + LATE)),
                beside="from any start", beside_effects=peak - best)
    first = values(rows, "ood", "sft", after_rl(STARTS[0]))
    middle = values(rows, "ood", "sft", *[after_rl(step) for step in MIDDLE])
    late = values(rows, "ood", "sft", *[after_rl(step) for step in LATE])
    yield Claim("too early", "2", "RL from too early a checkpoint ends lower",
                f"OOD after RL from steps {MIDDLE} minus from {STARTS[0]}", middle - first)
    yield Claim("too late", "2", "and from too late a one", f"the same minus from {LATE}",
                middle - late)
    picks = {"best": best_after_rl(STARTS), "equal": after_rl_from_equal_id}
    starts = {"best": "each one's best start", "equal": "the first start with ID of .95"}
    for name, pick in picks.items():
        for key, ability in dict(ood_b="OOD", prior="M, R, D, C").items():
            yield Claim(f"RL {name} {key}", "1, 3", f"RL ends higher from clip: {ability}",
                        f"after RL from {starts[name]}, clip minus SFT",
                        difference(rows, key, "clip", "sft", pick))


def claims_on_weights(measurements):
    shift = column(measurements, "shift")
    yield Claim("values", "2", "singular values stay, more than by chance",
                "mean relative change, random update of equal norm minus SFT",
                column(measurements, "shift_null") - shift, margin=NO_MARGIN,
                beside="SFT's own", beside_effects=shift)
    angle = column(measurements, "angle")
    yield Claim("vectors", "2", "singular vectors rotate, more than by chance",
                "mean angle in degrees, SFT minus random update of equal spectrum",
                angle - column(measurements, "angle_same"), margin=NO_MARGIN,
                beside="SFT's own", beside_effects=angle)
    fifth = column(measurements, "ood_fifth")
    yield Claim("restore", "2", "restoring early vectors restores OOD",
                "OOD, late model with the leading fifth of the early vectors, minus with a "
                "straight step back as long",
                fifth - column(measurements, "ood_straight"),
                beside="minus late model",
                beside_effects=fifth - column(measurements, "ood_late"))
    centroid = column(measurements, "centroid_sft") - column(measurements, "centroid_clip")
    yield Claim("drift", "1", "clip drifts less in latent space",
                "mean shift on other tasks at the first start of RL with ID of .95, SFT minus clip",
                column(measurements, "drift_sft") - column(measurements, "drift_clip"),
                margin=NO_MARGIN,
                beside="the paper's PCA centroid", beside_effects=centroid)


def claims_on_long_training(rows):
    yield Claim("entropy", "3", "clip keeps entropy in prolonged training",
                "entropy after 1,200 updates, clip minus SFT",
                difference(rows, "entropy", "clip-long", "sft-long", at_end), margin=NO_MARGIN,
                beside="ID of SFT then", beside_effects=values(rows, "id", "sft-long", at_end))


def all_claims(rows, measurements):
    """rows as from eval.read_rows; measurements: a dict for each seed of rows, in their order."""
    return [*claims_on_improbable_tokens(rows, measurements), *claims_on_forgetting(rows),
            *claims_on_rl(rows), *claims_on_weights(measurements), *claims_on_long_training(rows)]


# ================================================================= tables
def as_json(claim):
    """What claims.json says of a claim; None where there is no number."""
    found = claim.verdict()
    entry = dict(id=claim.id, paper=claim.paper, claim=claim.says, metric=claim.measured,
                 effect=found.effect, half=found.half, n=found.n, above=found.above,
                 verdict=found.verdict, sure=found.sure, at_least=claim.at_least,
                 margin=claim.margin)
    if claim.beside:
        other = verdict(claim.beside_effects)
        entry.update(beside=claim.beside, beside_effect=other.effect, beside_half=other.half)
    return {name: ev.finite(value) for name, value in entry.items()}


def show(found):
    """A Verdict's effect with its interval, as text."""
    if found.n == 0:
        return "-"
    if found.n == 1:
        return f"{found.effect:+.3f}"    # one seed has no interval
    return f"{found.effect:+.3f} ± {found.half:.3f}"


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def claims_table(claims):
    """-> lines of Markdown. above: of the n seeds those with an effect above 0."""
    titles = ["claim", "paper", "what it says: what was measured", "effect ± 95 %", "n", "above",
              "verdict", "beside it"]
    lines = [table_row(titles), "|---" * len(titles) + "|"]
    for claim in claims:
        found = claim.verdict()
        said = f"**{found.verdict}**" if found.sure else found.verdict
        beside = ""
        if claim.beside:
            beside = f"{claim.beside} {show(verdict(claim.beside_effects))}"
        lines.append(table_row([claim.id, claim.paper, f"{claim.says}: {claim.measured}",
                                show(found), str(found.n), str(found.above), said, beside]))
    return lines


def methods_table(rows):
    """-> lines of Markdown: each method at its end, means over its own seeds; then, over the seeds
    in which both get there, minus SFT where ID first reaches .95."""
    keys = ("id", "ood", "ood_any", "explained", "prior")
    titles = ["variant"] + [f"{ev.COLUMNS[key]} at the end" for key in keys]
    titles += ["seeds", "M R D C where ID first reaches .95, minus SFT", "OOD there", "seeds there"]
    lines = [table_row(titles), "|---" * len(titles) + "|"]
    for method in ev.methods_of(rows):
        cells = [method]
        for key in keys:
            end = verdict(values(rows, key, method, at_end))
            cells.append(f"{end.effect:.3f}")
        prior = verdict(difference(rows, "prior", method, "sft", at_id(0.95)))
        ood = verdict(difference(rows, "ood", method, "sft", at_id(0.95)))
        cells += [str(end.n), show(prior), show(ood), str(prior.n)]
        lines.append(table_row(cells))
    return lines


# ================================================================= figures
def draw_values(ax, places, columns, **style):
    """A line through the means of columns, one value a seed each, with its 95 % band; a place
    without any value is left out."""
    found = [(place, verdict(column)) for place, column in zip(places, columns)]
    found = [(place, at) for place, at in found if at.n > 0]
    halves = [at.half if at.n > 1 else 0 for _, at in found]
    ev.draw_band(ax, [place for place, _ in found], [at.effect for _, at in found], halves, **style)


def idea_figure(path):
    """The weight on grad log pi of a token against r, with p_old = .2."""
    fig = Figure((5, 3.4), layout="tight")
    ax = fig.subplots()
    r = np.linspace(0.3, 2, 500)
    ax.plot(r, np.ones_like(r), "-", lw=2, label="SFT")
    ax.plot(r, 0.2 * r, "--", lw=2, label="DFT: the probability, here .2 r")
    ax.plot(r, np.where(r <= 1.28, r, 0), "-", lw=2, label="clip = GRPO, A = 1")
    ax.plot(r, np.where(r >= 0.8, -r, 0), ":", lw=2, label="GRPO, A = -1")
    ax.set(xlabel="r = probability now / at the last refresh", ylabel="weight on its gradient")
    ax.axvline(1, color="gray", lw=0.8)
    ax.legend(loc="lower left", frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    fig.savefig(path, dpi=100)


def trade_figure(rows, path):
    """M, R, D, C against ID accuracy along SFT and clip at two rates; OOD before and after RL."""
    fig = Figure((13, 4.4), layout="tight")
    left, right = fig.subplots(1, 2)
    colors = dict(zip(CORE, ("#d1495b", "#2e86ab", "#66a182", "#edae49")))
    levels = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    for method in CORE:
        columns = [values(rows, "prior", method, at_id(level)) for level in levels]
        draw_values(left, levels, columns, color=colors[method], label=method, marker=".")
    left.set(xlabel="ID accuracy first reached (matched ID)", ylabel="M, R, D, C", xlim=(0.65, 1))
    for method in ("sft", "clip"):
        before = [values(rows, "ood", method, at_step(step)) for step in STARTS]
        after = [values(rows, "ood", method, after_rl(step)) for step in STARTS]
        draw_values(right, STARTS, before, color=colors[method], ls="--",
                    label=f"{method}, before RL")
        draw_values(right, STARTS, after, color=colors[method], marker="^",
                    label=f"{method}, after")
    right.set(xscale="log", xlabel="SFT updates before RL (log scale)", ylabel="OOD accuracy")
    right.set_xticks(STARTS, STARTS)
    right.minorticks_off()
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=9)
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=100)


# ================================================================= the command
def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, made or finished first")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="first seed [%(default)s]")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many [%(default)s]")
    parser.add_argument("--out", type=Path, default=HERE, help="where results go [study]")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="what follows is handed to clipsft.py")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be above 0")
    return args


def main(argv=None):
    args = read_flags(argv)
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.seeds)
    run_experiment(args.run, seeds, CORE, args.flags)
    run_experiment(args.run, seeds[:math.ceil(len(seeds) / 3)], VARIANTS, args.flags)
    rows = [row for row in ev.read_rows(args.run) if row["seed"] in seeds]
    measurements = [measured(args.run, seed, rows) for seed in seeds]
    claims = all_claims(rows, measurements)
    text = "\n".join([*claims_table(claims), "", *methods_table(rows)]) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "claims.md").write_text(text, encoding="utf-8")
    entries = [as_json(claim) for claim in claims]
    (args.out / "claims.json").write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n")
    ev.figure([row for row in rows if row["method"] in ("base", "sft", "clip")],
              args.out / "summary.png")
    trade_figure(rows, args.out / "trade.png")
    idea_figure(args.out / "idea.png")


if __name__ == "__main__":
    main()
