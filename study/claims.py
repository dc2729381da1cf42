"""study/claims.py - what the three papers say, measured over fresh seeds, each with its interval.

    python study/claims.py                  judges the committed rows once more
    python study/claims.py runs/study       runs the study first: clipsft.py in two processes, then
                                            measurements on its checkpoints

What is in the run folder is not computed again. Writes rows.jsonl, measured.jsonl, claims.json,
claims.md and the figures beside this file. Every effect is a difference within a seed: the same
base, the same data, the same order.

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
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
from rl import grpo  # noqa: E402

FIRST_SEED = 600    # nothing was tuned on these, and no earlier study used them
SEEDS = 10
FEW_SEEDS = 4       # for LATE and EARLY
PROCESSES = 2
EVAL_N = 300                   # problems of each kind
STARTS = (8, 64, 600, 1200)    # SFT updates that RL starts from
CORE = ("sft", "clip", "sft-frozen-table")                    # 1,200 updates, all seeds
RATES = ("sft-1e-4", "clip-1e-4", "sft-3e-5", "clip-3e-5")    # 300 updates, all seeds
LATE = ("rpsft", "sft-few", "clip-few", "sft-few-large", "sft-few-3e-5",
        "clip-few-3e-5")                                      # 600 updates
EARLY = ("clip-unbounded", "clip-frozen", "dft", "asft", "sft-skip-low",
         "sft-skip-random")                                   # 300 updates
WITH_RL = ("sft", "clip", "sft-few", "clip-few")
TRIES = dict(hot=dict(temperature=1.5), kl=dict(kl_coef=0.05, kl_to="base"),
             composite=dict(reward="composite"))    # of healing from the last start but one
BEST_SFT = "sft-3e-5"      # of the three rates that which keeps most of M R D C at equal ID,
BEST_CLIP = "clip-3e-5"    # on calibration seeds

LEVEL = 0.95             # of ID accuracy, where methods are compared: all of them reach it
MARGIN = 0.03            # an accuracy that differs by less does not differ
NO_MARGIN = 0.0          # nats, degrees: "no difference" has no meaning there
ROUNDING = 1e-9          # an effect of less is none: 1/3 + 1/3 - 2/3 need not be 0
T_999 = [
    636.619, 31.599, 12.924, 8.610, 6.869, 5.959, 5.408, 5.041, 4.781, 4.587, 4.437, 4.318, 4.221,
    4.140, 4.073, 4.015, 3.965, 3.922, 3.883]    # Student's t, 99.9 %: many claims are tested


# ================================================================= the experiment
def run_experiment(folder, seeds, methods, steps, starts, flags):
    """Run clipsft.py on seeds, a share of them in each process. Ends here if one of them fails."""
    share = math.ceil(len(seeds) / PROCESSES)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with_rl = [method for method in methods if method in WITH_RL]
    processes = []
    for first in range(0, len(seeds), share):
        mine = seeds[first:first + share]
        command = [sys.executable, HERE.parent / "clipsft.py", "--out_dir", folder,
                   "--seed", str(mine[0]), "--seeds", str(len(mine)), "--eval_n", str(EVAL_N),
                   "--steps", str(steps), "--methods", *methods, "--rl_methods", *with_rl,
                   "--rl_from", *map(str, starts), *flags]
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
    """All weight matrices of a model by name, the tables of tokens and places among them."""
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}


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


def distance(before, after):
    """|| W1 - W0 || over all matrices."""
    squares = [(after[name] - W0).pow(2).sum().item() for name, W0 in before.items()]
    return math.sqrt(sum(squares))


def ood_with(model, weights, base, eval_n, seed):
    """OOD accuracy of a model with these weight matrices."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights, strict=False)
    return ev.evaluate(model, base, eval_n, seed)["ood"]


def restoration(early, late, base, eval_n, seed):
    """OOD accuracy of the early and the late model, and of the late one with a leading share of the
    early singular vectors put back (fifth, half, all); after each, of a straight step from the late
    towards the early matrices that is as long, at most all the way (straight_...)."""
    before = matrices(early)
    after = matrices(late)
    numbers = dict(ood_early=ood_with(early, before, base, eval_n, seed),
                   ood_late=ood_with(late, after, base, eval_n, seed))
    for name, share in dict(fifth=1 / 5, half=1 / 2, all=1).items():
        restored = {}
        for key, W1 in after.items():
            k = math.ceil(share * min(W1.shape))
            restored[key] = ev.restore_directions(before[key], W1, k)
        step = min(1, distance(after, restored) / distance(after, before))
        straight = {key: W1 + step * (before[key] - W1) for key, W1 in after.items()}
        numbers[f"ood_{name}"] = ood_with(late, restored, base, eval_n, seed)
        numbers[f"ood_straight_{name}"] = ood_with(late, straight, base, eval_n, seed)
        numbers[f"step_{name}"] = step
    block = {key: block_taken_back(before[key], W1) for key, W1 in after.items()}
    step = distance(after, block) / distance(after, before)
    straight = {key: W1 + step * (before[key] - W1) for key, W1 in after.items()}
    numbers["ood_block"] = ood_with(late, block, base, eval_n, seed)
    numbers["ood_straight_block"] = ood_with(late, straight, base, eval_n, seed)
    numbers["step_block"] = step
    return numbers


def block_taken_back(W0, W1):
    """W1 without its change within the leading half of W0's directions, (m, n): never further than
    W0, and without the mixing of two sets of vectors. (Not the paper's formula.)"""
    U, _, Vh = torch.linalg.svd(W0.double(), full_matrices=False)
    k = min(W0.shape) // 2
    U = U[:, :k]
    V = Vh[:k].T
    change = U.T @ (W0 - W1).double() @ V                                    # (k, k)
    return W1 + (U @ change @ V.T).to(W1)


def starts(rows, seed):
    """The steps that RL starts from, early to late."""
    return ev.steps_of([row for row in rows if row["seed"] == seed], "sft", "rl")


def early_step(rows, seed):
    """The start among the first two at which SFT has its best OOD, on half a."""
    first = starts(rows, seed)[:2]
    curve = [row for row in ev.run_of(rows, "sft", seed) if row["step"] in first]
    return max(curve, key=lambda row: row["ood_a"])["step"]


def toward_base(run, rows, seed, base, eval_n):
    """What a fifth of the way back to the base in the weights, without any training, changes in
    OOD at the last two starts of RL: the mean."""
    gains = []
    for step in starts(rows, seed)[-2:]:
        model = load(run, seed, f"sft-{step}")
        after = matrices(model)
        mixed = {key: W1 + 0.2 * (matrices(base)[key] - W1) for key, W1 in after.items()}
        gains.append(ood_with(model, mixed, base, eval_n, seed)
                     - ood_with(model, after, base, eval_n, seed))
    return dict(gain_toward_base=ev.mean(gains))


def tries(run, seed, rows, base, eval_n):
    """What other settings of RL change in OOD from the last start but one (gain_...), and the share
    of groups without spread in the last ten steps (spreadless_...)."""
    step = starts(rows, seed)[-2]
    before = ev.row_at(ev.run_of(rows, "sft", seed), step)
    settings = ev.read_json(clipsft.job_path(run, seed, "sft"))["settings"]
    c = clipsft.Config()
    for name in ("rl_steps", "rl_lr", "rl_prompts", "rl_group", "rl_updates"):
        c = replace(c, **{name: settings[name]})
    numbers = {}
    for name, changes in TRIES.items():
        model = load(run, seed, f"sft-{step}")
        stats = list(grpo(model, base, replace(c, **changes), seed))
        numbers[f"gain_{name}"] = ev.evaluate(model, base, eval_n, seed)["ood"] - before["ood"]
        numbers[f"spreadless_{name}"] = ev.average(stats[-10:])["zero_spread"]
    return numbers


def rotation_by_rl(healed, early, late, seed):
    """Angle in degrees and distance from the early model, of the late one and of what RL makes of
    it: smaller after RL if RL turns the vectors back."""
    before = matrices(early)
    _, angle_late = spectral_change(before, matrices(late))
    _, angle_rl = spectral_change(before, matrices(healed))
    null = {}
    for name, W1 in matrices(late).items():
        null[name] = W1 + same_spectrum(matrices(healed)[name] - W1, seed, "rl", name)
    _, angle_random = spectral_change(before, null)
    return dict(angle_late=angle_late, angle_rl=angle_rl, angle_random=angle_random,
                distance_late=distance(before, matrices(late)),
                distance_rl=distance(before, matrices(healed)))


def measure(run, seed, rows, eval_n):
    """All measurements on the checkpoints of a seed -> a dict of numbers."""
    base = load(run, seed, "base")
    early = load(run, seed, f"sft-{early_step(rows, seed)}")
    last = starts(rows, seed)[-1]
    late = load(run, seed, f"sft-{last}")
    healed = load(run, seed, f"sft-{last}-rl")
    numbers = dict(seed=seed)
    numbers.update(gradients(base, seed))
    numbers.update(drift(run, seed, rows))
    numbers.update(spectra(early, late, seed))
    numbers.update(rotation_by_rl(healed, early, late, seed))
    numbers.update(restoration(early, late, base, eval_n, seed))
    numbers.update(toward_base(run, rows, seed, base, eval_n))
    numbers.update(tries(run, seed, rows, base, eval_n))
    return numbers


def measured(run, seed, rows):
    """measure(), kept in the run folder beside the settings that it depends on. Made anew if they
    differ or a checkpoint is newer; after a change of the measurements delete measured-*.json."""
    path = Path(run) / f"measured-s{seed}.json"
    settings = {}
    for method in ("base", "sft", "clip"):
        settings[method] = ev.read_json(clipsft.job_path(run, seed, method))["settings"]
    if not is_current(path, settings, Path(run).glob(f"s{seed}-*.pt")):
        numbers = measure(run, seed, rows, settings["base"]["eval_n"])
        numbers = {name: ev.finite(number) for name, number in numbers.items()}
        ev.write_json(path, dict(settings=settings, numbers=numbers))
    return ev.read_json(path)["numbers"]


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


def at_300(rows, method, seed):
    """The last row up to update 300."""
    curve = [row for row in ev.run_of(rows, method, seed) if row["step"] <= 300]
    return curve[-1] if curve else None


def at_id(level):
    def pick(rows, method, seed):
        return ev.at_id(ev.run_of(rows, method, seed), level)
    return pick


def at_peak(rows, method, seed):
    """The OOD peak: picked on one half of the problems, its `ood` that of the other."""
    curve = ev.run_of(rows, method, seed)
    return ev.peak(curve) if curve else None


def at_best_id(rows, method, seed):
    curve = ev.run_of(rows, method, seed)
    return max(curve, key=lambda row: row["id"], default=None)


def start_at_id(rows, method, seed, level=LEVEL):
    """The first start of RL with ID accuracy of at least level, before RL."""
    steps = ev.steps_of(rows, method, "rl")
    for row in ev.run_of(rows, method, seed):
        if row["step"] in steps and row["id"] >= level:
            return row
    return None


def after_rl_from_equal_id(rows, method, seed):
    """What RL makes of start_at_id."""
    start = start_at_id(rows, method, seed)
    if start is None:
        return None
    return after_rl(start["step"])(rows, method, seed)


def best_after_rl(rows, method, seed):
    """After RL from the start that is best in OOD: picked on one half of the problems, its `ood`
    that of the other."""
    ends = ev.run_of(rows, method, seed, "rl")
    return ev.peak(ends) if ends else None


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


def by_rl(rows, method, when, number):
    """number(before, after, peak), of the rows before and after RL and of the run's OOD peak: the
    mean over its starts "before" or "after" that peak, one value a seed -> (seeds,). The peak is
    picked on one half of the OOD problems and `ood` is of the other; both ways."""
    found = []
    for seed in ev.seeds_of(rows):
        curve = ev.run_of(rows, method, seed)
        numbers = []
        for picked, kept in (("ood_a", "ood_b"), ("ood_b", "ood_a")):
            peak = max(curve, key=lambda row: row[picked], default=None)
            for after in ev.run_of(rows, method, seed, "rl"):
                step = after["step"]
                if (when == "before" and step < peak["step"]
                        or when == "after" and step > peak["step"]):
                    before = ev.row_at(curve, step)
                    numbers.append(number(dict(before, ood=before[kept]),
                                          dict(after, ood=after[kept]),
                                          dict(peak, ood=peak[kept])))
        found.append(ev.mean(numbers))
    return np.array(found)


def gain_at(rows, key, method, *steps):
    """After RL minus before it, the mean over these starts, one value a seed."""
    after = values(rows, key, method, *[after_rl(step) for step in steps])
    return after - values(rows, key, method, *[at_step(step) for step in steps])


def gain(before, after, peak):
    return after["ood"] - before["ood"]


def loss(before, after, peak):
    return peak["ood"] - before["ood"]


def end(before, after, peak):
    return after["ood"]


def above_peak(before, after, peak):
    return after["ood"] - peak["ood"]


def no_spread(before, after, peak):
    return after["zero_spread"]


def column(measurements, name):
    """One measured number a seed, nan where it is missing -> (seeds,)."""
    found = [numbers.get(name) for numbers in measurements]
    return np.array([math.nan if number is None else number for number in found])


# ================================================================= verdicts
@dataclass
class Verdict:
    effect: float    # the mean over seeds
    half: float      # half of its 95 % interval
    n: int           # seeds with a value
    verdict: str     # holds, opposite, no difference or undecided
    sure: bool       # the 99.9 % interval says the same
    above: int       # seeds with a value above at_least


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
    above = sum(effect > at_least + ROUNDING for effect in finite)
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
    beside: dict = field(default_factory=dict)    # what else is shown: {label: one value a seed}
    by_construction: str = ""    # why it could not come out otherwise

    def verdict(self):
        if self.at_least != 0:    # "no difference" from a threshold has no meaning
            return verdict(self.effects, self.at_least, NO_MARGIN)
        return verdict(self.effects, 0.0, self.margin)


def claims_on_the_experiment(rows):
    """What a sceptic asks first of the experiment itself."""
    def fall(method):
        return values(rows, "ood", method, at_peak) - values(rows, "ood", method, at_end)

    def fixed_steps(method):
        early = values(rows, "ood", method, at_step(16), at_step(32), at_step(64))
        return early - values(rows, "ood", method, at_step(600), at_step(1200))
    yield Claim("peak", "2", "OOD peaks early, then falls while ID does not",
                "OOD of SFT, peak minus end", fall("sft"),
                beside={"ID, end minus peak": values(rows, "id", "sft", at_end)
                        - values(rows, "id", "sft", at_peak),
                        "update of the peak": values(rows, "step", "sft", at_peak),
                        "updates 16 to 64 minus 600 and 1,200": fixed_steps("sft"),
                        "clip": fall("clip")})
    yield Claim("peak, frozen table", "2", "it falls with the token table frozen as well",
                "the same with the token table (input and output) left as in the base",
                fall("sft-frozen-table"),
                beside={"minus half of SFT's fall": fall("sft-frozen-table") - fall("sft") / 2,
                        "ID at the end": values(rows, "id", "sft-frozen-table", at_end)})
    errors = 1 - values(rows, "ood", "sft", at_end)
    yield Claim("rule", "2", "what is lost is the reading of the rule",
                "of SFT's wrong OOD answers at the end, the share in which a face card does not "
                "count what the rule says, all else being right, above one half",
                values(rows, "ood_unread", "sft", at_end) / errors, at_least=0.5,
                beside={"it counts 10, as in SFT": values(rows, "ood_rule", "sft", at_end) / errors,
                        "growth of such answers since the peak":
                        values(rows, "ood_unread", "sft", at_end)
                        - values(rows, "ood_unread", "sft", at_peak),
                        "not in the format": values(rows, "ood_format", "sft", at_end) / errors,
                        "wrong sums": values(rows, "ood_sums", "sft", at_end) / errors,
                        "with a frozen table": values(rows, "ood_unread", "sft-frozen-table",
                                                      at_end)
                        / (1 - values(rows, "ood", "sft-frozen-table", at_end))})


def claims_on_improbable_tokens(rows, measurements):
    share = column(measurements, "gradient_share") - column(measurements, "token_share")
    yield Claim("gradient", "1", "improbable tokens have larger gradients",
                "log10 of the gradient norm of a token, base p < .1 over p > .9",
                column(measurements, "gradient"), margin=NO_MARGIN,
                beside={"share of the norms minus of the tokens": share},
                by_construction="with respect to the logits the norm is nearly 1 - p")
    yield Claim("skip", "1", "improbable tokens cause the forgetting",
                "M, R, D, C at the end: p < .1 left out, minus as many random tokens left out",
                difference(rows, "prior", "sft-skip-low", "sft-skip-random", at_end),
                beside={"ID": difference(rows, "id", "sft-skip-low", "sft-skip-random", at_end)},
                by_construction="they are what is to be learnt: without them ID stays low")
    yield Claim("order", "1", "clip learns improbable tokens later",
                "log p at update 16 where base p < .1, SFT minus clip",
                difference(rows, "logp_low", "sft", "clip", at_step(16)), margin=NO_MARGIN,
                beside={"p > .9": difference(rows, "logp_high", "sft", "clip", at_step(16)),
                        "ID at update 8, SFT": values(rows, "id", "sft", at_step(8)),
                        "clip": values(rows, "id", "clip", at_step(8))},
                by_construction="after two refreshes a probability has grown 1.64-fold, about")
    early = [at_step(step) for step in (8, 16, 32, 64)]
    numbers = values(rows, "clip_numbers", "clip", *early)
    signs = values(rows, "clip_signs", "clip", *early)
    yield Claim("clipped words", "3", "connectives are clipped most",
                "share of them that is clipped, in the rounds that end at updates 8, 16, 32, 64, "
                "minus the larger of numbers and signs",
                values(rows, "clip_connectives", "clip", *early) - np.maximum(numbers, signs),
                beside={"numbers": numbers, "signs": signs,
                        "all tokens then": values(rows, "clip_frac", "clip", *early),
                        "at the end": values(rows, "clip_frac", "clip", at_end)})


def claims_on_forgetting(rows):
    level = at_id(LEVEL)

    def kept(key, method, other, pick=level):
        return difference(rows, key, method, other, pick)
    yield Claim("keep prior", "1, 3", "clip keeps more of M, R, D, C",
                "where ID first reaches .95, clip minus SFT, equal rate",
                kept("prior", "clip", "sft"),
                beside={"at ID .98": kept("prior", "clip", "sft", at_id(0.98)),
                        "at the end": kept("prior", "clip", "sft", at_end),
                        "a lower rate alone, SFT 1e-4 minus 3e-4": kept("prior", "sft-1e-4", "sft"),
                        "clip at 3e-4 minus SFT at 1e-4": kept("prior", "clip", "sft-1e-4")})
    yield Claim("keep explained", "1, 3", "clip keeps more of E under other rules", "the same",
                kept("explained", "clip", "sft"),
                beside={"at the end": kept("explained", "clip", "sft", at_end)})
    yield Claim("keep ood", "3", "clip keeps more OOD", "the same, strict OOD",
                kept("ood", "clip", "sft"),
                beside={"at ID .98": kept("ood", "clip", "sft", at_id(0.98)),
                        "at the end": kept("ood", "clip", "sft", at_end),
                        "in any format": kept("ood_any", "clip", "sft"),
                        "not in the format": kept("ood_format", "clip", "sft"),
                        "face card not as the rule says": kept("ood_unread", "clip", "sft")})
    yield Claim("best rate prior", "1, 3", "also at each one's best rate: M, R, D, C",
                f"where ID first reaches .95, {BEST_CLIP} minus {BEST_SFT}",
                kept("prior", BEST_CLIP, BEST_SFT),
                beside={"both at 1e-4": kept("prior", "clip-1e-4", "sft-1e-4"),
                        "the best rate alone, SFT 3e-5 minus 3e-4": kept("prior", BEST_SFT, "sft"),
                        "updates to ID .95, SFT at 3e-4": values(rows, "step", "sft", level),
                        "clip at 3e-4": values(rows, "step", "clip", level),
                        "SFT at 3e-5": values(rows, "step", BEST_SFT, level),
                        "clip at 3e-5": values(rows, "step", BEST_CLIP, level)})
    yield Claim("best rate ood", "3", "also at each one's best rate: OOD", "the same, strict OOD",
                kept("ood", BEST_CLIP, BEST_SFT),
                beside={"both at 1e-4": kept("ood", "clip-1e-4", "sft-1e-4"),
                        "in any format": kept("ood_any", BEST_CLIP, BEST_SFT),
                        "not in the format": kept("ood_format", BEST_CLIP, BEST_SFT),
                        "the best rate alone, SFT 3e-5 minus 3e-4": kept("ood", BEST_SFT, "sft"),
                        "not in the format then": kept("ood_format", BEST_SFT, "sft")})
    yield Claim("forgetting", "1", "clip forgets less, in per cent of the base",
                "M, R, D, C and E lost where ID first reaches .95, SFT minus clip",
                forgotten(rows, "sft", level) - forgotten(rows, "clip", level), margin=3,
                beside={"SFT": forgotten(rows, "sft", level),
                        "clip": forgotten(rows, "clip", level),
                        "a lower rate alone, SFT at 3e-5": forgotten(rows, BEST_SFT, level)})
    yield Claim("ID parity", "1, 3", "clip is no worse in distribution",
                "best ID of the run, clip minus SFT, above -.02",
                difference(rows, "id", "clip", "sft", at_best_id), at_least=-0.02,
                by_construction="both are at the ceiling")
    yield Claim("bounded", "3", "it is the bound that protects",
                "M, R, D, C where ID first reaches .95, clip minus clip without a bound",
                kept("prior", "clip", "clip-unbounded"),
                beside={"without a bound minus SFT": kept("prior", "clip-unbounded", "sft")})
    yield Claim("frozen policy", "3", "a frozen old policy under-fits",
                "ID at update 128, clip minus clip with the base as old policy, above .05",
                difference(rows, "id", "clip", "clip-frozen", at_step(128)), at_least=0.05,
                by_construction="a token rests once it has grown by 28 %")
    late = values(rows, "prior", "clip", at_end) - values(rows, "prior", "clip", at_step(300))
    sft_late = values(rows, "prior", "sft", at_end) - values(rows, "prior", "sft", at_step(300))
    yield Claim("prolonged", "3", "clip is stable under prolonged training",
                "M, R, D, C of clip, update 1,200 minus 300, above -.05", late, at_least=-0.05,
                beside={"SFT": sft_late})
    yield Claim("rotation", "RPSFT", "to hold the base's leading subspaces keeps OOD",
                "OOD at update 600, RPSFT minus SFT",
                difference(rows, "ood", "rpsft", "sft", at_step(600)),
                beside={"ID then": difference(rows, "id", "rpsft", "sft", at_step(600)),
                        "M R D C then": difference(rows, "prior", "rpsft", "sft", at_step(600)),
                        "M R D C at ID .95": kept("prior", "rpsft", "sft")})
    yield Claim("anchor", "ASFT", "a KL to the base anchors DFT",
                "M, R, D, C at update 300, ASFT minus DFT",
                difference(rows, "prior", "asft", "dft", at_step(300)),
                beside={"ID then": difference(rows, "id", "asft", "dft", at_step(300)),
                        "OOD then": difference(rows, "ood", "asft", "dft", at_step(300)),
                        "at ID .95": kept("prior", "asft", "dft")})


def forgotten(rows, method, pick):
    """Per cent of the base's M, R, D, C and E that are lost, the mean of both -> (seeds,)."""
    lost = []
    for key in ("prior", "explained"):
        before = values(rows, key, "base", at_base)
        lost.append(100 * (before - values(rows, key, method, pick)) / before)
    return np.mean(lost, 0)


def at_base(rows, method, seed):
    found = ev.run_of(rows, "base", seed, "base")
    return found[0] if found else None


def claims_on_rl(rows, measurements):
    best = values(rows, "ood", "sft", best_after_rl)
    yield Claim("cold start", "2", "RL needs SFT first",
                "OOD after RL from SFT's best start, minus from the base",
                best - values(rows, "ood", "base", after_rl(0)),
                beside={"ID after RL from the base": values(rows, "id", "base", after_rl(0))},
                by_construction="the base never explains S, so nothing is rewarded")
    yield Claim("completes", "2", "RL completes SFT before the OOD peak",
                "OOD after RL minus before it, from starts before each run's own peak",
                by_rl(rows, "sft", "before", gain),
                beside={"clip": by_rl(rows, "clip", "before", gain),
                        "groups without spread": by_rl(rows, "sft", "before", no_spread),
                        "from 8 alone": gain_at(rows, "ood", "sft", 8),
                        "from 64 alone": gain_at(rows, "ood", "sft", 64),
                        **after_rl_from_8(rows)})
    yield Claim("heals", "2", "RL heals OOD after the peak",
                "the same from starts after the peak",
                by_rl(rows, "sft", "after", gain),
                beside={"what was lost": by_rl(rows, "sft", "after", loss),
                        "groups without spread": by_rl(rows, "sft", "after", no_spread),
                        "clip": by_rl(rows, "clip", "after", gain),
                        "from 600 alone": gain_at(rows, "ood", "sft", 600),
                        "from 600 at temperature 1.5": column(measurements, "gain_hot"),
                        "groups without spread then": column(measurements, "spreadless_hot"),
                        "from 600 with a KL of .05 to the base": column(measurements, "gain_kl"),
                        "from 600 with composite rewards":
                        column(measurements, "gain_composite"),
                        "from 600 of SFT on 128 demonstrations":
                        gain_at(rows, "ood", "sft-few", 600),
                        "and its ID": gain_at(rows, "id", "sft-few", 600)})
    step_back = column(measurements, "gain_toward_base")
    late = ev.steps_of(rows, "sft", "rl")[-2:]
    yield Claim("not a step back", "2", "RL heals more than a step back",
                "gain of RL from the last two starts, minus that of a fifth of the way to the base "
                "in the weight matrices without training (or 0, if that harms)",
                gain_at(rows, "ood", "sft", *late) - np.maximum(step_back, 0),
                beside={"gain of RL": gain_at(rows, "ood", "sft", *late),
                        "gain of the step": step_back})
    yield Claim("bound", "2", "RL does not surpass SFT's peak",
                "SFT's OOD peak minus OOD after RL, from starts after the peak, above -.03",
                -by_rl(rows, "sft", "after", above_peak), at_least=-0.03,
                beside={"from the best of all starts":
                        values(rows, "ood", "sft", at_peak) - best})
    yield Claim("too late", "2", "RL from too late a checkpoint ends lower",
                "OOD after RL, from starts before the peak minus from starts after it",
                by_rl(rows, "sft", "before", end) - by_rl(rows, "sft", "after", end))
    equal = after_rl_from_equal_id
    from_64 = after_rl(64)
    where = "after RL from the first start with ID of at least .95 (mostly update 64 for both)"
    yield Claim("RL equal prior", "1, 3", "RL ends higher from clip: M, R, D, C",
                f"{where}, clip minus SFT", difference(rows, "prior", "clip", "sft", equal),
                beside={"before RL": difference(rows, "prior", "clip", "sft", start_at_id),
                        "both from 64": difference(rows, "prior", "clip", "sft", from_64),
                        "at 64, before RL": difference(rows, "prior", "clip", "sft", at_step(64)),
                        "from each one's best start in OOD":
                        difference(rows, "prior", "clip", "sft", best_after_rl)})
    yield Claim("RL equal ood", "1, 3", "RL ends higher from clip: OOD", "the same, OOD",
                difference(rows, "ood", "clip", "sft", equal),
                beside={"before RL": difference(rows, "ood", "clip", "sft", start_at_id),
                        "both from 64": difference(rows, "ood", "clip", "sft", from_64),
                        "from each one's best start in OOD":
                        difference(rows, "ood", "clip", "sft", best_after_rl)})
    yield Claim("RL few id", "1, 3", "RL ends higher from clip: ID, where it is not saturated",
                "ID after RL from update 600, 128 demonstrations, clip minus SFT",
                difference(rows, "id", "clip-few", "sft-few", after_rl(600)),
                beside={"SFT before RL": values(rows, "id", "sft-few", at_step(600)),
                        "SFT after RL": values(rows, "id", "sft-few", after_rl(600))})


def after_rl_from_8(rows):
    """What RL makes of 8 updates of SFT, beside SFT at its OOD peak -> {label: one a seed}."""
    found = {}
    for key in ("id", "ood", "prior"):
        end = values(rows, key, "sft", after_rl(8))
        peak = values(rows, key, "sft", at_peak)
        found[f"{ev.COLUMNS[key]} after RL from 8"] = end
        found["at SFT's peak, " + ev.COLUMNS[key]] = peak
        found["difference in " + ev.COLUMNS[key]] = end - peak
    return found


def claims_on_weights(measurements):
    shift = column(measurements, "shift")
    yield Claim("values", "2", "singular values stay",
                ".01 minus the mean relative change from the early to the late checkpoint",
                0.01 - shift, margin=NO_MARGIN,
                beside={"SFT": shift,
                        "random update of equal norm": column(measurements, "shift_null")})
    angle = column(measurements, "angle")
    yield Claim("vectors", "2", "singular vectors rotate, more than by chance",
                "mean angle in degrees, SFT minus random update of equal spectrum (no difference: "
                "within half a degree)", angle - column(measurements, "angle_same"), margin=0.5,
                beside={"SFT": angle})
    yield Claim("turns back", "2", "RL turns them back",
                "angle to the early checkpoint in degrees, late minus late after RL",
                column(measurements, "angle_late") - column(measurements, "angle_rl"),
                margin=NO_MARGIN,
                beside={"a random update of RL's spectrum": column(measurements, "angle_late")
                        - column(measurements, "angle_random"),
                        "distance": column(measurements, "distance_late")
                        - column(measurements, "distance_rl")})
    late = column(measurements, "ood_late")
    lost = column(measurements, "ood_early") - late
    fifth = column(measurements, "ood_fifth")
    yield Claim("restore", "2", "restoring early vectors restores OOD",
                "OOD of the late model with the leading fifth of the early vectors, minus without",
                fifth - late,
                beside={"what was lost": lost,
                        "half of the vectors": column(measurements, "ood_half") - late,
                        "all (nearly the early matrices)": column(measurements, "ood_all") - late,
                        "length of the change, of the whole way back":
                        column(measurements, "step_fifth"),
                        "a straight step as long, at most all the way":
                        column(measurements, "ood_straight_fifth") - late})
    block = column(measurements, "ood_block")
    straight = np.maximum(column(measurements, "ood_straight_block"), late)
    yield Claim("restore a block", "2", "it is the leading directions that matter",
                "OOD with the change within the leading half of the early directions taken back, "
                "minus a straight step back as long (or none, if that harms)", block - straight,
                beside={"gain": block - late,
                        "length, of the whole way back": column(measurements, "step_block")})
    centroid = column(measurements, "centroid_sft") - column(measurements, "centroid_clip")
    yield Claim("drift", "1", "clip drifts less in latent space",
                "mean shift on other tasks at the first start of RL with ID of .95, SFT minus clip",
                column(measurements, "drift_sft") - column(measurements, "drift_clip"),
                margin=NO_MARGIN, beside={"the paper's PCA centroid": centroid})


def claims_on_entropy(rows):
    yield Claim("entropy", "3", "clip keeps entropy, against the paper's own baseline",
                "nats a token at the end, 128 demonstrations: clip at 3e-5 (75 passes) minus SFT "
                "at 6e-4 with batches of 128 (150 passes)",
                difference(rows, "entropy", "clip-few-3e-5", "sft-few-large", at_end),
                margin=NO_MARGIN,
                beside={"SFT": values(rows, "entropy", "sft-few-large", at_end),
                        "ID": difference(rows, "id", "clip-few-3e-5", "sft-few-large", at_end)})
    yield Claim("entropy, equal rate", "3", "and against SFT at the same rate and batch",
                "the same, SFT at 3e-5 too (no difference: within .03 nats)",
                difference(rows, "entropy", "clip-few-3e-5", "sft-few-3e-5", at_end),
                beside={"ID": difference(rows, "id", "clip-few-3e-5", "sft-few-3e-5", at_end)})


def all_claims(rows, measurements):
    """rows as from eval.read_rows; measurements: a dict for each seed of rows, in their order."""
    return [*claims_on_the_experiment(rows),
            *claims_on_improbable_tokens(rows, measurements),
            *claims_on_forgetting(rows), *claims_on_rl(rows, measurements),
            *claims_on_weights(measurements), *claims_on_entropy(rows)]


# ================================================================= tables
def as_json(claim):
    """What claims.json says of a claim; None where there is no number."""
    found = claim.verdict()
    entry = dict(id=claim.id, paper=claim.paper, claim=claim.says, metric=claim.measured,
                 effect=found.effect, half=found.half, n=found.n, above=found.above,
                 verdict=found.verdict, sure=found.sure, at_least=claim.at_least,
                 margin=claim.margin, by_construction=claim.by_construction)
    entry = {name: ev.finite(value) for name, value in entry.items()}
    entry["beside"] = {}
    for label, effects in claim.beside.items():
        other = verdict(effects)
        entry["beside"][label] = [ev.finite(other.effect), ev.finite(other.half)]
    return entry


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
    """-> lines of Markdown. above: of n seeds those with an effect above the bound."""
    titles = ["claim", "paper", "what it says: what was measured", "effect ± 95 %", "n", "above",
              "verdict", "beside it"]
    lines = [table_row(titles), "|---" * len(titles) + "|"]
    for claim in claims:
        found = claim.verdict()
        said = f"**{found.verdict}**" if found.sure else found.verdict
        if claim.by_construction:
            said += " (by construction)"
        beside = [f"{label} {show(verdict(effects))}" for label, effects in claim.beside.items()]
        if claim.by_construction:
            beside.append(claim.by_construction)
        lines.append(table_row([claim.id, claim.paper, f"{claim.says}: {claim.measured}",
                                show(found), str(found.n), str(found.above), said,
                                "; ".join(beside)]))
    return lines


def methods_table(rows):
    """-> lines of Markdown: each method at update 300 (or its last before), means over its own
    seeds; then, over the seeds in which both get there, minus SFT where ID reaches .95."""
    keys = ("id", "ood", "ood_unread", "ood_any", "explained", "prior", "entropy")
    titles = ["variant"] + [f"{ev.COLUMNS[key]} at 300" for key in keys]
    titles += ["seeds", "M R D C where ID reaches .95, minus SFT", "OOD there", "seeds there"]
    lines = [table_row(titles), "|---" * len(titles) + "|"]
    for method in ev.methods_of(rows):
        cells = [method]
        for key in keys:
            end = verdict(values(rows, key, method, at_300))
            cells.append(f"{end.effect:.3f}")
        prior = verdict(difference(rows, "prior", method, "sft", at_id(LEVEL)))
        ood = verdict(difference(rows, "ood", method, "sft", at_id(LEVEL)))
        cells += [str(end.n), show(prior), show(ood), str(prior.n)]
        lines.append(table_row(cells))
    return lines


def answers(rows):
    """-> lines of Markdown: one OOD problem of each seed, answered by the base, at SFT's OOD peak
    and at its end."""
    lines = ["```"]
    for seed in ev.seeds_of(rows):
        of_sft = [row for row in rows if row["method"] in ("base", "sft")]
        lines.append(ev.samples(of_sft, seed))
    return [*lines, "```"]


# ================================================================= figures
def draw_values(ax, places, columns, **style):
    """A line through the means of columns, one value a seed each, with its 95 % band; only places
    that every seed has reached, or the line would change company."""
    found = [(place, verdict(column)) for place, column in zip(places, columns)]
    found = [(place, at) for place, at in found if at.n == len(columns[0])]
    halves = [at.half if at.n > 1 else 0 for _, at in found]
    ev.draw_band(ax, [place for place, _ in found], [at.effect for _, at in found], halves, **style)


def idea_figure(path):
    """The weight on grad log pi of a token against r, with p_old = .2."""
    fig = Figure((6, 3.4), layout="tight")
    ax = fig.subplots()
    below = np.array([0.3, 0.8])
    above = np.array([1.28, 2.0])
    whole = np.array([0.3, 2.0])
    ax.plot(whole, [1, 1], lw=2, color="#1f77b4", label="SFT")
    ax.plot(whole, 0.2 * whole, "--", lw=2, color="#2ca02c", label="DFT: p, here .2 r")
    ax.plot([0.3, 1.28], [0.3, 1.28], lw=2, color="#ff7f0e", label="clip = GRPO, A = 1")
    ax.plot(above, [0, 0], lw=2, color="#ff7f0e")
    ax.plot([0.8, 2.0], [-0.8, -2.0], ":", lw=2, color="#d62728", label="GRPO, A = -1")
    ax.plot(below, [0, 0], ":", lw=2, color="#d62728")
    ax.set(xlabel="r = probability now / at the last refresh, p_old = .2",
           ylabel="weight on the token's gradient", ylim=(-2.1, 1.7))
    ax.set_xticks([0.5, 0.8, 1, 1.28, 1.5, 2], ["0.5", "1 - ε", "1", "1 + ε", "1.5", "2"])
    ax.legend(loc="lower left", frameon=False, fontsize=8)
    ax.grid(alpha=0.25)
    fig.savefig(path, dpi=130)


def trade_figure(rows, path):
    """At equal ID accuracy: M, R, D, C and OOD along SFT and clip at each rate; then OOD before and
    after RL by where it starts."""
    fig = Figure((13, 4.4), layout="tight")
    left, middle, right = fig.subplots(1, 3)
    colors = dict(zip(("sft", "clip", "sft-1e-4", "clip-1e-4", "sft-3e-5", "clip-3e-5"),
                      ("#1f77b4", "#ff7f0e", "#7fb2da", "#ffb877", "#0b3c5d", "#a34f00")))
    levels = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    for ax, key, title in ((left, "prior", "M, R, D, C"), (middle, "ood", "OOD")):
        for method, color in colors.items():
            columns = [values(rows, key, method, at_id(level)) for level in levels]
            draw_values(ax, levels, columns, color=color, label=method, marker=".")
        ax.set(title=f"{title} at equal ID", xlabel="ID accuracy first reached",
               ylabel=f"{title}, accuracy", ylim=(0, 1.02))
    left.set_ylim(0.6, 1.01)    # all that there is
    right.set_xscale("log")
    for method in ("sft", "clip"):
        steps = ev.steps_of(rows, method, "rl")
        before = [values(rows, "ood", method, at_step(step)) for step in steps]
        after = [values(rows, "ood", method, after_rl(step)) for step in steps]
        draw_values(right, steps, before, color=colors[method], ls="--", marker=".",
                    label=f"{method}, before RL")
        draw_values(right, steps, after, color=colors[method], marker="^",
                    label=f"{method}, after RL")
        right.set_xticks(steps, steps)
    right.set(title="OOD before and after RL", xlabel="SFT updates before RL (log scale)",
              ylabel="OOD, accuracy", ylim=(0, 1.02))
    right.minorticks_off()
    left.legend(frameon=False, fontsize=8, loc="lower left")    # the same colours in the middle
    right.legend(frameon=False, fontsize=8, loc="lower center")
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=130)


# ================================================================= the command
def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run folder, made or finished first")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="first seed [%(default)s]")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many [%(default)s]")
    parser.add_argument("--few_seeds", type=int, default=FEW_SEEDS,
                        help="of these how many for the variants [%(default)s]")
    parser.add_argument("--out", type=Path, default=HERE, help="where results go [study]")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="what follows is handed to clipsft.py")
    return parser.parse_args(argv)


def write_lines(path, entries):
    """One JSON object a line; numbers to five places."""
    lines = []
    for entry in entries:
        short = {}
        for name, value in entry.items():
            value = ev.finite(value)
            short[name] = round(value, 5) if isinstance(value, float) else value
        lines.append(json.dumps(short))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_lines(path):
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def run_study(args):
    """The experiment and the measurements -> rows.jsonl and measured.jsonl in args.out. Shorter
    runs lie in folders of their own, on the same bases."""
    torch.set_num_threads(1)
    run = args.run
    print(f"the study in {run}: computes what is not there yet, hours in all, and overwrites "
          f"the rows and figures in {args.out}", flush=True)
    seeds = range(args.seed, args.seed + args.seeds)
    few = seeds[:args.few_seeds]
    same_bases = ["--base_from", run, *args.flags]
    run_experiment(run, seeds, CORE, 1200, STARTS, args.flags)
    run_experiment(run / "300", seeds, RATES, 300, (), same_bases)
    run_experiment(run / "600", few, LATE, 600, (600,), same_bases)
    run_experiment(run / "300", few, EARLY, 300, (), same_bases)
    rows = [row for row in ev.read_rows(run) if row["seed"] in seeds]
    for folder in (run / "300", run / "600"):
        rows += [row for row in ev.read_rows(folder)
                 if row["method"] != "base" and row["seed"] in seeds]
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(args.out / "rows.jsonl", rows)
    with ProcessPoolExecutor(PROCESSES, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(measured, run, seed, rows) for seed in seeds]
        write_lines(args.out / "measured.jsonl", [job.result() for job in jobs])


def main(argv=None):
    args = read_flags(argv)
    if args.run is not None:
        run_study(args)
    rows = read_lines(args.out / "rows.jsonl")
    claims = all_claims(rows, read_lines(args.out / "measured.jsonl"))
    text = "\n".join([*claims_table(claims), "", *methods_table(rows), "", *answers(rows)]) + "\n"
    print(text)
    (args.out / "claims.md").write_text(text, encoding="utf-8")
    entries = [as_json(claim) for claim in claims]
    (args.out / "claims.json").write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n")
    ev.figure([row for row in rows if row["method"] in ("base", "sft", "clip")],
              args.out / "summary.png")
    trade_figure(rows, args.out / "trade.png")
    idea_figure(args.out / "idea.png")


if __name__ == "__main__":
    main()
