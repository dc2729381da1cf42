"""clipsft.py - pre-train a small GPT, fine-tune it with and without clipping, then run GRPO.

    python clipsft.py                                 the main job: one table, one figure
    python clipsft.py --seeds 10                      the claims study (then: python eval.py RUN)
    python clipsft.py --methods sft clip:eps_high=0.1 --seeds 3       test a hypothesis

Every method is a per-token loss in METHODS; data order and number of updates are the same for all,
unless a method carries its own settings: clip:eps_high=0.4,old_every=24 or sft:lr=1e-4.
"""
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import queue
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import eval as ev
from model import (GPT, BadInput, GPTConfig, adamw, arg, atomic_write, autocast, check, compiled,
                   generator, kl_exact, load_checkpoint, parse, pick_device, response_logits,
                   response_logprobs, run_main, save_checkpoint, trim, update)
from rl import RLConfig, clipped_surrogate, grpo, masked_mean, micro_batches


# --------------------------------------------------------------------------------- per-token losses
def sft_loss(logp):
    """Supervised fine-tuning: the weight on grad log pi is 1. logp (B, T) -> (B, T), to
    minimise."""
    # L_SFT = - log pi(y_t)
    return -logp


def clip_loss(logp, old_logp, eps_low, eps_high):
    """Clipped SFT: PPO's surrogate with advantage 1. The weight on grad log pi is r up to
    1+eps_high and 0 beyond: a token rests once its probability has grown by that factor since the
    old policy. An improbable token gets there first; one with p_old > 1/(1+eps_high) never does."""
    # L = - min(r_t, clip(r_t, 1 - e, 1 + e)), A_t = 1     PSFT 2508.17784 eq. 6; paper 1 eq. 8-9
    return -clipped_surrogate(logp, old_logp, 1.0, eps_low, eps_high)


def dft_loss(logp):
    """Dynamic fine-tuning (2508.05629): the weight is pi itself, held constant, so that the
    gradient is that of - pi(y_t): the opposite remedy, which never learns what it finds
    improbable."""
    # L_DFT = - sg(pi(y_t)) log pi(y_t)
    return -logp.detach().exp() * logp


def kl_to_base(b):
    """KL(pi || base) over the whole vocabulary at each response token: (B, T-1)."""
    with torch.no_grad():
        ref = response_logits(b.base, b.ids, b.ids_mask)
    kl = kl_exact(response_logits(b.model, b.ids, b.ids_mask), ref)
    return torch.zeros_like(b.logp).masked_scatter(b.mask, kl)


def rotation(model, base):
    """How far the model has moved within the base's leading singular directions, half of them in
    each block matrix: a scalar."""
    total = 0.0
    for W, W0 in zip(model.transformer.h.parameters(), base.transformer.h.parameters()):
        if W.dim() == 2:
            U, _, V = torch.linalg.svd(W0.detach(), full_matrices=False)
            k = min(W0.shape) // 2
            # sum over W of || U0_k^T (W - W0) V0_k ||_F^2                      RPSFT, 2605.10973
            total = total + (U[:, :k].T @ (W - W0.detach()) @ V[:k].T).pow(2).sum()
    return total


def rest_random(b, c):
    """The weight of clip, but tokens rest at random, as many as are beyond its bound."""
    ratio = (b.logp.detach() - b.old_logp).exp()
    beyond = (ratio > 1 + c.eps_high)[b.mask].float().mean()
    return sft_loss(b.logp) * ratio.clamp(max=1 + c.eps_high) * (b.fresh >= beyond)


def left_out(base_logp, mask, noise, mask_p):
    """The tokens that the mask_* methods never train, as bool tensors like mask (N, T-1): those
    the base gives less than mask_p; as many random ones; as many of the most probable; and random
    ones until they make up the same share of the base's loss."""
    low = mask & (base_logp < math.log(mask_p))
    n, loss = low.sum(), -base_logp.masked_fill(~mask, 0)

    def first(score, n):
        out, order = torch.zeros_like(low), score.masked_fill(~mask, math.inf).flatten().argsort()
        out.view(-1)[order[:n]] = True
        return out
    by_noise = noise.masked_fill(~mask, math.inf).flatten().argsort()
    n_loss = (loss.flatten()[by_noise].cumsum(0) <= loss[low].sum()).sum().clamp(max=mask.sum() - 1)
    return dict(low=low, random=first(noise, n), high=first(-base_logp, n),
                loss=first(noise, n_loss))


# A method maps b, the batch at hand, and c, the Config, to a loss per token (B, T-1); what it says
# outside b.mask does not count. b.logp carries the gradient; b.old_logp and b.base_logp are those
# of the old policy and of the base; b.fresh is uniform noise, new at each step; b.low, b.random,
# b.high, b.loss: see left_out; all (B, T-1). b.ids and b.ids_mask (B, T), b.model and b.base are
# there for a loss that needs more than log-probabilities.
METHODS = {
    "sft": lambda b, c: sft_loss(b.logp),
    "clip": lambda b, c: clip_loss(b.logp, b.old_logp, c.eps_low, c.eps_high),
    "dft": lambda b, c: dft_loss(b.logp),
    # Controls. What is it about clip: r as a weight, the moving old policy, or which tokens rest?
    "ratio": lambda b, c: clip_loss(b.logp, b.old_logp, c.eps_low, math.inf),
    "frozen": lambda b, c: clip_loss(b.logp, b.base_logp, c.eps_low, c.eps_high),
    "rest_random": rest_random,
    # Tokens that are never trained: see left_out.
    "mask_low": lambda b, c: sft_loss(b.logp) * ~b.low,
    "mask_random": lambda b, c: sft_loss(b.logp) * ~b.random,
    "mask_high": lambda b, c: sft_loss(b.logp) * ~b.high,
    "mask_loss": lambda b, c: sft_loss(b.logp) * ~b.loss,
    # A leash to the base: in its predictions (SFT-KL of 2508.17784), in its singular directions.
    "kl": lambda b, c: sft_loss(b.logp) + c.kl_weight * kl_to_base(b),
    "rpsft": lambda b, c: sft_loss(b.logp) + c.rot_weight * rotation(b.model, b.base),
}
# Those that compare with the moving old policy: K = 1 would make them SFT, and their clip_frac is
# worth reading. ("frozen" keeps the base as its old policy for ever.)
NEED_OLD = ("clip", "ratio", "rest_random")


# ------------------------------------------------------------------------------------ configuration
@dataclass
class Config(RLConfig):
    preset: str = arg("cpu", "smoke: every stage in seconds; cpu; gpu: 100M parameters")
    methods: list[str] = arg([], "methods, NAME or NAME:flag=value,...; if none are given sft and "
                             "clip, with --seeds the study's whole list")
    seeds: int = arg(1, "how many seeds, from --seed on; each has its own base", above=0)
    rl_methods: list[str] = arg(["sft", "clip"], "those that GRPO starts from, or none")
    rl_from: list[int] = arg([], "SFT steps that GRPO starts from; if none are given 100 300, with "
                             "--seeds a grid of eight", above=0)
    steps: int = arg(300, "SFT updates", above=0)
    lr: float = arg(3e-4, "SFT learning rate", above=0)
    batch_size: int = arg(16, "demonstrations an update", above=0)
    demos: int = arg(64, "demonstrations in all", above=0)
    p_word: float = arg(0.3, "chance of an unpredictable connective before a step", above=-1e-9,
                        below=1)
    eps_low: float = arg(0.2, "clip below: 1 - eps_low (never acts while the advantage is 1)",
                         above=0, below=1)
    eps_high: float = arg(0.2, "clip above: 1 + eps_high", above=0)
    old_every: int = arg(12, "K, updates per refresh of the old policy", above=0)
    mask_p: float = arg(0.1, "mask_* methods: base probability under which a token is masked",
                        above=0, below=1)
    kl_weight: float = arg(0.5, "kl method: weight of KL(pi || base)", above=0)
    rot_weight: float = arg(1.0, "rpsft method: weight of the rotation penalty", above=0)
    n_layer: int = arg(3, "layers", above=0)
    n_head: int = arg(2, "attention heads", above=0)
    n_embd: int = arg(64, "width", above=0)
    base_steps: int = arg(2000, "pre-training updates", above=0)
    base_lr: float = arg(4e-3, "pre-training peak learning rate", above=0)
    base_batch: int = arg(64, "documents a pre-training update", above=0)
    base_docs: int = arg(60000, "different pre-training documents", above=0)
    min_base: float = arg(0.9, "seeds whose base adds up fewer random-rule hands are left out",
                          above=-1e-9, below=1)
    compile: bool = arg(False, "torch.compile the forward pass and decoding")
    workers: int = arg(0, "processes; 0 is one a core, on CUDA one", above=-1)
    out_dir: str = arg("runs/main", "run folder; bases are cached in its parent folder")
    resume: bool = arg(False, "finish a stopped run")


STUDY = ["sft", "clip", "sft:steps=3000", "clip:steps=3000", "sft:demos=256", "clip:demos=256",
         "sft:lr=1e-4", "clip:lr=1e-4", "sft:lr=3e-5", "clip:lr=3e-5", "sft:lr=1e-5",
         "clip:lr=1e-5", "clip:eps_high=0.1", "clip:eps_high=0.4", "clip:old_every=4",
         "clip:old_every=36", "mask_low", "mask_random", "mask_high", "mask_loss", "dft", "ratio",
         "rest_random", "frozen", "kl", "rpsft", "mask_low:p_word=0", "mask_random:p_word=0"]
STUDY_RL = [4, 8, 16, 30, 60, 100, 200, 300]
PRESETS = {
    "cpu": {},
    "smoke": dict(n_layer=2, n_head=2, n_embd=32, base_steps=20, base_docs=400, steps=8,
                  rl_from=[8], rl_steps=2, rl_prompts=4, eval_n=16, min_base=0.0),
    "gpu": dict(n_layer=14, n_head=12, n_embd=768, base_steps=1500, base_lr=6e-4, base_batch=512,
                base_docs=400000, lr=3e-5, rl_lr=1e-5, dtype="bf16", device="cuda"),
}


PER_METHOD = ("steps", "lr", "batch_size", "demos", "p_word", "eps_low", "eps_high", "old_every",
              "mask_p", "kl_weight", "rot_weight", "grad_accum")


def settings_of(spec, c):
    """'clip:eps_high=0.4,lr=1e-4' -> ('clip', c with these settings)."""
    name, _, extra = spec.partition(":")
    if name not in METHODS:
        raise BadInput(f"--methods {spec}: choose from {', '.join(METHODS)}")
    for item in filter(None, extra.split(",")):
        key, _, value = item.partition("=")
        kind = {f.name: f.type for f in dataclasses.fields(c)}.get(key)
        if key not in PER_METHOD:
            raise BadInput(f"--methods {spec}: {key!r} is not one of {', '.join(PER_METHOD)}")
        try:
            c = dataclasses.replace(c, **{key: kind(value)})
        except ValueError:
            raise BadInput(f"--methods {spec}: {value!r} is not a number for {key}")
    check(c)
    if name in NEED_OLD and c.old_every == 1:
        raise BadInput(f"--old_every 1 with {name}: right after a refresh the ratio is 1, so "
                       "nothing is ever clipped and the method is plain SFT; use 2 or more")
    return name, c


def eval_steps(steps):
    """Dense while the OOD curve peaks, then ever sparser, and the last step; a prolonged run is
    only looked at from step 100 on."""
    grid = [4, 8, 16, 30, 60, 100, 200, 300, 1000]
    return [s for s in grid if s < steps and (steps <= 1000 or s >= 100)] + [steps]


# ------------------------------------------------------------------------------------- pre-training
def base_path(c, seed):
    """Where the base of this seed is cached: a name made of everything that its weights depend
    on."""
    keys = ("n_layer", "n_head", "n_embd", "base_steps", "base_lr", "base_batch", "base_docs",
            "device", "dtype", "max_new", "grad_accum", "compile")
    source = [inspect.getsource(x) for x in (data, inspect.getmodule(GPT), train_base,
                                             micro_batches, masked_mean)]
    what = repr([getattr(c, k) for k in keys] + [seed] + source)
    return Path(c.out_dir).parent / f"base-{hashlib.sha256(what.encode()).hexdigest()[:12]}.pt"


def pretrain(c, seed, report):
    """Train the base, the prior knowledge, or take it from the cache; evaluate it into the run."""
    cached, device, out = base_path(c, seed), torch.device(c.device), Path(c.out_dir)
    here, done = out / "ckpt" / f"s{seed}-base.pt", out / "cells" / f"s{seed}-base.json"
    if not here.exists():
        if cached.exists():
            report(skipped=c.base_steps)
        else:
            train_base(c, seed, cached, device, report)
        atomic_write(here, cached.read_bytes())
    if not done.exists():
        base, _ = load_checkpoint(here, device)
        with autocast(device, c.dtype):
            row = dict(seed=seed, method="base", stage="base", init_step=0, step=0,
                       **ev.evaluate(base, c, base), clip_frac=0.0)
        atomic_write(done, json.dumps([row]).encode())
        report(cell=f"base {seed}", row=row)


def train_base(c, seed, path, device, report):
    """Pre-train into `path`. Stopped half-way it goes on where it was."""
    part = Path(f"{path}.part")
    rng = random.Random(f"{seed}/docs")
    docs = [data.base_document(rng) for _ in range(c.base_docs)]
    ids, mask = data.batch([(p.prompt, r) for p, r in docs])             # tokenised once, up front
    length = (ids != data.PAD).sum(1)
    torch.manual_seed(seed)
    model, state = GPT(GPTConfig(data.N_VOCAB, 12 + c.max_new, c.n_layer, c.n_head, c.n_embd)), None
    if part.exists():
        model, state = load_checkpoint(part, device)
    opt = adamw(model.to(device), c.base_lr, betas=(0.9, 0.98), weight_decay=0.1)
    if state:
        opt.load_state_dict(state["optimizer"])
    start = state["step"] if state else 0
    report(skipped=start)
    compiled(model, c.compile)

    def gradients(part):    # not loss.backward(): two threads would add to the same .grad
        rows, share = part
        x, m = (t.to(device) for t in trim(ids[rows], mask[rows]))
        with autocast(device, c.dtype):
            loss = share * masked_mean(-response_logprobs(model, x, m), m[:, 1:])
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))
    # Two cores for one seed. map keeps the order of the sum, whichever thread is done first.
    threads = ThreadPoolExecutor(2, initializer=lambda: torch.set_num_threads(1))
    per_epoch = c.base_docs // c.base_batch
    for step in range(start, c.base_steps):
        if step == start or step % per_epoch == 0:
            order = torch.randperm(c.base_docs, generator=generator("cpu", seed, step // per_epoch))
        rows = order[step % per_epoch * c.base_batch:][:c.base_batch]
        rows = rows[length[rows].argsort()]    # short rows together: micro-batches without padding
        total = 0.0
        parts = micro_batches(mask[rows], "token", 2 * c.grad_accum)
        for loss, grads in threads.map(gradients, ((rows[run], share) for run, share in parts)):
            total += loss
            for p, grad in zip(model.parameters(), grads):
                p.grad = grad if p.grad is None else p.grad + grad
        # warm up for 100 steps, then down to 0 in a straight line
        update(model, opt, c.base_lr * min(1, (step + 1) / 100) * (1 - step / c.base_steps))
        report(cell=f"base {seed}", loss=total)
        if (step + 1) % 200 == 0 and step + 1 < c.base_steps:
            save_checkpoint(part, model, optimizer=opt.state_dict(), step=step + 1)
    save_checkpoint(path, model)
    part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- fine-tuning
def by_bin(x, bins, mask):
    """Sums of x (N, T) over the ten base-probability bins, [0, .1) first. -> list of 10 floats."""
    sums = torch.zeros(10, device=x.device).index_add_(0, bins[mask], x[mask].float())
    return sums.tolist()


def finetune(base, c, spec, seed, path=None, state=None, tick=lambda **_: None,
             on_row=lambda row, model: None):
    """Fine-tune a copy of base by one method. -> (model, metrics rows). One loop for all methods.

    path: where to keep a resumable checkpoint; state: what load_checkpoint returned for it."""
    name, c = settings_of(spec, c)
    dev = next(base.parameters()).device
    ids, mask = (t.to(dev) for t in data.demonstrations(c.demos, seed, p_word=c.p_word))
    N, m = len(ids), mask[:, 1:]
    with torch.no_grad(), autocast(dev, c.dtype):    # scored as it will be trained
        base_logp = response_logprobs(base, ids, mask)                       # (N, T-1)
    bins = (base_logp.exp() * 10).long().clamp(max=9)
    n_bin = by_bin(m, bins, m)
    noise = torch.rand(m.shape, generator=generator("cpu", seed, "noise")).to(dev)
    never = left_out(base_logp, m, noise, c.mask_p)

    model = copy.deepcopy(base)
    opt, rows, start, old_logp = adamw(model, c.lr), [], 0, base_logp
    clipped, losses = torch.zeros(2, 10), []           # tokens clipped and tokens seen, by bin
    if state:
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        rows, start, old_logp = state["rows"], state["step"], state["old_logp"]
    compiled(model, c.compile)
    per_epoch = -(-N // c.batch_size)
    for step in range(start, c.steps):
        # Every K updates the policy as it stands becomes the old policy. Where K is several epochs
        # (here 3, as in paper 1) a token is trained more than once against the same old policy.
        if step % c.old_every == 0 and name != "frozen":
            with torch.no_grad(), autocast(dev, c.dtype):
                old_logp = response_logprobs(model, ids, mask)
        epoch = torch.randperm(N, generator=generator("cpu", seed, "order", step // per_epoch))
        batch = epoch[step % per_epoch * c.batch_size:][:c.batch_size].to(dev)
        fresh = torch.rand(m.shape, generator=generator("cpu", seed, "fresh", step)).to(dev)
        named = dict(old_logp=old_logp, base_logp=base_logp, fresh=fresh, **never)
        loss = 0.0
        for part, share in micro_batches(mask[batch], c.aggregate, c.grad_accum):
            rows_of = batch[part]
            per_token = (t[rows_of] for t in (m, bins, *named.values()))
            x, x_mask, b_mask, b_bins, *more = trim(ids[rows_of], mask[rows_of], *per_token)
            b = SimpleNamespace(ids=x, ids_mask=x_mask, mask=b_mask, model=model, base=base,
                                **dict(zip(named, more)))
            with autocast(dev, c.dtype):
                b.logp = response_logprobs(model, x, x_mask)                 # (B, T-1)
                part_loss = share * masked_mean(METHODS[name](b, c), b_mask, c.aggregate, c.max_new)
            part_loss.backward()
            loss += part_loss.item()
            over = b.logp.detach() - b.old_logp > math.log(1 + c.eps_high)
            clipped += torch.tensor([by_bin(over, b_bins, b_mask), by_bin(b_mask, b_bins, b_mask)])
        try:
            update(model, opt, c.lr)
        except FloatingPointError as e:
            raise FloatingPointError(f"{spec}, seed {seed}, step {step}: {e}; last checkpoint "
                                     f"{path}")
        losses.append(loss)
        tick(loss=loss)
        if step + 1 in {*eval_steps(c.steps), *starts_of(spec, c)}:
            with torch.no_grad(), autocast(dev, c.dtype):
                logp = response_logprobs(model, ids, mask)
                row = dict(seed=seed, method=spec, stage="sft", init_step=0, step=step + 1,
                           **ev.evaluate(model, c, base), loss=ev.mean(losses))
            clipped[0] *= name in (*NEED_OLD, "frozen")    # the others clip nothing
            sums = by_bin(logp, bins, m)
            row |= dict(clip_frac=(clipped[0].sum() / clipped[1].sum()).item(), n_bin=n_bin,
                        clip_bins=(clipped[0] / clipped[1].clamp(min=1)).tolist(),
                        logp_bins=[x / n if n else None for x, n in zip(sums, n_bin)])
            rows.append(row)
            clipped, losses = torch.zeros(2, 10), []
            on_row(row, model)
            if path:
                save_checkpoint(path, model, optimizer=opt.state_dict(), step=step + 1, rows=rows,
                                old_logp=old_logp)
    return model, rows


# ------------------------------------------------------------------------------------- the pipeline
def slug(*parts):
    return "-".join(map(str, parts)).replace(":", "_").replace("=", "").replace(",", "_")


def starts_of(spec, c):
    """The steps of this method that GRPO starts from; the base itself is 0."""
    if spec == "base":
        return [0]
    return [s for s in c.rl_from if spec in c.rl_methods and s <= settings_of(spec, c)[1].steps]


def run_cell(c, spec, seed, report):
    """One method on one seed: fine-tune, then GRPO from its checkpoints; for "base" GRPO alone.
    What is finished is never computed again; what was stopped half-way goes on from its last
    checkpoint."""
    out, device = Path(c.out_dir), torch.device(c.device)
    name = f"s{seed} {spec}"
    base, _ = load_checkpoint(out / "ckpt" / f"s{seed}-base.pt", device)

    def unit(tag, work):
        """Rows of a unit of work from its file, or from work(state, path)."""
        done, part = out / "cells" / f"{tag}.json", out / "cells" / f"{tag}.part"
        if done.exists():
            rows = ev.read_json(done)
            report(cell=name, skipped=rows[-1]["step"])
            return rows
        state = None
        if part.exists():
            model, state = load_checkpoint(part, device)
            state["model"] = model.state_dict()
            report(cell=name, skipped=state["step"])
        rows = work(state, part)
        atomic_write(done, json.dumps(rows).encode())
        part.unlink(missing_ok=True)
        return rows

    def tick(**stats):
        report(cell=name, **stats)

    starts = starts_of(spec, c)

    def keep(row, model):
        if row["step"] in starts:
            save_checkpoint(out / "ckpt" / f"{slug(f's{seed}', spec, row['step'])}.pt", model)
        report(cell=name, row=row)

    if spec != "base":
        unit(slug(f"s{seed}", spec),
             lambda state, part: finetune(base, c, spec, seed, part, state, tick, keep)[1])

    def heal(start, state, part):
        ckpt = out / "ckpt" / (slug(f"s{seed}", spec, start) if start else f"s{seed}-base")
        model, _ = load_checkpoint(f"{ckpt}.pt", device)
        if state:
            model.load_state_dict(state["model"])
        compiled(model, c.compile)
        try:
            stats = grpo(model, c, seed, part, state=state, tick=tick)
        except FloatingPointError as e:
            raise FloatingPointError(f"GRPO from {ckpt}.pt: {e}; last good checkpoint: {part}")
        save_checkpoint(f"{ckpt}-rl.pt", model)
        with autocast(device, c.dtype):
            row = dict(seed=seed, method=spec, stage="rl", init_step=start, step=c.rl_steps,
                       **ev.evaluate(model, c, base), **stats)
        report(cell=name, row=row)
        return [row]

    for start in starts:
        unit(slug(f"s{seed}", spec, start, "rl"),
             lambda state, part, start=start: heal(start, state, part))


def worker(jobs, messages, parent):
    """A process of its own: takes jobs (function, arguments) until there are none, sends
    messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's business
    torch.set_num_threads(1)

    def report(**message):
        if os.getppid() != parent:
            os._exit(1)                             # the parent was killed: leave its files alone
        messages.put(message)
    for function, *args in iter(jobs.get, None):
        try:
            function(*args, report)
            report(finished=True)
        except Exception as e:
            report(error=e)


def run_jobs(jobs, workers, total, metrics):
    """Run jobs (function, arguments), one process each or here, under one progress bar, with a line
    and a metrics row for each evaluated checkpoint."""
    with tqdm(total=total, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        def show(message):
            if "error" in message:
                raise message["error"]
            if "skipped" in message:
                bar.update(message["skipped"])
            elif "row" in message:
                bar.write(ev.line(message["row"]))
                metrics.write(json.dumps(message["row"]) + "\n")
                metrics.flush()
            elif "cell" in message:
                stats = "".join(f" {k} {message[k]:.2f}" for k in ("loss", "reward")
                                if k in message)
                bar.set_postfix_str(f"{message['cell']}{stats}", refresh=False)
                bar.update()

        workers = min(workers, len(jobs))
        if workers <= 1:
            for function, *args in jobs:
                function(*args, lambda **message: show(message))
            return
        ctx = multiprocessing.get_context("spawn")
        todo, messages = ctx.Queue(), ctx.Queue()
        for job in jobs + [None] * workers:
            todo.put(job)
        pool = [ctx.Process(target=worker, args=(todo, messages, os.getpid()), daemon=True)
                for _ in range(workers)]
        for p in pool:
            p.start()
        left = len(jobs)
        while left:
            try:
                message = messages.get(timeout=2)
                left -= "finished" in message
                show(message)
            except queue.Empty:
                if any(p.exitcode for p in pool):
                    raise BadInput("a worker process died; --resume goes on from there")
        for p in pool:
            p.join()


def collect(out):
    """All finished rows of a run folder, in grid order."""
    cells, config, rows = Path(out) / "cells", ev.read_config(out), []
    for seed in range(config["seed"], config["seed"] + config["seeds"]):
        tags = []
        for m in ["base", *config["methods"]]:
            tags.append(slug(f"s{seed}", m))
            tags += [slug(f"s{seed}", m, s, "rl") for s in [0, *config["rl_from"]]]
        for tag in tags:
            if (cells / f"{tag}.json").exists():
                rows += ev.read_json(cells / f"{tag}.json")
    return rows


def prepare(argv):
    """Command line -> config, checked whole; run folder made or, with --resume, compared."""
    c = parse(Config, argv, __doc__, PRESETS)
    if c.resume:    # what is not given on the command line is as in the run
        kept = {k: v for k, v in ev.read_config(c.out_dir).items() if k in vars(c)}
        c = parse(Config, argv, __doc__, {c.preset: kept | dict(resume=True)})
    study = c.seeds > 1
    c.methods = list(dict.fromkeys(c.methods or (STUDY if study else ["sft", "clip"])))
    c.rl_from = sorted(set(c.rl_from or (STUDY_RL if study else [100, 300])))
    for spec in c.methods:
        settings_of(spec, c)
    for spec in c.rl_methods:
        if spec != "none" and spec.partition(":")[0] not in METHODS:
            raise BadInput(f"--rl_methods {spec}: choose from {', '.join(METHODS)} or none")
    if min(c.rl_from) > c.steps:
        raise BadInput(f"--rl_from {min(c.rl_from)}: SFT ends at --steps {c.steps}")
    c.rl_from = [s for s in c.rl_from if s <= c.steps]
    if c.n_embd % c.n_head:
        raise BadInput(f"--n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}")
    if c.base_batch > c.base_docs:
        raise BadInput(f"--base_batch {c.base_batch} is more than --base_docs {c.base_docs}")
    c.device = pick_device(c.device).type
    c.workers = c.workers or (os.cpu_count() if c.device == "cpu" else 1)

    out = Path(c.out_dir)
    config = json.loads(json.dumps(dataclasses.asdict(c)))
    free = ("resume", "workers", "out_dir", "seeds", "methods", "rl_methods")    # none is in a cell
    if (out / "config.json").exists():
        if not c.resume:
            raise BadInput(f"{out} holds a run already: finish or re-report it with --resume, or "
                           "name another folder with --out_dir")
        old = ev.read_config(out)
        differ = [k for k in config if k not in free and old.get(k) != config[k]]
        if differ:
            raise BadInput(f"--resume: {out} was started with another " + ", ".join(
                f"--{k} ({old.get(k)}, now {config[k]})" for k in differ))
        # A resumed run may be given further methods or seeds: it then computes those alone.
        if bare := set(c.rl_methods) - set(old["rl_methods"]) & set(old["methods"]) - {"none"}:
            raise BadInput(f"--rl_methods {' '.join(bare)}: has kept no checkpoints here for GRPO "
                           "to start from; use another folder")
        for k in ("methods", "rl_methods"):
            config[k] = list(dict.fromkeys(old[k] + getattr(c, k)))
        config["seeds"] = max(old["seeds"], c.seeds)
        atomic_write(out / "config.json", json.dumps(old | config, indent=1).encode())
        return c
    if out.is_file() or out.exists() and any(out.iterdir()):
        raise BadInput(f"--out_dir {out} is not empty and not a run of this program")
    try:
        (out / "ckpt").mkdir(parents=True)
        (out / "cells").mkdir()
    except OSError as e:
        raise BadInput(f"--out_dir {out}: {e.strerror}")
    config["versions"] = dict(python=platform.python_version(), torch=torch.__version__,
                              machine=platform.machine(), cpus=os.cpu_count())
    atomic_write(out / "config.json", json.dumps(config, indent=1).encode())
    return c


def able(c):
    """Seeds of the run whose base can add. The others have nothing to forget: they are left out
    before any method has seen them, and named."""
    out = []
    for seed in range(c.seed, c.seed + c.seeds):
        row = ev.read_json(Path(c.out_dir) / "cells" / f"s{seed}-base.json")[0]
        if row["answer_random"] >= c.min_base:
            out.append(seed)
        else:
            print(f"seed {seed} is left out: its base adds up only {row['answer_random']:.1%} of "
                  f"the random-rule hands (--min_base {c.min_base})")
    if not out:
        raise BadInput("no base can add: raise --base_steps, or try another --seed")
    return out


def main(argv=None):
    c = prepare(argv)
    out, seeds = Path(c.out_dir), range(c.seed, c.seed + c.seeds)
    torch.set_num_threads(1)    # results must not depend on the number of cores
    try:
        with open(out / "metrics.jsonl", "w", encoding="utf-8") as metrics:
            for row in collect(out):
                metrics.write(json.dumps(row) + "\n")
            print(ev.line())
            bases = [(pretrain, c, s) for s in seeds
                     if not (out / "cells" / f"s{s}-base.json").exists()]
            run_jobs(bases, c.workers, len(bases) * c.base_steps, metrics)
            seeds = able(c)
            healed = set(c.rl_methods) & set(c.methods)
            # GRPO from the base too: what is SFT good for?
            specs = c.methods + (["base"] if healed else [])
            cells = [(run_cell, c, m, s) for s in seeds for m in specs]
            steps = sum(len(starts_of(m, c)) * c.rl_steps for m in specs)
            steps += sum(settings_of(m, c)[1].steps for m in c.methods)
            run_jobs(cells, c.workers, steps * len(seeds), metrics)
            if {"sft", "clip"} <= healed and len(c.rl_from) > 3:
                run_jobs([(ev.measure, out, c, s) for s in seeds], c.workers, len(seeds), metrics)
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)
    lines = "".join(json.dumps(row) + "\n" for row in collect(out))
    atomic_write(out / "metrics.jsonl", lines.encode())
    ev.report(out)


if __name__ == "__main__":
    run_main(main)
