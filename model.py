"""model.py - a GPT-2 that decodes all rows together, and the log-probabilities that losses need.

Above the ruled line: transformer and log-probabilities; below: optimizers, files.
Parameters are named as in nanoGPT, which takes them unchanged.
Shapes: B rows, T tokens, C channels, H heads, D = C / H, V vocabulary, S places of the cache.
"""
import math
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 129
    block_size: int = 40      # longest sequence, prompt and response together
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 96
    bf16: bool = False        # matrix products in bfloat16 over float32 weights


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x, cache=None, start=0):
        """x (B, T, C), the tokens from place `start` on -> (B, T, C).

        A cache (2, B, H, S, D) keeps the keys and values of all tokens so far, so that decoding
        runs each token through the model once. With start > 0 x is one new token a row (T = 1)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # (B, H, T, D) each
        if cache is not None:
            cache[0, :, :, start:start + T] = k
            cache[1, :, :, start:start + T] = v
            k = cache[0, :, :, :start + T]
            v = cache[1, :, :, :start + T]
        # One new token sees all that the cache holds: only a whole prompt needs the causal mask.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=(start == 0))  # (B, H, T, D)
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
        self.ln_1 = nn.LayerNorm(c.n_embd)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd)
        self.mlp = MLP(c)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        c = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd),
            wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)),
            ln_f=nn.LayerNorm(c.n_embd),
        ))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight                    # tied
        # GPT-2's 0.02 belongs to its width of 768: a narrower model learns faster from larger
        # weights. Residual projections start smaller, by depth.
        std = 0.02 * math.sqrt(768 / c.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=std / math.sqrt(2 * c.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self):
        return self.lm_head.weight.device

    def autocast(self):
        """bfloat16 for a forward pass or a generate, never around an update: autocast keeps its
        copies of the weights until its region ends."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def hidden(self, ids, cache=None, start=0):
        """ids (B, T) from place `start` on -> final hidden states (B, T, C), before the head.
        cache: one tensor a layer, see Attention."""
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[start:start + ids.shape[1]]
        for i, block in enumerate(self.transformer.h):
            layer_cache = None
            if cache is not None:
                layer_cache = cache[i]
            x = block(x, layer_cache, start)
        return self.transformer.ln_f(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        with self.autocast():
            return self.lm_head(self.hidden(ids))

    @torch.no_grad()
    def generate(self, prompts, max_new, eos, pad, n=1, temperature=0.0, noise=None):
        """Continue every prompt n times until EOS or max_new tokens, all B = n * len(prompts) rows
        at once; the n rows of a prompt are neighbours and share its first pass. temperature 0 is
        greedy; noise: the torch.Generator of a sample.

        prompts (B/n, P), all of one length -> ids (B, P + max_new), pad behind each response, and
        mask (B, P + max_new), True at sampled tokens, EOS included: data.batch's convention, ready
        for a loss. A row without EOS was truncated. ValueError if it exceeds block_size."""
        c = self.config
        P = prompts.shape[1]
        S = P + max_new
        if S > c.block_size:
            raise ValueError(f"prompt {P} + response {max_new} exceed block_size {c.block_size}")
        ids = torch.full((n * len(prompts), S), pad, device=self.device)
        ids[:, :P] = prompts.repeat_interleave(n, 0)
        # Rows still decoding: entry i of token, done, x and the cache is of row live[i] of ids.
        live = torch.arange(len(ids), device=self.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        with self.autocast():
            cache = self.empty_cache(len(prompts), S)
            x = self.hidden(prompts, cache)[:, -1].repeat_interleave(n, 0)   # (B, C)
            cache = [kv.repeat_interleave(n, 1) for kv in cache]
            for t in range(P, S):
                token = sample(self.lm_head(x).float(), temperature, noise)  # (live,)
                ids[live, t] = token
                done = done | (token == eos)
                # Drop the finished rows once they are many. To look waits for the device: rarely.
                every_fourth = (t - P) % 4 == 3
                if every_fourth and done.float().mean() > 0.2:
                    keep = (~done).nonzero()[:, 0]
                    live = live[keep]
                    token = token[keep]
                    done = done[keep]
                    cache = [kv[:, keep] for kv in cache]                    # (2, live, H, S, D)
                if len(live) == 0 or t == S - 1:
                    break
                x = self.hidden(token[:, None], cache, t)[:, 0]              # (live, C)
        # A row went on until it was dropped: what lies behind its first EOS does not count.
        mask = response_mask(ids, P, eos)
        ids[:, P:] = ids[:, P:].masked_fill(~mask[:, P:], pad)
        return ids, mask

    def empty_cache(self, rows, places):
        """Room for keys and values: a list of (2, rows, H, places, D), one a layer."""
        c = self.config
        dtype = torch.bfloat16 if c.bf16 else torch.float32
        shape = (2, rows, c.n_head, places, c.n_embd // c.n_head)
        return [torch.empty(shape, device=self.device, dtype=dtype) for _ in range(c.n_layer)]


def sample(logits, temperature, noise):
    """One token a row: logits (B, V) -> (B,). temperature 0: the most probable."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=noise)[:, 0]


def response_mask(ids, start, eos):
    """True from place `start` up to the first EOS, or to the end: ids (B, T) -> (B, T) bool."""
    sampled = torch.arange(ids.shape[1], device=ids.device) >= start         # (T,)
    is_eos = (ids == eos) & sampled
    eos_before = is_eos.cumsum(1) - is_eos.long()    # how many stand strictly before
    return sampled & (eos_before == 0)


def token_logprobs(logits, targets):
    """log pi(target): logits (..., V) of any dtype, targets (...) -> (...) float32: bfloat16 has
    steps of .03 near log p = -5, and the clip's bound is at a log-ratio of log 1.28 = .25."""
    flat = logits.float().reshape(-1, logits.shape[-1])                      # (N, V)
    return -F.cross_entropy(flat, targets.reshape(-1), reduction="none").view_as(targets)


def kl_exact(logits, ref_logits):
    """KL(pi || ref) per position over the whole vocabulary: (..., V), (..., V) -> (...), nats."""
    logp = logits.float().log_softmax(-1)
    ref_logp = ref_logits.float().log_softmax(-1)
    # 0 log 0 is 0: a masked word (logit -inf) adds nothing, and no NaN to the gradient
    log_ratio = (logp - ref_logp).masked_fill(logp == -torch.inf, 0.0)
    # KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v))          SFT-KL of PSFT, 2508.17784
    return (logp.exp() * log_ratio).sum(-1)


def response_logits(model, ids, mask):
    """Logits only where a loss needs them: ids, mask (B, T) -> (N, V) at the N response tokens, in
    row order. Position t predicts token t+1, hence the shift."""
    with model.autocast():
        x = model.hidden(ids)[:, :-1]                                        # (B, T-1, C)
        return model.lm_head(x[mask[:, 1:]])


def response_targets(ids, mask):
    """The N response tokens themselves, in row order: ids, mask (B, T) -> (N,)."""
    return ids[:, 1:][mask[:, 1:]]


def in_rows(values, mask):
    """One value a response token, (N,) in row order -> (B, T-1), 0 outside mask[:, 1:]."""
    rows = torch.zeros(mask[:, 1:].shape, dtype=values.dtype, device=values.device)
    return rows.masked_scatter(mask[:, 1:], values)


def response_logprobs(model, ids, mask, temperature=1.0):
    """log pi of each response token: ids, mask (B, T) -> (B, T-1) float32, 0 outside the mask."""
    logits = response_logits(model, ids, mask)                               # (N, V)
    if temperature != 1:
        logits = logits.float() / temperature
    return in_rows(token_logprobs(logits, response_targets(ids, mask)), mask)


def trim(ids, mask):
    """Drop the columns of ids, mask (B, T) behind the last that any row trains; none if the mask is
    empty."""
    used = mask.any(0).nonzero()                                             # (columns, 1)
    if len(used) == 0:
        return ids, mask
    last = used.max().item()
    return ids[:, :last + 1], mask[:, :last + 1]


# ================================================================= below: what it takes to run this
def adamw(model, lr):
    """For SFT and RL: fused, without weight decay."""
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)


def muon(model, lr, adam_lr):
    """-> Muon for the blocks' matrices and AdamW for the rest, for pre-training: twice as fast as
    AdamW alone, and a stronger base."""
    blocks = model.transformer.h
    matrices = [p for p in blocks.parameters() if p.dim() == 2]
    others = [p for p in blocks.parameters() if p.dim() == 1]
    others += [model.lm_head.weight, model.transformer.wpe.weight]
    others += model.transformer.ln_f.parameters()
    return (Muon(matrices, lr),
            torch.optim.AdamW(others, adam_lr, (0.9, 0.98), weight_decay=0.0, fused=True))


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw", but in float32:
    torch's bfloat16 takes longer than the model's own passes where a CPU has no such products."""

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "average" not in self.state[p]:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])    # Nesterov
                direction = orthogonal(ahead)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction, alpha=group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(G):
    """G (m, n) with its singular values moved to about 1, by five Newton-Schulz steps (Muon)."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def update(model, *opts):
    """One step of each optimizer, the gradient norm cut to 1. -> the norm before, a tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return norm


def generator(device, *key):
    """A torch.Generator that depends on key alone: no RNG state is ever carried along."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def temporary(path):
    """Where a file is written before it is renamed to path: a file that is there is whole."""
    return Path(f"{path}.{os.getpid()}.tmp")


def save_checkpoint(path, model):
    """Configuration and weights: what load_checkpoint, and nanoGPT, read."""
    torch.save(dict(gpt=asdict(model.config), model=model.state_dict()), temporary(path))
    temporary(path).replace(path)


def load_checkpoint(path, device="cpu"):
    """-> model. Never unpickles code. ValueError names a file that is missing, damaged or not of
    this project."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["gpt"])).to(device)
        model.load_state_dict(saved["model"])
    except Exception as error:    # torch raises many kinds, none with the name of the file
        raise ValueError(f"cannot read {path}: {error}") from error
    return model
