"""study/speed.py - how fast this machine trains, decodes and runs GRPO, beside what one would use.

    python study/speed.py --threads 1                             the main job's size
    python study/speed.py --device cuda --bf16 1 --compile 1 --n_layer 12 --n_head 12 \\
        --n_embd 768 --vocab_size 50304 --block_size 1024 --rows 16 --nanogpt nanoGPT/model.py

Every round does each kind of work once; shown are medians of the rounds. x: how many times as fast
as the row above, paired by round. floor: the least that decoding takes at the measured rates of
copy and product. transformers and TRL if they are installed, nanoGPT by the path to its model.py.
"""
import argparse
import contextlib
import copy
import importlib.util
import math
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clipsft  # noqa: E402
import data  # noqa: E402
import rl  # noqa: E402
from model import (GPT, GPTConfig, adamw, response_logprobs, token_logprobs, trim,  # noqa: E402
                   update)

WARM_UP = 2    # rounds that do not count
PEAKS = dict(H100=989e12, H200=989e12, A100=312e12)    # bfloat16 FLOPs a second
TRL = "GRPO step, TRL"


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = dict(n_layer=3, n_head=4, n_embd=96, vocab_size=data.N_VOCAB, block_size=40, rows=64,
                 decode=256, threads=torch.get_num_threads(), bf16=0, compile=0, rounds=10,
                 device="cpu", nanogpt="")
    for flag, default in flags.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            help=f"[{default}]")
    c = parser.parse_args(argv)
    for flag in ("n_layer", "n_head", "n_embd", "rows", "decode", "threads", "rounds"):
        if getattr(c, flag) < 1:
            parser.error(f"--{flag} must be above 0")
    if c.block_size < 4:
        parser.error("--block_size must be 4 or more")
    if is_cards(c) and c.block_size < 40:
        parser.error("--block_size must be 40 or more with the vocabulary of the cards")
    return c


def is_cards(c):
    """With the vocabulary of the cards: their documents. With another: random tokens, no GRPO."""
    return c.vocab_size == data.N_VOCAB


def size_of(c):
    return {name: getattr(c, name) for name in
            ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}


def prompt_length(c):
    return c.block_size // 4


def new_tokens(c):
    """Tokens that each row decodes."""
    return min(c.block_size * 3 // 4, 192)


def group_size(c):
    """Rows that share a prompt: 8, or less where --decode is no multiple of 8 (20: 4)."""
    return math.gcd(c.decode, 8)


def documents(c):
    """Problems with their responses, c.rows of them."""
    rng = random.Random(0)
    return [data.base_document(rng) for _ in range(c.rows)]


def training_batch(c):
    """-> ids (rows, T), mask (rows, T) on the device."""
    if is_cards(c):
        ids, mask = data.batch([(problem.prompt, answer) for problem, answer in documents(c)])
    else:
        ids = torch.randint(0, c.vocab_size, (c.rows, c.block_size))
        mask = (torch.arange(c.block_size) > 0).repeat(c.rows, 1)
    return ids.to(c.device), mask.to(c.device)


def decoding_prompts(c, ids):
    """One prompt for each group of rows: (c.decode / group_size, prompt_length)."""
    return ids[:1, :prompt_length(c)].repeat(c.decode // group_size(c), 1)


def next_tokens(ids, mask):
    """What nanoGPT calls targets: the next token, -1 where nothing is trained. (B, T) -> (B, T)"""
    return torch.where(mask, ids, -1).roll(-1, 1)


# ================================================================= kinds of work
def rates(c, dtype):
    """A matrix product and a copy: what the machine can do at all."""
    side = product_side(c)
    a = torch.randn(side, side, device=c.device).to(dtype)
    b = torch.ones(128, 1024, 1024, device=c.device)
    return {"product": lambda: a @ a, "copy": lambda: b[:64].copy_(b[64:])}


def product_side(c):
    return 8192 if c.device == "cuda" else 1024


def train_here(c, model, ids, mask):
    """A step as in clipsft.py: logits only where they are needed (compiled: everywhere)."""
    opt = adamw(model, 1e-4)

    def logprobs_everywhere(ids):
        return token_logprobs(model(ids)[:, :-1], ids[:, 1:])
    compiled = torch.compile(logprobs_everywhere) if c.compile else None

    def step():
        batch_ids, batch_mask = trim(ids, mask)
        if c.compile:
            logp = compiled(batch_ids)
        else:
            logp = response_logprobs(model, batch_ids, batch_mask)
        rl.masked_mean(-logp, batch_mask[:, 1:]).backward()
        update(model, opt)
    return step


def train_usual(c, net, loss):
    """A step as one would first write it: padded rows, all logits, AdamW as nanoGPT's."""
    opt = torch.optim.AdamW(net.parameters(), 1e-4, fused=c.device == "cuda")

    def step():
        loss().backward()
        update(net, opt)
    return step


def train_plain(c, model, ids, mask):
    target = next_tokens(ids, mask).flatten()

    def loss():
        return F.cross_entropy(model(ids).flatten(0, 1).float(), target, ignore_index=-1)
    return train_usual(c, model, loss)


def train_nanogpt(c, model, ids, mask):
    """nanoGPT's model, imported from the path c.nanogpt."""
    spec = importlib.util.spec_from_file_location("nanogpt", c.nanogpt)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module    # its dataclass looks itself up there
    spec.loader.exec_module(module)
    net = module.GPT(module.GPTConfig(**size_of(c))).to(c.device)
    target = next_tokens(ids, mask)

    def loss():
        with model.autocast():
            return net(ids, target)[1]
    return train_usual(c, net, torch.compile(loss) if c.compile else loss)


def transformers_model(c, dtype):
    from transformers import GPT2Config, GPT2LMHeadModel
    net = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=None, eos_token_id=None))
    return net.to(c.device, dtype).eval()


def decode_transformers(c, net, prompts):
    def work():
        return net.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                            top_k=0, pad_token_id=0, max_new_tokens=new_tokens(c),
                            num_return_sequences=group_size(c))
    return work


def decode_here(c, model, prompts):
    """No token is EOS, so that every row decodes all of its tokens."""
    def work():
        return model.generate(prompts, new_tokens(c), eos=-1, pad=0, n=group_size(c),
                              temperature=1.0)
    return work


def coin_verdict(problem, response):
    """A reward that has spread, as from a model that has learnt something."""
    strict = random.random() < 0.5
    return data.Verdict(strict=strict, any=True, error="", partial=float(strict))


def grpo_here(c):
    """A GRPO step of a model that is not trained, as TRL's."""
    data.verify = coin_verdict
    player = GPT(GPTConfig(**size_of(c), bf16=c.bf16 > 0)).to(c.device)
    opt = adamw(player, 1e-4)
    settings = clipsft.Config()

    def work():
        return rl.grpo_step(player, opt, settings, step=9, seed=0, ref=None)
    return work


def all_work(c, net):
    """-> {name: function}, in the order of the report. net: transformers_model, or None."""
    model = GPT(GPTConfig(**size_of(c), bf16=c.bf16 > 0)).to(c.device)
    ids, mask = training_batch(c)
    prompts = decoding_prompts(c, ids)
    work = rates(c, dtype_of(c))
    work["train, plain loop"] = train_plain(c, model, ids, mask)
    if c.nanogpt:
        work["train, nanoGPT"] = train_nanogpt(c, model, ids, mask)
    work["train, here"] = train_here(c, model, ids, mask)
    if net is not None:
        work["decode, transformers"] = decode_transformers(c, net, prompts)
    work["decode, here"] = decode_here(c, model, prompts)
    if is_cards(c):
        work["GRPO step, here"] = grpo_here(c)
    return work


def dtype_of(c):
    return torch.bfloat16 if c.bf16 else torch.float32


# ================================================================= rounds
def one_round(c, work, times):
    """Do each kind once; appends to times[name] the seconds."""
    for name, function in work.items():
        start = time.perf_counter()
        function()
        if c.device == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)


def rounds_in_trl(c, net, work, times):
    """Train `net` by TRL's GRPO; ours take their turn whenever it asks for rewards."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, ProgressCallback
    words = {word: i for i, word in enumerate((*data.WORDS, "<eos>", "<pad>"))}
    tokenizer = Tokenizer(models.WordLevel(words, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    times[TRL] = []
    start = time.perf_counter()

    def reward(completions, **_):
        nonlocal start
        times[TRL].append(time.perf_counter() - start)
        one_round(c, work, times)
        start = time.perf_counter()
        return [float(random.random() < 0.5) for _ in completions]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            folder, per_device_train_batch_size=64, steps_per_generation=4, beta=0.0,
            num_generations=8, max_completion_length=data.MAX_NEW, learning_rate=1e-4,
            bf16=c.bf16 > 0, max_steps=4 * (c.rounds + WARM_UP), use_cpu=c.device == "cpu",
            report_to="none", save_strategy="no", gradient_checkpointing=False)
        prompts = [problem.prompt for problem, _ in documents(c)]
        trainer = trl.GRPOTrainer(
            copy.deepcopy(net).float(), reward, settings, Dataset.from_dict(
                dict(prompt=prompts * 99)), None,
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                                    pad_token="<pad>"))
        trainer.remove_callback(ProgressCallback)
        with contextlib.redirect_stdout(None):
            trainer.train()


def measure(c):
    """-> {name: seconds of each round}, the first ones left out, in the order of the report."""
    net = None
    try:    # an optional extra may fail in any way
        net = transformers_model(c, dtype_of(c))
    except Exception as error:
        print(f"without transformers: {type(error).__name__}")
    work = all_work(c, net)
    times = {name: [] for name in work}
    if net is not None and is_cards(c):
        try:
            rounds_in_trl(c, net, work, times)
        except Exception as error:
            times = {name: [] for name in work}    # a round may be half done
            print(f"without TRL: {type(error).__name__}")
    while len(times["copy"]) < c.rounds + WARM_UP:
        one_round(c, work, times)
    if TRL in times:
        times["GRPO step, here"] = times.pop("GRPO step, here")    # behind TRL's
    return {name: seconds[WARM_UP:] for name, seconds in times.items()}


# ================================================================= the report
def peak_memory(c):
    """GiB; nan where the system does not say."""
    if c.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "win32":
        return math.nan
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return used / 2 ** 30    # bytes there,
    return used / 2 ** 20        # KiB elsewhere


def done_by(c, kind, tokens):
    """What one turn of a kind does -> (number, unit). tokens: those trained in a step."""
    if kind == "product":
        return 2 * product_side(c) ** 3 / 1e9, "GFLOP"
    if kind == "copy":
        return 2 * 2 ** 28 / 1e9, "GB"    # 2 ** 28 bytes read, as many written
    if kind == "train":
        return tokens, "tokens"
    if kind == "decode":
        return c.decode * new_tokens(c), "tokens"
    settings = clipsft.Config()
    return settings.rl_prompts * settings.rl_group, "rollouts"


def decoding_floor(c, parameters, times):
    """Seconds. A step reads the weights and the cache, and takes 2 FLOPs a parameter and row."""
    places = prompt_length(c) + new_tokens(c) / 2    # in the cache, on average
    numbers = parameters + c.decode * c.n_layer * 2 * c.n_embd * places
    read = numbers * dtype_of(c).itemsize
    by_copy = read / 2 ** 29 * median(times["copy"])
    by_product = parameters * c.decode / product_side(c) ** 3 * median(times["product"])
    return new_tokens(c) * max(by_copy, by_product)


def utilisation(c, parameters, tokens_per_second, card):
    """Model FLOPs utilisation, of bfloat16 on a card in PEAKS; otherwise None."""
    # 6 n + 12 L C T FLOPs a token                                   PaLM, 2204.02311 appendix B
    flops = 6 * parameters + 12 * c.n_layer * c.n_embd * c.block_size
    for name, peak in PEAKS.items():
        if name in card and c.bf16:
            return tokens_per_second * flops / peak
    return None


def report(c, times):
    """Lines of text."""
    ids, mask = training_batch(c)
    tokens = mask[:, 1:].sum().item()
    parameters = sum(p.numel() for p in GPT(GPTConfig(**size_of(c))).parameters())
    card = f"CPU, {c.threads} threads"
    if c.device == "cuda":
        card = torch.cuda.get_device_name()
    lines = [f"{card}, torch {torch.__version__}, {parameters:,} parameters, "
             f"{'bf16' if c.bf16 else 'fp32'}, peak memory {peak_memory(c):.1f} GiB"]
    above = ""
    for name, seconds in times.items():
        kind = name.split(",")[0]
        done, unit = done_by(c, kind, tokens)
        middle = median(seconds)
        line = f"{name:22}{1e3 * middle:9.1f} ms {done / middle:11,.0f} {unit}/s"
        if above.startswith(kind):
            ratio = median(theirs / ours for theirs, ours in zip(times[above], seconds))
            line += f"{ratio:6.2f}x"
        used = utilisation(c, parameters, done / middle, card)
        if kind == "train" and used is not None:
            line += f"  MFU {used:.1%}"
        if kind == "decode":
            line += f"  floor {1e3 * decoding_floor(c, parameters, times):.1f} ms"
        lines.append(line)
        above = name
    return lines


def main(argv=None):
    c = read_flags(argv)
    torch.set_num_threads(c.threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")    # as clipsft.py
    warnings.simplefilter("ignore")               # of other libraries
    times = measure(c)
    print("\n".join(report(c, times)))


if __name__ == "__main__":
    main()
