"""clipsft.py - pre-train a small GPT, fine-tune it with and without clipping, then run GRPO.
    python clipsft.py                                 the main job: one table, one figure
    python clipsft.py --methods sft clip clip:eps_high=0.1 --seeds 5 --out_dir runs/eps

Above the ruled line: the losses of papers 1 (Liu et al., ICML 2026) and 3 (PSFT, 2508.17784), and
the one loop that trains by any of them; below: cells, processes, command line. A method may carry
settings of its own: clip:eps_high=0.4,old_every=24. The same command goes on after a stop.
"""
import copy
import functools
import inspect
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import traceback
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as ev
import model as gpt
from model import (GPT, BadInput, GPTConfig, adamw, arg, atomic, generator, kl_exact,
                   load_checkpoint, muon, parse, response_logits, response_logprobs,
                   save_checkpoint, trim, update)
from rl import RLConfig, clipped_surrogate, grpo, masked_mean, micro_batches

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
    that of - pi(y_t): the opposite remedy, which hardly learns what it finds improbable."""
    # L_DFT = - sg(pi(y_t)) log pi(y_t)
    return -logp.detach().exp() * logp

def kl_to_base(b):
    """KL(pi || base) over the whole vocabulary at each response token of a batch: (B, T-1)."""
    with torch.no_grad():
        ref = response_logits(b.base, b.ids, b.mask)
    kl = kl_exact(response_logits(b.model, b.ids, b.mask), ref)
    return torch.zeros_like(b.logp).masked_scatter(b.mask[:, 1:], kl)

@dataclass
class Batch:
    """What a loss may read. Log-probs (B, T-1) are computed when first asked for."""
    ids: torch.Tensor     # (B, T)
    mask: torch.Tensor    # (B, T), as in data.batch
    model: GPT
    old: GPT              # the model as it stood at the last refresh
    base: GPT
    logp = functools.cached_property(lambda b: response_logprobs(b.model, b.ids, b.mask))
    old_logp = functools.cached_property(lambda b: response_logprobs(b.old, b.ids, b.mask))
    base_logp = functools.cached_property(lambda b: response_logprobs(b.base, b.ids, b.mask))

# A method maps b, the batch, and c, the Config, to a loss per token (B, T-1); what it says outside
# mask[:, 1:] does not count. (clip:eps_high=inf: no bound; clip:old_every=300: the base as old.)
METHODS = {
    "sft": lambda b, c: sft_loss(b.logp),
    "clip": lambda b, c: clip_loss(b.logp, b.old_logp, 0.2, c.eps_high),
    "dft": lambda b, c: dft_loss(b.logp),
    "kl": lambda b, c: sft_loss(b.logp) + 0.5 * kl_to_base(b),    # SFT-KL of 2508.17784, its weight
}

def finetune(model, base, ids, mask, method, c, seed, opts, schedule=lambda step: 1.0):
    """Train `model` in place on ids, mask (N, T): yields (step, statistics) after each of c.steps
    updates. One loop for every method, and for pre-training; schedule(step) scales the rates."""
    per_pass, per_epoch, epoch = -(-c.old_every // c.passes), len(ids) // c.batch_size or 1, None
    for step in range(c.steps):
        refresh, i = divmod(step, c.old_every)
        if i == 0:    # every K updates the policy as it stands becomes the old policy
            old = copy.deepcopy(model).requires_grad_(False)
        # Batches of one refresh, paper 3: 0 1 2 3 ...; passed twice with K = 4: 0 1 0 1, 2 3 2 3
        n = refresh * per_pass + i % per_pass                                # number of the batch
        if epoch != n // per_epoch:
            epoch = n // per_epoch
            order = torch.randperm(len(ids), generator=generator("cpu", seed, epoch))
        batch = order[n % per_epoch * c.batch_size:][:c.batch_size].to(ids.device)
        loss, clipped = 0.0, 0
        for rows, share in micro_batches(mask[batch], c.aggregate, c.grad_accum):
            b = Batch(*trim(ids[batch[rows]], mask[batch[rows]]), model, old, base)
            m = b.mask[:, 1:]                                                # (B, T-1)
            part = share * masked_mean(METHODS[method](b, c), m, c.aggregate, data.MAX_NEW)
            part.backward()
            loss += part.item()
            if "old_logp" in vars(b):    # the loss has asked for it
                clipped += (m & (b.logp - b.old_logp > math.log(1 + c.eps_high))).sum().item()
        update(model, opts, schedule(step))
        yield step + 1, dict(loss=loss, clip_frac=clipped / (mask[batch].sum().item() or 1))

def pretrain(c, seed):
    """The base: the same loop with method sft on base_document, warmed up for 100 updates, then
    down to 0 in a straight line. -> model."""
    rng = random.Random(f"{seed}/docs")
    docs = [data.base_document(rng) for _ in range(c.base_docs)]
    ids, mask = (t.to(c.device) for t in data.batch([(p.prompt, r) for p, r in docs]))
    torch.manual_seed(seed)
    model = GPT(GPTConfig(data.N_VOCAB, 40, c.n_layer, c.n_head, c.n_embd, c.dtype == "bf16"))
    c = replace(c, steps=c.base_steps, batch_size=c.base_batch, aggregate="token", passes=1,
                old_every=c.base_steps, grad_accum=c.grad_accum * (2 if c.device == "cpu" else 1))
    opts = muon(model.to(c.device), c.base_lr, c.base_adam_lr)
    steps = finetune(model, None, ids, mask, "sft", c, seed, opts,
                     lambda step: min(1, (step + 1) / 100) * (1 - step / c.steps))
    for _ in progress(steps, c.steps, f"base {seed}"):
        pass
    return model

def skipped(base, ids, mask, c, seed):
    """Paper 1's ablation: mask without tokens of base p < .1 (low), or without as many random."""
    if c.skip == "none":
        return mask
    m = mask[:, 1:]
    low = m & (response_logprobs(base, ids, mask) < math.log(0.1))           # (N, T-1)
    noise = torch.rand(m.shape, generator=generator("cpu", seed, "noise")).to(m.device)
    by_noise = noise.masked_fill(~m, math.inf).flatten().argsort()
    some = by_noise.argsort().view_as(m) < low.sum()    # the rank of each
    return torch.cat([mask[:, :1], m & ~(low if c.skip == "low" else some)], 1)

# ================================================================= below: what it takes to run this
@dataclass
class SFTConfig:
    """What a method may have of its own: clip:eps_high=0.4,old_every=24."""
    steps: int = arg(300, "SFT updates", gt=0)
    lr: float = arg(3e-4, "SFT learning rate", gt=0)
    batch_size: int = arg(16, "demonstrations an update", gt=0)
    demos: int = arg(2048, "demonstrations in all", gt=0)
    p_word: float = arg(0.3, "chance of an unpredictable connective before a step", ge=0, lt=1)
    eps_high: float = arg(0.28, "clip: a token rests beyond r = 1 + eps_high", gt=0)
    old_every: int = arg(8, "K, updates per refresh of the old policy", gt=0)
    passes: int = arg(1, "passes over the demonstrations of a refresh", gt=0)
    skip: str = arg("none", "tokens never trained: base p < .1, or any", ("none", "low", "random"))

@dataclass
class Config(SFTConfig, RLConfig):
    preset: str = arg("cpu", "gpu: 10M parameters", ("cpu", "smoke", "gpu"))
    methods: list[str] = arg(("sft", "clip"), "methods, NAME or NAME:flag=value,...")
    seeds: int = arg(1, "how many seeds, from --seed on; each has its own base", gt=0)
    rl_methods: list[str] = arg(("sft", "clip"), "those that GRPO starts from; nothing: no RL")
    rl_from: list[int] = arg((8, 64, 300), "SFT steps that GRPO starts from", gt=0)
    n_layer: int = arg(3, "layers", gt=0)
    n_head: int = arg(4, "attention heads", gt=0)
    n_embd: int = arg(96, "width", gt=0)
    dtype: str = arg("fp32", "of matrix products", ("fp32", "bf16"))
    base_steps: int = arg(1000, "pre-training updates", gt=0)
    base_lr: float = arg(6e-3, "pre-training: peak learning rate of Muon", gt=0)
    base_adam_lr: float = arg(4e-3, "and of AdamW", gt=0)
    base_batch: int = arg(64, "documents a pre-training update", gt=0)
    base_docs: int = arg(60000, "different pre-training documents", gt=0)
    workers: int = arg(0, "processes; 0: one a CPU that may be used, on CUDA one", ge=0)
    out_dir: str = arg("runs/main", "run folder; bases are cached in its parent folder")

PRESETS = {
    "smoke": dict(n_layer=2, n_head=2, n_embd=32, base_steps=20, base_docs=400, steps=8,
                  rl_from=[8], rl_steps=2, rl_prompts=4, eval_n=16),
    "gpu": dict(n_layer=6, n_head=6, n_embd=384, base_steps=800, base_lr=3e-3, base_adam_lr=2e-3,
                base_batch=256, base_docs=100000, lr=1e-4, rl_lr=3e-5, device="cuda"),
}
EVAL_STEPS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 200, 300, 600)    # and the last

def variant(text, c):
    """'clip:eps_high=0.4,lr=1e-4' -> ('clip', c with these settings)."""
    method, _, settings = text.partition(":")
    if method not in METHODS:
        raise BadInput(f"error: method {text}: choose from {', '.join(METHODS)}")
    flags = [f"--{s}" for s in settings.split(",") if s]
    return method, replace(c, **vars(parse(SFTConfig, flags, None, vars(c))))

def progress(steps, total, name):    # a bar on a terminal, of the main process only
    return tqdm(steps, name, total, leave=False, disable=multiprocessing.parent_process() and True)

def file(c, folder, *parts):
    return Path(c.out_dir) / folder / "-".join(map(str, parts)).replace(":", "_")

def load(c, seed, *name):
    """The checkpoint ("base",) or (method, step) of a run; a missing one is made again."""
    path = file(c, "ckpt", f"s{seed}", *name[:-1], f"{name[-1]}.pt")
    if not path.exists():
        sft_cell(c, seed, name[0]) if name[1:] else base_cell(c, seed)
    return load_checkpoint(path, c.device)

def base_cell(c, seed):
    """Pre-train the base, or take it from beside the run folder, named by all it depends on."""
    key = [seed, *(v for k, v in vars(c).items() if k.startswith(
        ("n_", "base_", "device", "dtype", "grad_accum"))), *map(inspect.getsource, (
            data, gpt, masked_mean, micro_batches, Batch, finetune, pretrain))]
    cached = Path(c.out_dir).parent / f"base-{zlib.crc32(repr(key).encode())}.pt"
    if not cached.exists():
        save_checkpoint(cached, pretrain(c, seed))
    base = load_checkpoint(cached, c.device)
    save_checkpoint(file(c, "ckpt", f"s{seed}", "base.pt"), base)
    return [dict(seed=seed, method="base", stage="base", step=0)
            | ev.evaluate(base, base, c.eval_n)]

def sft_cell(c, seed, text):
    """Fine-tune a copy of the base by one method; keep the checkpoints that RL starts from."""
    method, c = variant(text, c)
    base = load(c, seed, "base").requires_grad_(False)
    ids, mask = (t.to(c.device) for t in data.demonstrations(c.demos, seed, p_word=c.p_word))
    model = copy.deepcopy(base).requires_grad_(True)
    mask, rows, recent = skipped(base, ids, mask, c, seed), [], []
    steps = finetune(model, base, ids, mask, method, c, seed, adamw(model, c.lr))
    for step, stats in progress(steps, c.steps, f"seed {seed} {text}"):
        recent.append(stats)
        if text in c.rl_methods and step in c.rl_from:
            save_checkpoint(file(c, "ckpt", f"s{seed}", text, f"{step}.pt"), model)
        if step in (*EVAL_STEPS, *c.rl_from, c.steps):
            rows.append(dict(seed=seed, method=text, stage="sft", step=step)
                        | ev.evaluate(model, base, c.eval_n) | ev.average(recent))
            recent = []
    return rows

def rl_cell(c, seed, *start):
    """GRPO from ("base",) or (method, step)."""
    base, model = load(c, seed, "base"), load(c, seed, *start)
    steps = progress(grpo(model, c, seed), c.rl_steps, f"seed {seed} {start}, RL")
    stats = [stats for _, stats in steps][-10:]
    save_checkpoint(file(c, "ckpt", f"s{seed}", *start, "rl.pt"), model)
    return [dict(seed=seed, method=start[0], stage="rl", step=[0, *start[1:]][-1])
            | ev.evaluate(model, base, c.eval_n) | ev.average(stats)]

def cell(work, c, seed, *args):
    """The rows of work(c, seed, ...), from their file or computed into it."""
    path = file(c, "cells", f"s{seed}", *args, f"{work.__name__}.json")
    if not path.exists():
        try:
            rows = work(c, seed, *args)
        except BadInput as e:
            raise BadInput(f"{e} ({path.stem})")
        except Exception:
            raise RuntimeError(traceback.format_exc()) from None    # as text it survives the way
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(rows))
    return ev.read_json(path)

def start_worker():    # Ctrl-C is the parent's business; without a parent it ends at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())    # its own would be left behind by a killed process
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def run(pool, work, c, cells):
    """Compute the cells here or in the pool; show their rows as they come."""
    todo = as_completed([pool.submit(cell, work, c, *args) for args in cells]) if pool else cells
    for done in tqdm(todo, work.__name__, len(cells), leave=False, disable=None):
        rows = done.result() if pool else cell(work, c, *done)
        for r in rows:
            tqdm.write(ev.table([(f"seed {r['seed']} {ev.name_of(r)}", r)]).split("\n")[1])

def prepare(argv):
    """Command line -> config, checked whole; each method is tried once on a tiny model."""
    c = parse(Config, argv, __doc__, PRESETS.get(parse(Config, argv, __doc__).preset, {}))
    c.rl_methods = [m for m in c.rl_methods if variant(m, c) and m in c.methods]
    if c.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("error: torch finds no CUDA device; without --preset gpu it runs on the CPU")
    script = main.__module__ == "__main__"
    if c.workers > 1 and not script:
        raise BadInput("error: --workers 2 or more only from the command line; use --workers 1")
    c.workers = c.workers or (torch.get_num_threads() if script and c.device == "cpu" else 1)
    if c.n_embd % c.n_head:
        raise BadInput(f"error: --n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}")
    for text in c.methods or [""]:
        method, mine = variant(text, c)
        if text in c.rl_methods and max(c.rl_from, default=0) > mine.steps:
            raise BadInput(f"error: --rl_from {max(c.rl_from)}: {text} ends at step {mine.steps}")
        tiny = GPT(GPTConfig(data.N_VOCAB, 40, 1, 1, 8))
        b = Batch(*data.demonstrations(2, 0), tiny, tiny, tiny)
        if METHODS[method](b, mine).shape != b.logp.shape:
            raise BadInput(f"error: the loss of {method} must be one per token, (B, T-1)")
        if "old_logp" in vars(b) and mine.old_every == 1:
            raise BadInput(f"error: --old_every 1 with {text}: right after a refresh the ratio is "
                           "1, so nothing is ever clipped and it is plain SFT; use 2 or more")
    path, config = Path(c.out_dir) / "config.json", json.loads(json.dumps(asdict(c)))
    old = ev.read_json(path) if path.exists() else {}
    free = ("preset", "workers", "out_dir", "seed", "seeds", "methods", "rl_methods")
    if differ := [f"--{k} ({old[k]}, now {v})" for k, v in config.items()
                  if k not in free and old.get(k, v) != v]:
        raise BadInput(f"error: {c.out_dir} was made with another {', '.join(differ)}; give the "
                       "same, or another --out_dir")
    if config.keys() - old:    # a new folder, or a new flag
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(config | old, indent=1))
    return c

def main(argv=None):
    """Run what is not there yet, then report. In a notebook: main([]) or main(["--seeds", "2"])."""
    c = prepare(argv)
    torch.set_num_threads(1)    # results must not depend on the number of cores
    pool = ProcessPoolExecutor(c.workers, multiprocessing.get_context("spawn"), start_worker) \
        if c.workers > 1 else None
    try:
        print(ev.table([]))
        seeds = range(c.seed, c.seed + c.seeds)
        run(c.seeds > 1 and pool, base_cell, c, [(s,) for s in seeds])
        run(pool, sft_cell, c, [(s, m) for s in seeds for m in c.methods])
        starts = [("base",), *((m, n) for m in c.rl_methods for n in c.rl_from)]
        run(pool, rl_cell, c, [(s, *start) for s in seeds for start in starts[len(starts) == 1:]])
    except BrokenExecutor as e:
        raise BadInput(f"error: a worker died ({e}); the same command goes on from here")
    finally:
        for p in multiprocessing.active_children() if pool and sys.exc_info()[0] else ():
            p.kill()
        if pool:
            pool.shutdown(cancel_futures=True)
    ev.report(c.out_dir)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)
