"""study/speed.py - how fast this machine trains, decodes and runs GRPO, beside what one would use.

    python study/speed.py --threads 1                             the main job's size
    python study/speed.py --device cuda --bf16 1 --n_layer 12 --n_head 12 --n_embd 768 \\
        --vocab_size 50304 --block_size 1024 --rows 16

Medians of ten, taken in turn; x: how many times as fast as the row above (paired).
"""
import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import rl  # noqa: E402
from model import GPT, GPTConfig, adamw, response_logprobs, trim, update  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for flag, default in dict(n_layer=3, n_head=4, n_embd=96, vocab_size=data.N_VOCAB, block_size=40,
                          rows=64, decode=256, threads=torch.get_num_threads(), bf16=0,
                          device="cpu").items():
    parser.add_argument(f"--{flag}", type=type(default), default=default)
c = parser.parse_args()
torch.set_num_threads(c.threads)
torch.manual_seed(0)
rng, T, P = random.Random(0), c.block_size, c.block_size // 4
model = GPT(GPTConfig(c.vocab_size, T, c.n_layer, c.n_head, c.n_embd, c.bf16 > 0)).to(c.device)
n, opts = sum(p.numel() for p in model.parameters()), adamw(model, 1e-4)
usual = [torch.optim.AdamW(model.parameters(), 1e-4)]
cards = c.vocab_size == data.N_VOCAB
docs = [data.base_document(rng) for _ in range(c.rows)]
ids, mask = data.batch([(p.prompt, r) for p, r in docs]) if cards else (
    torch.randint(0, c.vocab_size, (c.rows, T)), torch.ones(c.rows, T, dtype=torch.bool))
ids, mask = ids.to(c.device), mask.to(c.device)
prompts = ids[:1, :P].repeat(c.decode // 8, 1)
target = torch.where(mask, ids, -1)[:, 1:].flatten()

def train():    # as clipsft.py pre-trains: short rows together, logits only where a loss needs them
    for rows, share in rl.micro_batches(mask, "token", 2 if c.device == "cpu" else 1):
        x, m = trim(ids[rows], mask[rows])
        (-share * rl.masked_mean(response_logprobs(model, x, m), m[:, 1:])).backward()
    update(model, opts)

def plain():    # what one would write first: padded rows, all logits, plain AdamW
    logits = model(ids)[:, :-1].flatten(0, 1).float()
    F.cross_entropy(logits, target, ignore_index=-1).backward()
    update(model, usual)

kinds = {"train, plain loop": plain, "train, here": train}
try:    # an optional extra may fail in any way
    from transformers import GPT2Config, GPT2LMHeadModel
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=T, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=None, eos_token_id=None)).to(c.device).eval()
    kinds["decode, transformers"] = lambda: hf.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=0,
        max_new_tokens=T - P, num_return_sequences=8)
except Exception as e:
    print(f"without transformers: {type(e).__name__}")
kinds["decode, here"] = lambda: model.generate(prompts, T - P, -1, 0, 8, 1.0)
if cards:    # a reward that has spread, as from a model that has learnt something
    rl.data.verify = lambda *_: data.Verdict(rng.random() < 0.5, True)
    kinds["GRPO step, 256 rollouts, 4 updates"] = lambda: rl.grpo_step(
        model, opts, rl.RLConfig(), turn, 0)
card = torch.cuda.get_device_name() if c.device == "cuda" else f"CPU, {c.threads} threads"
peak = next((p for k, p in dict(H100=989e12, H200=989e12, A100=312e12).items() if k in card), None)
print(f"{card}, torch {torch.__version__}, {n:,} parameters, {'bf16' if c.bf16 else 'fp32'}")
times, before = {name: [] for name in kinds}, ""
for turn in range(12):    # two to warm up
    for name, work in kinds.items():
        start = time.perf_counter()
        work()
        if c.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
for name, ts in times.items():
    t, kind = median(ts[2:]), name.split(",")[0]
    count = int(mask.sum()) if kind == "train" else c.decode * (T - P)
    gain = median(a / b for a, b in zip(times.get(before, ts)[2:], ts[2:]))
    # 6 n + 12 L C T FLOPs a token: PaLM, appendix B
    mfu = count * (6 * n + 12 * c.n_layer * c.n_embd * T) / t / peak if peak else 0
    print(f"{name:36}{1e3 * t:9.1f} ms {count / t:11,.0f} tokens/s"
          + f"{gain:6.2f}x" * before.startswith(kind) + f"  MFU {mfu:.1%}" * (mfu > 0))
    before = name
