"""data.py - the cards task: tokenizer, problems, answers, verifier, batches. Run it to see some.

A letter says what to do with a hand of four cards, the numbers what J, Q, K are worth. The base
adds up tersely under S, A, T, by running totals; under E, X, G it explains:

    S 11 12 13 : 7 K 3 J >   7 20 23 34 <eos>
    E 11 12 13 : 7 K 3 J >   7 + 13 = 20 , 20 + 3 = 23 , 23 + 11 = 34 # 34 <eos>

The expert explains S too, largest card first. Fine-tuning (SFT) and RL see S alone, in distribution
(ID): J=Q=K=10 or J=Q=K=14; out of distribution (OOD) they are 11, 12, 13 (GeneralPoints of
2509.12235 in miniature). A cold start: the base never explains S, so RL has nothing to reward
without SFT. E and M, R, D, C, never trained again, are the prior abilities that may be forgotten.
"""
import random
import re
import zlib
from typing import NamedTuple

import tiktoken
import torch

# Every word is one token, so every number 0..99 is: arithmetic on single tokens is learnt sooner
# than on digits. Specials have ids of their own: pad is never eos.
FACES = ("J", "Q", "K")
DECK = tuple(map(str, range(2, 11))) + FACES
OPS = "SATEXGMRDC"    # sum: terse S A T, explained E X G; maximum, reverse, values, sorted values
CONNECTIVES = ("so", "then", "now", "next", "well", "hence", "thus", "and")
WORDS = (*map(str, range(100)), *FACES, *OPS, *":>+=,#", *CONNECTIVES)
SPECIALS = {" <eos>": len(WORDS), " <pad>": len(WORDS) + 1}
EOS, PAD = SPECIALS.values()
N_VOCAB = len(WORDS) + len(SPECIALS)
MAX_NEW = 28    # tokens of the longest answer (a demonstration has up to 23); a prompt has 10

# A tiktoken encoding built in memory needs no download. A token is a space and a word.
_enc = tiktoken.Encoding("cards", pat_str=r" [^ ]+", special_tokens=SPECIALS,
                         mergeable_ranks={f" {w}".encode(): i for i, w in enumerate(WORDS)},
                         explicit_n_vocab=N_VOCAB)
_known = frozenset(WORDS)

def encode(text):
    """Text -> token ids. ValueError names a word outside the vocabulary: tiktoken would panic."""
    words = text.split()
    if bad := set(words) - _known:
        raise ValueError(f"not in the vocabulary: {min(bad)!r} (see data.WORDS)")
    return _enc.encode_ordinary("".join(" " + w for w in words))

def decode(ids):
    """Token ids -> text, words separated by one space; specials are shown as <eos>, <pad>."""
    return _enc.decode(ids)[1:]

ID_RULES, OOD_RULE = ((10,) * 3, (14,) * 3), (11, 12, 13)    # two: some bases tie a style to one

class Problem(NamedTuple):
    op: str        # a letter of OPS
    rule: tuple    # worth of J, Q, K: whole numbers up to 24, so that four cards stay below 100
    hand: tuple    # four cards of the deck

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
    """'eval', 'rl' or 'train', by what the cards are worth if J=Q=K=10, in any order: 7 J 3 K and
    3 10 7 Q have the same sums then, so no evaluation hand has those of a hand in training."""
    h = fingerprint("10" if c in FACES else c for c in hand) % 10
    return "eval" if h < 3 else "rl" if h < 5 else "train"

def draw(rng, split, op="S", rules=None):
    """A random problem of a split with a face card, under one of rules, or any of 10..19."""
    while True:
        hand = tuple(rng.choices(DECK, k=4))
        if not set(hand).isdisjoint(FACES) and split_of(hand) == split:
            return Problem(op, tuple(rng.choice(rules or [rng.choices(range(10, 20), k=3)])), hand)

def terse(values):
    """Running totals, left to right. [7, 10, 3] -> '7 17 20'"""
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
    """A demonstration: a chain, largest card first. That S is explained, the order and the
    connectives are what the base finds improbable; the arithmetic it knows."""
    return chain(sorted(problem.values, reverse=True), rng, p_word)

def truth(problem):
    """The one right response to M, R, D or C."""
    v = problem.values
    answers = {"M": [max(v)], "R": problem.hand[::-1], "D": v, "C": sorted(v)}
    return " ".join(map(str, answers[problem.op]))

def base_document(rng):
    """(problem, response) of the pre-training mixture, a tenth for each letter."""
    problem = draw(rng, "train", rng.choice(OPS))
    values = problem.values
    if problem.op in "MRDC":
        return problem, truth(problem)
    if problem.op in "SAT":
        return problem, terse(values)
    order = rng.random()    # of a chain: half as in the hand, 40 % any, 10 % largest first
    if order >= 0.5:
        values = rng.sample(values, 4) if order < 0.9 else sorted(values, reverse=True)
    return problem, chain(values, rng, 0.03)

_N = "(0|[1-9][0-9]?)"
_STEP = rf"(?:(?:{'|'.join(CONNECTIVES)}) )?{_N} \+ {_N} = {_N}"
_CHAIN = re.compile(rf"{_STEP} , {_STEP} , {_STEP} # {_N}")

class Verdict(NamedTuple):
    strict: bool    # three steps, every card once in any order, every sum and the total right
    any: bool       # the last number is right, in any format: arithmetic, not style

def verify(problem, response):
    """Verdict on a response text (without <eos>). Numbers are parsed, never evaluated."""
    if problem.op in "MRDC":
        return Verdict(*[response == truth(problem)] * 2)
    values, words = problem.values, response.split()
    right = bool(words) and words[-1] == str(sum(values))
    match = _CHAIN.fullmatch(response)
    if not match:
        return Verdict(False, right)
    a, b, ab, t1, c, abc, t2, d, abcd, total = map(int, match.groups())
    strict = (sorted((a, b, c, d)) == sorted(values) and a + b == ab == t1
              and t1 + c == abc == t2 and t2 + d == abcd == total)
    return Verdict(strict, right)

def batch(pairs):
    """[(prompt, response), ...] texts -> ids (B, T) long, mask (B, T) bool, right-padded.

    The mask convention, once for the project: mask[:, t] is True iff token t is a response token or
    its EOS; prompt and padding are False. Position t predicts token t+1, so a loss takes
    logits[:, :-1], ids[:, 1:] and mask[:, 1:]; the first response token is trained."""
    prompts = [encode(p) for p, _ in pairs]
    rows = [p + encode(r) + [EOS] for p, (_, r) in zip(prompts, pairs)]
    T = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
    start, end = (torch.tensor([[len(x)] for x in xs]) for xs in (prompts, rows))    # (B, 1)
    t = torch.arange(T)
    return ids, (start <= t) & (t < end)

def demonstrations(n, seed, split="train", p_word=0.3):
    """The expert's data, n problems of a split under the ID rules. -> ids (n, T), mask (n, T)."""
    rng = random.Random(f"{seed}/demonstrations")
    problems = [draw(rng, split, rules=ID_RULES) for _ in range(n)]
    return batch([(p.prompt, expert(p, rng, p_word)) for p in problems])

def main():
    """Problems of every kind, each with its tokens over their mask: 1 is trained, 0 is not."""
    rng = random.Random(0)
    shown = [("expert demonstration, an ID rule", "S", ID_RULES, lambda p: expert(p, rng)),
             ("the same, OOD rule (only evaluated)", "S", [OOD_RULE], lambda p: expert(p, rng)),
             ("the base, terse", "S", None, lambda p: terse(p.values)),
             ("the base, explained", "E", None, lambda p: chain(p.values))]
    shown += [(f"the base, {op}", op, None, truth) for op in "MRDC"]
    for title, op, rules, answer in shown:
        problem = draw(rng, "train", op, rules)
        ids, mask = batch([(problem.prompt, answer(problem))])
        print(f"\n{title}")
        for row in map(decode, ids.T.tolist()), ids[0].tolist(), mask[0].long().tolist():
            print("".join(f"{cell!s:>6}" for cell in row))

if __name__ == "__main__":
    main()
