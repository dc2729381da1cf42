"""study/llm.py - does it hold on a real language model? SFT, clip and a third of the rate.

    python study/llm.py                  the table and the figure again, from the committed rows
    python study/llm.py --model NAME     runs it first; NAME: of a hub, a folder as transformers
                                         writes them, or a folder that holds one .gguf file
    python study/llm.py --model NAME --device cuda --rl_from 8 32    then GRPO from two checkpoints

clipsft.finetune and rl.grpo run unchanged on any causal model of transformers, through an adapter
of a few lines. The task is that of data.py, in words and in the model's chat template:
every other demonstration has a face card, under J = Q = K = 10, the others none, under any rule.

ID and OOD are scored by teacher forcing, one forward pass instead of a decoded answer: a greedy
answer equals a reference exactly if at each of its places the most probable token is its token. The
only reference is the expert's order without connectives (which are never the most probable: each
stands in 4 % of the places), so a right answer in another order counts as wrong: a lower bound, in
OOD the more so as the order itself follows the rule.

What may be forgotten: facts (llm_facts.txt: is the greedy completion right, below others of its
kind?), plain text (nats a token on Python's own documentation), and whatever else the base says
(KL(base || model) on answers that the base itself sampled, and the model's entropy there). Methods
are compared at equal ID accuracy, interpolated between evaluations (the base is the first), within
a seed: the same demonstrations in the same order.

In this order: adapter, task, what is forgotten, one job; below the line: files, table, figure.
"""
import argparse
import copy
import functools
import json
import math
import random
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import clipsft  # noqa: E402
import data  # noqa: E402
import eval as ev  # noqa: E402
import rl  # noqa: E402
from model import (generator, in_rows, kl_exact, response_logits, response_targets,  # noqa: E402
                   temporary, token_logprobs, trim)

# What a method changes in clipsft.Config; its lr and steps are factors on the flags.
METHODS = {
    "sft": dict(loss="sft"),
    "clip": dict(loss="clip", old_every=8, eps_high=0.28),
    "sft-third": dict(loss="sft", lr=1 / 3, steps=1.5),
    "clip-third": dict(loss="clip", old_every=8, eps_high=0.28, lr=1 / 3, steps=1.5),
}
EVAL_STEPS = (8, 16, 32, 48, 64, 96, 128)    # and the last
LEVELS = (0.3, 0.5)                 # of ID accuracy, where methods are compared
PAIRS = (("clip", "sft"), ("sft-third", "sft"), ("clip-third", "sft-third"))
PASSAGES, PASSAGE_TOKENS = 8, 128  # of plain text
ANSWER_TOKENS = 64                  # of the base's own answers and of rollouts, at most
FACTS_A_ROW = 8                     # facts in a row, after an example
PLACES = 512                        # whose logits are computed at a time
REQUESTS = (
    "Write a short poem about the sea.", "Explain how rain forms.", "What is photosynthesis?",
    "Give three tips for learning to cook.", "Describe a typical day of a farmer.",
    "Why do people sleep?", "Write a polite email asking for a day off.", "How do I make tea?",
    "What is the difference between a lake and a river?", "Tell me a story about a lost dog.",
    "How does a bicycle stay upright?", "Name some animals that live in Africa.",
    "What should I pack for a trip to the mountains?", "Explain what a democracy is.",
    "Summarize the plot of Romeo and Juliet.", "What is gravity?")


class Adapter(torch.nn.Module):
    """A causal model of transformers with what this project asks of a model (see model.GPT)."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    @property
    def device(self):
        return self.lm.device

    def autocast(self):
        """bfloat16 over float32 weights on CUDA; float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def hidden(self, ids):
        """ids (B, T), padded on the right, so that no token sees padding -> (B, T, C)."""
        return self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def lm_head(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        return self.lm.get_output_embeddings()(x)

    @torch.no_grad()
    def generate(self, prompts, max_new, eos, pad, n=1, temperature=0.0, noise=None):
        """Continue every prompt n times, as model.GPT.generate does, but prompts (B/n, P) may be
        padded on the left. temperature 0 is greedy; noise: its seed is that of the sample.
        -> ids (B, T) padded on the right, mask (B, T) True at sampled tokens, EOS included."""
        prompts = prompts.repeat_interleave(n, 0)                            # (B, P)
        seen = ((prompts != pad).cumsum(1) > 0).long()    # a pad inside the prompt is a word
        sampling = dict(do_sample=False)
        if temperature > 0:
            sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        with torch.random.fork_rng(), self.autocast():    # transformers takes no torch.Generator
            if noise is not None:
                torch.manual_seed(noise.initial_seed())
            out = self.lm.generate(
                prompts, attention_mask=seen, max_new_tokens=max_new, eos_token_id=eos,
                pad_token_id=pad, repetition_penalty=1.0, **sampling)
        pairs = []
        P = prompts.shape[1]
        for row, n_seen in zip(out.tolist(), seen.sum(1).tolist()):
            response = row[P:]
            if eos in response:
                response = response[:response.index(eos) + 1]
            pairs.append((row[P - n_seen:P], response))
        ids, mask = batch(pairs, pad)
        return ids.to(self.device), mask.to(self.device)


def batch(pairs, pad):
    """[(prompt ids, response ids), ...] -> ids (B, T), mask (B, T), the convention of data.batch:
    padded on the right, mask[:, t] True iff token t is of the response."""
    rows = [torch.tensor(prompt + response) for prompt, response in pairs]
    masks = [torch.tensor([False] * len(p) + [True] * len(r)) for p, r in pairs]
    return (pad_sequence(rows, batch_first=True, padding_value=pad),
            pad_sequence(masks, batch_first=True, padding_value=False))


def question(problem):
    """A problem of data.py in words, as short as its answer (see in_words)."""
    J, Q, K = problem.rule
    return f"Add the cards {','.join(problem.hand)}. J={J},Q={Q},K={K}."


def in_words(answer):
    """'10 + 8 = 18 , so 18 + 2 = 20 # 20' -> '10+8=18, so 18+2=20. The sum is 20.'; without the
    blanks, which would be tokens of their own for some tokenizers."""
    for old, new in ((" + ", "+"), (" = ", "="), (" , ", ", "), (" # ", ". The sum is ")):
        answer = answer.replace(old, new)
    return f"{answer}."


def as_answer(text):
    """in_words undone, for data.verify, which knows neither full stops nor missing blanks."""
    for old, new in (("The sum is", " # "), (".", " "), (",", " , "), ("+", " + "), ("=", " = ")):
        text = text.replace(old, new)
    return " ".join(text.split())


def chat(tokenizer, text):
    """What a user says -> ids of the prompt, in the model's chat template."""
    prompt = tokenizer.apply_chat_template([dict(role="user", content=text)], tokenize=False,
                                           add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False).input_ids


def dialogue(tokenizer, problem, answer):
    """-> (prompt ids, response ids), which end in EOS."""
    response = tokenizer(in_words(answer), add_special_tokens=False).input_ids
    return chat(tokenizer, question(problem)), response + [tokenizer.eos_token_id]


def demonstrations(tokenizer, n, seed):
    """Those of data.demonstrations, in words -> ids (n, T), mask (n, T)."""
    rng = random.Random(f"{seed}/demonstrations")
    pairs = []
    for i in range(n):
        if i % 2 == 0:
            problem = data.draw_id(rng, "train")
        else:
            problem = data.draw(rng, "train", among=())
        pairs.append(dialogue(tokenizer, problem, data.expert(problem, rng)))
    return batch(pairs, tokenizer.pad_token_id)


def card_sets(tokenizer, n, seed):
    """Held-out problems of a seed with the answer that is looked for, name -> (ids, mask), each
    (n, T): 'id'; 'ood', their twins under three different worths; 'ood_rule', these with the answer
    of a model that counts J = Q = K = 10 all the same."""
    sets = dict(id=[], ood=[], ood_rule=[])
    problems = ev.eval_sets(n, seed)
    for problem in problems["id"]:
        sets["id"].append(dialogue(tokenizer, problem, data.expert(problem, None, 0.0)))
    for problem in problems["ood"]:
        unread = problem._replace(rule=data.ID_RULE)
        sets["ood"].append(dialogue(tokenizer, problem, data.expert(problem, None, 0.0)))
        sets["ood_rule"].append(dialogue(tokenizer, problem, data.expert(unread, None, 0.0)))
    return {name: batch(pairs, tokenizer.pad_token_id) for name, pairs in sets.items()}


def read_facts():
    """-> [(kind, prompt, completion)] of llm_facts.txt, whose lines '# ...' begin a kind."""
    facts = []
    for text in (HERE / "llm_facts.txt").read_text().splitlines():
        if text.startswith("# "):
            kind = text[2:]
        elif text:
            facts.append((kind, *text.split("|")))
    return facts


def fact_set(tokenizer):
    """The facts as plain text, FACTS_A_ROW of one kind in a row, a line each -> ids (n, T), mask
    (n, T) True at the completions, number (n, T): that of the fact, from 1, and 0 elsewhere. Each
    row begins with the first fact of its kind, which shows what is asked and is not scored."""
    kinds = {}
    for kind, prompt, completion in read_facts():
        kinds.setdefault(kind, []).append((prompt, completion))
    rows = []
    n = 0
    for example, *scored in kinds.values():
        for start in range(0, len(scored), FACTS_A_ROW):
            row = tokenizer("".join(example)).input_ids
            number = [0] * len(row)
            for prompt, completion in scored[start:start + FACTS_A_ROW]:
                asked = tokenizer(f"\n{prompt}", add_special_tokens=False).input_ids
                wanted = tokenizer(completion, add_special_tokens=False).input_ids
                n += 1
                row += asked + wanted
                number += [0] * len(asked) + [n] * len(wanted)
            rows.append((torch.tensor(row), torch.tensor(number)))
    rows.sort(key=lambda row: len(row[0]))    # rows of one length, little padding
    ids = pad_sequence([row for row, _ in rows], batch_first=True,
                       padding_value=tokenizer.pad_token_id)
    number = pad_sequence([number for _, number in rows], batch_first=True)
    return ids, number > 0, number


def passages():
    """Parts of long topics of Python's documentation, as this Python has it: a list of texts."""
    from pydoc_data.topics import topics
    long = sorted(name for name, text in topics.items() if len(text) > 2000)
    return [topics[name][200:2000] for name in random.Random("passages").sample(long, PASSAGES)]


def text_set(tokenizer):
    """The passages -> ids, mask (PASSAGES, PASSAGE_TOKENS): all but the first token is scored."""
    rows = [tokenizer(text).input_ids[:PASSAGE_TOKENS] for text in passages()]
    return batch([(row[:1], row[1:]) for row in rows], tokenizer.pad_token_id)


def own_answers(base, tokenizer):
    """The base's answers to REQUESTS, sampled at temperature 1 -> ids (B, T), mask (B, T)."""
    return respond(base, tokenizer, REQUESTS, 1, 1.0, generator("cpu", "own answers"))


def respond(model, tokenizer, texts, n, temperature, noise):
    """n answers to each of the texts of a user -> ids (B, T), mask (B, T), as Adapter.generate."""
    prompts = [chat(tokenizer, text) for text in texts]
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    return model.generate(torch.tensor(padded, device=model.device), ANSWER_TOKENS,
                          tokenizer.eos_token_id, pad, n, temperature, noise)


def rollout(tokenizer, model, c, step, seed):
    """rl.rollout in words -> ids (B, T), mask (B, T), rewards (P, G)."""
    rng = random.Random(f"{seed}/rl/{step}")
    problems = [data.draw_id(rng, "rl") for _ in range(c.rl_prompts)]
    asked = [question(problem) for problem in problems]
    noise = generator("cpu", seed, "rollout", step)
    ids, mask = respond(model, tokenizer, asked, c.rl_group, c.temperature, noise)
    rewards = []
    for i, (row, row_mask) in enumerate(zip(ids, mask)):
        text = tokenizer.decode(row[row_mask], skip_special_tokens=True,
                                clean_up_tokenization_spaces=False)
        verdict = data.verify(problems[i // c.rl_group], as_answer(text))
        rewards.append(rl.reward_of(verdict, c.reward))
    return ids, mask, torch.tensor(rewards).view(c.rl_prompts, c.rl_group)


def parts(ids, mask, device):
    """ids, mask (N, T) some rows at a time, so that at most PLACES logits are in memory."""
    rows = max(1, PLACES // mask.sum(1).max().item())
    for some_ids, some_mask in zip(ids.split(rows), mask.split(rows)):
        some_ids, some_mask = trim(some_ids, some_mask)
        yield some_ids.to(device), some_mask.to(device)


@torch.no_grad()
def score(model, ids, mask):
    """Teacher forcing on ids, mask (N, T) -> of each response token, on the CPU: is another token
    more probable, (N, T-1) bool; and its log pi, (N, T-1) float32 nats. False and 0 elsewhere."""
    wrong = torch.zeros_like(mask[:, 1:])
    logp = torch.zeros(wrong.shape)
    start = 0
    for some_ids, some_mask in parts(ids, mask, model.device):
        logits = response_logits(model, some_ids, some_mask)                 # (M, V)
        targets = response_targets(some_ids, some_mask)                      # (M,)
        end = start + len(some_ids)
        place = (slice(start, end), slice(some_ids.shape[1] - 1))
        wrong[place] = in_rows(logits.argmax(-1) != targets, some_mask).cpu()
        logp[place] = in_rows(token_logprobs(logits, targets), some_mask).cpu()
        start = end
    return wrong, logp


@torch.no_grad()
def logits_of(model, ids, mask):
    """ids, mask (N, T) -> a list of the logits at response tokens, (M, V) for each of the parts."""
    return [response_logits(model, *part) for part in parts(ids, mask, model.device)]


@torch.no_grad()
def drift(model, ids, mask, base_logits):
    """Mean nats a response token of ids, mask (N, T): KL(base || model), entropy of the model.
    base_logits: those of the base, as logits_of gives them."""
    kl = 0.0
    entropy = 0.0
    for part, part_logits in zip(parts(ids, mask, model.device), base_logits):
        logits = response_logits(model, *part)                               # (M, V)
        kl += kl_exact(part_logits, logits).sum().item()
        entropy += torch.distributions.Categorical(logits=logits.float()).entropy().sum().item()
    n = mask.sum().item()
    return kl / n, entropy / n


def may_be_unread(wrong, ids, other):
    """Spares a second pass: only a greedy answer whose first wrong token, wrong (n, T-1), is just
    where the two references ids (n, T) and other (n, T') first differ can equal the other.
    -> (n,) bool: these rows."""
    T = min(ids.shape[1], other.shape[1])
    differs = ids[:, 1:T] != other[:, 1:T]                                   # (n, T-1)
    return wrong.any(1) & (wrong.int().argmax(1) == differs.int().argmax(1))


def evaluate(model, sets):
    """All that a row says of a model. sets: name -> (ids, mask, ...): of card_sets; fact_set,
    'facts'; text_set, 'text'; own_answers and the base's logits there, 'own'. nll: nats a token of
    the ID references."""
    row = {}
    wrong, logp = score(model, *sets["id"])
    row["id"] = 1 - wrong.any(1).float().mean().item()
    row["nll"] = -(logp.sum() / sets["id"][1].sum()).item()
    wrong, _ = score(model, *sets["ood"])
    row["ood"] = 1 - wrong.any(1).float().mean().item()
    unread = may_be_unread(wrong, sets["ood"][0], sets["ood_rule"][0])       # (n,)
    row["ood_rule"] = 0.0
    if unread.any():
        ids, mask = sets["ood_rule"]
        wrong, _ = score(model, ids[unread], mask[unread])
        row["ood_rule"] = (~wrong.any(1)).sum().item() / len(ids)
    ids, mask, number = sets["facts"]
    wrong, _ = score(model, ids, mask)
    row["facts"] = 1 - len(number[:, 1:][wrong].unique()) / number.max().item()
    _, logp = score(model, *sets["text"])
    row["text"] = -(logp.sum() / sets["text"][1].sum()).item()
    row["kl"], row["entropy"] = drift(model, *sets["own"])
    if not math.isfinite(row["nll"] + row["text"]):
        raise FloatingPointError("nll is not finite: try a lower --lr")
    return row


def run_job(base, tokenizer, sets, flags, seed, method):
    """Evaluate the base, or fine-tune a copy of it by a method -> rows."""
    row = dict(model=model_name(flags.model), seed=seed, method=method)
    if method == "base":
        row.update(stage="base", step=0, **evaluate(base, sets))
        show(row)
        return [row]
    c = config(flags, method)
    ids, mask = demonstrations(tokenizer, c.demos, seed)
    model = copy.deepcopy(base).requires_grad_(True)
    rows = []
    recent = []
    begin = time.perf_counter()
    trained = 0.0    # seconds, without evaluations
    for step, stats in clipsft.finetune(model, base, ids, mask, c, seed):
        recent.append((stats["loss"], stats["clipped"][stats["mask"]].float().mean()))
        recent = recent[-c.old_every:]    # K updates: every age of the old policy once
        if step in EVAL_STEPS or step in c.rl_from or step == c.steps:
            means = torch.tensor(recent).mean(0).tolist()    # waits for the device
            trained += time.perf_counter() - begin
            found = evaluate(model, sets)
            rows.append(dict(row, stage="sft", step=step, **found, loss=means[0],
                             clip_frac=means[1], seconds=trained / step))
            show(rows[-1])
            begin = time.perf_counter()
        if step in c.rl_from:
            healed = copy.deepcopy(model)
            sample = functools.partial(rollout, tokenizer)
            stats = list(rl.grpo(healed, base, c, seed, sample))
            found = evaluate(healed, sets)
            reward = ev.mean(s["reward"] for s in stats[-10:])
            rows.append(dict(row, stage="rl", step=step, **found, reward=reward))
            show(rows[-1])
            begin = time.perf_counter()
    return rows


# ================================================================= below: what it takes to run this
MEASURES = dict(id="ID", ood="OOD", ood_rule="unread", facts="facts", text="text nll", kl="KL",
                entropy="entropy", nll="ID nll", clip_frac="clipped", seconds="s/update")
COMPARED = ("facts", "text", "kl", "entropy", "ood", "ood_rule")
LEGEND = """ID, OOD: the expert's greedy answer, every token right; unread: OOD, every face card
counted 10; facts: completed right; text nll, ID nll: nats a token; KL(base || model), entropy:
nats a token on the base's own answers; clipped: share of the tokens in the last K updates"""
COLORS = {"sft": "#1f77b4", "clip": "#ff7f0e", "sft-third": "#0b3c5d",
          "clip-third": "#a34f00"}


def config(flags, method):
    """-> clipsft.Config of a method."""
    factors = dict(METHODS[method])
    lr = flags.lr * factors.pop("lr", 1)
    steps = round(flags.steps * factors.pop("steps", 1))
    return replace(clipsft.Config(), lr=lr, steps=steps, batch_size=flags.batch_size,
                   demos=flags.demos, rl_from=tuple(flags.rl_from), rl_steps=flags.rl_steps,
                   rl_lr=flags.rl_lr, **factors)


def gguf_file(name):
    """-> the one .gguf file of a folder that is not of transformers, or None."""
    files = sorted(Path(name).glob("*.gguf"))
    if len(files) == 1 and not (Path(name) / "config.json").exists():
        return files[0]
    return None


def model_name(name):
    """What a model is called in rows and tables, without its folder."""
    file = gguf_file(name)
    return Path(name).resolve().name if file is None else file.stem


def load(name, device):
    """-> base (an Adapter, frozen), tokenizer. ValueError for what cannot work."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("--model needs transformers: pip install transformers gguf") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {}
    weights = dict(dtype=torch.float32)
    file = gguf_file(name)
    if file is not None:
        options["gguf_file"] = file.name
        if hasattr(transformers, "GgufConfig"):    # older versions dequantize unasked
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        lm = transformers.AutoModelForCausalLM.from_pretrained(name, **options, **weights)
    except Exception as error:    # transformers raises many kinds, of many lines
        raise ValueError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    check_tokenizer(tokenizer, name)
    base = Adapter(lm.to(device)).requires_grad_(False)
    check_adapter(base, tokenizer)
    return base, tokenizer


def check_tokenizer(tokenizer, name):
    """Needs a chat template and an EOS, which serves as pad if there is none."""
    if not tokenizer.chat_template:
        raise ValueError(f"--model {name}: its tokenizer has no chat template; an Instruct model?")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat(tokenizer, "")[0] == tokenizer.pad_token_id:    # Adapter.generate would take it for pad
        raise ValueError(f"--model {name}: its prompts begin with the pad token")


@torch.no_grad()
def check_adapter(base, tokenizer):
    """ValueError if logits are more than the head's product with hidden states (scaled, capped)."""
    ids = torch.tensor([chat(tokenizer, REQUESTS[0])], device=base.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with base.autocast():
        wanted = base.lm(ids).logits[0, :-1]
    if not torch.allclose(response_logits(base, ids, mask), wanted, rtol=0.02, atol=0.02):
        raise ValueError(f"{type(base.lm).__name__} changes its logits behind the head, which this "
                         "adapter does not know of")


def check_length(sets, base):
    """ValueError for rows that are longer than the model's context."""
    limit = getattr(base.lm.config, "max_position_embeddings", None)
    longest = max(ids.shape[1] for ids, *_ in sets.values())
    if limit is not None and longest > limit:
        raise ValueError(f"prompt and answer have {longest} tokens, the model takes {limit}")


@functools.cache
def text_fingerprint():
    """A number that changes with the facts, passages, requests and the wording of the task."""
    problem = data.Problem("S", data.ID_RULE, data.DECK[:4])
    texts = [*map("|".join, read_facts()), *passages(), *REQUESTS, question(problem),
             in_words(data.expert(problem, None, 0.0))]
    return zlib.crc32("\n".join(texts).encode())


def job_settings(flags, method):
    """All that the rows of a job depend on, as it stands in its file."""
    settings = dict(model=model_name(flags.model), device=flags.device, eval_n=flags.eval_n,
                    texts=text_fingerprint(), task=clipsft.task_fingerprint())
    if method != "base":
        c = config(flags, method)
        for name in ("loss", "lr", "steps", "batch_size", "demos", "old_every", "eps_high",
                     "rl_steps", "rl_lr"):
            settings[name] = getattr(c, name)
        settings["rl_from"] = list(c.rl_from)    # as JSON has it
    return settings


def saved_answers(base, tokenizer, flags):
    """own_answers, from the run folder if they are there: all jobs have the same."""
    path = Path(flags.out_dir) / "answers.json"
    wanted = dict(model=model_name(flags.model))
    if not path.exists():
        ids, mask = own_answers(base, tokenizer)
        ev.write_json(path, dict(settings=wanted, ids=ids.tolist(), mask=mask.tolist()))
    clipsft.refuse_other_settings(path, wanted)
    saved = ev.read_json(path)
    return torch.tensor(saved["ids"]), torch.tensor(saved["mask"])


def run(flags):
    """Run the jobs that are not in the run folder yet; then all its rows into --rows."""
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    for path in sorted(Path(flags.out_dir).glob("s[0-9]*-*.json")):
        _, method = path.stem.split("-", 1)
        if method in METHODS or method == "base":
            clipsft.refuse_other_settings(path, job_settings(flags, method))
    base, tokenizer = load(flags.model, flags.device)
    fixed = dict(facts=fact_set(tokenizer), text=text_set(tokenizer))
    check_length(dict(fixed, **card_sets(tokenizer, flags.eval_n, flags.seed)), base)
    Path(flags.out_dir).mkdir(parents=True, exist_ok=True)
    Path(flags.rows).parent.mkdir(parents=True, exist_ok=True)
    own = saved_answers(base, tokenizer, flags)
    fixed["own"] = (*own, logits_of(base, *own))
    print(header(), flush=True)
    for seed in range(flags.seed, flags.seed + flags.seeds):
        sets = dict(fixed, **card_sets(tokenizer, flags.eval_n, seed))
        for method in ("base", *METHODS):
            path = clipsft.job_path(flags.out_dir, seed, method)
            if path.exists():
                print(f"seed {seed} {method}: found; delete {path} to run it again", flush=True)
                continue
            rows = run_job(base, tokenizer, sets, flags, seed, method)
            ev.write_json(path, dict(settings=job_settings(flags, method), rows=rows))
    lines = [json.dumps(row) for row in ev.read_rows(flags.out_dir)]
    temporary(flags.rows).write_text("\n".join(lines) + "\n")
    temporary(flags.rows).replace(flags.rows)


def header():
    return f"{'':32}" + "".join(f"{title:>9}" for title in MEASURES.values())


def show(row, label=""):
    if not label:
        label = f"seed {row['seed']} {row['method']}, step {row['step']}"
        if row["stage"] == "rl":
            label += ", then RL"
    cells = [f"{row[key]:9.3f}" if key in row else f"{'-':>9}" for key in MEASURES]
    print(f"{label:32}{''.join(cells)}", flush=True)


def curve(rows, method, seed):
    """The base and one run after it, in the order of their steps."""
    return ev.run_of(rows, "base", seed, "base") + ev.run_of(rows, method, seed)


def differences(rows, method, reference, key):
    """One value a seed: method minus reference, the mean over those LEVELS of ID accuracy that both
    reach; seeds in which there is none are left out."""
    found = []
    for seed in ev.seeds_of(rows):
        at_levels = []
        for level in LEVELS:
            mine = ev.at_id(curve(rows, method, seed), level)
            other = ev.at_id(curve(rows, reference, seed), level)
            if mine is not None and other is not None:
                at_levels.append(mine[key] - other[key])
        if at_levels:
            found.append(ev.mean(at_levels))
    return found


def last_differences(rows, method, reference, key):
    """One value a seed: method minus reference, each at its last update, whatever ID is there."""
    found = []
    for seed in ev.seeds_of(rows):
        mine = ev.run_of(rows, method, seed)
        other = ev.run_of(rows, reference, seed)
        if mine and other:
            found.append(mine[-1][key] - other[-1][key])
    return found


def print_pairs(where, rows, differences_of, keys):
    titles = "".join(f"{f'{method} - {reference}':>25}" for method, reference in PAIRS)
    print(f"\n{where}: paired differences, mean +- 95 % (n seeds)\n{'':10}{titles}")
    for key in keys:
        cells = ""
        for method, reference in PAIRS:
            values = differences_of(rows, method, reference, key)
            middle, half = ev.interval(values)
            width = f"+- {half:.4f}" if len(values) > 1 else ""    # one seed has no interval
            cell = f"{middle:+.4f} {width}" if values else "none"
            cells += f"{f'{cell} ({len(values)})':>25}"
        print(f"{MEASURES[key]:10}{cells}")


def report(rows, path):
    """Print the tables, draw the figure."""
    print(f"\n{rows[0]['model']}, means over n seeds\n{LEGEND}\n\n{header()}")
    for method in ("base", *METHODS):
        for stage, after in (("base", ""), ("sft", ""), ("rl", ", RL")):
            for step in ev.steps_of(rows, method, stage):
                some = [row for row in rows
                        if (row["method"], row["stage"], row["step"]) == (method, stage, step)]
                show(ev.average(some), f"{method}, step {step}{after}, n {len(some)}")
    levels = " and ".join(f"{level:g}" for level in LEVELS)
    print_pairs(f"at equal ID, {levels}", rows, differences, COMPARED)
    print_pairs("at the last update of each", rows, last_differences, ("id", *COMPARED))
    figure(rows, path)


def figure(rows, path):
    """ID and OOD over updates, means over seeds with their 95 % band; then facts, nll of plain text
    minus the base's and KL against ID: what a method has changed where it has learnt as much. Means
    over seeds of each evaluation, and faint, each seed."""
    import matplotlib.figure
    fig = matplotlib.figure.Figure((13, 3.6), layout="tight")
    axes = fig.subplots(1, 4)
    bases = {row["seed"]: row for row in rows if row["stage"] == "base"}
    rows = [dict(row, text=row["text"] - bases[row["seed"]]["text"]) for row in rows]
    for method in METHODS:
        some = []    # the base is the start of every method
        for row in rows:
            if row["method"] in ("base", method) and row["stage"] != "rl":
                some.append(dict(row, method=method, stage="sft"))
        look = dict(color=COLORS[method], marker=".")
        by_step = functools.partial(ev.by_step, some, method, "sft")
        ev.draw_band(axes[0], *by_step("id"), **look, label=method)
        ev.draw_band(axes[0], *by_step("ood"), **look, linestyle="--")
        for ax, key in zip(axes[1:], ("facts", "text", "kl")):
            ax.plot(by_step("id")[1], by_step(key)[1], **look)
            for seed in ev.seeds_of(some):
                path_of_seed = ev.run_of(some, method, seed)
                ax.plot([row["id"] for row in path_of_seed], [row[key] for row in path_of_seed],
                        color=COLORS[method], linewidth=0.7, alpha=0.35)
    titles = ("ID, and dashed OOD", "facts known", "plain text: nll minus base's",
              "KL(base || model), nats")
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel="ID accuracy")
        ax.grid(alpha=0.25)
    axes[0].set(xlabel="SFT updates", ylim=(0, 1.02))
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(temporary(path), format="png", dpi=130)
    temporary(path).replace(path)


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags = dict(
        model=("", "of a hub or a folder; without it only the table"),
        out_dir=("runs/llm", "run folder: one file a job"),
        rows=(str(HERE / "llm.jsonl"), "all rows; the figure lies beside them"),
        seed=(0, "the first seed"), seeds=(3, "how many"), steps=(32, "updates"),
        batch_size=(8, "demonstrations an update"), lr=(1e-4, "learning rate"),
        demos=(2048, "demonstrations in all"), eval_n=(32, "ID and OOD problems, of each"),
        device=("cpu", "cpu or cuda"), rl_steps=(20, "GRPO steps"),
        rl_lr=(1e-5, "its learning rate"))
    for flag, (default, meaning) in flags.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default,
                            choices=("cpu", "cuda") if flag == "device" else None,
                            help=f"{meaning} [{default}]")
    parser.add_argument("--rl_from", type=int, nargs="*", default=[],
                        help="updates that GRPO starts from; nothing: no RL")
    found = parser.parse_args(argv)
    for flag in ("seeds", "steps", "batch_size", "lr", "eval_n"):
        if not getattr(found, flag) > 0:
            parser.error(f"--{flag} must be above 0")
    if any(not 1 <= step <= found.steps for step in found.rl_from):
        parser.error(f"--rl_from: SFT has steps 1 to {found.steps}")
    if found.batch_size > found.demos:
        parser.error(f"--batch_size {found.batch_size} is above --demos {found.demos}")
    return found


def main(argv=None):
    flags = read_flags(argv)
    try:
        if flags.model:
            run(flags)
        if not Path(flags.rows).exists():
            raise ValueError(f"there is no {flags.rows} yet: give --model")
        rows = [json.loads(line) for line in Path(flags.rows).read_text().splitlines()]
        if not rows:
            raise ValueError(f"{flags.rows} is empty")
        path = Path(flags.rows).with_suffix(".png")
        report(rows, path)
        print(f"\nrows: {flags.rows}, figure: {path}")
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from the finished jobs")
