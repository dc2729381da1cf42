"""model.py - a GPT-2 that decodes all rows together.

Above the ruled line: transformer and log-probabilities; below: optimizers, files, command line.
Parameters are named as in nanoGPT, which takes them unchanged.
Shapes: B rows, T tokens, C channels, H heads, D = C / H, V vocabulary.
"""
import argparse
import contextlib
import math
import operator
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
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
        """x (B, T, C), the tokens from place start on -> (B, T, C). A cache (2, B, H, S, D) keeps
        their keys and values; with start > 0, T = 1, x attends to all that it holds."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))                 # (B, H, T, D)
        if cache is not None:
            cache[:, :, :, start:start + T] = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
            k, v = cache[:, :, :, :start + T]
        if start == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)      # (B, H, T, D)
        else:    # one query a row: two plain products beat the fused kernel
            y = (q / q.shape[3] ** 0.5 @ k.mT).softmax(-1) @ v
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
        c = self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(Block(c) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight                    # tied
        # GPT-2's 0.02 belongs to its width of 768: a narrower model learns faster from larger
        # weights. Residual projections start smaller, by depth.
        std = 0.02 * math.sqrt(768 / c.n_embd)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                shrink = math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=std / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def autocast(self):
        """bfloat16 for a forward pass or a generate, never around an update: autocast keeps its
        copies of the weights until its region ends (in inference mode it keeps none)."""
        return torch.autocast(self.lm_head.weight.device.type, torch.bfloat16,
                              enabled=self.config.bf16)

    def hidden(self, ids, cache=None, start=0):
        """ids (B, T) from place start on -> final hidden states (B, T, C), before the head."""
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[start:start + ids.shape[1]]
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache and cache[i], start)
        return self.transformer.ln_f(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        with self.autocast():
            return self.lm_head(self.hidden(ids))

    def generate(self, prompts, max_new, eos, pad, n=1, temperature=0.0, generator=None):
        """Continue every prompt n times until EOS or max_new tokens, all B = n * len(prompts) rows
        at once; the n rows of a prompt are neighbours and share its prefill. temperature 0: greedy.
        prompts (B/n, P), all of one length -> ids (B, P + max_new), pad behind each response, and
        mask (B, P + max_new), True at sampled tokens, EOS included: data.batch's convention, ready
        for a loss. A row without EOS was truncated. ValueError if it exceeds block_size."""
        c, dev, P = self.config, prompts.device, prompts.shape[1]
        S = P + max_new
        if S > c.block_size:
            raise ValueError(f"prompt {P} + response {max_new} exceed block_size {c.block_size}")
        ids = torch.full((n * len(prompts), S), pad, device=dev)
        ids[:, :P] = prompts.repeat_interleave(n, 0)
        live = torch.arange(len(ids), device=dev)                            # rows still decoding
        done = live < 0                                                      # none yet
        with torch.inference_mode(not c.bf16), torch.no_grad(), self.autocast():    # see autocast
            shape = (2, len(prompts), c.n_head, S, c.n_embd // c.n_head)
            dtype = torch.bfloat16 if c.bf16 else torch.float32
            cache = [torch.empty(shape, device=dev, dtype=dtype) for _ in range(c.n_layer)]
            x = self.hidden(prompts, cache)[:, -1].repeat_interleave(n, 0)   # prefill, (B, C)
            cache = [kv.repeat_interleave(n, 1) for kv in cache]
            for t in range(P, S):
                logits = self.lm_head(x).float()                             # (live, V)
                token = logits.argmax(-1)
                if temperature > 0:
                    # the first token whose cumulative probability exceeds u
                    cdf = (logits / temperature).softmax(-1).cumsum(-1)
                    u = torch.rand(len(live), 1, device=dev, generator=generator) * cdf[:, -1:]
                    token = torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=c.vocab_size - 1)
                ids[live, t] = token
                done = done | (token == eos)
                # Drop the finished rows once they are many. A look waits for the device: rarely.
                if (t - P) % 4 == 3 and done.float().mean() > 0.2:
                    live, token, cache = live[~done], token[~done], [kv[:, ~done] for kv in cache]
                    done = done[~done]
                if len(live) == 0 or t == S - 1:
                    break
                x = self.hidden(token[:, None], cache, t)[:, 0]
        # A row went on until it was dropped: what lies behind its first EOS does not count.
        sampled = torch.arange(S, device=dev) >= P
        ends = (ids == eos) & sampled
        mask = sampled & (ends.cumsum(1) - ends.long() == 0)
        return ids.masked_fill(sampled & ~mask, pad), mask

def token_logprobs(logits, targets):
    """log pi(target): logits (..., V) of any dtype, targets (...) -> (...) float32, for bfloat16
    near log p = -5 has steps of .03: it would drown a ratio of 1.28, whose log is .25."""
    z, y = logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)     # (N, V), (N,)
    return -torch.nn.functional.cross_entropy(z, y, reduction="none").view_as(targets)

def kl_exact(logits, ref_logits):
    """KL(pi || ref) per position over the whole vocabulary: (..., V), (..., V) -> (...), nats."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    # KL(pi || ref) = sum_v pi(v) (log pi(v) - log ref(v))          SFT-KL of PSFT, 2508.17784
    return (logp.exp() * (logp - ref_logp)).sum(-1)

def response_logits(model, ids, mask):
    """Logits only where a loss needs them: ids, mask (B, T) -> (N, V) at the N response tokens, in
    row order. Position t predicts token t+1, hence the shift."""
    with model.autocast():
        return model.lm_head(model.hidden(ids)[:, :-1][mask[:, 1:]])

def response_logprobs(model, ids, mask, temperature=1.0):
    """log pi of each response token: ids, mask (B, T) -> (B, T-1) float32, 0 outside the mask."""
    m = mask[:, 1:]
    logits = response_logits(model, ids, mask).float().div_(temperature)     # (N, V)
    logp = token_logprobs(logits, ids[:, 1:][m])                             # (N,)
    return torch.zeros_like(m, dtype=torch.float).masked_scatter(m, logp)

def trim(ids, mask):
    """Drop the columns behind the longest row of ids, mask (B, T)."""
    T = mask.shape[1] - int(mask.any(0).flip(0).long().argmax())
    return ids[:, :T], mask[:, :T]

# ================================================================= below: what it takes to run this
torch.set_float32_matmul_precision("high")    # TF32 on CUDA; on the CPU it changes nothing
torch.backends.cuda.enable_cudnn_sdp(False)    # in bf16 it would plan anew for every shape

def adamw(model, lr):
    """-> [AdamW], fused, without weight decay: for SFT and RL."""
    return [torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)]

def muon(model, lr, adam_lr):
    """-> optimizers for pre-training: Muon for the blocks' matrices, AdamW for the rest; twice as
    fast as AdamW alone, and a stronger base."""
    blocks = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in blocks)]
    return [torch.optim.Muon(blocks, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, adam_lr, (0.9, 0.98), weight_decay=0.0, fused=True)]

def update(model, opts, scale=1.0):
    """A step at scale times each rate, the gradient norm cut to 1; BadInput if it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not norm.isfinite():
        raise BadInput(f"error: the gradient norm is {norm}: try a lower learning rate")
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = scale * group.setdefault("initial_lr", group["lr"])
        opt.step()
        opt.zero_grad()

def generator(device, *key):
    """A torch.Generator that depends on key alone: no RNG state is ever carried along."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))

class BadInput(SystemExit):
    """What the user can put right. Uncaught it ends the program with its message alone."""

@contextlib.contextmanager
def atomic(path):
    """Yields a temporary path to write to and renames it, so that nobody ever reads half a file;
    makes the folder. BadInput if the disk is full or read-only."""
    tmp = Path(f"{path}.{os.urandom(4).hex()}.tmp")
    try:
        tmp.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        tmp.replace(path)
    except (OSError, RuntimeError) as e:    # RuntimeError: torch.save on a full disk
        raise BadInput(f"error: cannot write {path}: {e}")
    finally:
        tmp.exists() and tmp.unlink()

def save_checkpoint(path, model):
    with atomic(path) as tmp:
        torch.save(dict(gpt=asdict(model.config), model=model.state_dict()), tmp)

def load_checkpoint(path, device="cpu"):
    """-> model. Never unpickles code. BadInput names a file that is missing, cut off, altered (the
    zip's checksums tell) or not of this project."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["gpt"])).to(device)
        model.load_state_dict(saved["model"])    # strict: no weight is left random in silence
        return model
    except Exception as e:
        raise BadInput(f"error: cannot load {path} ({e}); if it is there, delete it and run again")

def arg(default, help, choices=None, **bounds):
    """A dataclass field that is a flag; a tuple takes many values. bounds: gt, ge, lt."""
    return field(default=default, metadata=dict(help=help, choices=choices, bounds=bounds))

def parse(cls, argv, doc, defaults={}):
    """Command line -> instance of the dataclass cls, one flag a field; or BadInput."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, usage="%(prog)s [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise BadInput(f"error: {message} (see --help)")
    parser.error = fail
    for f in fields(cls):
        many, m = isinstance(f.default, tuple), f.metadata
        def convert(text, kind=f.type.__args__[0] if many else f.type, bounds=m["bounds"]):
            value = kind(text)
            for name, bound in bounds.items():
                if not getattr(operator, name)(value, bound):
                    raise argparse.ArgumentTypeError(f"{text} is not {name} {bound}")
            return value
        convert.__name__ = "number"
        shown = " ".join(map(str, f.default)) if many else f.default
        parser.add_argument(f"--{f.name}", default=f.default, choices=m["choices"], type=convert,
                            nargs="*" if many else None, metavar="",
                            help=f"{m['help']} {'|'.join(m['choices'] or ())} [{shown}]")
    parser.set_defaults(**defaults)
    got = vars(parser.parse_args(argv))
    return cls(**{f.name: got[f.name] for f in fields(cls)})
