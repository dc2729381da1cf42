"""clipsft.py - pre-train a small GPT, fine-tune it with and without clipping, then run GRPO.

    python clipsft.py                                 the main job: one table, one figure
    python clipsft.py --methods sft clip clip:eps_high=0.1 --seeds 5 --out_dir runs/eps

Above the ruled line: the losses of papers 1 (Liu et al., ICML 2026) and 3 (PSFT, 2508.17784), and
the one loop that trains by any of them; below: cells, processes, command line. A method is a loss
in METHODS; data order and updates are the same for all, unless it carries settings of its own, as
in clip:eps_high=0.4,old_every=24 or sft:lr=1e-4. The same command goes on after a stop.
"""
import copy
import functools
import hashlib
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as ev
import model as gpt
from model import (GPT, BadInput, GPTConfig, adamw, arg, atomic, generator, kl_exact,
                   load_checkpoint, parse, pick_device, response_logits, response_logprobs,
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
    that of - pi(y_t): the opposite remedy, which never learns what it finds improbable."""
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
    """What a loss may read. Log-probs (B, T-1) are computed when first asked for; what a loss says
    outside mask[:, 1:] does not count. Only those of the model carry a gradient."""
    ids: torch.Tensor     # (B, T)
    mask: torch.Tensor    # (B, T), as in data.batch
    model: GPT
    old: GPT              # the model as it stood at the last refresh
    base: GPT
    logp = functools.cached_property(lambda b: response_logprobs(b.model, b.ids, b.mask))
    old_logp = functools.cached_property(lambda b: response_logprobs(b.old, b.ids, b.mask))
    base_logp = functools.cached_property(lambda b: response_logprobs(b.base, b.ids, b.mask))

# A method maps b, the batch, and c, the Config, to a loss per token (B, T-1). Clip without bound is
# clip:eps_high=inf, with the base as old policy for ever clip:old_every=300; SFT without tokens
# that the base finds improbable, or without as many random ones, sft:skip=low, sft:skip=random.
METHODS = {
    "sft": lambda b, c: sft_loss(b.logp),
    "clip": lambda b, c: clip_loss(b.logp, b.old_logp, 0.2, c.eps_high),
    "dft": lambda b, c: dft_loss(b.logp),
    "kl": lambda b, c: sft_loss(b.logp) + 0.5 * kl_to_base(b),    # SFT-KL of 2508.17784, its weight
}

def finetune(model, base, ids, mask, method, c, seed, opt, schedule=lambda step: 1.0):
    """Train `model` in place on ids, mask (N, T): yields (step, statistics) after each of c.steps
    updates. One loop for every method, and for pre-training; schedule(step) scales c.lr."""
    per_epoch = max(1, len(ids) // c.batch_size)
    for step in range(c.steps):
        # Every K updates the policy as it stands becomes the old policy. Where K is several epochs
        # (as in paper 1) a token is trained more than once against the same old policy.
        if step % c.old_every == 0:
            old = copy.deepcopy(model).requires_grad_(False)
        if step % per_epoch == 0:
            order = torch.randperm(len(ids), generator=generator("cpu", seed, step // per_epoch))
        batch = order[step % per_epoch * c.batch_size:][:c.batch_size].to(ids.device)
        loss, clipped = 0.0, 0
        for rows, share in micro_batches(mask[batch], c.aggregate, c.grad_accum):
            b = Batch(*trim(ids[batch[rows]], mask[batch[rows]]), model, old, base)
            m = b.mask[:, 1:]                                                # (B, T-1)
            part = share * masked_mean(METHODS[method](b, c), m, c.aggregate, data.MAX_NEW)
            part.backward()
            loss += part.item()
            if "old_logp" in vars(b):    # the loss has asked for it
                clipped += (m & (b.logp - b.old_logp > math.log(1 + c.eps_high))).sum().item()
        update(model, opt, c.lr * schedule(step))
        yield step + 1, dict(loss=loss, clip_frac=clipped / mask[batch, 1:].sum().item())

def pretrain(c, seed):
    """The base: the same loop with method sft on base_document, warmed up for 100 updates, then
    down to 0 in a straight line. -> model."""
    rng = random.Random(f"{seed}/docs")
    docs = [data.base_document(rng) for _ in range(c.base_docs)]
    ids, mask = (t.to(c.device) for t in data.batch([(p.prompt, r) for p, r in docs]))
    torch.manual_seed(seed)
    model = GPT(GPTConfig(data.N_VOCAB, 40, c.n_layer, c.n_head, c.n_embd, c.dtype == "bf16"))
    c = replace(c, steps=c.base_steps, lr=c.base_lr, batch_size=c.base_batch, aggregate="token",
                old_every=c.base_steps, grad_accum=2 * c.grad_accum)    # short rows together
    opt = adamw(model.to(c.device), c.lr, betas=(0.9, 0.98), weight_decay=0.1)
    steps = finetune(model, None, ids, mask, "sft", c, seed, opt,
                     lambda step: min(1, (step + 1) / 100) * (1 - step / c.steps))
    for _ in progress(steps, c.steps, f"base {seed}"):
        pass
    return model

def skipped(base, ids, mask, c, seed):
    """Paper 1's ablation: the mask (N, T) without the tokens to which the base gives p < .1 (c.skip
    low), or without as many random ones (random)."""
    m = mask[:, 1:]
    low = m & (response_logprobs(base, ids, mask) < math.log(0.1))           # (N, T-1)
    noise = torch.rand(m.shape, generator=generator("cpu", seed, "noise")).to(m.device)
    by_noise = noise.masked_fill(~m, math.inf).flatten().argsort()
    some = torch.zeros_like(m).flatten().index_fill(0, by_noise[:low.sum()], True).view_as(m)
    return torch.cat([mask[:, :1], m & ~dict(none=~m, low=low, random=some)[c.skip]], 1)

# ================================================================= below: what it takes to run this
@dataclass
class SFTConfig:
    """What a method may have of its own: clip:eps_high=0.4,old_every=24."""
    steps: int = arg(300, "SFT updates", gt=0)
    lr: float = arg(3e-4, "SFT learning rate", gt=0)
    batch_size: int = arg(16, "demonstrations an update", gt=0)
    demos: int = arg(64, "demonstrations in all", gt=0)
    p_word: float = arg(0.3, "chance of an unpredictable connective before a step", ge=0, lt=1)
    eps_high: float = arg(0.2, "clip: a token rests beyond r = 1 + eps_high", gt=0)
    old_every: int = arg(12, "K, updates per refresh of the old policy", gt=0)
    skip: str = arg("none", "response tokens never trained: those of base p < .1 (low), as many "
                    "random ones (random)", choices=("none", "low", "random"))

@dataclass
class Config(SFTConfig, RLConfig):
    preset: str = arg("cpu", "smoke: every stage in seconds; cpu; gpu: 100M parameters",
                      choices=("cpu", "smoke", "gpu"))
    methods: list[str] = arg(("sft", "clip"), "methods, NAME or NAME:flag=value,...")
    seeds: int = arg(1, "how many seeds, from --seed on; each has its own base", gt=0)
    rl_methods: list[str] = arg(("sft", "clip"), "those that GRPO starts from; nothing: no RL")
    rl_from: list[int] = arg((100, 300), "SFT steps that GRPO starts from", gt=0)
    n_layer: int = arg(3, "layers", gt=0)
    n_head: int = arg(2, "attention heads", gt=0)
    n_embd: int = arg(64, "width", gt=0)
    dtype: str = arg("fp32", "fp32, or bf16 matrix products", choices=("fp32", "bf16"))
    base_steps: int = arg(2000, "pre-training updates", gt=0)
    base_lr: float = arg(4e-3, "pre-training peak learning rate", gt=0)
    base_batch: int = arg(64, "documents a pre-training update", gt=0)
    base_docs: int = arg(60000, "different pre-training documents", gt=0)
    workers: int = arg(0, "processes; 0: one a CPU that may be used, on CUDA one", ge=0)
    out_dir: str = arg("runs/main", "run folder; bases are cached in its parent folder")

PRESETS = {
    "smoke": dict(n_layer=2, n_head=2, n_embd=32, base_steps=20, base_docs=400, steps=8,
                  rl_from=[8], rl_steps=2, rl_prompts=4, eval_n=16),
    "gpu": dict(n_layer=14, n_head=12, n_embd=768, base_steps=1500, base_lr=6e-4, base_batch=512,
                base_docs=400000, lr=3e-5, rl_lr=1e-5, dtype="bf16", device="cuda"),
}
EVAL_STEPS = (4, 8, 16, 30, 60, 100, 200, 300, 1000)    # dense where OOD peaks; and the last

def variant(text, c):
    """'clip:eps_high=0.4,lr=1e-4' -> ('clip', c with these settings)."""
    method, _, settings = text.partition(":")
    if method not in METHODS:
        raise BadInput(f"error: method {text}: choose from {', '.join(METHODS)}")
    flags = [f"--{s}" for s in settings.split(",") if s]
    return method, replace(c, **vars(parse(SFTConfig, flags, None, vars(c))))

def progress(steps, total, name):
    """A bar on a terminal, of the main process only."""
    return tqdm(steps, name, total, leave=False, disable=multiprocessing.parent_process() and True)

def file(c, folder, *parts):
    return Path(c.out_dir) / folder / "-".join(map(str, parts)).replace(":", "_")

# A cell is a function of (c, seed, ...) alone; it leaves checkpoints and returns rows of metrics.
def base_cell(c, seed):
    """Pre-train the base, or take it from the cache beside the run folder, where it is named by all
    that its weights depend on."""
    keys = ("n_layer", "n_head", "n_embd", "base_steps", "base_lr", "base_batch", "base_docs",
            "device", "dtype", "grad_accum")
    key = [seed, *(getattr(c, k) for k in keys),
           *map(inspect.getsource, (data, gpt, finetune, pretrain))]
    key = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    cached = Path(c.out_dir).parent / f"base-{key}.pt"
    if not cached.exists():
        save_checkpoint(cached, pretrain(c, seed))
    base = load_checkpoint(cached, c.device)
    save_checkpoint(file(c, "ckpt", f"s{seed}", "base.pt"), base)
    return [dict(seed=seed, method="base", stage="base", step=0)
            | ev.evaluate(base, base, c.eval_n)]

def sft_cell(c, seed, text):
    """Fine-tune a copy of the base by one method; keep the checkpoints that RL starts from."""
    starts = c.rl_from if text in c.rl_methods else []
    method, c = variant(text, c)
    base = load_checkpoint(file(c, "ckpt", f"s{seed}", "base.pt"), c.device).requires_grad_(False)
    ids, mask = (t.to(c.device) for t in data.demonstrations(c.demos, seed, p_word=c.p_word))
    model = copy.deepcopy(base).requires_grad_(True)
    steps = finetune(model, base, ids, skipped(base, ids, mask, c, seed), method, c, seed,
                     adamw(model, c.lr))
    rows, recent = [], []
    for step, stats in progress(steps, c.steps, f"seed {seed} {text}"):
        recent.append(stats)
        if step in starts:
            save_checkpoint(file(c, "ckpt", f"s{seed}", text, f"{step}.pt"), model)
        if step in (*EVAL_STEPS, *starts, c.steps):
            rows.append(dict(seed=seed, method=text, stage="sft", step=step)
                        | ev.evaluate(model, base, c.eval_n) | ev.average(recent))
            recent = []
    return rows

def rl_cell(c, seed, *start):
    """GRPO from ("base",) or (method, step)."""
    base, model = (load_checkpoint(file(c, "ckpt", f"s{seed}", *name) .with_suffix(".pt"), c.device)
                   for name in (["base"], start))
    steps = progress(grpo(model, c, seed), c.rl_steps, f"seed {seed} {start}, RL")
    stats = [stats for _, stats in steps][-10:]
    save_checkpoint(file(c, "ckpt", f"s{seed}", *start, "rl.pt"), model)
    return [dict(seed=seed, method=start[0], stage="rl", step=[0, *start[1:]][-1])
            | ev.evaluate(model, base, c.eval_n) | ev.average(stats)]

def cell(work, c, seed, *args):
    """The rows of a cell, from its file or computed into it: the only unit of resuming. A worker's
    error is handed on as text, for it might not survive the way."""
    path = file(c, "cells", f"s{seed}", *args, f"{work.__name__}.json")
    if not path.exists():
        try:
            rows = work(c, seed, *args)
        except BadInput as e:
            raise BadInput(f"{e} ({path.stem})")
        except Exception:
            raise RuntimeError(traceback.format_exc()) from None
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(rows))
    return ev.read_json(path)

def start_worker():
    """Ctrl-C is the parent's business; without a parent a worker ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    """Command line -> config, checked whole, each method tried once on a tiny model; the run folder
    made, or compared with."""
    c = parse(Config, argv, __doc__, PRESETS.get(parse(Config, argv, __doc__).preset, {}))
    c.device, c.rl_methods = pick_device(c.device), [m for m in c.rl_methods if m in c.methods]
    script = getattr(sys.modules["__main__"], "main", None) is main
    if c.workers > 1 and not script:
        raise BadInput("error: --workers 2 or more only from the command line; use --workers 1")
    # as many threads as CPUs that this process may use
    c.workers = c.workers or (torch.get_num_threads() if script and c.device == "cpu" else 1)
    if c.n_embd % c.n_head:
        raise BadInput(f"error: --n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}")
    for text in c.methods:
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
    out, config = Path(c.out_dir), json.loads(json.dumps(asdict(c)))
    try:
        (out / "ckpt").mkdir(parents=True, exist_ok=True)
        (out / "cells").mkdir(exist_ok=True)
    except OSError as e:
        raise BadInput(f"error: --out_dir {out}: {e}")
    if not (out / "config.json").exists():
        with atomic(out / "config.json") as tmp:
            tmp.write_text(json.dumps(config, indent=1))
    old = ev.read_json(out / "config.json")
    free = ("preset", "workers", "out_dir", "seed", "seeds", "methods", "rl_methods")
    if differ := [f"--{k} ({old[k]}, now {v})" for k, v in config.items()
                  if k not in free and old.get(k, v) != v]:
        raise BadInput(f"error: {out} was made with another {', '.join(differ)}; give the same, or "
                       "another --out_dir")
    return c

def main(argv=None):
    """Run everything that is not there yet, then report. From a notebook or a script: main([]) or
    main(["--seeds", "2"]), in one process, for others would not know what was changed there."""
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
    except BaseException as e:
        for p in multiprocessing.active_children():
            p.kill()
        if isinstance(e, KeyboardInterrupt):
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
        if isinstance(e, BrokenProcessPool):
            raise BadInput("error: a worker process died (killed, or out of memory: use fewer "
                           "--workers); the same command goes on from here")
        raise
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    ev.report(c.out_dir)

if __name__ == "__main__":
    main()
