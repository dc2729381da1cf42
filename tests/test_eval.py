"""What is measured and what is reported: by hand, by plain loops, by numerical integration."""
import copy
import json
import math
import re
import runpy
import statistics
import sys
import zlib

import matplotlib.figure
import pytest
import torch
from conftest import gpt2, keyed

import data
import eval as ev

near = pytest.approx


# ---- spectra: a matrix (6, 5) of known singular values and vectors
def orthogonal(n, seed):
    noise = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.double, generator=noise))[0]


def rotation(n, i, j, angle):
    """A turn by an angle in the plane of two axes."""
    R = torch.eye(n, dtype=torch.double)
    R[i, i] = math.cos(angle)
    R[j, j] = math.cos(angle)
    R[i, j] = -math.sin(angle)
    R[j, i] = math.sin(angle)
    return R


U = orthogonal(6, 1)
V = orthogonal(5, 2)
S = torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0], dtype=torch.double)


def matrix(left=U, values=S, right=V):
    return left[:, :5] @ values.diag() @ right.T


@pytest.mark.parametrize("other, k, left, right", [
    (matrix(left=U @ rotation(6, 1, 5, 0.3)), 2, [0, 0.3], [0, 0]),    # out of the top 2
    (matrix(right=V @ rotation(5, 0, 4, 0.7)), 1, [0], [0.7]),
    (matrix(values=S * torch.tensor([1.5, 1.1, 1.2, 0.9, 0.3])), 2, [0, 0], [0, 0]),
    (matrix(left=U @ rotation(6, 0, 1, 0.5)), 2, [0, 0], [0, 0])])    # within the top 2
def test_principal_angles_of_known_turns(other, k, left, right):
    found = ev.principal_angles(matrix(), other, k)
    assert found[0].tolist() == near(left, abs=1e-6)
    assert found[1].tolist() == near(right, abs=1e-6)


def test_singular_values_shift_relative_to_the_first_matrix():
    scaled = matrix(values=S * torch.tensor([1.1, 1, 1, 1, 0.5]))
    assert ev.singular_value_shift(matrix(), scaled).tolist() == near([0.1, 0, 0, 0, -0.5])


LATE_RIGHT = V @ rotation(5, 2, 3, 0.2)    # beyond the second direction
LATE = matrix(left=U @ rotation(6, 1, 5, 0.3), values=2 * S, right=LATE_RIGHT)


@pytest.mark.parametrize("before, after, k, expected", [
    (matrix(), LATE, None, matrix(values=2 * S)),
    (LATE, matrix(), None, LATE / 2),    # swapped: the old values in the new directions
    (matrix(), LATE, 1, LATE),           # the first was not turned
    (matrix(), LATE, 2, matrix(values=2 * S, right=LATE_RIGHT))])
def test_restoring_directions_keeps_the_values(before, after, k, expected):
    assert torch.allclose(ev.restore_directions(before, after, k), expected)


# ---- drift: four texts whose principal axes are x, then y
H = torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])
X = torch.tensor([0.5, 0, 0])
Z = torch.tensor([0, 0, 2.0])
OFF = torch.tensor([1.0, 2, 9])


@pytest.mark.parametrize("before, after, centroid, shift", [
    ([H, H], [H + X, H + X], 0.5, 0.5),
    ([H, H], [H + X, H - X], 0, 0.5),       # layer 2 against layer 1: the centroids cancel
    ([H], [H + Z], 0, 2),                   # across the first two directions of the spread
    ([H + OFF], [H], 5 ** 0.5, 86 ** 0.5)])
def test_drift_by_hand(before, after, centroid, shift):
    assert ev.representation_drift(before, after) == near((centroid, shift), abs=1e-4)


# ---- gradient norms
@pytest.fixture
def sure(tiny):
    """A model sure enough of itself for tokens in all ten bins, and samples of it."""
    tiny.transformer.ln_f.weight.data.mul_(8)
    noise = torch.Generator().manual_seed(0)
    ids, mask = tiny.generate(torch.arange(8)[:, None], 9, -1, data.PAD, 14, 1.0, noise)
    mask[:, :4] = False
    return tiny, ids, mask


def tokens_of_bin(model, ids, mask, b):
    """The places (row, t) of response tokens t + 1 of probability b/10 to (b+1)/10, and log p."""
    logp = gpt2(model, ids).log_softmax(-1)
    places = []
    for i, t in mask[:, 1:].nonzero().tolist():
        p = logp[i, t, ids[i, t + 1]].exp().item()
        if b / 10 <= p < (b + 1) / 10:
            places.append((i, t))
    return places, logp


def test_gradient_norm_counts_tokens_by_their_probability(sure):
    found = ev.gradient_norm_by_probability(*sure, per_bin=1)
    counts = [len(tokens_of_bin(*sure, b)[0]) for b in range(10)]
    assert [n for n, _ in found] == counts
    assert min(counts) > 0


def test_gradient_norm_of_single_tokens_by_float64_gradients(sure):
    model, ids, mask = sure
    found = ev.gradient_norm_by_probability(model, ids, mask, 2)
    for b in (0, 9):
        places, logp = tokens_of_bin(model, ids, mask, b)
        order = torch.randperm(len(places), generator=keyed("bins", b)).tolist()
        norms = []
        for n in order[:2]:
            i, t = places[n]
            parameters = list(model.parameters())
            grads = torch.autograd.grad(logp[i, t, ids[i, t + 1]], parameters, retain_graph=True)
            norms.append(math.sqrt(sum(grad.pow(2).sum().item() for grad in grads)))
        assert found[b][1] == near(statistics.fmean(norms), rel=1e-3)


def test_a_bin_without_tokens_has_no_norm(sure):
    model, ids, mask = sure
    found = ev.gradient_norm_by_probability(model, ids[:1, :6], mask[:1, :6])
    empty = [math.isnan(norm) for n, norm in found if n == 0]
    assert len(empty) >= 8
    assert all(empty)


# ---- statistics
def test_mean_and_interval_by_hand():
    assert ev.mean(x for x in (1, 2, 6)) == 3
    assert math.isnan(ev.mean([]))
    # mean 2, s = 1, n = 3: t = 4.303 with two degrees of freedom
    assert ev.interval([1.0, 2.0, 3.0]) == near((2, 4.303 / math.sqrt(3)))
    assert ev.interval([0.0, 2.0], [5.0]) == near((1, 5))
    assert ev.interval([1.0]) == (1, math.inf)
    many = [0.0, 1.0] * 15    # beyond the table: its last t
    assert ev.interval(many)[1] == near(2.093 * statistics.stdev(many) / math.sqrt(30))


def coverage(x, df, n=20000):
    """Of Student's t within +-x, by the midpoint rule over u, where t = sqrt(df) tan u."""
    end = math.atan(x / math.sqrt(df))
    u = (torch.arange(n).double() + 0.5) / n * end
    density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 2 * density * end * (torch.cos(u) ** (df - 1)).mean().item()


def test_table_of_t_covers_95_percent_to_the_last_digit():
    assert len(ev.T_95) == 19
    for df, t in enumerate(ev.T_95, 1):
        assert coverage(t - 6e-4, df) < 0.95 < coverage(t + 6e-4, df)


# ---- what a row says of a model
def test_eval_sets_ask_the_same_hands_in_three_ways_and_prior_abilities_in_turn():
    sets = ev.eval_sets(40, 0)
    for asked, ood, explained in zip(sets["id"], sets["ood"], sets["explained"], strict=True):
        assert (asked.op, asked.rule) == ("S", (10, 10, 10))
        assert ood == asked._replace(rule=ood.rule) and ood.rule != asked.rule
        assert explained == ood._replace(op="E")
    assert "".join(problem.op for problem in sets["prior"]) == "MRDC" * 10
    assert len({problem.rule for problem in sets["prior"]}) > 20


def test_eval_sets_depend_on_the_seed_alone():
    before = ev.eval_sets(40, 0)
    ev.eval_sets.cache_clear()
    assert ev.eval_sets(40, 0) == before
    assert ev.eval_sets(40, 1)["id"] != before["id"]


def half_of(problem):
    return zlib.crc32(" ".join(sorted(problem.hand)).encode()) % 2


def wrong(error, problem):
    """A response that is wrong in this way."""
    right = data.chain(problem.values)
    return dict(format=data.terse(problem.values), values=data.chain([1, 1, 1, 1]),
                rule=data.chain(problem._replace(rule=(10, 10, 10)).values),
                face=data.chain(problem._replace(rule=(1, 1, 1)).values),
                sums=right.rsplit(" ", 1)[0] + " 99")[error]


def answer(name, i, problem):
    """Of a made-up model to problem i of a set: half a of ood is right, half b wrong in turn."""
    right = data.chain(problem.values)
    if name == "id":
        return [right, data.terse(problem.values), f"{right} 0", ""][i % 4]
    if name == "ood":
        return right if half_of(problem) == 0 else wrong(ERRORS[i % 5], problem)
    if name == "explained":
        return data.terse(problem.values)
    return str(max(problem.values)) if problem.op == "M" else "0"


ERRORS = ("format", "rule", "face", "values", "sums")


@pytest.fixture
def scored(monkeypatch):
    """Accuracies of a model whose answers are scripted, 80 of each set of seed 5."""
    names = iter(("id", "ood", "explained", "prior"))

    def respond(model, problems):
        name = next(names)
        return [answer(name, i, problem) for i, problem in enumerate(problems)], None, None
    monkeypatch.setattr(ev, "respond", respond)
    return ev.accuracies(None, 80, 5)


def test_accuracies_of_scripted_answers(scored):
    assert (scored["id"], scored["explained"], scored["prior"]) == (0.25, 0, 0.25)
    assert (scored["id_any"], scored["explained_any"]) == (0.5, 1)
    assert (scored["ood_a"], scored["ood_b"]) == (1, 0)
    first = ev.eval_sets(80, 5)["ood"][0]
    assert scored["sample"] == f"{first.prompt} {answer('ood', 0, first)}"


def test_shares_of_wrong_ood_answers_by_kind(scored):
    turns = [i % 5 for i, problem in enumerate(ev.eval_sets(80, 5)["ood"]) if half_of(problem)]
    found = [scored[f"ood_{error}"] for error in ERRORS]
    assert found == near([turns.count(turn) / 80 for turn in range(5)])
    assert scored["ood_unread"] == near((turns.count(1) + turns.count(2)) / 80)
    assert len(set(found)) > 2    # not the same for all
    assert scored["ood"] + sum(found) == near(1)
    assert scored["ood_any"] == near(scored["ood"] + scored["ood_format"])    # terse and right


def test_entropy_on_own_samples_by_float64(tiny):
    problems = ev.eval_sets(8, 0)["id"]
    prompts = torch.tensor([data.encode(problem.prompt) for problem in problems])
    ids, mask = tiny.generate(prompts, data.MAX_NEW, data.EOS, data.PAD, 1, 1.0, keyed("entropy"))
    p = gpt2(tiny, ids).softmax(-1)
    terms = [-(p[i, t] * p[i, t].log()).sum().item() for i, t in mask[:, 1:].nonzero().tolist()]
    assert ev.entropy(tiny, problems) == near(statistics.fmean(terms), rel=1e-5)


@pytest.fixture
def wary(tiny):
    """Another base: of '+' it is .1 to .99 sure, so tokens lie in both classes."""
    base = copy.deepcopy(tiny)
    base.transformer.ln_f.weight.data.mul_(3)
    base.transformer.ln_f.bias.data += 14 * base.lm_head.weight[data.encode("+")[0]]
    return base


def test_nats_on_demonstrations_by_float64(tiny, wary):
    ids, mask = data.demonstrations(128, "held out", "eval")
    targets = ids[:, 1:][mask[:, 1:]][:, None]
    logp = gpt2(tiny, ids).detach().log_softmax(-1)[:, :-1][mask[:, 1:]]
    base_logp = gpt2(wary, ids).detach().log_softmax(-1)[:, :-1][mask[:, 1:]]
    said = logp.gather(1, targets)
    base_p = base_logp.gather(1, targets).exp()
    kl = (base_logp.exp() * (base_logp - logp)).sum(1)
    expected = dict(nll=-said.mean().item(), kl_base=kl.mean().item(),
                    logp_low=said[base_p < 0.1].mean().item(),
                    logp_high=said[base_p > 0.9].mean().item())
    assert ev.on_demonstrations(tiny, wary) == near(expected, rel=1e-4)


def test_evaluate_takes_entropy_on_the_first_128_id_problems(tiny, monkeypatch):
    asked = []

    def entropy(model, problems):
        asked.extend(problems)
        return 0.5
    monkeypatch.setattr(ev, "entropy", entropy)
    monkeypatch.setattr(ev, "accuracies", lambda model, n, seed: dict(id=(n, seed)))
    row = ev.evaluate(tiny, tiny, 130, 7)
    assert (row["id"], row["entropy"], row["kl_base"]) == ((130, 7), 0.5, near(0, abs=1e-6))
    assert asked == ev.eval_sets(130, 7)["id"][:128]


def test_a_model_of_nan_is_an_error(tiny):
    tiny.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="nll is nan"):
        ev.evaluate(tiny, tiny, 8, 0)


def test_clipped_shares_by_hand():
    so, thus, plus, eos = *data.encode("so thus +"), data.EOS
    updates = [dict(tokens=torch.tensor([[so, 7, plus, so], [99, 3, 3, 3]]),
                    mask=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
                    clipped=torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]]).bool()),
               dict(tokens=torch.tensor([[thus, 0, eos]]), mask=torch.ones(1, 3).bool(),
                    clipped=torch.tensor([[0, 0, 1]]).bool())]
    # of so, thus one; of 7, 99, 3, 0 one; of +, EOS one
    assert ev.clipped_shares(updates) == dict(clip_frac=3 / 8, clip_connectives=1 / 2,
                                              clip_numbers=1 / 4, clip_signs=1 / 2)
    updates[1]["mask"][0, :2] = False
    assert math.isnan(ev.clipped_shares(updates[1:])["clip_numbers"])


# ---- rows
def row(**changes):
    start = dict(seed=0, method="sft", stage="sft", step=1, id=0.5, ood=0.5, ood_a=0.5, ood_b=0.5,
                 ood_any=0.5, explained=0.5, prior=1.0, entropy=0.1, ood_rule=0.15,
                 ood_face=0.05, ood_unread=0.2,
                 ood_values=0.1, ood_sums=0.1, ood_format=0.1, nll=0.5, sample="S 10 ...")
    return start | changes


def made_up():
    """Two seeds of sft and clip at steps 2 and 20, RL from the base and from step 2."""
    rows = []
    for seed, up in ((0, 0.0), (1, 0.2)):
        rows.append(row(seed=seed, method="base", stage="base", step=0, ood=0.1 + up))
        rows.append(row(seed=seed, method="base", stage="rl", step=0, ood=0.05))
        rows.append(row(seed=seed, step=2, id=0.95, ood=0.6, ood_a=0.6, ood_b=0.55))
        rows.append(row(seed=seed, stage="rl", step=2, ood=0.8 + up))
        rows.append(row(seed=seed, step=20, id=0.99, ood=0.4, ood_a=0.5))
        rows.append(row(seed=seed, method="clip", step=2, id=0.9, ood=0.7, ood_b=0.65))
        rows.append(row(seed=seed, method="clip", stage="rl", step=2, ood=0.9 + 2 * up))
        rows.append(row(seed=seed, method="clip", step=20, id=0.96, ood=0.6 + up, ood_a=0.9))
    return rows


def test_the_peak_is_picked_on_each_half_and_reported_on_the_other():
    curve = [row(step=2, ood_a=0.9, ood_b=0.6, id=0.8), row(step=4, ood_a=0.7, ood_b=0.8, id=0.9),
             row(step=8, ood_a=0.5, ood_b=0.5, ood=0.95)]
    best = ev.peak(curve)    # steps 2 and 4
    assert (best["step"], best["ood"], best["id"]) == near((3, (0.6 + 0.7) / 2, 0.85))


@pytest.mark.parametrize("level, prior", [
    (0.8, 1.0),                # reached at the first row, exactly
    (0.85, 0.9),               # half of the way to the second
    (0.9, 0.8),                # the first crossing, though the third row is below
    (0.96, 0.2)])              # three quarters of the way from the third, .72, to the fourth
def test_where_an_id_accuracy_is_first_reached_by_hand(level, prior):
    curve = [row(step=2, id=0.8, prior=1.0), row(step=4, id=0.9, prior=0.8),
             row(step=8, id=0.72, prior=0.8), row(step=16, id=1.04, prior=0.0)]
    found = ev.at_id(curve, level)
    assert (found["prior"], found["sample"]) == (near(prior), "S 10 ...")
    assert ev.at_id(curve, 1.05) is None    # never
    assert ev.at_id(curve, 0.5) is None     # some time before the first row
    assert ev.at_id([], 0.5) is None


def cells(text, width):
    """Lines of a table -> {label: its cells}."""
    found = {}
    for line in text.split("\n"):
        found[line[:width].strip()] = line[width:].replace("+-", " ").split()
    return found


def columns(text):
    """Lines of a table whose columns are two blanks apart -> {label: its cells}."""
    found = {}
    for line in text.split("\n"):
        label, *values = re.split(r" {2,}| \+- ", line)
        found[label] = values
    return found


def test_summary_by_hand():
    found = cells(ev.summary(made_up()), 32)
    assert {label: found[label][1] for label in found if label} == {
        "base": "0.200", "base, then RL": "0.050", "sft, OOD peak": "0.575", "sft, step 2": "0.600",
        "sft, step 2, then RL": "0.900", "sft, step 20": "0.400", "clip, OOD peak": "0.500",
        "clip, step 2": "0.700", "clip, step 2, then RL": "1.100", "clip, step 20": "0.700"}


def test_samples_are_at_the_peak_and_at_the_end():
    rows = [r | dict(sample=f"at {r['method']} {r['step']}") for r in made_up() if r["seed"] == 1]
    assert [line.split() for line in ev.samples(rows, 1).split("\n")[1:]] == [
        "base at base 0".split(), "sft, step 2, OOD peak at sft 2".split(),
        "sft, step 20 at sft 20".split(), "clip, step 20, OOD peak at clip 20".split(),
        "clip, step 20 at clip 20".split()]


def test_summary_says_over_how_many_seeds_each_mean_is():
    rows = [r for r in made_up() if (r["method"], r["seed"]) != ("clip", 1)]
    found = cells(ev.summary(rows), 32)
    assert [found[f"{method}, step 20"][-1] for method in ("sft", "clip")] == ["2", "1"]


def test_a_line_of_the_table():
    numbers = dict(seed=3, method="sft", stage="rl", step=8, id=0.25, ood=1, prior=0.125)
    label, *found = ev.line(numbers).rsplit(maxsplit=8)
    assert label == "seed 3 sft, step 8, then RL"
    assert found == ["0.250", "1.000", "-", "-", "-", "0.125", "-", "-"]


def test_differences_are_paired_by_seed():
    rows = [r for r in made_up() if (r["method"], r["seed"]) != ("sft", 0)]
    rows.append(row(seed=2, method="clip", step=20, ood=99.0))
    found = ev.paired_differences(rows, "clip", "sft", ev.pick_end)
    assert found["ood"] == near([0.4])    # seed 1 alone has both: .8 - .4


def test_compare_by_hand():
    found = columns(ev.compare(made_up()))
    # ood at the end .2 and .4; RL's ends .9 - .8 and 1.3 - 1.0; 12.706 s / sqrt 2 = 12.706 * .1
    assert found["clip - sft, at the end"][:5] == ["2", "-0.030", "0.000", "+0.300", "1.271"]
    assert found["clip - sft, RL from 2"][:5] == ["2", "+0.000", "0.000", "+0.200", "1.271"]
    # clip has .95 after 5/6 of the way from .7 to .6 and .8: .6167 and .7833; sft .6 and .6
    assert found["clip - sft, at ID .95"][3:5] == ["+0.100", "1.059"]
    never = [r | dict(id=0.9) if r["method"] == "clip" else r for r in made_up()]
    assert list(columns(ev.compare(never)))[1:] == ["clip - sft, at the end",
                                                    "clip - sft, RL from 2"]
    one_seed = [r for r in made_up() if r["seed"] == 0]    # without an interval
    found = columns(ev.compare(one_seed))
    assert found["clip - sft, at the end"][:3] == ["1", "-0.030", "+0.200"]


def test_compare_has_clip_as_a_reference_too():
    rows = made_up() + [row(method="kl", step=20, ood=0.5)]
    found = columns(ev.compare(rows))
    assert found["kl - sft, at the end"][2] == "+0.100"
    assert found["kl - clip, at the end"][2] == "-0.100"


def test_points_of_the_figure_by_hand():
    steps, means, halves = ev.by_step(made_up(), "clip", "sft", "ood")
    assert (steps, means, halves) == ([2, 20], near([0.7, 0.7]), near([0, 12.706 * 0.1]))
    rows = [r for r in made_up() if r["seed"] == 0]    # one seed has no band
    assert ev.by_step(rows, "sft", "sft", "ood") == ([2, 20], [0.6, 0.4], [0, 0])


def test_the_base_and_update_2_are_never_averaged():
    rows = [row(method="base", stage="base", step=2, ood=0.0), row(step=2, ood=0.6),
            row(method="base", stage="rl", step=2, ood=0.1), row(stage="rl", step=2, ood=0.8)]
    assert ev.by_step(rows, "sft", "sft", "ood") == ([2], [0.6], [0])
    assert ev.by_step(rows, "sft", "rl", "ood") == ([2], [0.8], [0])


# ---- files
def folder(path, rows):
    """A run folder: a file a job."""
    path.mkdir()
    for job in {(r["seed"], r["method"]) for r in rows}:
        mine = [r for r in rows if (r["seed"], r["method"]) == job]
        ev.write_json(path / f"s{job[0]}-{job[1]}.json", dict(settings={}, rows=mine))
    return path


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_rows_come_in_the_order_of_their_seeds_and_null_is_nan(tmp_path):
    rows = [row(seed=seed, method=method) for seed in (2, 10) for method in ("base", "sft")]
    assert ev.read_rows(folder(tmp_path / "run", rows)) == rows
    run = folder(tmp_path / "null", [row(logp_low=None)])
    assert math.isnan(ev.read_rows(run)[0]["logp_low"])


def test_json_takes_none_for_what_is_not_finite():
    assert [ev.finite(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
    assert [ev.finite(value) for value in (0.5, "nan", 3)] == [0.5, "nan", 3]


def test_nan_is_not_written_and_the_file_of_before_stays(tmp_path):
    ev.write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError):
        ev.write_json(tmp_path / "a.json", [math.nan])
    assert ev.read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize("content", [b"", b'{"rows": [{"se', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "s0-sft.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"s0-sft\.json"):
        ev.report([tmp_path])


def report_from_the_command_line(monkeypatch, run):
    monkeypatch.setattr(sys, "argv", ["eval.py", str(run)])
    runpy.run_path(ev.__file__, run_name="__main__")


@pytest.mark.parametrize("rows", [[], [row(method="base", stage="base", step=0)]])
def test_nothing_to_report_is_said_in_one_line(tmp_path, monkeypatch, rows):
    run = folder(tmp_path / "run", rows)
    with pytest.raises(SystemExit, match="^error: .*run holds no finished job$"):
        report_from_the_command_line(monkeypatch, run)


def test_eval_from_the_command_line_reports_and_writes_rows_and_a_figure(
        tmp_path, monkeypatch, capsys):
    rows = made_up() + [row(step=30, logp_low=math.nan)]
    run = folder(tmp_path / "läufe 実験", [*rows[:-1], row(step=30, logp_low=None)])
    report_from_the_command_line(monkeypatch, run)
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert ev.summary(rows) in out and ev.samples(rows, 0) in out and ev.compare(rows) in out
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert len(found) == 17
    assert [r["logp_low"] for r in found if "logp_low" in r] == [None]


def test_report_of_two_folders_pairs_them_by_seed_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = []
    other = [r | dict(ood=r["ood"] + 0.1) for r in made_up() if r["seed"] == 1]
    run = folder(tmp_path / "run", made_up())
    folder(tmp_path / "tight", other)
    ev.report(["run", "tight"], texts.append)
    found = columns("\n".join(texts))
    assert found["clip (tight) - clip, at the end"][:3] == ["1", "+0.000", "+0.100"]
    assert found["sft (tight) - sft, RL from 2"][:3] == ["1", "+0.000", "+0.100"]
    assert cells(texts[0].split("\n\n")[1], 32)["base"][-1] == "2"    # one base a seed
    assert not (run / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    drawn = []

    def save(fig, path, **options):
        drawn.append(fig)
        path.write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", save)
        ev.figure(made_up(), tmp_path_factory.mktemp("figure") / "summary.png")
    return drawn[0].axes


def test_the_figure_draws_means_and_what_rl_makes_of_them(panels):
    assert len(panels) == 4
    ood = {line.get_label(): line for line in panels[1].get_lines()}
    assert list(ood) == ["sft", "sft, then RL", "clip", "clip, then RL"]
    assert ood["clip"].get_xydata().ravel().tolist() == near([2, 0.7, 20, 0.7])
    assert ood["sft, then RL"].get_xydata().ravel().tolist() == near([2, 0.9])
    assert ood["sft"].get_color() == ood["sft, then RL"].get_color()


def test_the_figure_stacks_the_ood_errors_of_sft(panels):
    """At step 20: .4 right, then .15 and .05 unread, .1 other cards, .1 sums, .1 format."""
    tops = [area.get_paths()[0].vertices for area in panels[2].collections]
    heights = [max(y for x, y in vertices if x == 20) for vertices in tops]
    assert heights == near([0.4, 0.55, 0.6, 0.7, 0.8, 0.9])
