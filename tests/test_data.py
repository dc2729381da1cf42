"""data.py against answers worked by hand, counts and frequencies."""
import itertools
import random
from collections import Counter

import pytest

import data
import eval as ev
from data import Problem, verify

# All that depends on which rules there are.
BASE_WORTHS = range(10, 20)
ID_RULES = ((10, 10, 10), (14, 14, 14))
OOD_RULE = (11, 12, 13)

HAND = Problem("S", (11, 12, 13), ("7", "K", "3", "J"))    # worth 7, 13, 3, 11: in all 34


def id_values(hand):
    """What the cards are worth where J = Q = K = 10, in ascending order."""
    return tuple(sorted(10 if card in "JQK" else int(card) for card in hand))


def order_of(response):
    """The cards of a chain in the order in which they are added."""
    numbers = [int(word) for word in response.split() if word.isdigit()]
    return [numbers[0], *numbers[1:9:3]]


def rate_of_connectives(responses):
    """Connectives a step, of chains of three steps."""
    words = " ".join(responses).split()
    return sum(word in data.CONNECTIVES for word in words) / (3 * len(responses))


def read_demonstrations(*args, **kw):
    """Demonstrations as pairs of a problem and the words of its response, EOS included."""
    pairs = []
    for row, row_mask in zip(*data.demonstrations(*args, **kw)):
        op, J, Q, K, _, *hand, _ = data.decode(row[:10].tolist()).split()
        problem = Problem(op, (int(J), int(Q), int(K)), tuple(hand))
        pairs.append((problem, data.decode(row[row_mask].tolist())))
    return pairs


@pytest.fixture(scope="module")
def documents():
    """6000 documents of the base: pairs of a problem and a response."""
    rng = random.Random(0)
    return [data.base_document(rng) for _ in range(6000)]


def test_every_word_is_one_token_and_comes_back():
    text = " ".join(data.WORDS)
    assert len(set(data.WORDS)) == 127
    assert data.encode(text) == list(range(127))
    assert data.decode(range(129)) == f"{text} <eos> <pad>"
    assert (data.EOS, data.PAD, data.N_VOCAB) == (127, 128, 129)


@pytest.mark.parametrize("word", ["100", "7K", "a", "<eos>", "é", "\x00", "\U0001f600", "-1"])
def test_a_word_outside_the_vocabulary_is_named(word):
    with pytest.raises(ValueError) as error:
        data.encode(f"7 {word} K")
    assert f"not in the vocabulary: {word!r}" in str(error.value)


def test_values_and_prompt_by_hand():
    assert HAND.values == [7, 13, 3, 11]
    assert HAND.prompt == "S 11 12 13 : 7 K 3 J >"
    assert Problem("E", (14, 15, 16), ("10", "Q", "2", "J")).values == [10, 15, 2, 14]


def test_rules_in_and_out_of_distribution():
    assert data.ID_RULES == ID_RULES
    assert data.OOD_RULE == OOD_RULE


def test_a_split_belongs_to_the_id_values_three_two_and_five_tenths_of_them():
    hands = [hand for hand in itertools.product(data.DECK, repeat=4) if set(hand) & set("JQK")]
    found = {(id_values(hand), data.split_of(hand)) for hand in hands}
    sizes = Counter(split for _, split in found)
    assert sizes == dict(eval=48, rl=29, train=88)    # in all C(11, 3) = 165 sets of values


def test_what_is_trained_never_meets_what_is_evaluated(documents):
    rng = random.Random(1)
    trained = documents + read_demonstrations(500, 0)
    evaluated = [problem for problems in ev.eval_sets(200).values() for problem in problems]
    evaluated += [problem for problem, _ in read_demonstrations(128, "held out", "eval")]
    values = [{id_values(problem.hand) for problem, _ in trained},
              {id_values(data.draw(rng, "rl").hand) for _ in range(1000)},
              {id_values(problem.hand) for problem in evaluated}]
    assert all(len(seen) > 20 for seen in values)
    assert sum(len(seen) for seen in values) == len(set.union(*values))    # they share none


def test_a_draw_takes_each_of_the_rules_given_or_any():
    rng = random.Random(0)
    counts = Counter(data.draw(rng, "rl", "M", ((1, 2, 3), (4, 5, 6)))[:2] for _ in range(300))
    assert set(counts) == {("M", (1, 2, 3)), ("M", (4, 5, 6))}
    assert min(counts.values()) > 110
    free = [data.draw(rng, "rl") for _ in range(300)]
    assert len({problem.rule for problem in free}) > 200
    assert {worth for problem in free for worth in problem.rule} == set(BASE_WORTHS)


def test_a_draw_has_four_cards_of_the_deck_among_them_a_face():
    rng = random.Random(0)
    hands = [data.draw(rng, "train").hand for _ in range(300)]
    assert all(len(hand) == 4 and set(hand) & set("JQK") for hand in hands)
    assert {card for hand in hands for card in hand} == set("23456789JQK") | {"10"}


def test_the_styles_by_hand():
    assert data.terse([7, 10, 3, 10]) == "7 17 20 30"
    assert data.chain([7, 10, 3, 10]) == "7 + 10 = 17 , 17 + 3 = 20 , 20 + 10 = 30 # 30"
    explained = "13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34"
    assert data.expert(HAND, random.Random(0), 0.0) == explained


def test_each_connective_stands_before_each_step():
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        for place, step in enumerate(data.expert(HAND, rng).split(" , ")):
            seen.add((place, step.split()[0]))
    assert len(seen & set(itertools.product(range(3), data.CONNECTIVES))) == 3 * 8


def test_the_base_meets_nearly_all_rules(documents):
    assert len({problem.rule for problem, _ in documents}) > 0.9 * len(BASE_WORTHS) ** 3


def test_the_base_learns_each_letter_a_tenth_and_explains_all_but_s_a_t(documents):
    counts = Counter(problem.op for problem, _ in documents)
    assert counts == pytest.approx(dict.fromkeys("SATEXGMRDC", 600), abs=75)
    for problem, response in documents:
        assert verify(problem, response) == (problem.op not in "SAT", True)
        if problem.op in "SAT":
            totals = itertools.accumulate(problem.values)
            assert response.split() == [str(total) for total in totals]


def test_the_base_explains_in_three_kinds_of_order_with_few_connectives(documents):
    chains = [(problem, response) for problem, response in documents if problem.op in "EXG"]
    counts = Counter()
    for problem, response in chains:
        best = sorted(problem.values, reverse=True)
        if len(set(best)) == 4 and problem.values != best:
            kinds = {tuple(problem.values): "hand", tuple(best): "largest first"}
            counts[kinds.get(tuple(order_of(response)), "any")] += 1
    # half as in the hand, a tenth largest first, two fifths any, of which 1/24 is each of these
    shares = {kind: count / counts.total() for kind, count in counts.items()}
    assert shares == pytest.approx({"hand": 0.517, "largest first": 0.117, "any": 0.367}, abs=0.035)
    rate = rate_of_connectives([response for _, response in chains])
    assert rate == pytest.approx(0.03, abs=0.01)


def test_demonstrations_are_the_experts_under_the_id_rules():
    pairs = read_demonstrations(300, 3)
    for problem, response in pairs:
        assert problem.op == "S"
        assert verify(problem, response.removesuffix(" <eos>")).strict
        assert order_of(response) == sorted(problem.values, reverse=True)
    counts = Counter(problem.rule for problem, _ in pairs)
    assert counts == pytest.approx(dict.fromkeys(ID_RULES, 300 / len(ID_RULES)), abs=40)


def test_demonstrations_depend_on_the_seed_alone():
    assert read_demonstrations(30, 3) == read_demonstrations(30, 3)
    assert read_demonstrations(30, 3) != read_demonstrations(30, 4)


@pytest.mark.parametrize("given, rate", [({}, 0.3), (dict(p_word=0.0), 0), (dict(p_word=0.6), 0.6)])
def test_demonstrations_have_connectives_at_the_rate_asked_for(given, rate):
    responses = [response for _, response in read_demonstrations(300, 3, **given)]
    assert rate_of_connectives(responses) == pytest.approx(rate, abs=0.05)


@pytest.mark.parametrize("response, strict, right", [
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 1, 1),
    ("so 7 + 13 = 20 , 20 + 3 = 23 , then 23 + 11 = 34 # 34", 1, 1),       # any order, connectives
    ("so so 7 + 13 = 20 , 20 + 3 = 23 , 23 + 11 = 34 # 34", 0, 1),         # two together
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 35", 0, 0),               # wrong total
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 35 # 34", 0, 1),               # wrong third sum
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 35 # 35", 0, 0),
    ("13 + 11 = 24 , 24 + 7 = 32 , 31 + 3 = 34 # 34", 0, 1),               # wrong second, mended
    ("13 + 11 = 25 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1),               # wrong first, mended
    ("13 + 11 = 23 , 23 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1),               # two errors cancel
    ("13 + 11 = 24 , 24 + 7 = 30 , 30 + 3 = 34 # 34", 0, 1),
    ("13 + 13 = 26 , 26 + 5 = 31 , 31 + 3 = 34 # 34", 0, 1),               # other cards
    ("13 + 11 = 24 , 24 + 10 = 34 # 34", 0, 1),                            # a step short
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34", 0, 1),                    # no total
    ("13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34 34", 0, 1),            # a word too many
    ("34 13 + 11 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", 0, 1),
    ("13 + 11 = 24 , 24 + 07 = 31 , 31 + 3 = 34 # 34", 0, 1),              # no number of the task
    ("7 20 23 34", 0, 1), ("7 20 23 33", 0, 0), ("34", 0, 1), ("34 7", 0, 0), ("", 0, 0),
    ("30+4", 0, 0), ("1/0", 0, 0)])
def test_verifier_by_hand(response, strict, right):
    for op in "SATEXG":
        assert verify(HAND._replace(op=op), response) == (strict, right)


def test_a_card_that_is_there_twice_is_used_twice():
    problem = Problem("S", (10, 10, 10), ("7", "7", "3", "J"))
    assert verify(problem, "7 + 7 = 14 , 14 + 3 = 17 , 17 + 10 = 27 # 27").strict
    assert not verify(problem, "7 + 10 = 17 , 17 + 10 = 27 , 27 + 3 = 30 # 30").strict


@pytest.mark.parametrize("op, right, wrong", [
    ("M", "13", ["12", "13 13", "K", "so 13"]), ("R", "J 3 K 7", ["7 K 3 J", "11 3 13 7", ""]),
    ("D", "7 13 3 11", ["7 13 3", "7 K 3 J", "7 20 23 34"]),
    ("C", "3 7 11 13", ["3 7 13 11", "13 11 7 3", "3 7 11 13 13", "3  7 11 13"])])
def test_prior_abilities_have_one_right_response(op, right, wrong):
    problem = HAND._replace(op=op)
    assert data.truth(problem) == right
    assert verify(problem, right) == (True, True)
    for response in wrong:
        assert verify(problem, response) == (False, False)


def test_a_batch_is_padded_on_the_right_and_its_mask_marks_the_response_and_its_eos():
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9"), ("S 3 >", "")])
    S, M, to, total = data.encode("S M > #")
    assert ids.tolist() == [[S, 10, 7, total, 17, 127],
                            [M, 9, 127, 128, 128, 128],
                            [S, 3, to, 127, 128, 128]]
    assert mask.tolist() == [[False, False, True, True, True, True],
                             [False, True, True, False, False, False],
                             [False, False, False, True, False, False]]


def test_the_demo_prints_each_token_over_its_mask(capsys):
    data.main()
    for document in capsys.readouterr().out.strip().split("\n\n"):
        _, *lines = document.split("\n")
        words, ids, mask = [line.split() for line in lines]
        assert data.decode([int(i) for i in ids]).split() == words
        assert mask == ["0"] * 10 + ["1"] * (len(words) - 10)
