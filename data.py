"""data.py - the cards task: tokenizer, problems, answers, verifier, batches. Run it to see some.

A letter says what to do with a hand of four cards, three numbers what J, Q, K are worth. The base
adds up tersely under S, A, T, by running totals; under E, X, G it explains:

    S 12 18 10 : 7 K 3 J >   7 17 20 32 <eos>
    E 12 18 10 : 7 K 3 J >   7 + 10 = 17 , 17 + 3 = 20 , 20 + 12 = 32 # 32 <eos>

The expert explains S too, largest card first. In distribution (ID): hands with a face card under
J=Q=K=10: half of the demonstrations of supervised fine-tuning (SFT), and all prompts of RL. The
other half of the demonstrations, hands without a face card, show the format under every rule. So
nothing asks to read the rule. Out of distribution (OOD): hands as in ID under three different
worths; it is paper 2's pair of rules (GeneralPoints of 2509.12235) in miniature. To be right there
the rule must be read; format, letter, words and sums are trained. (A model that ignores the rule
and one that has learnt that no card counts more than 10 give the same answers here.)
A cold start: the base never explains S, so RL has nothing to reward without SFT. E and M, R, D, C,
never trained again, are the prior abilities that may be forgotten.
"""
import itertools
import random
import re
import zlib
from collections import Counter
from typing import NamedTuple

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

FACES = ("J", "Q", "K")
DECK = ("2", "3", "4", "5", "6", "7", "8", "9", "10") + FACES
OPS = "SATEXGMRDC"    # sum: terse S A T, explained E X G; M maximum, R reverse, D values, C sorted
CONNECTIVES = ("so", "then", "now", "next", "well", "hence", "thus", "and")
WORTHS = (10, 12, 14, 16, 18)    # what a face card may be worth; the base knows every such rule
ID_RULE = (10, 10, 10)
ERRORS = ("format", "rule", "face", "values", "sums")    # kinds of wrong answers, see verify

# Every word is one token, so every number 0..99 is: arithmetic on single tokens is learnt sooner
# than on digits. Pad is never eos.
NUMBERS = tuple(str(number) for number in range(100))
WORDS = NUMBERS + FACES + tuple(OPS) + tuple(":>+=,#") + CONNECTIVES
EOS = len(WORDS)
PAD = EOS + 1
N_VOCAB = PAD + 1
MAX_NEW = 28    # tokens that an answer may have, EOS included (a demonstration has up to 23)

# A tiktoken encoding built in memory needs no download. A token is a space and a word.
_tokenizer = tiktoken.Encoding(
    "cards",
    pat_str=r" [^ ]+",
    mergeable_ranks={f" {word}".encode(): i for i, word in enumerate(WORDS)},
    special_tokens={" <eos>": EOS, " <pad>": PAD},
    explicit_n_vocab=N_VOCAB,
)
_KNOWN = frozenset(WORDS)


def encode(text):
    """Text -> token ids. ValueError names a word outside the vocabulary: tiktoken would panic."""
    words = text.split()
    for word in words:
        if word not in _KNOWN:
            raise ValueError(f"not in the vocabulary: {word!r} (see data.WORDS)")
    return _tokenizer.encode_ordinary("".join(f" {word}" for word in words))


def decode(ids):
    """Token ids -> text, words separated by one space; specials are shown as <eos>, <pad>."""
    return _tokenizer.decode(ids).removeprefix(" ")


class Problem(NamedTuple):
    op: str        # a letter of OPS
    rule: tuple    # worth of J, Q, K: whole numbers up to 24, so that four cards stay below 100
    hand: tuple    # four cards of the deck

    @property
    def values(self):
        """What the four cards are worth, in the order of the hand."""
        worth = dict(zip(FACES, self.rule))
        return [worth[card] if card in FACES else int(card) for card in self.hand]

    @property
    def prompt(self):
        J, Q, K = self.rule
        return f"{self.op} {J} {Q} {K} : {' '.join(self.hand)} >"


def fingerprint(words):
    """A number that does not depend on the order of the words, nor on the process."""
    return zlib.crc32(" ".join(sorted(words)).encode())


def split_of(hand):
    """'eval', 'rl' or 'train', by what the cards are worth under the ID rule, in any order: 7 J 3 K
    and 3 10 7 Q are of one split, for they have the same sums: no evaluation hand has those of a
    hand in training."""
    worths = ["10" if card in FACES else card for card in hand]
    tenth = fingerprint(worths) % 10
    if tenth < 3:
        return "eval"
    if tenth < 5:
        return "rl"
    return "train"


def draw_hand(rng, split, among=FACES):
    """A random hand of a split that holds one of these face cards; with (), that holds none."""
    while True:
        hand = tuple(rng.choices(DECK, k=4))
        if among == ():
            fits = not any(card in FACES for card in hand)
        else:
            fits = any(card in among for card in hand)
        if fits and split_of(hand) == split:
            return hand


def draw(rng, split, op="S", among=FACES):
    """A random problem of a split under any rule; hand: see draw_hand."""
    return Problem(op, tuple(rng.choices(WORTHS, k=3)), draw_hand(rng, split, among))


def draw_id(rng, split, among=FACES):
    """A random problem in distribution, with one of these face cards."""
    return Problem("S", ID_RULE, draw_hand(rng, split, among))


def draw_pair(rng, split):
    """An ID problem and its OOD twin: the same hand where J, Q, K are worth three different
    numbers. The hand holds a Q or a K (the first number of the rule alone does not do), the ID
    rule's answer is wrong for the twin, and no sum exceeds 37: SFT trains every number up to there.
    (Not 38: both sets of ID values that add up to it are in the rl split.)"""
    while True:
        problem = draw_id(rng, split, ("Q", "K"))
        twin = problem._replace(rule=tuple(rng.sample(WORTHS, 3)))
        id_sum = sum(problem.values)
        ood_sum = sum(twin.values)
        if ood_sum != id_sum and ood_sum <= 37:
            return problem, twin


def terse(values):
    """Running totals, left to right. [7, 10, 3] -> '7 17 20'"""
    return " ".join(str(total) for total in itertools.accumulate(values))


def chain(values, rng=None, p_word=0.0):
    """Additions in the given order, then the total. [7, 10, 3] -> '7 + 10 = 17 , 17 + 3 = 20 # 20'
    Before each step, with probability p_word, a connective that nobody could predict."""
    steps = []
    total = values[0]
    for value in values[1:]:
        step = f"{total} + {value} = {total + value}"
        if p_word > 0 and rng.random() < p_word:
            step = f"{rng.choice(CONNECTIVES)} {step}"
        steps.append(step)
        total += value
    return f"{' , '.join(steps)} # {total}"


def expert(problem, rng, p_word=0.3):
    """A demonstration: a chain, largest card first. That S is explained, the order and the
    connectives are what the base finds improbable; the arithmetic it knows."""
    return chain(sorted(problem.values, reverse=True), rng, p_word)


def truth(problem):
    """The one right response to M, R, D or C."""
    if problem.op == "R":
        return " ".join(reversed(problem.hand))
    if problem.op == "M":
        numbers = [max(problem.values)]
    elif problem.op == "D":
        numbers = problem.values
    else:
        numbers = sorted(problem.values)
    return " ".join(str(number) for number in numbers)


def base_document(rng):
    """(problem, response) of the pre-training mixture, a tenth for each letter."""
    problem = draw(rng, "train", rng.choice(OPS))
    values = problem.values
    if problem.op in "MRDC":
        return problem, truth(problem)
    if problem.op in "SAT":
        return problem, terse(values)
    order = rng.random()
    if order < 0.5:
        ordered = values    # as in the hand
    elif order < 0.9:
        ordered = rng.sample(values, 4)    # any order
    else:
        ordered = sorted(values, reverse=True)
    return problem, chain(ordered, rng, 0.03)


_NUMBER = "(0|[1-9][0-9]?)"
_STEP = rf"(?:(?:{'|'.join(CONNECTIVES)}) )?{_NUMBER} \+ {_NUMBER} = {_NUMBER}"
_CHAIN = re.compile(rf"{_STEP} , {_STEP} , {_STEP} # {_NUMBER}")


class Verdict(NamedTuple):
    strict: bool    # three steps, every card once in any order, every sum and the total right
    any: bool       # the last number is right, in any format: arithmetic, not style
    error: str      # "" if strict, else of ERRORS the first that applies
    partial: float  # composite reward: half for the right steps, half for right cards and total


def verify(problem, response):
    """Verdict on a response text (without <eos>). Numbers are parsed, never evaluated. Errors:
    format, not three steps and a total; rule, face, values, other numbers than the hand's, see
    misreading; sums, the right numbers added up wrongly."""
    if problem.op in "MRDC":
        right = response == truth(problem)
        error = "" if right else "values"
        return Verdict(strict=right, any=right, error=error, partial=float(right))
    words = response.split()
    total_right = len(words) > 0 and words[-1] == str(sum(problem.values))
    match = _CHAIN.fullmatch(response)
    if match is None:
        return Verdict(strict=False, any=total_right, error="format", partial=0.0)
    # a + b = ab , ab2 + c = abc , abc2 + d = abcd # total
    a, b, ab, ab2, c, abc, abc2, d, abcd, total = [int(number) for number in match.groups()]
    steps = [a + b == ab, ab == ab2 and ab2 + c == abc, abc == abc2 and abc2 + d == abcd]
    used = [a, b, c, d]
    cards_right = sorted(used) == sorted(problem.values)
    if not cards_right:
        error = misreading(problem, used)
    elif not all(steps) or abcd != total:
        error = "sums"
    else:
        error = ""
    share = sum(steps) / 3    # True counts 1
    partial = (share + (cards_right and total_right)) / 2
    return Verdict(strict=error == "", any=total_right, error=error, partial=partial)


def misreading(problem, used):
    """What is wrong with the four numbers of an answer. rule: one or more face cards are counted as
    under the ID rule, all else is right; face: one or more as anything else; values: a card that is
    no face card is missing."""
    under_id_rule = problem._replace(rule=ID_RULE).values
    either = zip(problem.values, under_id_rule)    # of each card both numbers
    readings = [sorted(numbers) for numbers in itertools.product(*either)]
    if sorted(used) in readings:
        return "rule"
    plain = Counter(int(card) for card in problem.hand if card not in FACES)
    return "face" if plain <= Counter(used) else "values"


def batch(pairs):
    """[(prompt, response), ...] texts -> ids (B, T) long, mask (B, T) bool, right-padded.

    The mask convention, once for the project: mask[:, t] is True iff token t is a response token or
    its EOS; prompt and padding are False. Position t predicts token t+1, so a loss takes
    logits[:, :-1], ids[:, 1:] and mask[:, 1:]; the first response token is trained."""
    rows = []
    masks = []
    for prompt, response in pairs:
        prompt_ids = encode(prompt)
        response_ids = encode(response) + [EOS]
        rows.append(torch.tensor(prompt_ids + response_ids))
        masks.append(torch.tensor([False] * len(prompt_ids) + [True] * len(response_ids)))
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD)            # (B, T)
    mask = pad_sequence(masks, batch_first=True, padding_value=False)        # (B, T)
    return ids, mask


def demonstrations(n, seed, split="train", p_word=0.3):
    """The expert's data -> ids (n, T), mask (n, T). Every other problem has a face card, under the
    ID rule; the rest have none, under any rule: there it need not be read."""
    rng = random.Random(f"{seed}/demonstrations")
    pairs = []
    for i in range(n):
        if i % 2 == 0:
            problem = draw_id(rng, split)
        else:
            problem = draw(rng, split, among=())
        pairs.append((problem.prompt, expert(problem, rng, p_word)))
    return batch(pairs)


def show(title, problem, response):
    """Print a document: its words, their ids, and the mask, 1 where a token is trained."""
    ids, mask = batch([(problem.prompt, response)])
    words = [decode([token]) for token in ids[0].tolist()]
    print(f"\n{title}")
    for cells in (words, ids[0].tolist(), mask[0].int().tolist()):
        print("".join(f"{cell:>6}" for cell in cells))


def main():
    rng = random.Random(0)
    problem = draw_id(rng, "train")
    show("expert demonstration, ID", problem, expert(problem, rng))
    problem = draw(rng, "train", among=())
    show("expert demonstration, no face card, any rule", problem, expert(problem, rng))
    _, problem = draw_pair(rng, "train")
    show("OOD (only evaluated)", problem, expert(problem, rng))
    problem = draw(rng, "train")
    show("the base, terse", problem, terse(problem.values))
    problem = draw(rng, "train", "E")
    show("the base, explained", problem, chain(problem.values))
    for op in "MRDC":
        problem = draw(rng, "train", op)
        show(f"the base, {op}", problem, truth(problem))


if __name__ == "__main__":
    main()
