import itertools
import random
from collections import Counter

import pytest
import torch

import data
import eval as ev
from data import Problem, verify

HAND = Problem("S", (11, 12, 13), ("7", "K", "3", "J"))     # worth 7, 13, 3, 11: in all 34

def id_values(hand):
    """What the cards are worth where J = Q = K = 10, in ascending order."""
    return tuple(sorted(10 if card in "JQK" else int(card) for card in hand))

def order_of(response):
    """The cards of a chain in the order in which they are added."""
    numbers = [int(w) for w in response.split() if w.isdigit()]
    return [numbers[0], *numbers[1:9:3]]

def test_every_word_is_one_token_and_comes_back():
    text = " ".join(data.WORDS)
    assert len(set(data.WORDS)) == 127 and data.encode(text) == list(range(127))
    assert data.decode(range(127)) == text and data.encode(" 42\n J") == [42, 100]
    assert (data.EOS, data.PAD, data.N_VOCAB) == (127, 128, 129)
    assert data.decode([127, 7, 128]) == "<eos> 7 <pad>"

def test_a_word_outside_the_vocabulary_is_named():
    for word in ("100", "7K", "a", "<eos>", "é", "\x00", "\U0001f600", "S:", "-1"):
        with pytest.raises(ValueError) as e:
            data.encode(f"7 {word} K")
        assert f"not in the vocabulary: {word!r}" in str(e.value)

def test_values_and_prompt_by_hand():
    assert HAND.values == [7, 13, 3, 11] and HAND.prompt == "S 11 12 13 : 7 K 3 J >"
    assert Problem("E", data.ID_RULES[1], ("10", "Q", "2", "J")).values == [10, 14, 2, 14]
    assert data.ID_RULES == ((10, 10, 10), (14, 14, 14)) and data.OOD_RULE == (11, 12, 13)

def test_a_split_belongs_to_the_id_values_three_two_and_five_tenths_of_them():
    hands = [h for h in itertools.product(data.DECK, repeat=4) if set(h) & {*"JQK"}]
    found = {(id_values(h), data.split_of(h)) for h in hands}      # C(11, 3) = 165 sets of values
    assert Counter(split for _, split in found) == dict(eval=48, rl=29, train=88)

def test_what_is_trained_never_meets_what_is_evaluated():
    rng = random.Random(1)
    sets = {"evaluated": [p.hand for s in ev.eval_sets(200).values() for p in s],
            "trained": [data.base_document(rng)[0].hand for _ in range(3000)],
            "rl": [data.draw(rng, "rl").hand for _ in range(1000)]}
    for name, rows in (("trained", data.demonstrations(500, 0)),
                       ("evaluated", data.demonstrations(128, "held out", "eval"))):
        sets[name] += [data.decode(r[5:9].tolist()).split() for r in rows[0]]
    sets = {name: set(map(id_values, hands)) for name, hands in sets.items()}
    assert all(len(s) > 20 for s in sets.values())
    for a, b in itertools.combinations(sets, 2):
        assert sets[a].isdisjoint(sets[b])

def test_a_draw_has_a_face_card_and_keeps_its_rule_and_letter():
    rng = random.Random(0)
    fixed = [data.draw(rng, "rl", "M", ((1, 2, 3), (4, 5, 6))) for _ in range(300)]
    assert all(p.op == "M" and len(p.hand) == 4 for p in fixed)
    rules = Counter(p.rule for p in fixed)
    assert set(rules) == {(1, 2, 3), (4, 5, 6)} and min(rules.values()) > 110
    assert all(set(p.hand) & set("JQK") for p in fixed)
    assert {c for p in fixed for c in p.hand} == {*"23456789JQK", "10"}
    free = [data.draw(rng, "train") for _ in range(300)]
    assert len({p.rule for p in free}) > 100 and {p.op for p in free} == {"S"}
    assert {v for p in free for v in p.rule} == {*range(10, 20)}

def test_styles_by_hand():
    assert data.terse([7, 10, 3, 10]) == "7 17 20 30"
    assert data.chain([7, 10, 3, 10]) == "7 + 10 = 17 , 17 + 3 = 20 , 20 + 10 = 30 # 30"
    assert data.expert(HAND, random.Random(0), 0.0) == \
        "13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34"
    truths = [data.truth(HAND._replace(op=op)) for op in "MRDC"]
    assert truths == ["13", "J 3 K 7", "7 13 3 11", "3 7 11 13"]

def test_connectives_stand_before_any_step_at_their_rate():
    rng = random.Random(0)
    steps = [s.split() for _ in range(2000) for s in data.expert(HAND, rng).split(" , ")]
    words = Counter((i % 3, s[0]) for i, s in enumerate(steps) if s[0] in data.CONNECTIVES)
    assert abs(words.total() / 6000 - 0.3) < 0.02 and len(words) == 3 * 8     # each, before each

def test_the_base_explains_e_x_g_always_and_s_a_t_never():
    rng = random.Random(0)
    docs = [data.base_document(rng) for _ in range(6000)]
    ops = Counter(p.op for p, _ in docs)
    assert set(ops) == set("SATEXGMRDC") and all(abs(n - 600) < 75 for n in ops.values())
    orders, words = Counter(), Counter()
    for p, r in docs:
        assert verify(p, r).any and verify(p, r).strict == (p.op not in "SAT")
        if p.op in "SAT":
            assert r.split() == [str(n) for n in itertools.accumulate(p.values)]
        elif p.op in "EXG":
            words.update(w in data.CONNECTIVES for w in r.split())
            best = sorted(p.values, reverse=True)
            if len({*best}) == 4 and p.values != best:
                orders[(order_of(r) == p.values) - (order_of(r) == best)] += 1
    # half as in the hand, a tenth largest first, two fifths any, of which 1/24 is each of these
    assert [orders[k] / orders.total() for k in (1, -1, 0)] == pytest.approx(
        [0.5 + 0.4 / 24, 0.1 + 0.4 / 24, 0.4 * 22 / 24], abs=0.035)
    assert abs(words[True] / (3 * (ops["E"] + ops["X"] + ops["G"])) - 0.03) < 0.01

def test_demonstrations_are_the_experts_under_the_id_rules():
    ids, mask = data.demonstrations(300, 3)
    assert torch.equal(ids, data.demonstrations(300, 3)[0])
    assert not torch.equal(ids[:, :10], data.demonstrations(300, 4)[0][:, :10])
    rules = Counter()
    for row, m in zip(ids, mask):
        prompt = data.decode(row[:10].tolist()).split()
        said, rule = data.decode(row[m][:-1].tolist()), tuple(map(int, prompt[1:4]))
        rules[rule] += 1
        p = Problem("S", rule, tuple(prompt[5:9]))
        assert p.prompt == " ".join(prompt) and verify(p, said).strict
        assert order_of(said) == sorted(p.values, reverse=True)
    assert set(rules) == {(10,) * 3, (14,) * 3} and min(rules.values()) > 110
    for kw, rate in (({}, 0.3), (dict(p_word=0.0), 0.0), (dict(p_word=0.6), 0.6)):
        words = sum(data.WORDS[t] in data.CONNECTIVES
                    for row in data.demonstrations(300, 3, **kw)[0] for t in row if t < 127)
        assert abs(words / 900 - rate) < 0.05 and (rate or not words)

@pytest.mark.parametrize("text, strict, right", [
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 1, 1),
    ("so 7 + 13 = 20 , 20 + 3 = 23 , then 23 + 11 = 34 # 34", 1, 1),     # any order, words
    ("so so 7 + 13 = 20 , 20 + 3 = 23 , 23 + 11 = 34 # 34", 0, 1),
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 35", 0, 0),             # wrong total
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 35 # 34", 0, 1),             # wrong last sum
    ("13 + 11 = 24 , 24 + 7 = 32 , 32 + 3 = 35 # 35", 0, 0),             # wrong second
    ("13 + 11 = 25 , 25 + 7 = 32 , 32 + 3 = 35 # 35", 0, 0),             # wrong first
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34 34", 0, 1),
    ("13 + 11 = 24 , 24 + 7 = 32 , 31 + 3 = 34 # 34", 0, 1),             # then mended
    ("13 + 11 = 25 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1),
    ("13 + 11 = 24 , 25 + 7 = 32 , 32 + 3 = 35 # 35", 0, 0),     # carried over wrongly
    ("13 + 11 = 24 , 24 + 7 = 31 , 32 + 3 = 35 # 35", 0, 0),
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 35 # 35", 0, 0),
    ("13 + 13 = 26 , 26 + 5 = 31 , 31 + 3 = 34 # 34", 0, 1),             # a card used twice
    ("7 20 23 34", 0, 1), ("7 20 23 33", 0, 0), ("34", 0, 1), ("", 0, 0),
    ("13 + 11 = 24 , 24 + 10 = 34 # 34", 0, 1),                          # a step short
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34", 0, 1),                  # no total
    ("34 13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1),
    ("13 + 11 = 24 24 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1), ("30+4", 0, 0), ("1/0", 0, 0)])
def test_verifier_by_hand(text, strict, right):
    for op in "SATEXG":
        assert verify(HAND._replace(op=op), text) == (strict, right)
    twice = Problem("S", (10, 10, 10), ("7", "7", "3", "J"))
    assert not verify(twice, "10 + 10 = 20 , 20 + 3 = 23 , 23 + 7 = 30 # 30").strict

@pytest.mark.parametrize("op, right, wrong", [
    ("M", "13", ["12", "13 13", "K", "so 13"]), ("R", "J 3 K 7", ["7 K 3 J", "11 3 13 7", ""]),
    ("D", "7 13 3 11", ["7 13 3", "7 K 3 J", "7 20 23 34"]),
    ("C", "3 7 11 13", ["3 7 13 11", "13 11 7 3", "3 7 11 13 13", "3  7 11 13"])])
def test_prior_abilities_have_one_right_response(op, right, wrong):
    assert verify(HAND._replace(op=op), right) == (True, True)
    for text in wrong:
        assert verify(HAND._replace(op=op), text) == (False, False)

def test_mask_and_padding_by_hand():
    """Prompt 0, every token of the answer and EOS 1, padding 0."""
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9"), ("S 3 >", "")])
    s, m, to, hash_ = data.encode("S M > #")
    assert ids.tolist() == [[s, 10, 7, hash_, 17, 127], [m, 9, 127, 128, 128, 128],
                            [s, 3, to, 127, 128, 128]]
    assert mask.long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert (mask.dtype, ids.dtype) == (torch.bool, torch.long)

def test_the_demo_prints_each_token_over_its_mask(capsys):
    data.main()
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 8 and "M R D C".split() == [b.split("\n")[0][-1] for b in blocks[4:]]
    for block in blocks:
        _, *rows = block.split("\n")
        words, ids, mask = (row.split() for row in rows)
        assert data.decode([int(i) for i in ids]).split() == words
        assert mask == ["0"] * 10 + ["1"] * (len(words) - 10)
