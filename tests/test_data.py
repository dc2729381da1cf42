import itertools
import random
from collections import Counter

import pytest
import torch

import data
from data import Problem, verify

HAND = Problem("S", (11, 12, 13), ("7", "K", "3", "J"))     # worth 7, 13, 3, 11: in all 34


# ---- tokenizer
def test_every_word_is_one_token_and_comes_back():
    text = " ".join(data.WORDS)
    ids = data.encode(text)
    assert ids == list(range(len(data.WORDS))) and data.decode(ids) == text
    assert data.encode("42 J") == [42, 100]


def test_specials_have_ids_of_their_own():
    assert (data.EOS, data.PAD, data.N_VOCAB) == (122, 123, 124)
    assert data.decode([data.EOS, data.PAD]) == "<eos> <pad>"


@pytest.mark.parametrize("text", ["100", "7K", "a", "<eos>", "é", "\x00", "7 + \U0001f600", "S:",
                                  "-1"])
def test_text_outside_the_vocabulary_is_a_value_error(text):
    with pytest.raises(ValueError, match="not in the vocabulary") as e:
        data.encode("7 " + text)
    assert repr(text.split()[0] if text[0] != "7" else text.split()[-1]) in str(e.value)


def test_random_strings_encode_to_what_they_say_or_are_refused():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("0123456789JQKS:>+=,# \n\tsoé\0", k=rng.randrange(12)))
        try:
            assert data.decode(data.encode(text)).split() == text.split()
        except ValueError:
            assert any(w not in data.WORDS for w in text.split())


# ---- problems
def test_values_and_prompt_by_hand():
    assert HAND.values == [7, 13, 3, 11]
    assert HAND.prompt == "S 11 12 13 : 7 K 3 J >"
    assert Problem("S", data.ID_RULE, HAND.hand).values == [7, 10, 3, 10]
    assert data.OOD_RULE == (11, 12, 13) and data.ID_RULE == (10, 10, 10)


@pytest.mark.parametrize("args", [("X", (10, 10, 10), ("7", "K", "3", "J")),
                                  ("S", (10, 10, 25), ("7", "K", "3", "J")),
                                  ("S", (10, 10), ("7", "K", "3", "J")),
                                  ("S", (0, 10, 10), ("7", "K", "3", "J")),
                                  ("S", (10, 10, 10), ("1", "K", "3", "J")),
                                  ("S", (10, 10, 10), ("11", "K", "3", "J")),
                                  ("S", (10, 10, 10), ("7", "K", "3"))])
def test_impossible_problems_are_refused(args):
    with pytest.raises(ValueError, match="op 'X' is not one of S, M, R, D, C$|three whole numbers "
                       "1..24|four cards of 2 3 4 5 6 7 8 9 10 J Q K$"):
        Problem(*args)


def test_the_extreme_rules_stay_within_the_vocabulary():
    assert Problem("S", (1, 24, 24), ("K", "K", "Q", "K")).values == [24] * 4
    assert Problem("S", (1, 1, 1), ("J", "J", "J", "J")).values == [1] * 4
    data.encode(data.chain([24] * 4))


def test_splits_are_disjoint_as_sets_of_cards():
    rng = random.Random(0)
    seen = {s: {tuple(sorted(data.draw(rng, s).hand)) for _ in range(1500)}
            for s in ("train", "rl", "eval")}
    for a, b in itertools.combinations(seen, 2):
        assert not seen[a] & seen[b]
    assert all(len(hands) > 100 for hands in seen.values())
    hand = ("7", "K", "3", "J")     # whatever the order of the cards, the split is the same
    assert len({data.split_of(h) for h in itertools.permutations(hand)}) == 1


def id_values(hand):
    """What the cards are worth where J = Q = K = 10, in ascending order."""
    return tuple(sorted(10 if card in "JQK" else int(card) for card in hand))


def test_what_is_trained_never_meets_what_is_evaluated():
    """Not even as ID values: 7 J 3 K and 10 3 Q 7 have the same sums."""
    import eval as ev
    rng = random.Random(1)
    sets = {"evaluated": [p.hand for s in ev.eval_sets(200).values() for p in s],
            "base": [data.base_document(rng)[0].hand for _ in range(3000)],
            "rl": [data.draw(rng, "rl").hand for _ in range(1000)]}
    for name, rows in (("demos", data.demonstrations(200, 0)),
                       ("evaluated", data.demonstrations(50, "held out", "eval"))):
        sets.setdefault(name, []).extend(data.decode(r[5:9].tolist()).split() for r in rows[0])
    sets = {name: set(map(id_values, hands)) for name, hands in sets.items()}
    for a, b in itertools.combinations(sets, 2):
        assert sets[a].isdisjoint(sets[b]) or {a, b} == {"base", "demos"}


def test_sizes_of_the_splits():
    """Three, two and five tenths of all sets of ID values, by a literal count."""
    hands = [h for h in itertools.combinations_with_replacement(data.DECK, 4) if set(h) & {*"JQK"}]
    split = {id_values(h): data.split_of(h) for h in hands}
    assert all(split[id_values(h)] == data.split_of(h) for h in hands)
    n = Counter(split.values())
    assert sum(n.values()) == 165        # three values of 2 to 10 beside a face card: C(11, 3)
    assert (n["eval"], n["rl"], n["train"]) == (48, 29, 88)


def test_demonstrations_are_the_experts_under_the_id_rule():
    def texts(*args, **kw):
        return [data.decode(r[m | (r == data.PAD)].tolist()).split(" <eos>")[0]
                for r, m in zip(*data.demonstrations(*args, **kw))]
    ids, mask = data.demonstrations(300, 3)
    assert len(ids) == 300 and torch.equal(ids, data.demonstrations(300, 3)[0])
    assert not torch.equal(ids, data.demonstrations(300, 4)[0])
    for row, said in zip(ids.tolist(), texts(300, 3)):
        prompt = data.decode(row[:10]).split()
        p = Problem("S", (10, 10, 10), tuple(prompt[5:9]))
        assert p.prompt == " ".join(prompt) and verify(p, said).strict
        numbers = [int(w) for w in said.split() if w.isdigit()]
        assert [numbers[0], *numbers[1:9:3]] == sorted(p.values, reverse=True)
    for kw, rate in (({}, 0.3), (dict(p_word=0.0), 0.0), (dict(p_word=0.6), 0.6)):
        words = sum(w in data.CONNECTIVES for t in texts(300, 3, **kw) for w in t.split())
        assert abs(words / 900 - rate) < 0.06 and (rate or not words)


def test_draw_has_a_face_card_and_keeps_its_rule():
    rng = random.Random(0)
    for _ in range(200):
        p = data.draw(rng, "rl", rule=data.ID_RULE)
        assert set(p.hand) & set("JQK") and p.rule == (10, 10, 10)
    rules = {data.draw(rng, "rl").rule for _ in range(100)}
    assert len(rules) > 50 and {v for r in rules for v in r} == {*range(10, 20)}


# ---- styles
def test_styles_by_hand():
    assert data.terse([7, 10, 3, 10]) == "7 17 20 30"
    assert data.chain([7, 10, 3, 10]) == "7 + 10 = 17 , 17 + 3 = 20 , 20 + 10 = 30 # 30"
    assert data.expert(HAND, random.Random(0), 0.0) == \
        "13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34"
    truths = {op: data.truth(Problem(op, HAND.rule, HAND.hand)) for op in data.OPS}
    assert truths == {"S": "34", "M": "13", "R": "J 3 K 7", "D": "7 13 3 11", "C": "3 7 11 13"}


def test_connectives_stand_before_steps_at_their_rate():
    rng = random.Random(0)
    texts = [data.expert(HAND, rng) for _ in range(2000)]
    words = [w for t in texts for w in t.split() if w in data.CONNECTIVES]
    assert abs(len(words) / 6000 - 0.3) < 0.03 and set(words) == set(data.CONNECTIVES)
    assert all(verify(HAND, t).strict for t in texts)


def test_the_base_mixture():
    rng = random.Random(0)
    docs = [data.base_document(rng) for _ in range(4000)]
    assert all(verify(p, r).answer for p, r in docs)
    sums = [(p, r) for p, r in docs if p.op == "S"]
    assert abs(len(sums) / 4000 - 0.6) < 0.03
    assert abs(sum("=" not in r for _, r in sums) / len(sums) - 0.55) < 0.04
    # the order of the chains, where the three ways to order a hand are told apart
    orders, words, steps = Counter(), 0, 0
    for p, r in sums:
        numbers = [int(w) for w in r.split() if w.isdigit()]
        if "=" in r:
            steps, words = steps + 3, words + sum(w in data.CONNECTIVES for w in r.split())
            order, best = [numbers[0], *numbers[1:9:3]], sorted(p.values, reverse=True)
            if best != p.values:
                orders[(order == p.values) - (order == best)] += 1
    share = [orders[k] / orders.total() for k in (1, 0, -1)]
    # of chains .25/.45 are in the order of the hand, .15/.45 in any, .05/.45 largest first; any
    # order is one of the other two in a few of 24 cases
    assert share == pytest.approx([0.60, 0.29, 0.11], abs=0.04)
    assert abs(words / steps - 0.03) < 0.01


# ---- verifier
CASES = [                                                                 # format, strict, answer
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", (1, 1, 1)),
    ("so 7 + 13 = 20 , 20 + 3 = 23 , then 23 + 11 = 34 # 34", (1, 1, 1)),   # another order, words
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 35", (1, 0, 0)),           # wrong total
    ("13 + 11 = 25 , 25 + 7 = 32 , 32 + 3 = 34 # 34", (1, 0, 1)),           # wrong sums
    ("13 + 11 = 24 , 24 + 7 = 31 , 30 + 4 = 34 # 34", (1, 0, 1)),   # step from another total
    ("13 + 13 = 26 , 26 + 5 = 31 , 31 + 3 = 34 # 34", (1, 0, 1)),           # a card used twice
    ("13 + 11 = 24 , 20 + 7 = 27 , 27 + 3 = 30 # 30", (1, 0, 0)),           # each sum right
    ("13 + 11 = 24 , 24 + 10 = 34 # 34", (0, 0, 1)),                        # a step short
    ("7 20 23 34", (0, 0, 1)),                                              # the base's style
    ("10 + 10 = 20 , 20 + 7 = 27 , 27 + 3 = 30 # 30", (1, 0, 0)),   # the other rule's values
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34", (0, 0, 1)),                # no total
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34 34", (0, 0, 1)),
    ("13 + 11 = 24 24 + 7 = 31 , 31 + 3 = 34 # 34", (0, 0, 1)),
    ("", (0, 0, 0)), ("# 34", (0, 0, 1)), ("34 <eos>", (0, 0, 0)),
]


@pytest.mark.parametrize("text,expected", CASES)
def test_verifier_by_hand(text, expected):
    v = verify(HAND, text)
    assert (v.format_ok, v.strict, v.answer) == tuple(map(bool, expected))


def test_prior_abilities_have_one_right_response():
    p = Problem("C", HAND.rule, HAND.hand)
    assert verify(p, "3 7 11 13") == data.Verdict(True, True, True)
    assert not verify(p, "3 7 11 13 13").strict
    assert not verify(p, "3 7 13 11").answer


def slow_strict(problem, text):
    """An independent checker: walks the words, needs no regular expression."""
    words = [w for w in text.split(" ")]
    steps, total = " ".join(words).split(" # ")[0], " ".join(words).split(" # ")[1:]
    left, running = list(problem.values), None
    for i, step in enumerate(steps.split(" , ")):
        w = step.split(" ")
        if w[0] in data.CONNECTIVES:
            w = w[1:]
        if len(w) != 5 or w[1] != "+" or w[3] != "=" or not all(x.isdigit() for x in w[::2]):
            return False
        a, b, s = map(int, w[::2])
        for card in [a, b] if i == 0 else [b]:
            if card not in left:
                return False
            left.remove(card)
        if (i and a != running) or a + b != s:
            return False
        running = s
    return not left and total == [str(running)]


def test_fuzzed_responses_against_the_slow_checker():
    rng, right = random.Random(0), 0
    for _ in range(6000):
        p = data.draw(rng, "rl")
        words = data.chain(rng.sample(p.values, 4), rng, 0.3).split()
        for _ in range(rng.choice((0, 0, 1, 2))):
            i = rng.randrange(len(words))
            new = rng.choice(data.WORDS) if rng.random() < 0.5 else rng.choice(words)
            words[i:i + rng.choice((0, 1, 1, 2))] = [new]
        text = " ".join(words)
        assert verify(p, text).strict == slow_strict(p, text), (p, text)
        right += verify(p, text).strict
    assert 2000 < right < 5000
    for _ in range(3000):     # arbitrary text: never an exception, never right
        text = "".join(rng.choices("0123456789 +=,#\n<eos>é٣", k=rng.randrange(40)))
        assert not verify(HAND, text).strict


# ---- batches
def test_batch_literal():
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])
    eos, pad = data.EOS, data.PAD
    s, m, hash_ = data.encode("S M #")
    assert ids.tolist() == [[s, 10, 7, hash_, 17, eos], [m, 9, eos, pad, pad, pad]]
    assert mask.long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]]
    assert mask.dtype == torch.bool and ids.dtype == torch.long
