"""clipsft.py - pre-train a small GPT, fine-tune it with and without clipping, then run GRPO.

    python clipsft.py                                    sft and clip: one table, one figure
    python clipsft.py --methods sft clip dft --seeds 3 --out_dir runs/dft
    python clipsft.py --eps_high 0.1 --base_from runs/main --out_dir runs/tight

Above the ruled line: the losses of papers 1 (Liu et al., ICML 2026) and 3 (PSFT, 2508.17784), and
the loop that trains by any of them. Below: settings, jobs, command line. A job is a seed and a
method; one that is in the run folder is not computed again, so the same command goes on after a
stop. Several processes may fill one folder, each with seeds of its own.
"""
import argparse
import copy
import functools
import itertools
import math
import os
import random
import re
import sys
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as ev
from model import (GPT, GPTConfig, adamw, generator, in_rows, kl_exact, load_checkpoint, muon,
                   response_logits, response_logprobs, response_targets, save_checkpoint, set_lr,
                   token_logprobs, trim, update)
from rl import clipped_surrogate, grpo, is_clipped, masked_mean


def sft_loss(logp):
    """Supervised fine-tuning: weight 1 on grad log pi. logp (B, T) -> (B, T), to be minimised."""
    # L_SFT = - log pi(y_t)
    return -logp


def clip_loss(logp, old_logp, eps_low, eps_high):
    """Clipped SFT: PPO's surrogate with advantage 1. The weight on grad log pi is r up to
    1+eps_high and 0 beyond: a token rests once its probability has grown by that factor since the
    old policy. An improbable token gets there first; one with p_old > 1/(1+eps_high) never does."""
    # L = - min(r_t, clip(r_t, 1 - e, 1 + e)), A_t = 1     PSFT 2508.17784 eq. 6; paper 1 eq. 8-9
    return -clipped_surrogate(logp, old_logp, 1.0, eps_low, eps_high)


def dft_loss(logp):
    """Dynamic fine-tuning (2508.05629): the weight is pi itself, held constant, so the gradient is
    that of - pi(y_t): the opposite of a clip, it hardly learns what the model finds improbable."""
    # L_DFT = - sg(pi(y_t)) log pi(y_t)
    return -logp.detach().exp() * logp


def token_loss(c, model, old, base, ids, mask):
    """ids, mask (B, T) -> the loss of each token and whether it is clipped, both (B, T-1).
    c: Config; old: the model at the last refresh; base: the model before SFT.
    A loss of your own is one more branch here and one more line of METHODS."""
    logits = response_logits(model, ids, mask)                               # (N, V)
    logp = in_rows(token_logprobs(logits, response_targets(ids, mask)), mask)
    clipped = torch.zeros_like(mask[:, 1:])    # only clip sets it
    if c.loss == "sft":
        loss = sft_loss(logp)
    elif c.loss == "clip":
        with torch.no_grad():
            old_logp = response_logprobs(old, ids, mask)
        loss = clip_loss(logp, old_logp, c.eps_low, c.eps_high)
        clipped = is_clipped(logp, old_logp, torch.ones_like(logp), c.eps_low, c.eps_high)
    elif c.loss == "dft":
        loss = dft_loss(logp)
    elif c.loss == "kl":
        # - log pi(y_t) + beta KL(pi || base)                          SFT-KL of PSFT, 2508.17784
        base_logits = response_logits(base, ids, mask)                       # (N, V)
        loss = sft_loss(logp) + c.beta * in_rows(kl_exact(logits, base_logits), mask)
    elif c.loss == "asft":
        # - sg(pi(y_t)) log pi(y_t) + beta KL(base || pi)                         ASFT, 2509.23753
        base_logits = response_logits(base, ids, mask)                       # (N, V)
        loss = dft_loss(logp) + c.beta * in_rows(kl_exact(base_logits, logits), mask)
    else:
        raise ValueError(f"unknown loss {c.loss!r}")
    return loss, clipped


def leading_directions(model, share):
    """{name: (W, U_k, V_k)} of each matrix W (m, n) of a model, its k = share * min(m, n) leading
    singular vectors (m, k), (n, k)."""
    found = {}
    for name, W in model.named_parameters():
        if W.dim() == 2:
            U, _, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
            k = round(share * min(W.shape))
            found[name] = (W.detach(), U[:, :k], Vh[:k].T)
    return found


def rotation_penalty(model, directions):
    """What a model has changed within the leading directions of the base: a scalar."""
    total = 0.0
    for name, W in model.named_parameters():
        if name in directions:
            W0, U, V = directions[name]
            # || U_0k^T (W - W_0) V_0k ||_F^2                                    RPSFT, 2605.10973
            total = total + (U.T @ (W - W0) @ V).pow(2).sum()
    return total


def batches(n, size, seed):
    """Row numbers (size,) of one batch after another, without end; each epoch in a new order,
    without the last rows that do not fill a batch."""
    if size > n:
        raise ValueError(f"a batch of {size} from {n} rows")
    for epoch in itertools.count():
        order = torch.randperm(n, generator=generator("cpu", seed, epoch))
        for start in range(0, n - size + 1, size):
            yield order[start:start + size]


def finetune(model, base, ids, mask, c, seed):
    """Train `model` in place on ids, mask (N, T), which stay on the CPU: each batch is moved to the
    model's device. Yields (step, statistics) after each of c.steps updates: the loss, a scalar, and
    tokens, mask, clipped (B, T-1). They are tensors, for reading a number waits for the device."""
    if c.old_every % c.passes != 0:
        raise ValueError(f"{c.passes} passes do not divide {c.old_every} updates a refresh")
    if c.rotation > 0:
        directions = leading_directions(base, c.rotation_share)
    opt = adamw(model, c.lr)
    stream = batches(len(ids), c.batch_size, seed)
    step = 0
    while True:
        # Every K updates the model as it stands becomes the old policy. The K / passes batches
        # until the next refresh are passed over `passes` times: paper 3 once, paper 1 three times.
        # (The other losses do not look at it.)
        old = copy.deepcopy(model).requires_grad_(False)
        n_fresh = min(c.old_every // c.passes, c.steps)
        fresh = [next(stream) for _ in range(n_fresh)]
        for rows in fresh * c.passes:
            batch_ids, batch_mask = trim(ids[rows], mask[rows])
            batch_ids, batch_mask = batch_ids.to(model.device), batch_mask.to(model.device)
            m = batch_mask[:, 1:]                                            # (B, T-1)
            loss, clipped = token_loss(c, model, old, base, batch_ids, batch_mask)
            if loss.shape != m.shape:
                raise ValueError(f"a loss has one value a token: {m.shape}, not {loss.shape}")
            loss = masked_mean(loss, m, c.aggregate, data.MAX_NEW)
            if c.rotation > 0:
                loss = loss + c.rotation * rotation_penalty(model, directions)
            loss.backward()
            update(model, opt)
            step += 1
            yield step, dict(loss=loss.detach(), tokens=batch_ids[:, 1:], mask=m, clipped=clipped)
            if step == c.steps:
                return


def pretrain(c, seed):
    """The base: plain SFT on base_document, warmed up for 100 updates, then down to 0 -> model."""
    rng = random.Random(f"{seed}/docs")
    documents = [data.base_document(rng) for _ in range(c.base_docs)]
    ids, mask = data.batch([(problem.prompt, response) for problem, response in documents])
    torch.manual_seed(seed)
    model = GPT(GPTConfig(data.N_VOCAB, 40, c.n_layer, c.n_head, c.n_embd, c.dtype == "bf16"))
    model.to(c.device)
    muon_opt, adam_opt = muon(model, c.base_lr, c.base_adam_lr)
    stream = batches(len(ids), c.base_batch, seed)
    for step in progress(range(c.base_steps), c.base_steps, f"seed {seed} base"):
        rows = next(stream)
        batch_ids, batch_mask = trim(ids[rows], mask[rows])
        batch_ids, batch_mask = batch_ids.to(c.device), batch_mask.to(c.device)
        scale = min(1, (step + 1) / 100) * (1 - step / c.base_steps)
        set_lr(muon_opt, scale * c.base_lr)
        set_lr(adam_opt, scale * c.base_adam_lr)
        logp = response_logprobs(model, batch_ids, batch_mask)
        loss = masked_mean(sft_loss(logp), batch_mask[:, 1:])
        loss.backward()
        update(model, muon_opt, adam_opt)
    return model


@torch.no_grad()
def without_improbable(base, ids, mask, skip, seed):
    """A test of paper 1's claim: ids, mask (N, T) -> the mask without the tokens of base p < .1
    ("low"), or without as many response tokens drawn at random ("random")."""
    m = mask[:, 1:]                                                          # (N, T-1)
    logp = response_logprobs(base, ids.to(base.device), mask.to(base.device)).to(ids.device)
    improbable = m & (logp < math.log(0.1))
    if skip == "low":
        drop = improbable
    else:
        places = m.nonzero()                                                 # (tokens, 2)
        order = torch.randperm(len(places), generator=generator("cpu", seed, "skip"))
        n_drop = int(improbable.sum())
        chosen = places[order[:n_drop]]
        drop = torch.zeros_like(m)
        drop[chosen[:, 0], chosen[:, 1]] = True
    mask = mask.clone()
    mask[:, 1:] &= ~drop
    return mask


# ================================================================= below: what it takes to run this
@dataclass
class Config:
    """The comment beside a field is its flag's help."""
    out_dir: str = "runs/main"      # run folder
    base_from: str = ""             # a run folder whose bases are taken instead of new ones
    methods: tuple = ("sft", "clip")      # what to run, lines of METHODS
    seed: int = 0                   # the first seed
    seeds: int = 1                  # how many; each has its own base
    device: str = "cpu"             # cpu or cuda
    dtype: str = "fp32"             # of matrix products: fp32 or bf16
    eval_n: int = 400               # held-out problems of each kind

    # model and base
    n_layer: int = 3                # layers
    n_head: int = 4                 # attention heads
    n_embd: int = 96                # width
    base_steps: int = 800           # pre-training updates
    base_batch: int = 64            # documents an update
    base_docs: int = 60000          # different documents
    base_lr: float = 6e-3           # Muon's learning rate, before warm-up and decay
    base_adam_lr: float = 4e-3      # AdamW's, for what is no matrix of a block

    # supervised fine-tuning
    loss: str = "sft"               # set by METHODS, not a flag
    steps: int = 1200               # SFT updates
    lr: float = 3e-4                # SFT learning rate
    batch_size: int = 16            # demonstrations an update
    demos: int = 4096               # demonstrations in all
    p_word: float = 0.3             # chance of an unpredictable connective before a step
    eps_low: float = 0.2            # clip: the lower bound, which never acts
    eps_high: float = 0.28          # clip: a token rests beyond r = 1 + eps_high
    old_every: int = 8              # K, updates per refresh of the old policy; passes divide it
    passes: int = 1                 # passes over the batches of a refresh
    beta: float = 0.5               # weight of the KL to the base of method kl (asft has .05)
    rotation: float = 0.0           # weight of RPSFT's penalty on turning the base's matrices
    rotation_share: float = 0.5     # RPSFT: the leading share of singular vectors
    freeze: str = "none"            # weights that SFT leaves alone: none, table (of tokens)
    skip: str = "none"              # tokens never trained: base p < .1 (low) or as many (random)
    aggregate: str = "token"        # SFT's and GRPO's mean: token, sequence, constant

    # GRPO
    rl_methods: tuple = ("sft", "clip")   # which methods GRPO starts from, besides the base
    rl_from: tuple = (8, 1200)      # SFT steps that GRPO starts from; nothing: no RL
    rl_steps: int = 20              # GRPO steps
    rl_lr: float = 1e-4             # GRPO's learning rate, after 5 warm-up steps
    rl_prompts: int = 32            # P, prompts a GRPO step
    rl_group: int = 8               # G, responses a prompt
    rl_updates: int = 4             # updates a GRPO step, each on its share of the rollouts
    rl_eps_low: float = 0.2         # GRPO's clip below: 1 - rl_eps_low
    rl_eps_high: float = 0.28       # and above: 1 + rl_eps_high (DAPO's clip-higher)
    reward: str = "strict"          # GRPO's: strict or composite, see rl.reward_of
    adv_scale: str = "std"          # divisor of the advantage: std (GRPO) or none (Dr. GRPO)
    kl_coef: float = 0.0            # weight of a KL in GRPO
    kl_to: str = "start"            # to what GRPO starts from (start) or to the base
    temperature: float = 1.0        # of GRPO's sampling and scoring alike


# What a method changes in the settings, whatever the flags say. A variant is a line.
METHODS = {
    "sft": dict(loss="sft"),
    "clip": dict(loss="clip"),
    "dft": dict(loss="dft"),
    "asft": dict(loss="asft", beta=0.05),
    "kl": dict(loss="kl"),
    "rpsft": dict(loss="sft", rotation=1.0, rotation_share=0.5),
    "sft-1e-4": dict(loss="sft", lr=1e-4),
    "sft-3e-5": dict(loss="sft", lr=3e-5),
    "clip-1e-4": dict(loss="clip", lr=1e-4),
    "clip-3e-5": dict(loss="clip", lr=3e-5),
    "clip-unbounded": dict(loss="clip", eps_high=math.inf),
    "clip-frozen": dict(loss="clip", old_every=100000),    # the base stays the old policy
    "clip-paper1": dict(loss="clip", old_every=24, passes=3, eps_high=0.5, aggregate="sequence"),
    "sft-frozen-table": dict(loss="sft", freeze="table"),
    "sft-skip-low": dict(loss="sft", skip="low"),
    "sft-skip-random": dict(loss="sft", skip="random"),
    "sft-few": dict(loss="sft", demos=128),
    "clip-few": dict(loss="clip", demos=128),
    # Paper 3's SFT has large batches and a high rate, its clip small ones and a low rate.
    "sft-few-large": dict(loss="sft", demos=128, batch_size=128, lr=6e-4, steps=150),
    "sft-few-3e-5": dict(loss="sft", demos=128, lr=3e-5),
    "clip-few-3e-5": dict(loss="clip", demos=128, lr=3e-5),
}
PRESETS = {
    "smoke": dict(out_dir="runs/smoke", n_layer=2, n_head=2, n_embd=32, base_steps=20,
                  base_docs=400, steps=8, rl_from=(8,), rl_steps=2, rl_prompts=4, eval_n=16),
    "gpu": dict(out_dir="runs/gpu", n_layer=6, n_head=6, n_embd=384, base_steps=800, base_lr=3e-3,
                base_adam_lr=2e-3, base_batch=256, base_docs=100000, lr=1e-4, rl_lr=3e-5,
                device="cuda"),
}
CHOICES = dict(device=("cpu", "cuda"), dtype=("fp32", "bf16"), skip=("none", "low", "random"),
               freeze=("none", "table"), reward=("strict", "composite"),
               kl_to=("start", "base"),
               aggregate=("token", "sequence", "constant"), adv_scale=("std", "none"),
               methods=tuple(METHODS), rl_methods=tuple(METHODS))
EVAL_STEPS = (8, 16, 32, 64, 128, 300, 600, 1200)    # and the last


def read_flags(argv):
    """Command line -> Config: the defaults, changed by a preset, changed by the flags. What cannot
    run ends here in one line, before any work."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=__doc__, epilog=f"methods: {', '.join(METHODS)}",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="smoke: seconds; gpu: 10M parameters")
    # {field of Config: its comment}
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)", Path(__file__).read_text(), re.MULTILINE))
    for f in fields(Config):
        if f.name == "loss":
            continue
        options = dict(type=type(f.default), choices=CHOICES.get(f.name), metavar=f.name.upper(),
                       help=f"{comments[f.name]} [{f.default}]")
        if f.type is tuple:
            options.update(type=type(f.default[0]), nargs="*",
                           help=f"{comments[f.name]} [{' '.join(map(str, f.default))}]")
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    preset = PRESETS.get(given.pop("preset"), {})
    given = {name: value for name, value in given.items() if value is not None}
    c = Config(**{**preset, **given})
    try:
        check(c, given)
    except ValueError as error:
        parser.error(str(error))
    return c


def check(c, given):
    """ValueError for settings that would fail late, never end or mislead. given: the flags."""
    for name in ("seeds", "n_layer", "n_head", "base_steps", "base_batch", "base_lr",
                 "base_adam_lr", "steps", "batch_size", "passes", "eps_low", "eps_high", "lr",
                 "rl_steps", "rl_lr", "rl_prompts", "rl_updates", "temperature"):
        if not getattr(c, name) > 0:    # nan is refused too
            raise ValueError(f"--{name} must be above 0")
    for name in ("seed", "p_word", "beta", "rotation", "kl_coef"):
        if not getattr(c, name) >= 0:
            raise ValueError(f"--{name} must be 0 or more")
    if c.eval_n < 16:
        raise ValueError("--eval_n must be 16 or more: the OOD set is halved")
    if not c.methods or len(set(c.methods)) < len(c.methods):
        raise ValueError("--methods: name at least one, each once")
    if c.base_batch > c.base_docs:
        raise ValueError(f"--base_batch {c.base_batch} is above --base_docs {c.base_docs}")
    if c.n_embd % c.n_head != 0:
        raise ValueError(f"--n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}")
    if c.rl_group < 2:
        raise ValueError("--rl_group must be 2 or more: an answer is compared with its group")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; without --preset gpu it runs on the CPU")
    if c.base_from and not Path(c.base_from).is_dir():
        raise ValueError(f"--base_from {c.base_from}: no such folder")
    for method in c.rl_methods:
        if "rl_methods" in given and method not in c.methods:
            raise ValueError(f"--rl_methods {method} is not among --methods")
    for name in given:
        if all(name in METHODS[method] for method in c.methods):
            raise ValueError(f"--{name} reaches no method: their lines of METHODS set it")
    for method in c.methods:
        mine = replace(c, **METHODS[method])
        if mine.batch_size > mine.demos:
            raise ValueError(f"--batch_size {mine.batch_size} is above --demos {mine.demos}")
        if mine.loss == "clip" and mine.old_every < 2:
            raise ValueError(f"--old_every {mine.old_every} with {method}: right after a refresh "
                             "the ratio is 1, so nothing is clipped: plain SFT; use 2 or more")
        if mine.old_every < 1 or mine.old_every % mine.passes != 0:
            raise ValueError(f"--passes {mine.passes} must divide --old_every {mine.old_every}")
        for step in mine.rl_from:
            if method in c.rl_methods and not 1 <= step <= mine.steps:
                raise ValueError(f"--rl_from {step}: {method} has steps 1 to {mine.steps}; give "
                                 "--rl_from too")


@functools.cache
def task_fingerprint():
    """A number that changes with the task: with documents, demonstrations or evaluation problems
    (data.py, eval.eval_sets)."""
    rng = random.Random("fingerprint")
    texts = []
    for _ in range(100):
        problem, response = data.base_document(rng)
        texts.append(f"{problem.prompt} {response}")
    ids, _ = data.demonstrations(100, "fingerprint")
    texts += [data.decode(row) for row in ids.tolist()]
    for problems in ev.eval_sets(100, "fingerprint").values():
        texts += [problem.prompt for problem in problems]
    return zlib.crc32("\n".join(texts).encode())


def job_settings(c, method):
    """All that the rows of a job depend on, as it stands in its file."""
    settings = asdict(replace(c, **METHODS.get(method, {})))    # the base has none of its own
    for name in ("out_dir", "base_from", "methods", "seed", "seeds"):
        del settings[name]
    settings["rl_methods"] = [method] if method in c.rl_methods else []
    settings["rl_from"] = list(settings["rl_from"])
    settings["task"] = task_fingerprint()
    for name, value in settings.items():
        if value == math.inf:
            settings[name] = "inf"    # JSON has none
    return settings


def job_path(folder, seed, method):
    return Path(folder) / f"s{seed}-{method}.json"


def check_folder(c):
    """ValueError names what the jobs of the run folder were made with if that differs from now."""
    for path in sorted(Path(c.out_dir).glob("s[0-9]*-*.json")):
        _, method = path.stem.split("-", 1)
        if method not in METHODS and method != "base":
            continue    # a line that is no longer there
        wanted = job_settings(c, method)
        if not wanted["rl_methods"]:
            del wanted["rl_methods"]    # a job with RL serves one without
        refuse_other_settings(path, wanted)


def check_base(c, seed):
    """ValueError if --base_from has no base of this seed, or one of other settings."""
    path = job_path(c.base_from, seed, "base")
    if not path.exists():
        raise ValueError(f"--base_from: there is no {path}")
    wanted = {}
    for name, value in job_settings(c, "base").items():
        if name.startswith(("base_", "n_", "dtype", "task")):
            wanted[name] = value
    refuse_other_settings(path, wanted)


def refuse_other_settings(path, wanted):
    found = ev.read_json(path)["settings"]
    for name, value in wanted.items():
        if name in found and found[name] == value:
            continue
        if name == "task":
            raise ValueError(f"{path} is of another task: data.py or eval.eval_sets has changed; "
                             "give another --out_dir")
        raise ValueError(f"{path} was made with {name} = {found.get(name)}, now {value}: give the "
                         "same or another --out_dir, or delete the file to run it again")


def run_base(c, seed):
    """Pre-train the base, or take it from another run folder; what GRPO makes of it -> rows."""
    if c.base_from:
        base = load_checkpoint(Path(c.base_from) / f"s{seed}-base.pt", c.device)
    else:
        base = pretrain(c, seed)
    save_checkpoint(Path(c.out_dir) / f"s{seed}-base.pt", base)
    row = dict(seed=seed, method="base", stage="base", step=0)
    row.update(ev.evaluate(base, base, c.eval_n, seed))
    show(ev.line(row))
    rows = [row]
    if c.rl_from:
        rows.append(run_rl(c, seed, "base", 0, base, base))
    return rows


def run_method(c, seed, method):
    """Fine-tune a copy of the base by a method; GRPO from some of its steps -> rows."""
    c = replace(c, **METHODS[method])
    base = load_checkpoint(Path(c.out_dir) / f"s{seed}-base.pt", c.device).requires_grad_(False)
    ids, mask = data.demonstrations(c.demos, seed, p_word=c.p_word)
    if c.skip != "none":
        mask = without_improbable(base, ids, mask, c.skip, seed)
    model = copy.deepcopy(base).requires_grad_(True)
    if c.freeze == "table":
        model.lm_head.weight.requires_grad_(False)
    rows = []
    recent = []
    updates = finetune(model, base, ids, mask, c, seed)
    for step, stats in progress(updates, c.steps, f"seed {seed} {method}"):
        recent.append(stats)
        recent = recent[-c.old_every:]    # K updates: every age of the old policy once
        if step in EVAL_STEPS or step in c.rl_from or step == c.steps:
            row = dict(seed=seed, method=method, stage="sft", step=step)
            row.update(ev.evaluate(model, base, c.eval_n, seed))
            row["loss"] = ev.mean(stats["loss"].item() for stats in recent)
            row.update(ev.clipped_shares(recent))
            rows.append(row)
            show(ev.line(row))
        if step in c.rl_from and method in c.rl_methods:
            save_checkpoint(Path(c.out_dir) / f"s{seed}-{method}-{step}.pt", model)
            rows.append(run_rl(c, seed, method, step, model, base))
    return rows


def run_rl(c, seed, method, step, model, base):
    """GRPO on ID prompts from a copy of model -> row, with the statistics of the last steps."""
    model = copy.deepcopy(model).requires_grad_(True)
    steps = progress(grpo(model, base, c, seed), c.rl_steps, f"seed {seed} {method} {step}, RL")
    stats = list(steps)
    save_checkpoint(Path(c.out_dir) / f"s{seed}-{method}-{step}-rl.pt", model)
    row = dict(seed=seed, method=method, stage="rl", step=step)
    row.update(ev.evaluate(model, base, c.eval_n, seed))
    row.update(ev.average(stats[-10:]))
    show(ev.line(row))
    return row


def progress(steps, total, name):
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(steps, name, total, leave=False, disable=None)


def show(text):
    """Print beside the bars. A reader that has gone (| head -1) does not end the work."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    """Run the jobs that are not there yet, then report. In a notebook: main(["--seeds", "2"])."""
    c = read_flags(argv)
    torch.set_float32_matmul_precision("high")     # TF32 on CUDA; on the CPU it changes nothing
    torch.backends.cuda.enable_cudnn_sdp(False)    # in bf16 it would plan anew for every shape
    seeds = range(c.seed, c.seed + c.seeds)
    try:
        check_folder(c)    # all is looked at before any work
        for seed in seeds:
            if c.base_from and not job_path(c.out_dir, seed, "base").exists():
                check_base(c, seed)
        Path(c.out_dir).mkdir(parents=True, exist_ok=True)
        show(ev.header())
        for seed in seeds:
            for method in ("base", *c.methods):
                path = job_path(c.out_dir, seed, method)
                if path.exists():
                    show(f"seed {seed} {method}: found; delete {path} to run it again")
                    continue
                rows = run_base(c, seed) if method == "base" else run_method(c, seed, method)
                rows = [{key: ev.finite(value) for key, value in row.items()} for row in rows]
                ev.write_json(path, dict(settings=job_settings(c, method), rows=rows))
        ev.report([c.out_dir], show)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the finished jobs")
