"""data.py - the cards task, its tokenizer, its verifier, its batches.  Run it to look at problems.

A hand of four cards is added up. The prompt states the rule, that is what J, Q and K are worth:

    S 11 12 13 : 7 K 3 J >   13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34 <eos>

Supervised fine-tuning (SFT) and reinforcement learning (RL) only ever see the in-distribution rule
J=Q=K=10; the out-of-distribution (OOD) rule is 11, 12, 13. GeneralPoints of arXiv 2509.12235 in
miniature. Four other operations on the same hands stand for prior abilities that SFT never trains.
"""
import random
import re
import zlib
from dataclasses import dataclass

import tiktoken
import torch

# ---------------------------------------------------------------------------------------- tokenizer
# Every word is one token, so every number 0..99 is: arithmetic on single tokens is learnt sooner
# than on digits. Specials have ids of their own: pad is never eos.
FACES = ("J", "Q", "K")
DECK = tuple(map(str, range(2, 11))) + FACES
OPS = {"S": "sum", "M": "maximum", "R": "reverse", "D": "values", "C": "sorted values"}
PRIOR_OPS = ("M", "R", "D", "C")
CONNECTIVES = ("so", "then", "now", "next", "well", "hence", "thus", "and")
WORDS = (*map(str, range(100)), *FACES, *OPS, *":>+=,#", *CONNECTIVES)
SPECIALS = {" <eos>": len(WORDS), " <pad>": len(WORDS) + 1}
EOS, PAD = SPECIALS.values()
N_VOCAB = len(WORDS) + len(SPECIALS)

# A tiktoken encoding built in memory needs no download. A token is a space and a word.
_enc = tiktoken.Encoding("cards", pat_str=r" [^ ]+", special_tokens=SPECIALS,
                         mergeable_ranks={f" {w}".encode(): i for i, w in enumerate(WORDS)},
                         explicit_n_vocab=N_VOCAB)
_known = frozenset(WORDS)


def encode(text):
    """Text -> list of token ids. ValueError names a word outside the vocabulary (tiktoken itself
    would panic there, and drop white space silently)."""
    words = text.split()
    if not _known.issuperset(words):
        bad = next(w for w in words if w not in _known)
        raise ValueError(f"not in the vocabulary: {bad!r} (see data.WORDS)")
    return _enc.encode_ordinary("".join(" " + w for w in words))


def decode(ids):
    """Token ids -> text, words separated by one space; specials are shown as <eos>, <pad>."""
    return _enc.decode(ids)[1:]


# ----------------------------------------------------------------------------------------- problems
ID_RULE, OOD_RULE = (10, 10, 10), (11, 12, 13)


@dataclass(frozen=True)
class Problem:
    op: str        # one of OPS
    rule: tuple    # worth of J, Q, K
    hand: tuple    # four cards of the deck

    def __post_init__(self):
        if self.op not in OPS:
            raise ValueError(f"op {self.op!r} is not one of {', '.join(OPS)}")
        if len(self.rule) != 3 or not all(isinstance(v, int) and 1 <= v <= 24 for v in self.rule):
            raise ValueError(f"rule {self.rule}: three whole numbers 1..24 (four cards stay < 100)")
        if len(self.hand) != 4 or any(c not in DECK for c in self.hand):
            raise ValueError(f"hand {self.hand}: four cards of {' '.join(DECK)}")

    @property
    def values(self):
        worth = dict(zip(FACES, self.rule))
        return [worth[c] if c in worth else int(c) for c in self.hand]

    @property
    def prompt(self):
        return f"{self.op} {' '.join(map(str, self.rule))} : {' '.join(self.hand)} >"


def fingerprint(words):
    """A number that does not depend on their order."""
    return zlib.crc32(" ".join(sorted(words)).encode())


def split_of(hand):
    """'eval', 'rl' or 'train', decided by what the cards are worth under the ID rule, in any order:
    7 J 3 K and 3 10 7 Q have the same sums, so they are in the same split. No evaluation hand, and
    none with the same ID values, occurs in pre-training, SFT or RL."""
    h = fingerprint("10" if c in FACES else c for c in hand) % 10
    return "eval" if h < 3 else "rl" if h < 5 else "train"


def draw(rng, split, op="S", rule=None):
    """A random problem of a split with at least one face card; rule None: worths from 10..19."""
    while True:
        hand = tuple(rng.choices(DECK, k=4))
        if not set(hand).isdisjoint(FACES) and split_of(hand) == split:
            rule = rule or tuple(rng.choices(range(10, 20), k=3))
            return Problem(op, rule, hand)


# ---------------------------------------------------------------------------------- response styles
def terse(values):
    """The base model's own habit: running totals, left to right. [7, 10, 3] -> '7 17 20'"""
    return " ".join(str(sum(values[:i + 1])) for i in range(len(values)))


def chain(values, rng=None, p_word=0.0):
    """Additions in the given order, then the total. [7, 10, 3] -> '7 + 10 = 17 , 17 + 3 = 20 # 20'
    Before each step, with probability p_word, a connective that nobody could predict."""
    steps, total = [], values[0]
    for v in values[1:]:
        word = rng.choice(CONNECTIVES) + " " if p_word and rng.random() < p_word else ""
        steps.append(f"{word}{total} + {v} = {total + v}")
        total += v
    return " , ".join(steps) + f" # {total}"


def expert(problem, rng, p_word=0.3):
    """A demonstration for SFT: a chain, largest card first. The order and the connectives are what
    the base model finds improbable; the arithmetic it knows."""
    return chain(sorted(problem.values, reverse=True), rng, p_word)


def demonstrations(n, seed, split="train", p_word=0.3):
    """The expert's data, n problems of a split under the ID rule. -> ids (n, T), mask (n, T)."""
    rng = random.Random(f"{seed}/demonstrations")
    problems = [draw(rng, split, rule=ID_RULE) for _ in range(n)]
    return batch([(p.prompt, expert(p, rng, p_word)) for p in problems])


def truth(problem):
    """The one right response to a prior-ability prompt; for S the total."""
    v = problem.values
    return {"S": lambda: str(sum(v)), "M": lambda: str(max(v)),
            "R": lambda: " ".join(reversed(problem.hand)), "D": lambda: " ".join(map(str, v)),
            "C": lambda: " ".join(map(str, sorted(v)))}[problem.op]()


def base_document(rng):
    """(problem, response) of the pre-training mixture: 6/10 sums, 1/10 for each prior ability. The
    base has seen the expert's style and merely disprefers it: SFT shifts habits, not arithmetic."""
    problem = draw(rng, "train", rng.choices("SMRDC", weights=(6, 1, 1, 1, 1))[0])
    if problem.op != "S":
        return problem, truth(problem)
    style, values = rng.random(), problem.values
    # 55 % terse; chains: 25 % in the order of the hand, 15 % in any, 5 % largest first (the expert)
    if style < 0.55:
        return problem, terse(values)
    if style >= 0.80:
        values = rng.sample(values, 4) if style < 0.95 else sorted(values, reverse=True)
    return problem, chain(values, rng, 0.03)


# ----------------------------------------------------------------------------------------- verifier
_STEP = r"(?:(?:%s) )?(\d+) \+ (\d+) = (\d+)" % "|".join(CONNECTIVES)
_CHAIN = re.compile(rf"{_STEP} , {_STEP} , {_STEP} # (\d+)")


@dataclass(frozen=True)
class Verdict:
    format_ok: bool    # three steps and a total, whatever the numbers
    strict: bool       # format, every card once in any order, every sum and the total right
    answer: bool       # the last number is right, in whatever style: arithmetic, not format


def verify(problem, response):
    """Three verdicts on a response text (without <eos>). Numbers are matched and parsed, never
    evaluated. Prior abilities have one right response: all three verdicts are equality with it."""
    if problem.op != "S":
        same = response == truth(problem)
        return Verdict(same, same, same)
    values, words = problem.values, response.split()
    answer = bool(words) and words[-1] == str(sum(values))
    match = _CHAIN.fullmatch(response)
    if not match:
        return Verdict(False, False, answer)
    a, b, ab, t1, c, abc, t2, d, abcd, total = map(int, match.groups())
    strict = (sorted((a, b, c, d)) == sorted(values) and a + b == ab == t1
              and t1 + c == abc == t2 and t2 + d == abcd == total)
    return Verdict(True, strict, answer)


# ------------------------------------------------------------------------------------------ batches
def batch(pairs):
    """[(prompt, response), ...] texts -> ids (B, T) long, mask (B, T) bool, right-padded.

    The mask convention, once for the project: mask[:, t] is True iff token t is a response token or
    its EOS; prompt and padding are False. Position t predicts token t+1, so a loss takes
    logits[:, :-1], ids[:, 1:] and mask[:, 1:]."""
    prompts = [encode(p) for p, _ in pairs]
    rows = [p + encode(r) + [EOS] for p, (_, r) in zip(prompts, pairs)]
    T = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
    start, end = (torch.tensor([[len(x)] for x in xs]) for xs in (prompts, rows))    # (B, 1)
    t = torch.arange(T)
    return ids, (start <= t) & (t < end)


def main():
    """Problems of every kind, each with its tokens over their mask: 1 is trained, 0 is not."""
    rng = random.Random(0)
    shown = [("expert demonstration, ID rule", "S", ID_RULE, lambda p: expert(p, rng)),
             ("the same style, OOD rule (only evaluated)", "S", OOD_RULE, lambda p: expert(p, rng)),
             ("the base's own style, random rule", "S", None, lambda p: terse(p.values))]
    shown += [(f"prior ability: {OPS[op]}", op, None, truth) for op in PRIOR_OPS]
    for title, op, rule, answer in shown:
        problem = draw(rng, "train", op, rule)
        ids, mask = batch([(problem.prompt, answer(problem))])
        words = [decode([i]) for i in ids[0].tolist()]
        print(f"\n{title}: {verify(problem, answer(problem))}")
        for label, cells in (("text", words), ("id", ids[0].tolist()),
                             ("mask", mask[0].long().tolist())):
            print(f"{label:>5} " + " ".join(
                f"{c!s:>{max(len(w), 3)}}" for c, w in zip(cells, words)))


if __name__ == "__main__":
    main()
