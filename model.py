"""model.py - a GPT-2 in one file, with a key-value cache that decodes all rows together.

Parameters are named as in GPT-2; a state dict moves to and from nanoGPT unchanged.
Shapes: B rows, T tokens, C channels, H heads, D = C / H, V vocabulary, N response tokens.
Run it for the parameter table and the measured speed of this machine.
"""
import argparse
import contextlib
import hashlib
import io
import math
import os
import platform
import random
import sys
import time
import zlib
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 124
    block_size: int = 40     # longest sequence, prompt and response together
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = 64


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x, cache=None, seen=None):
        """x (B, T, C) -> (B, T, C). A cache (2, rows, H, S, D) keeps the keys and values of x.
        Prefill: in the first T of its S slots, rows / B copies of each prompt. Decode, T = 1 and
        rows = B: in the last, and x attends to all S; seen (B, 1, 1, S) is -inf at slots that a row
        must not see and 0 elsewhere."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv                                                        # (B, H, T, D)
        if seen is None:
            if cache is not None:
                cache.unflatten(1, (B, -1))[..., :T, :] = qkv[1:, :, None]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # (B, H, T, D)
        else:    # one query a row: two plain products beat the fused kernel
            cache[..., -1:, :] = qkv[1:]
            k, v = cache
            score = q / math.sqrt(q.shape[3]) @ k.transpose(2, 3)            # (B, H, 1, S)
            y = (score + seen).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd), MLP(c)

    def forward(self, x, *cached):
        x = x + self.attn(self.ln_1(x), *cached)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight              # tied
        # GPT-2's 0.02 belongs to its width of 768: a narrower model learns faster from larger
        # weights. Residual projections start smaller, by depth.
        std = 0.02 * math.sqrt(768 / c.n_embd)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                shrink = math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=std / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, ids):
        """ids (B, T) -> final hidden states (B, T, C), before the head."""
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[:ids.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return self.lm_head(self.hidden(ids))

    def step(self, token, pos, cache, seen):
        """Decode one token a row: token, pos (B,) -> logits (B, V). cache: for each layer its slots
        in use, the last of them for this token; seen as in Attention."""
        x = (self.transformer.wte(token) + self.transformer.wpe(pos))[:, None]
        for block, kv in zip(self.transformer.h, cache):
            x = block(x, kv, seen)                                           # (B, 1, C)
        return self.lm_head(self.transformer.ln_f(x[:, 0]))

    def generate(self, prompts, lengths, max_new, eos, pad, n=1, temperature=0.0, generator=None):
        """Continue every prompt n times until EOS or max_new tokens, all B = n * len(prompts) rows
        at once; the n rows of a prompt are neighbours and share its prefill.

        prompts (B/n, P) right-padded, lengths (B/n,). Returns ids (B, P + max_new), each response
        right behind its own prompt and pad after it, and mask (B, P + max_new), True at sampled
        tokens, EOS included: data.batch's convention, ready for a loss. A row without EOS was
        truncated. temperature 0 is greedy. Prompts may differ in length (the cards' do not):
        without left padding each row decodes at its own position, so its logits do not depend on
        the rows beside it. ValueError if prompt and response exceed block_size."""
        P, dev, c = prompts.shape[1], prompts.device, self.config
        S = P + max_new
        if S > c.block_size:
            raise ValueError(f"prompt {P} + response {max_new} exceed block_size {c.block_size}")
        wte, wpe, blocks = self.transformer.wte, self.transformer.wpe, self.transformer.h
        rows = len(prompts) * n
        auto = torch.is_autocast_enabled(dev.type)
        dtype = torch.get_autocast_dtype(dev.type) if auto else wte.weight.dtype
        ids = torch.full((rows, S), pad, device=dev)
        ids[:, :P] = prompts.repeat_interleave(n, 0)
        with torch.inference_mode():    # less overhead an operation than no_grad
            cache = [torch.empty(2, rows, c.n_head, S, c.n_embd // c.n_head, device=dev,
                                 dtype=dtype) for _ in blocks]
            x = wte(prompts) + wpe.weight[:P]                                # prefill
            for block, kv in zip(blocks, cache):
                x = block(x, kv)
            x = x[torch.arange(len(x), device=dev), lengths - 1].repeat_interleave(n, 0)  # (B, C)
            lengths = lengths.repeat_interleave(n)
            row, pos = torch.arange(rows, device=dev), lengths               # rows still decoding
            done = torch.zeros(rows, dtype=torch.bool, device=dev)
            # In the cache every response begins at slot P: the padding before it is not to be seen.
            slot = torch.arange(S, device=dev)
            seen = torch.where((slot < lengths[:, None]) | (slot >= P), 0, -math.inf)
            seen = seen[:, None, None].to(dtype)                             # (rows, 1, 1, S)
            logits = self.lm_head(self.transformer.ln_f(x))                  # (rows, V)
            for t in range(max_new):
                if temperature > 0:
                    # The first token whose cumulative probability exceeds u: torch.multinomial does
                    # the same more slowly.
                    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
                    u = torch.rand(len(row), 1, device=dev, generator=generator) * cdf[:, -1:]
                    token = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=c.vocab_size - 1)
                else:
                    token = logits.argmax(-1)
                ids[row, pos] = token
                done = done | (token == eos)
                if t == max_new - 1:
                    break
                # Drop the rows that have finished, once they are many. A look waits for the device:
                # look rarely.
                if t % 4 == 3 and (left := (~done).sum().item()) < 0.8 * len(row):
                    if not left:
                        break
                    live = ~done
                    row, pos, seen, token, done = (x[live] for x in (row, pos, seen, token, done))
                    cache = [kv[:, live] for kv in cache]
                k = P + t + 1                                                # slots in use
                used = [kv[..., :k, :] for kv in cache]
                logits = self.step(token, pos, used, seen[..., :k])
                pos = pos + 1
        # A row went on until it was dropped: what lies behind its first EOS does not count.
        behind = slot >= lengths[:, None]                                    # the prompt
        mask = behind & (slot < lengths[:, None] + max_new)
        ends = (ids == eos) & mask
        mask &= ends.cumsum(1) - ends.long() == 0
        return ids.masked_fill(behind & ~mask, pad), mask


# -------------------------------------------------------------------------------- log-probabilities
def token_logprobs(logits, targets):
    """log pi(target): logits (..., V), targets (...) -> (...) float32, whatever the logits'
    dtype."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def kl_exact(logits, ref_logits):
    """KL(pi || ref) per position over the whole vocabulary: (..., V), (..., V) -> (...), nats."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    # KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v))          SFT-KL of PSFT, 2508.17784
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def response_logits(model, ids, mask):
    """Logits only where a loss needs them: ids, mask (B, T) -> (N, V) at the N response tokens, in
    row order. Position t predicts token t+1, hence the shift."""
    return model.lm_head(model.hidden(ids)[:, :-1][mask[:, 1:]])


def response_logprobs(model, ids, mask, temperature=1.0, max_elements=2**26):
    """log pi of each response token: ids, mask (B, T) -> (B, T-1) float32, 0 outside the mask.

    A large vocabulary is worked through in chunks that are recomputed in the backward pass, so that
    no more than max_elements float32 logits ever lie in memory."""
    where = mask[:, 1:]
    h, y = model.hidden(ids)[:, :-1][where], ids[:, 1:][where]               # (N, C), (N,)

    def logp(h, y):
        return token_logprobs(model.lm_head(h) / temperature, y)
    n = max(1, max_elements // model.config.vocab_size)
    out = logp(h, y) if len(h) <= n else torch.cat(
        [checkpoint(logp, a, b, use_reentrant=False) for a, b in zip(h.split(n), y.split(n))])
    return torch.zeros(where.shape, device=ids.device).masked_scatter(where, out)


def trim(ids, mask, *more):
    """Drop the columns behind the longest row. ids, mask (B, T); tensors in more are (B, T-1), like
    log-probabilities."""
    T = int(mask.nonzero()[:, 1].max()) + 1
    return ids[:, :T], mask[:, :T], *(x[:, :T - 1] for x in more)


# --------------------------------------------------------------- optimizer, randomness, checkpoints
class BadInput(Exception):
    """Something the user can put right: shown as one line, exit code 2."""


def adamw(model, lr, betas=(0.9, 0.95), weight_decay=0.0):
    """AdamW, fused; weight decay on matrices only, not on biases and LayerNorm gains."""
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2],
                   weight_decay=weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def update(model, opt, lr, max_norm=1.0):
    """One optimizer step at this learning rate after clipping the gradient norm. Returns the norm
    before clipping; FloatingPointError if it is not finite, with the weights left as they were."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}")
    for group in opt.param_groups:
        group["lr"] = lr
    opt.step()
    opt.zero_grad(set_to_none=True)
    return norm


def generator(device, *key):
    """A torch.Generator that depends on nothing but key, e.g. (seed, "rollout", step). Every draw
    of the project is keyed by its step, so a resumed run has no RNG state to restore."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def atomic_write(path, data):
    """Write bytes under another name, then rename: a reader sees the old file or the new one."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        with contextlib.suppress(OSError):    # on a read-only disk not even that
            tmp.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {e.strerror}")


def save_checkpoint(path, model, **extra):
    """Weights, architecture and whatever else (tensors, numbers, lists, dicts), atomically. The
    last 32 bytes are the SHA-256 of the rest: torch.load ignores them, and by itself sees no bit
    flip."""
    buffer = io.BytesIO()
    torch.save(dict(gpt=asdict(model.config), model=model.state_dict(), **extra), buffer)
    data = buffer.getvalue()
    atomic_write(path, data + hashlib.sha256(data).digest())


def load_checkpoint(path, device="cpu"):
    """-> (model, extra). Never unpickles code (weights_only). BadInput names what is wrong."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"cannot read checkpoint {path}: {e.strerror}")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise BadInput(f"{path} is truncated, damaged or not a checkpoint of this project")
    try:
        extra = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        model = GPT(GPTConfig(**extra.pop("gpt"))).to(device)
        model.load_state_dict(extra.pop("model"))    # strict: no weight is left random in silence
    except Exception as e:
        raise BadInput(f"{path} is not a checkpoint of this project ({type(e).__name__})")
    return model, extra


# -------------------------------------------------------------------------- device and command line
def pick_device(name):
    """'auto' is CUDA where there is one, else the CPU; a device asked for by name must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA device here; use --device cpu")
    torch.set_float32_matmul_precision("high")    # TF32 on CUDA; on the CPU it changes nothing
    return torch.device(name)


def compiled(model, wanted):
    """--compile: the forward pass and the decoding step, for all sizes at once. The last thing to
    do with a model: a deep copy of it would still run these weights."""
    if wanted:
        model.hidden = torch.compile(model.hidden, dynamic=True)
        model.step = torch.compile(model.step, dynamic=True)


def autocast(device, dtype):
    """float32, or bfloat16 matrix products over float32 weights; log-softmax is always float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def arg(default, help, above=None, below=None, choices=None):
    """A dataclass field that is a command line flag; numbers lie strictly between above and
    below."""
    meta = dict(help=help, above=above, below=below, choices=choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def check(config):
    """BadInput if a field of a config lies outside what its arg() allows."""
    for f in fields(config):
        value, m = getattr(config, f.name), f.metadata
        for v in value if isinstance(value, list) else [value]:
            if m["choices"] and v not in m["choices"]:
                raise BadInput(f"--{f.name} {v}: choose from {', '.join(m['choices'])}")
            if m["above"] is not None and not v > m["above"]:
                raise BadInput(f"--{f.name} {v}: must be above {m['above']}")
            if m["below"] is not None and not v < m["below"]:
                raise BadInput(f"--{f.name} {v}: must be below {m['below']}")
    return config


class Parser(argparse.ArgumentParser):
    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise BadInput(message + " (see --help)")


def parse(cls, argv, doc, presets=None):
    """Command line -> a checked instance of the dataclass cls: one flag a field, defaults from the
    preset. Anything unknown or impossible is BadInput, before anything is computed or written."""
    parser = Parser(doc)
    for f in fields(cls):
        default = f.default if f.default is not MISSING else f.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(type=f.type.__args__[0], nargs="+") if isinstance(default, list) else \
            dict(type=f.type)
        parser.add_argument(f"--{f.name}", default=default,
                            help=f"{f.metadata['help']} [{shown}]", **kind)
    chosen = parser.parse_args(argv)
    if presets:
        if chosen.preset not in presets:
            raise BadInput(f"--preset {chosen.preset}: choose from {', '.join(presets)}")
        parser.set_defaults(**presets[chosen.preset])
        chosen = parser.parse_args(argv)
    return check(cls(**vars(chosen)))


def run_main(main):
    """Run a program: bad input is one line and exit code 2, Ctrl-C exits with 130."""
    try:
        main()
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as e:    # a disk can fill up at any write
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------ parameter table and speed
@dataclass
class Bench:
    n_layer: int = arg(3, "layers", above=0)
    n_head: int = arg(2, "attention heads", above=0)
    n_embd: int = arg(64, "width", above=0)
    vocab_size: int = arg(124, "vocabulary", above=1)
    block_size: int = arg(40, "tokens a row, a quarter of them prompt", above=7)
    rows: int = arg(64, "rows a training step", above=0)
    sample_rows: int = arg(256, "rows decoded together, 8 a prompt", above=7)
    threads: int = arg(0, "CPU threads, 0 is all", above=-1)
    device: str = arg("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = arg("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16"))
    compile: bool = arg(False, "torch.compile the training forward pass and the decoding step")


def main(argv=None):
    c = parse(Bench, argv, __doc__)
    if c.n_embd % c.n_head:
        raise BadInput(f"--n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}")
    dev, T, P = pick_device(c.device), c.block_size, c.block_size // 4
    torch.set_num_threads(c.threads or torch.get_num_threads())
    torch.manual_seed(0)
    model = GPT(GPTConfig(c.vocab_size, T, c.n_layer, c.n_head, c.n_embd)).to(dev)
    opt, usual = adamw(model, 1e-4), torch.optim.AdamW(model.parameters(), 1e-4)
    n = sum(p.numel() for p in model.parameters())
    for name in ("wte", "wpe", "attn", "mlp", "ln_"):
        print(f"{name:>6} {sum(p.numel() for k, p in model.named_parameters() if name in k):>12,}")
    print(f"{'all':>6} {n:>12,} parameters (the head is wte)")
    compiled(model, c.compile)
    if (c.vocab_size, T) == (124, 40):    # documents of the main job's pre-training
        import data                       # here alone: the model does not depend on the task
        rng = random.Random(0)
        docs = [data.base_document(rng) for _ in range(c.rows)]
        ids, mask = (t.to(dev) for t in data.batch([(p.prompt, r) for p, r in docs]))
        ids, mask = F.pad(ids, (0, T - ids.shape[1]), value=data.PAD), \
            F.pad(mask, (0, T - mask.shape[1]))
    else:                                 # full rows, a quarter of each prompt
        ids = torch.randint(0, c.vocab_size, (c.rows, T), device=dev)
        mask = (torch.arange(T, device=dev) >= P).repeat(c.rows, 1)
    prompts = ids[:1, :P].repeat(c.sample_rows // 8, 1)    # 8 responses each, as in GRPO
    lengths = torch.full((len(prompts),), P, device=dev)
    last = (mask * torch.arange(1, T + 1, device=dev)).amax(1)    # (rows,), padding begins here
    tokens = int(last.sum())

    def plain():     # what one would write first: padded rows, all logits, plain AdamW
        with autocast(dev, c.dtype):
            target = torch.where(mask, ids, -100)[:, 1:].flatten()
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), target)
        loss.backward()
        update(model, usual, 1e-4)

    def ours():      # as clipsft.py pre-trains: short rows together, no padding behind them
        for rows in last.argsort().chunk(2):
            x, m = trim(ids[rows], mask[rows])
            with autocast(dev, c.dtype):
                loss = -response_logprobs(model, x, m).sum() / mask.sum()
            loss.backward()
        update(model, opt, 1e-4)

    def sample():
        with autocast(dev, c.dtype):
            model.generate(prompts, lengths, T - P, -1, 0, n=8, temperature=1.0)
    where = torch.cuda.get_device_name() if dev.type == "cuda" else \
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {c.dtype}\nmedians of 10, taken in turn; tokens "
          "without padding; x: times as fast as the row above")
    sampled = c.sample_rows * (T - P)
    kinds = [(f"train, {c.rows} x {T}, padded, all logits", plain, tokens),
             (f"train, {c.rows} x {T}, as clipsft.py does", ours, tokens),
             (f"sample, {c.sample_rows} x {T - P}", sample, sampled)]
    try:             # for comparison, where it is installed: the same shape in another library
        from transformers import GPT2Config, GPT2LMHeadModel
        hf = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=T, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, bos_token_id=None, eos_token_id=None)).to(dev).eval()

        def theirs():
            with autocast(dev, c.dtype):
                hf.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                            top_k=0, max_new_tokens=T - P, num_return_sequences=8, pad_token_id=0)
        kinds.insert(2, (f"sample, {c.sample_rows} x {T - P}, transformers", theirs, sampled))
    except ImportError:
        pass
    times, hopper = [[] for _ in kinds], "H100" in where or "H200" in where
    for turn in range(-2, 10):    # two to warm up
        for (_, work, _), seconds in zip(kinds, times):
            start = time.perf_counter()
            work()
            if dev.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds.append(time.perf_counter() - start)
    for i, (name, _, tokens) in enumerate(kinds):
        t, gain = median(times[i]), median(a / b for a, b in zip(times[i - 1], times[i]))
        # 6 n + 12 L C T FLOPs a token (PaLM, appendix B), against the H100's and H200's 989 TFLOP/s
        mfu = tokens * (6 * n + 12 * c.n_layer * c.n_embd * T) / t / 989e12
        print(f"{name:>36} {1e3 * t:9.1f} ms {tokens / t:12,.0f} tokens/s" +
              (f"{gain:7.2f}x" if i % 2 else "") + (f"  MFU {mfu:.1%}" if i < 2 and hopper else ""))
    if dev.type == "cuda":
        print(f"{'peak memory':>36} {torch.cuda.max_memory_allocated() / 2**20:9.0f} MiB")
    else:
        import resource    # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss    # KiB; on a Mac bytes
        print(f"{'peak memory':>36} {peak / 2**(20 if sys.platform == 'darwin' else 10):9.0f} MiB")


if __name__ == "__main__":
    run_main(main)
