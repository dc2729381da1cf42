"""study/speed.py - how fast this machine trains, decodes and runs GRPO, beside what one would use.

    python study/speed.py --threads 1                             the main job's size
    python study/speed.py --device cuda --bf16 1 --compile 1 --n_layer 12 --n_head 12 \\
        --n_embd 768 --vocab_size 50304 --block_size 1024 --rows 16 --nanogpt nanoGPT/model.py

Medians of ten rounds; x: how many times as fast as the row above (paired). floor: the least that
decoding takes at the measured rates of copy and product. transformers and TRL if they work, nanoGPT
by the path to its model.py.
"""
import argparse
import contextlib
import copy
import importlib.util
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import model as gpt  # noqa: E402
import rl  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
for flag, default in dict(n_layer=3, n_head=4, n_embd=96, vocab_size=data.N_VOCAB, block_size=40,
                          rows=64, decode=256, threads=torch.get_num_threads(), bf16=0, compile=0,
                          rounds=10, device="cpu", nanogpt="").items():
    parser.add_argument(f"--{flag}", type=type(default), default=default)
c = parser.parse_args()
torch.set_num_threads(c.threads)
torch.manual_seed(0)
warnings.simplefilter("ignore")    # of other libraries
cuda, cards, rng = c.device == "cuda", c.vocab_size == data.N_VOCAB, random.Random(0)
T, P, new = c.block_size, c.block_size // 4, min(c.block_size * 3 // 4, 192)
size = {k: vars(c)[k] for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
model = gpt.GPT(gpt.GPTConfig(**size, bf16=c.bf16 > 0)).to(c.device)
n, opts, kinds, times = sum(p.numel() for p in model.parameters()), gpt.adamw(model, 1e-4), {}, {}
docs = [data.base_document(rng) for _ in range(c.rows)]
ids, mask = data.batch([(p.prompt, r) for p, r in docs]) if cards else (
    torch.randint(0, c.vocab_size, (c.rows, T)), (torch.arange(T) > 0).repeat(c.rows, 1))
ids, mask = ids.to(c.device), mask.to(c.device)
prompts, target = ids[:1, :P].repeat(c.decode // 8, 1), torch.where(mask, ids, -1).roll(-1, 1)
torch.backends.cuda.enable_cudnn_sdp(True)    # model.py's reason not to: many shapes
compiled = torch.compile if c.compile else lambda f: f
every = compiled(lambda ids: gpt.token_logprobs(model(ids), ids.roll(-1, 1))[:, :-1])

def here():    # as clipsft.py: short rows together, logits only where needed (compiled: all)
    for rows, share in rl.micro_batches(mask, "token", 2 if cards and not cuda else 1):
        x, m = gpt.trim(ids[rows], mask[rows])
        logp = every(x) if c.compile else gpt.response_logprobs(model, x, m)
        (-share * rl.masked_mean(logp, m[:, 1:])).backward()
    gpt.update(model, opts)

def usual(net, loss):    # what one would write first: padded rows, all logits; AdamW as nanoGPT's
    usual_opts = [torch.optim.AdamW(net.parameters(), 1e-4, fused=cuda)]
    return lambda: (loss().backward(), gpt.update(net, usual_opts))

@compiled
def nanogpt():
    with model.autocast():
        return nano(ids, target)[1]

def turn():    # each kind once
    for name, work in kinds.items():
        start = time.perf_counter()
        work()
        torch.cuda.synchronize() if cuda else None
        times.setdefault(name, []).append(time.perf_counter() - start)

def turns_in_trl():    # ours take their turn whenever TRL asks for rewards
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, ProgressCallback
    words = {w: i for i, w in enumerate((*data.WORDS, "<eos>", "<pad>"))}
    tokenizer = Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = [time.perf_counter()]

    def reward(completions, **_):
        times.setdefault("GRPO step, TRL", []).append(time.perf_counter() - start[0])
        turn()
        start[0] = time.perf_counter()
        return [float(rng.random() < 0.5) for _ in completions]
    trainer = trl.GRPOTrainer(copy.deepcopy(hf).float(), reward, trl.GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=64, steps_per_generation=4, beta=0.0,
        num_generations=8, max_completion_length=data.MAX_NEW, learning_rate=1e-4, bf16=c.bf16 > 0,
        max_steps=4 * c.rounds + 8, use_cpu=not cuda, report_to="none", save_strategy="no",
        gradient_checkpointing=False),
        Dataset.from_dict(dict(prompt=[p.prompt for p, _ in docs] * 99)), None,
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"))
    trainer.remove_callback(ProgressCallback)
    with contextlib.redirect_stdout(None):
        trainer.train()
side = 8192 if cuda else 1024
a = torch.randn(side, side, device=c.device).to(torch.bfloat16 if c.bf16 else torch.float)
b = torch.ones(128, 1024, 1024, device=c.device)
kinds |= {"product": lambda: a @ a, "copy": lambda: b[:64].copy_(b[64:]),
          "train, plain loop": usual(model, lambda: F.cross_entropy(
              model(ids).flatten(0, 1).float(), target.flatten(), ignore_index=-1))}
if c.nanogpt:
    spec = importlib.util.spec_from_file_location("nanogpt", c.nanogpt)
    file = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    nano = file.GPT(file.GPTConfig(**size)).to(c.device)
    kinds["train, nanoGPT"] = usual(nano, nanogpt)
kinds["train, here"] = here
try:    # an optional extra may fail in any way
    from transformers import GPT2Config, GPT2LMHeadModel
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=T, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=None, eos_token_id=None)).to(a).eval()
    kinds["decode, transformers"] = lambda: hf.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=0,
        max_new_tokens=new, num_return_sequences=8)
    kinds["decode, transformers"]()
except Exception as e:
    kinds.pop("decode, transformers", None)
    print(f"without transformers: {type(e).__name__}")
kinds["decode, here"] = lambda: model.generate(prompts, new, -1, 0, 8, 1.0)
if cards:    # a reward that has spread, as from a model that has learnt something
    rl.data.verify = lambda *_: data.Verdict(rng.random() < 0.5, True)
    player = gpt.GPT(model.config).to(c.device)    # not trained on documents, as TRL's
    player_opts = gpt.adamw(player, 1e-4)
    kinds["GRPO step, here"] = lambda: rl.grpo_step(player, player_opts, rl.RLConfig(), 9, 0)
    try:
        turns_in_trl()
    except Exception as e:
        times.pop("GRPO step, TRL", None)
        print(f"without TRL: {type(e).__name__}")
while len(times.get("copy", [])) < c.rounds + 2:    # two to warm up
    turn()
names, peaks = [*kinds], dict(H100=989e12, H200=989e12, A100=312e12)
names[-1:-1] = ["GRPO step, TRL"] * ("GRPO step, TRL" in times)
card = torch.cuda.get_device_name() if cuda else f"CPU, {c.threads} threads"
peak = next((p for k, p in peaks.items() if k in card), None)
used = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(0).ru_maxrss
print(f"{card}, torch {torch.__version__}, {n:,} parameters, {'bf16' if c.bf16 else 'fp32'}, peak "
      f"memory {used / 2 ** 30:.1f} GiB")
for before, name in zip([""] + names, names):
    t, kind = median(times[name][2:]), name.split(",")[0]
    done, unit = dict(
        product=(2 * side ** 3 / 1e9, "GFLOP"), copy=(2 * 2 ** 28 / 1e9, "GB"),
        train=(int((target >= 0).sum()), "tokens"), decode=(c.decode * new, "tokens")).get(
            kind, (256, "rollouts"))
    line = f"{name:22}{1e3 * t:9.1f} ms {done / t:11,.0f} {unit}/s"
    if before.startswith(kind):
        line += f"{median(a / b for a, b in zip(times[before][2:], times[name][2:])):6.2f}x"
    if kind == "train" and peak and c.bf16:    # 6 n + 12 L C T FLOPs a token: PaLM, appendix B
        line += f"  MFU {done * (6 * n + 12 * c.n_layer * c.n_embd * T) / t / peak:.1%}"
    if kind == "decode":    # a step reads the weights and the cache, and takes 2 n FLOPs a row
        read = (n + c.decode * c.n_layer * c.n_embd * (2 * P + new)) * a.element_size()
        each, copied = (median(times[k][2:]) for k in ("product", "copy"))
        floor = max(read / 2 ** 29 * copied, n * c.decode / side ** 3 * each)
        line += f"  floor {1e3 * new * floor:.1f} ms"
    print(line)
