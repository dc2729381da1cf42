"""model.py - a GPT-2 in one file, with a key-value cache that decodes all rows together.

Parameters are named as in GPT-2 and nanoGPT, so a state dict moves between them unchanged.
Shapes: B rows, T tokens, C channels, H heads, D = C / H, V vocabulary, N response tokens.
Run it for the parameter table and the measured speed of this machine.
"""
import argparse
import hashlib
import io
import math
import os
import sys
import zlib
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 124
    block_size: int = 40     # longest sequence, prompt and response together
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 96


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x, cache=None, slots=None, seen=None):
        """x (B, T, C). With a cache (2, B, S, H, D), keys and values are also written to its slots;
        a single token (T = 1) then attends to the slots that `seen` (B, 1, 1, S) allows."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2)     # each (B, T, H, D)
        if cache is not None:
            cache[0][slots], cache[1][slots] = k, v
            if T == 1:
                k, v = cache
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)     # (B, H, ., D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=T > 1)
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
        # GPT-2's 0.02 belongs to its width of 768: narrower models need larger weights (at width 96
        # the sums are learnt in 2/3 of the steps). Residual projections start smaller, by depth.
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

    @torch.no_grad()
    def generate(self, prompts, lengths, max_new, eos, pad, temperature=0.0, generator=None):
        """Continue every prompt until EOS or max_new tokens, all rows at once.

        prompts (B, P) right-padded, lengths (B,). Returns ids (B, P + max_new), each response right
        behind its own prompt and pad after it, and mask (same shape), True at sampled tokens, EOS
        included: data.batch's convention, ready for a loss. Rows without an EOS were truncated.
        temperature 0 is greedy. No left padding: each row decodes at its own position, so a row's
        logits do not depend on the rows beside it. ValueError if the block is too short."""
        (B, P), dev, c = prompts.shape, prompts.device, self.config
        if P + max_new > c.block_size:
            raise ValueError(f"prompt {P} + response {max_new} exceed block_size {c.block_size}")
        wte, wpe, blocks = self.transformer.wte, self.transformer.wpe, self.transformer.h
        ids = torch.full((B, P + max_new), pad, device=dev)
        ids[:, :P] = prompts
        mask = torch.zeros_like(ids, dtype=torch.bool)
        x = wte(prompts) + wpe.weight[:P]
        # Zeros, not empty: a masked slot still meets the softmax, and 0 * NaN would be NaN.
        cache = x.new_zeros(c.n_layer, 2, B, P + max_new, c.n_head, c.n_embd // c.n_head)
        for block, kv in zip(blocks, cache):
            x = block(x, kv, (slice(None), slice(P)))                        # prefill
        x = x[torch.arange(B, device=dev), lengths - 1]                      # (B, C)
        row, pos = torch.arange(B, device=dev), lengths.clone()              # rows still decoding
        ragged = not bool((lengths == P).all())
        done = torch.zeros(B, dtype=torch.bool, device=dev)
        for t in range(max_new):
            logits = self.lm_head(self.transformer.ln_f(x)).float()          # (B, V)
            if temperature > 0:
                # argmax(logits / T + Gumbel noise) samples softmax(logits / T), without a sync
                noise = torch.empty_like(logits).exponential_(generator=generator)
                logits = logits / temperature - noise.log()
            token = torch.where(done, pad, logits.argmax(-1))
            ids[row, pos], mask[row, pos] = token, ~done
            done = done | (token == eos)
            if t % 4 == 3 or t == max_new - 1:    # each look waits for the device: look rarely
                live = ~done
                if t == max_new - 1 or not live.any():
                    break
                if live.sum() <= 0.8 * len(live):                            # drop finished rows
                    row, pos, done, token = row[live], pos[live], done[live], token[live]
                    cache = cache[:, :, live]
            n = P + t + 1                                                    # slots in use
            seen = (torch.arange(n, device=dev) <= pos[:, None])[:, None, None] if ragged else None
            slots = (torch.arange(len(row), device=dev)[:, None], pos[:, None])
            x = (wte(token) + wpe(pos))[:, None]                             # (B, 1, C)
            for block, kv in zip(blocks, cache):
                x = block(x, kv[:, :, :n], slots, seen)
            x, pos = x[:, 0], pos + 1
        return ids, mask


# ------------------------------------------------------------------------------- log-probabilities
def token_logprobs(logits, targets):
    """log pi(target): logits (..., V), targets (...) -> (...) float32, whatever the logits' dtype."""
    logits = logits.float()
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


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


def trim(ids, mask, *more, multiple=1):
    """Drop the columns behind the longest row (rounded up to a multiple, so that a compiled model
    meets few shapes). ids, mask (B, T); tensors in more are (B, T-1), like log-probabilities."""
    T = int(mask.nonzero()[:, 1].max()) + 1
    T = min(ids.shape[1], -(-T // multiple) * multiple)
    return ids[:, :T], mask[:, :T], *(x[:, :T - 1] for x in more)


# -------------------------------------------------------------- optimizer, randomness, checkpoints
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
        tmp.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {e.strerror}")


def save_checkpoint(path, model, **extra):
    """Weights, architecture and whatever else (tensors, numbers, lists, dicts), atomically. The last
    32 bytes are the SHA-256 of the rest: torch.load ignores them, and by itself sees no bit flip."""
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
    extra = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    model = GPT(GPTConfig(**extra.pop("gpt"))).to(device)
    model.load_state_dict(extra.pop("model"))    # strict
    return model, extra


# ------------------------------------------------------------------------- device and command line
def pick_device(name):
    """'auto' is CUDA where there is one, else the CPU; a device asked for by name must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA device here; use --device cpu")
    torch.set_float32_matmul_precision("high")    # TF32 on CUDA; on the CPU it changes nothing
    return torch.device(name)


def autocast(device, dtype):
    """float32, or bfloat16 matrix products over float32 weights; log-softmax is always float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def arg(default, help, above=None, below=None, choices=None):
    """A dataclass field that is a command line flag; numbers lie strictly between above and below."""
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


def parse(cls, argv, doc, presets=None):
    """Command line -> a checked instance of the dataclass cls: one flag a field, defaults from the
    preset. Anything unknown or impossible is BadInput, before anything is computed or written."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        raise BadInput(message + " (see --help)")
    parser.error = error
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
    except FloatingPointError as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
