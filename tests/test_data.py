"""data.py against answers worked by hand, counts and frequencies."""
import itertools
import random
from collections import Counter

import pytest

import data
import eval as ev
from data import Problem, verify

near = pytest.approx
ID_RULE = (10, 10, 10)
WORTHS = {10, 12, 14, 16, 18}
FACES = set("JQK")
HAND = Problem("S", (12, 14, 10), ("7", "Q", "3", "J"))    # worth 7, 14, 3, 12: in all 36


def id_values(hand):
    """What the cards are worth where J = Q = K = 10, in ascending order."""
    return tuple(sorted(10 if card in "JQK" else int(card) for card in hand))


def numbers_of(text):
    return [int(word) for word in text.split() if word.isdigit()]


def order_of(response):
    """The cards of a chain in the order in which they are added."""
    numbers = numbers_of(response)
    return [numbers[0], *numbers[1:9:3]]


def rate_of_connectives(responses):
    """Connectives a step, of chains of three steps."""
    words = " ".join(responses).split()
    return sum(word in data.CONNECTIVES for word in words) / (3 * len(responses))


def read_demonstrations(*args, **kw):
    """Demonstrations as pairs of a problem and the text of its response, without EOS."""
    pairs = []
    for row, row_mask in zip(*data.demonstrations(*args, **kw)):
        op, J, Q, K, _, *hand, _ = data.decode(row[:10].tolist()).split()
        problem = Problem(op, (int(J), int(Q), int(K)), tuple(hand))
        pairs.append((problem, data.decode(row[row_mask].tolist()).removesuffix(" <eos>")))
    return pairs


@pytest.fixture(scope="module")
def documents():
    """6000 documents of the base: pairs of a problem and a response."""
    rng = random.Random(0)
    return [data.base_document(rng) for _ in range(6000)]


@pytest.fixture(scope="module")
def demonstrations():
    return read_demonstrations(1000, 3)


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(0)
    return [data.draw_pair(rng, "eval") for _ in range(300)]


# ---- words, hands, splits
def test_every_word_is_one_token_and_comes_back():
    text = " ".join(data.WORDS)
    assert len(set(data.WORDS)) == 127
    assert data.encode(text) == list(range(127))
    assert data.decode(range(129)) == f"{text} <eos> <pad>"
    assert (data.EOS, data.PAD, data.N_VOCAB) == (127, 128, 129)


@pytest.mark.parametrize("word", ["100", "<eos>", "\x00", "\U0001f600"])
def test_a_word_outside_the_vocabulary_is_named(word):
    with pytest.raises(ValueError) as error:
        data.encode(f"7 {word} K")
    assert f"not in the vocabulary: {word!r}" in str(error.value)


def test_values_and_prompt_by_hand():
    assert HAND.values == [7, 14, 3, 12]
    assert HAND.prompt == "S 12 14 10 : 7 Q 3 J >"
    assert Problem("E", (14, 15, 16), ("10", "K", "2", "J")).values == [10, 16, 2, 14]


def test_a_split_belongs_to_the_id_values_three_two_and_five_tenths_of_them():
    hands = itertools.product(data.DECK, repeat=4)
    found = {(id_values(hand), data.split_of(hand)) for hand in hands}
    assert len(found) == 495    # C(9 + 3, 4) sets of values, so each has one split
    counts = Counter(split for _, split in found)
    assert counts == near(dict(eval=148.5, rl=99, train=247.5), abs=25)


def test_what_is_trained_never_meets_what_is_evaluated(documents, demonstrations):
    rng = random.Random(1)
    evaluated = [problem for some in ev.eval_sets(200, 0).values() for problem in some]
    evaluated += [problem for problem, _ in read_demonstrations(128, "held out", "eval")]
    values = [{id_values(problem.hand) for problem, _ in documents + demonstrations},
              {id_values(data.draw_id(rng, "rl").hand) for _ in range(1000)},
              {id_values(problem.hand) for problem in evaluated}]
    assert all(len(seen) > 20 for seen in values)
    assert sum(len(seen) for seen in values) == len(set.union(*values))    # they share none


@pytest.mark.parametrize("among, held", [((), set()), (("Q",), {"Q"}), (("J", "K"), {"J", "K"})])
def test_a_hand_has_four_cards_and_a_face_of_those_asked_for(among, held):
    rng = random.Random(0)
    hands = [data.draw_hand(rng, "train", among) for _ in range(300)]
    assert all(len(hand) == 4 for hand in hands)
    assert all(bool(set(hand) & (held or FACES)) == (held != set()) for hand in hands)
    expected = set(data.DECK) if held else set(data.DECK) - FACES
    assert {card for hand in hands for card in hand} == expected


def test_a_draw_is_under_any_rule_and_in_distribution_under_one():
    rng = random.Random(0)
    drawn = [data.draw(rng, "rl", "M") for _ in range(300)]
    assert {problem.op for problem in drawn} == {"M"}
    assert {worth for problem in drawn for worth in problem.rule} == WORTHS
    assert {data.draw_id(rng, "rl")[:2] for _ in range(30)} == {("S", ID_RULE)}


def test_a_pair_is_one_hand_with_q_or_k_under_the_id_rule_and_under_three_other_worths(pairs):
    for problem, twin in pairs:
        assert problem.op == twin.op == "S"
        assert problem.hand == twin.hand
        assert set(twin.hand) & {"Q", "K"}
        assert problem.rule == ID_RULE
        assert len(set(twin.rule)) == 3 and set(twin.rule) <= WORTHS
        assert data.split_of(twin.hand) == "eval"
    assert {worth for _, twin in pairs for worth in twin.rule} == WORTHS


def test_the_answers_of_a_pair_differ_and_stay_within_what_sft_trains(pairs):
    sums = [(sum(problem.values), sum(twin.values)) for problem, twin in pairs]
    assert all(asked != other for asked, other in sums)
    assert max(other for _, other in sums) == 37    # it may be reached


# ---- styles and what is trained
def test_the_styles_by_hand():
    assert data.terse([7, 10, 3, 10]) == "7 17 20 30"
    assert data.chain([7, 10, 3, 10]) == "7 + 10 = 17 , 17 + 3 = 20 , 20 + 10 = 30 # 30"
    explained = "14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36 # 36"
    assert data.expert(HAND, random.Random(0), 0.0) == explained


def test_each_connective_stands_before_each_step():
    rng = random.Random(0)
    seen = set()
    for _ in range(1000):
        for place, step in enumerate(data.expert(HAND, rng).split(" , ")):
            seen.add((place, step.split()[0]))
    assert len(seen & set(itertools.product(range(3), data.CONNECTIVES))) == 3 * 8


def test_the_base_meets_all_rules(documents):
    assert {problem.rule for problem, _ in documents} == set(itertools.product(WORTHS, repeat=3))


def test_the_base_learns_each_letter_a_tenth_and_explains_all_but_s_a_t(documents):
    counts = Counter(problem.op for problem, _ in documents)
    assert counts == near(dict.fromkeys("SATEXGMRDC", 600), abs=75)
    for problem, response in documents:
        found = verify(problem, response)
        assert (found.strict, found.any) == (problem.op not in "SAT", True)
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
    assert shares == near({"hand": 0.517, "largest first": 0.117, "any": 0.367}, abs=0.035)
    assert rate_of_connectives([response for _, response in chains]) == near(0.03, abs=0.01)


def test_demonstrations_are_right_and_largest_first(demonstrations):
    for problem, response in demonstrations:
        assert problem.op == "S"
        assert verify(problem, response).strict
        assert order_of(response) == sorted(problem.values, reverse=True)


def test_every_other_demonstration_has_a_face_card_and_the_rest_any_rule(demonstrations):
    with_face = [problem for problem, _ in demonstrations[::2]]
    without = [problem for problem, _ in demonstrations[1::2]]
    assert all(set(problem.hand) & FACES for problem in with_face)
    assert {problem.rule for problem in with_face} == {ID_RULE}
    assert not any(set(problem.hand) & FACES for problem in without)
    for worths in zip(*(problem.rule for problem in without)):    # of J, of Q, of K
        assert Counter(worths) == near(dict.fromkeys(WORTHS, 100), abs=40)


def test_sft_trains_every_number_that_an_ood_answer_needs(pairs):
    _, answers = zip(*read_demonstrations(4096, 3))
    needed = {number for _, twin in pairs for number in numbers_of(data.chain(twin.values))}
    assert needed <= {number for response in answers for number in numbers_of(response)}


def test_demonstrations_depend_on_the_seed_alone():
    assert read_demonstrations(30, 3) == read_demonstrations(30, 3)
    assert read_demonstrations(30, 3) != read_demonstrations(30, 4)


@pytest.mark.parametrize("given, rate", [({}, 0.3), (dict(p_word=0.0), 0), (dict(p_word=0.6), 0.6)])
def test_demonstrations_have_connectives_at_the_rate_asked_for(given, rate):
    responses = [response for _, response in read_demonstrations(300, 3, **given)]
    assert rate_of_connectives(responses) == near(rate, abs=0.05)


# ---- verdicts: of three steps so many are right; the total counts as much as all of them
@pytest.mark.parametrize("response, error, right, partial", [
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36 # 36", "", 1, 1),
    ("so 7 + 14 = 21 , 21 + 3 = 24 , then 24 + 12 = 36 # 36", "", 1, 1),       # any order
    ("10 + 10 = 20 , 20 + 7 = 27 , 27 + 3 = 30 # 30", "rule", 0, 1 / 2),       # J, Q not read
    ("12 + 10 = 22 , 22 + 7 = 29 , 29 + 3 = 32 # 32", "rule", 0, 1 / 2),       # Q not read
    ("14 + 10 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", "rule", 0, 1 / 2),       # J not read
    ("10 + 10 = 21 , 21 + 7 = 28 , 28 + 3 = 31 # 31", "rule", 0, 1 / 3),       # and a wrong sum
    ("10 + 10 = 20 , 20 + 7 = 27 , 27 + 3 = 30 # 36", "rule", 1, 1 / 2),
    ("14 + 14 = 28 , 28 + 5 = 33 , 33 + 3 = 36 # 36", "values", 1, 1 / 2),     # 5 for 7
    ("12 + 12 = 24 , 24 + 7 = 31 , 31 + 3 = 34 # 34", "face", 0, 1 / 2),       # J for Q
    ("7 + 7 = 14 , 14 + 7 = 21 , 21 + 3 = 24 # 24", "face", 0, 1 / 2),         # no face card read
    ("14 + 12 = 26 , 26 + 3 = 29 , 29 + 3 = 32 # 32", "values", 0, 1 / 2),     # 3 twice, no 7
    ("10 + 10 = 20 , 20 + 7 = 27 , 27 + 4 = 31 # 31", "values", 0, 1 / 2),
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36 # 37", "sums", 0, 1 / 2),       # wrong total
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 37 # 36", "sums", 1, 5 / 6),       # wrong third sum
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 37 # 37", "sums", 0, 1 / 3),
    ("14 + 12 = 26 , 26 + 7 = 34 , 33 + 3 = 36 # 36", "sums", 1, 2 / 3),       # second, mended
    ("14 + 12 = 27 , 26 + 7 = 33 , 33 + 3 = 36 # 36", "sums", 1, 2 / 3),       # first, mended
    ("14 + 12 = 25 , 25 + 7 = 33 , 33 + 3 = 36 # 36", "sums", 1, 2 / 3),       # two errors cancel
    ("14 + 12 = 25 , 25 + 7 = 32 , 32 + 3 = 35 # 35", "sums", 0, 1 / 3),       # carried on
    ("so so 7 + 14 = 21 , 21 + 3 = 24 , 24 + 12 = 36 # 36", "format", 1, 0),
    ("24 + 12 = 36 , 36 + 0 = 36 # 36", "format", 1, 0),                       # a step short
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36", "format", 1, 0),              # no total
    ("14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36 # 36 36", "format", 1, 0),
    ("36 14 + 12 = 26 , 26 + 7 = 33 , 33 + 3 = 36 # 36", "format", 1, 0),
    ("14 + 12 = 26 , 26 + 07 = 33 , 33 + 3 = 36 # 36", "format", 1, 0),        # no such number
    ("7 21 24 36", "format", 1, 0), ("7 21 24 35", "format", 0, 0), ("36", "format", 1, 0),
    ("36 7", "format", 0, 0), ("", "format", 0, 0), ("30+6", "format", 0, 0),
    ("1/0", "format", 0, 0)])
def test_verdicts_by_hand(response, error, right, partial):
    for op in "SE":
        found = verify(HAND._replace(op=op), response)
        assert found == (error == "", right, error, near(partial))


def test_a_card_that_is_there_twice_is_used_twice():
    problem = Problem("S", (10, 10, 10), ("7", "7", "3", "J"))
    assert verify(problem, "7 + 7 = 14 , 14 + 3 = 17 , 17 + 10 = 27 # 27").strict
    assert not verify(problem, "7 + 10 = 17 , 17 + 10 = 27 , 27 + 3 = 30 # 30").strict


@pytest.mark.parametrize("op, right, wrong", [
    ("M", "14", ["12", "14 14", "Q", "so 14"]), ("R", "J 3 Q 7", ["7 Q 3 J", "12 3 14 7", ""]),
    ("D", "7 14 3 12", ["7 14 3", "7 Q 3 J", "7 21 24 36"]),
    ("C", "3 7 12 14", ["3 7 14 12", "14 12 7 3", "3  7 12 14"])])
def test_prior_abilities_have_one_right_response(op, right, wrong):
    problem = HAND._replace(op=op)
    assert data.truth(problem) == right
    assert verify(problem, right) == (True, True, "", 1)
    for response in wrong:
        assert verify(problem, response) == (False, False, "values", 0)


# ---- batches
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
