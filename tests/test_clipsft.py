"""Losses by hand, training once more by plain loops, and what a run keeps, refuses, survives."""
import copy
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from conftest import keyed

import clipsft
import data
import eval as ev
import rl
from clipsft import Config, clip_loss, dft_loss, finetune, sft_loss, token_loss
from model import GPT, GPTConfig, Muon, load_checkpoint

near = pytest.approx
SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --base_steps 6 --base_lr 1e-2 --base_adam_lr 2e-2 "
         "--base_docs 10 --base_batch 4 --steps 7 --lr 3e-3 --demos 10 --batch_size 4 "
         "--old_every 3 --eps_high 0.05 --rl_from 4 --rl_steps 1 --rl_prompts 2 --rl_group 2 "
         "--eval_n 16").split()
C = clipsft.read_flags(SMALL)


# ---- losses
def weights(loss_of, logp):
    """What a loss multiplies grad log pi by, token by token."""
    logp = logp.clone().requires_grad_()
    loss_of(logp).sum().backward()
    return (-logp.grad).tolist()


RATIO = torch.tensor([0.5, 1.0, 1.19, 1.4], dtype=torch.double)
P = torch.tensor([0.1, 0.25, 0.5, 0.9], dtype=torch.double)


def test_sft_and_dft_losses_by_hand():
    assert sft_loss(P.log()).tolist() == near([2.30259, 1.38629, 0.69315, 0.10536], rel=1e-4)
    assert dft_loss(P.log()).tolist() == near([0.230259, 0.346574, 0.346574, 0.094824], rel=1e-5)
    assert weights(dft_loss, P.log()) == near([0.1, 0.25, 0.5, 0.9])


@pytest.mark.parametrize("eps_high, losses, expected", [
    (0.2, [-0.5, -1, -1.19, -1.2], [0.5, 1, 1.19, 0]),
    (math.inf, [-0.5, -1, -1.19, -1.4], [0.5, 1, 1.19, 1.4])])
def test_clip_loss_and_its_weights_by_hand(eps_high, losses, expected):
    old = P.log() - RATIO.log()
    assert clip_loss(P.log(), old, 0.2, eps_high).tolist() == near(losses)
    assert weights(lambda logp: clip_loss(logp, old, 0.2, eps_high), P.log()) == near(expected)


@pytest.mark.parametrize("loss, expected", [
    ("kl", math.log(2) + 3 * 0.5 * math.log(4 / 3)),              # KL(pi || base)
    ("asft", 0.5 * math.log(2) + 3 * 0.375 * math.log(1.5))])     # KL(base || pi)
def test_losses_with_a_kl_by_hand(monkeypatch, loss, expected):
    """One token, the second of three words: pi gives it 1/2, the base 3/8."""
    pi = torch.tensor([[1 / 4, 1 / 2, 1 / 4]]).log() + 7
    base = torch.tensor([[1 / 2, 3 / 8, 1 / 8]]).log()
    monkeypatch.setattr(clipsft, "response_logits", lambda model, ids, mask: model)
    c = Config(loss=loss, beta=3.0)
    ids, mask = torch.tensor([[0, 1]]), torch.tensor([[False, True]])
    found, clipped = token_loss(c, pi, None, base, ids, mask)
    assert found.tolist() == [[near(expected, rel=1e-5)]]
    assert clipped.tolist() == [[False]]


# ---- the penalty on rotations, about a matrix of singular values 4, 2, 1, .5, share one half
@pytest.fixture
def directions():
    """Leading are the first two rows and the last two columns."""
    model = torch.nn.Linear(4, 4)
    model.weight.data = torch.tensor([[0, 0, 4, 0], [0, 0, 0, 2], [1, 0, 0, 0], [0, 0.5, 0, 0]])
    return model, clipsft.leading_directions(model, 0.5)


def test_penalty_of_a_planar_rotation_by_hand(directions):
    model, leading = directions
    assert list(leading) == ["weight"]
    assert clipsft.rotation_penalty(model, leading).item() == near(0, abs=1e-9)
    c, s = math.cos(0.3), math.sin(0.3)
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[c, -s], [s, c]])
    model.weight.data = turn @ model.weight.data
    # (4 c - 4)^2 + (2 s)^2 + (4 s)^2 + (2 c - 2)^2
    assert clipsft.rotation_penalty(model, leading).item() == near(40 * (1 - c), rel=1e-4)


def test_no_penalty_outside_the_leading_directions(directions):
    model, leading = directions
    other = torch.nn.Linear(4, 4)
    other.weight.data = model.weight.data.clone()
    other.weight.data[2:] += 5
    other.weight.data[:, :2] += 7
    assert clipsft.rotation_penalty(other, leading).item() == near(0, abs=1e-9)
    other.weight.data[1, 2] -= 3
    assert clipsft.rotation_penalty(other, leading).item() == near(9)


# ---- training
@pytest.fixture(scope="module")
def start():
    """A one-layer model trained until it has probabilities of every size, and its data."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(data.N_VOCAB, 40, 1, 2, 16))
    ids, mask = data.demonstrations(10, 3)
    c = replace(C, loss="sft", steps=40, lr=1e-2, batch_size=10, old_every=40)
    for _ in finetune(model, None, ids, mask, c, 0):
        pass
    return model, ids, mask


def gradient(c, model, old, ids, mask):
    loss, _ = token_loss(c, model, old, None, ids, mask)
    return torch.autograd.grad(loss[mask[:, 1:]].mean(), list(model.parameters()))


def test_right_after_a_refresh_the_gradient_of_clip_is_that_of_sft(start):
    model, ids, mask = start
    of_clip = gradient(replace(C, loss="clip"), model, copy.deepcopy(model), ids, mask)
    of_sft = gradient(replace(C, loss="sft"), model, None, ids, mask)
    for mine, other in zip(of_clip, of_sft, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)


def plain_loss(c, p, base_p, old_logp, y):
    """Loss of one token and whether it is clipped: p, base_p (V,) float64, y the token."""
    nll = -p[y].log()
    ratio = (p[y].log() - old_logp).exp()
    if c.loss == "dft":
        return p[y].item() * nll, False
    if c.loss == "asft":
        return p[y].item() * nll + c.beta * (base_p * (base_p / p).log()).sum(), False
    if c.loss == "kl":
        return nll + c.beta * (p * (p / base_p).log()).sum(), False
    if c.loss == "clip":
        clipped = ratio.item() > 1 + c.eps_high
        return (0 * ratio - 1 - c.eps_high if clipped else -ratio), clipped
    return nll, False


def plain_rows(c, seed, n, step):
    """The rows of an update: K / passes fresh batches after each refresh, then the same again."""
    fresh = c.old_every // c.passes
    batch = step // c.old_every * fresh + step % c.old_every % fresh
    per_epoch = n // c.batch_size
    order = torch.randperm(n, generator=keyed(seed, batch // per_epoch)).tolist()
    first = batch % per_epoch * c.batch_size
    return order[first:first + c.batch_size]


def plain_mean(c, rows):
    """rows: a list of the losses of each row's tokens."""
    tokens = sum(len(row) for row in rows)
    if c.aggregate == "token":
        return sum(sum(row) for row in rows) / tokens
    if c.aggregate == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (len(rows) * data.MAX_NEW)


def plain_penalty(model, base, share):
    """The squares of what each pair of leading singular vectors of the base finds changed."""
    total = 0
    for W, W0 in zip(model.parameters(), base.parameters()):
        if W.dim() == 2:
            U, _, Vh = torch.linalg.svd(W0.detach())
            for i, j in itertools.product(range(int(share * min(W.shape))), repeat=2):
                total += (U[:, i] @ (W - W0.detach()) @ Vh[j]) ** 2
    return total


def plain_update(model, opts, loss):
    model.zero_grad()
    loss.backward()
    norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))
    for p in model.parameters():
        p.grad /= max(1, norm)
    for opt in opts:
        opt.step()


def plain_finetune(model, base, ids, mask, c, seed):
    """finetune in place, token by token -> (losses, shares of clipped tokens), one an update."""
    opt = torch.optim.AdamW(model.parameters(), c.lr, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    shares = []
    for step in range(c.steps):
        if step % c.old_every == 0:
            old = copy.deepcopy(model)
        rows = []
        beyond = []
        for i in plain_rows(c, seed, len(ids), step):
            p, old_p, base_p = [m(ids[i:i + 1])[0].softmax(-1) for m in (model, old, base)]
            rows.append([])
            for t in mask[i, 1:].nonzero()[:, 0].tolist():
                y = ids[i, t + 1]
                old_logp = old_p[t, y].log().detach()
                loss, clipped = plain_loss(c, p[t], base_p[t].detach(), old_logp, y)
                rows[-1].append(loss)
                beyond.append(clipped)
        total = plain_mean(c, rows)
        if c.rotation > 0:
            total = total + c.rotation * plain_penalty(model, base, c.rotation_share)
        plain_update(model, [opt], total)
        losses.append(total.item())
        shares.append(sum(beyond) / len(beyond))
    return losses, shares


def assert_same_weights(ours, theirs, atol):
    """But for the biases of the keys: softmax ignores them, and Adam blows up their rounding."""
    expected = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        near_it = torch.isclose(weight.double(), expected[name], rtol=0, atol=atol)
        if name.endswith("c_attn.bias"):
            width = len(weight) // 3
            near_it[width:2 * width] = True
        assert near_it.all(), name


def clip_frac(stats):
    return stats["clipped"][stats["mask"]].double().mean().item()


@pytest.mark.parametrize("own", [
    dict(loss="dft"), dict(loss="kl", batch_size=8), dict(loss="asft"),
    dict(loss="sft", rotation=2.0, rotation_share=0.25),
    dict(loss="clip", eps_high=math.inf, aggregate="sequence", batch_size=5),
    dict(loss="clip", old_every=7, aggregate="constant"),
    dict(loss="clip", old_every=6, passes=3, batch_size=3)], ids=str)
def test_fine_tuning_by_plain_loops(start, own):
    model, ids, mask = start
    c = replace(C, **own)
    base = copy.deepcopy(model)
    base.lm_head.weight.data *= 0.8
    ours = copy.deepcopy(model)
    stats = dict(finetune(ours, base, ids, mask, c, 5))
    theirs = copy.deepcopy(model).double()
    losses, shares = plain_finetune(theirs, base.double(), ids, mask, c, 5)
    assert list(stats) == [1, 2, 3, 4, 5, 6, 7]
    assert [stats[step]["loss"].item() for step in stats] == near(losses, abs=1e-4)
    assert [clip_frac(stats[step]) for step in stats] == near(shares)
    assert_same_weights(ours, theirs, 5e-5)


def test_nothing_is_clipped_right_after_a_refresh_and_something_later(start):
    model, ids, mask = start
    updates = finetune(copy.deepcopy(model), model, ids, mask, replace(C, loss="clip"), 5)
    clipped = [step for step, stats in updates if clip_frac(stats) > 0]
    assert clipped == [2, 3, 5, 6]


def test_the_tokens_of_an_update_are_those_of_its_mask(start):
    model, ids, mask = start
    c = replace(C, batch_size=10, steps=1)
    _, stats = next(finetune(copy.deepcopy(model), model, ids, mask, c, 5))
    assert sorted(stats["tokens"][stats["mask"]].tolist()) == sorted(ids[mask].tolist())


def test_a_frozen_old_policy_takes_no_more_batches_than_updates(start, monkeypatch):
    model, ids, mask = start
    c = replace(C, **clipsft.METHODS["clip-frozen"])
    monkeypatch.setattr(clipsft, "batches", lambda n, size, seed: iter([torch.arange(4)] * 7))
    steps = [step for step, _ in finetune(copy.deepcopy(model), model, ids, mask, c, 5)]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_rows_that_fill_no_batch_wait_for_the_next_epoch():
    stream = clipsft.batches(10, 4, 7)
    for epoch in range(3):
        order = torch.randperm(10, generator=keyed(7, epoch))
        assert torch.equal(torch.cat([next(stream), next(stream)]), order[:8])


def test_passes_that_do_not_divide_or_a_loss_of_the_wrong_shape_are_refused(start, monkeypatch):
    model, ids, mask = start
    with pytest.raises(ValueError, match="2 passes do not divide 3"):
        next(finetune(model, model, ids, mask, replace(C, passes=2), 0))

    def wrong_loss(*args):
        loss, clipped = token_loss(*args)
        return loss.mean(), clipped
    monkeypatch.setattr(clipsft, "token_loss", wrong_loss)
    with pytest.raises(ValueError, match="one value a token"):
        next(finetune(copy.deepcopy(model), model, ids, mask, C, 0))


@pytest.mark.parametrize("steps, atol", [(5, 1e-5), (102, 1e-3)])    # in the warm-up, past it
def test_pre_training_by_plain_loops(steps, atol):
    ours = clipsft.pretrain(replace(C, base_steps=steps, aggregate="constant"), 3)
    rng = random.Random("3/docs")
    documents = [data.base_document(rng) for _ in range(10)]
    ids, mask = data.batch([(problem.prompt, text) for problem, text in documents])
    torch.manual_seed(3)
    model = GPT(GPTConfig(data.N_VOCAB, 40, 1, 2, 16)).double()
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or ".h." not in n]
    muon = Muon(matrices, 1e-2)    # held against torch's in test_model.py
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * (steps - step) / steps
        muon.param_groups[0]["lr"] = 1e-2 * scale
        adam.param_groups[0]["lr"] = 2e-2 * scale
        rows = plain_rows(replace(C, old_every=steps), 3, 10, step)
        logp = model(ids[rows])[:, :-1].log_softmax(-1)
        said = logp.gather(2, ids[rows, 1:, None])[mask[rows, 1:]]
        plain_update(model, [muon, adam], -said.mean())
    assert_same_weights(ours, model, atol)


# ---- tokens that are not trained
PROBABILITIES = torch.tensor([[0.01, 0.05, 0.101, 0.9], [0.01, 0.099, 0.5, 0.02]])
RESPONSES = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()    # the rest: prompt, padding


@pytest.fixture
def base_of_probabilities(tiny, monkeypatch):
    monkeypatch.setattr(clipsft, "response_logprobs", lambda *args: PROBABILITIES.log())
    return tiny


def test_skip_low_drops_improbable_response_tokens(base_of_probabilities):
    mask = clipsft.without_improbable(base_of_probabilities, RESPONSES, RESPONSES, "low", 0)
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 0, 0, 1, 0]]
    assert RESPONSES.sum() == 6    # the mask that was given is as it was


def test_skip_random_drops_as_many_at_random(base_of_probabilities):
    dropped = set()
    for seed in range(30):
        base = base_of_probabilities
        mask = clipsft.without_improbable(base, RESPONSES, RESPONSES, "random", seed)
        gone = [tuple(place) for place in (RESPONSES & ~mask).nonzero().tolist()]
        assert len(gone) == 2 and not (mask & ~RESPONSES).any()
        dropped.update(gone)
    assert dropped == {(0, 2), (0, 3), (0, 4), (1, 2), (1, 3)}


# ---- command line
@pytest.mark.parametrize("line, said", [
    ("--methods sft nope", "nope"), ("--methods", "--methods"), ("--methods sft sft", "each once"),
    ("--methods sft clip --rl_methods sft dft", "--rl_methods dft"), ("--loss clip", "--loss"),
    ("--rl_from 4 9", "--rl_from 9"), ("--rl_from 0", "--rl_from 0"), ("--lr nan", "--lr"),
    ("--old_every 1", "--old_every 1"), ("--passes 2", "--passes 2"), ("--meth sft", "--meth"),
    ("--n_head 3", "--n_head 3"), ("--base_batch 11", "--base_batch"),
    ("--batch_size 11", "--batch_size"), ("--rl_group 1", "--rl_group"), ("--device cuda", "CUDA"),
    ("--base_from nowhere", "nowhere")])
def test_a_bad_command_line_is_said_in_one_line_and_writes_nothing(
        tmp_path, monkeypatch, capsys, line, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        clipsft.main([*SMALL, "--out_dir", str(tmp_path / "run"), *line.split()])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert "error: " in last and said in last
    assert os.listdir(tmp_path) == []


def test_zero_is_refused_where_nothing_would_happen(capsys):
    for name in ("seeds", "n_layer", "n_head", "base_steps", "base_batch", "steps", "batch_size", "passes",
                 "eps_low", "eps_high", "lr", "rl_steps", "rl_lr", "rl_prompts", "rl_updates",
                 "temperature"):
        with pytest.raises(SystemExit, match="2"):
            clipsft.read_flags([*SMALL, f"--{name}", "0"])
        assert f"--{name} must be above 0" in capsys.readouterr().err


def test_help_names_every_flag_with_its_comment_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        clipsft.main(["--help"])
    options = " ".join(capsys.readouterr().out.split("options:")[1].split())
    said = {text.split()[0]: text for text in options.split(" --")}
    assert said["lr"] == "lr LR SFT learning rate [0.0003]"
    assert said["rl_from"].endswith("] SFT steps that GRPO starts from; nothing: no RL [8 1200]")
    names = {f.name for f in fields(Config)} - {"loss"}
    assert names <= said.keys()
    assert all(len(said[name].split()) > 3 for name in names)


def test_flags_go_before_the_preset_and_the_preset_before_the_defaults():
    c = clipsft.read_flags(["--preset", "smoke", "--steps", "16", "--methods", "dft"])
    assert (c.steps, c.n_embd, c.lr, c.rl_methods) == (16, 32, 3e-4, ("sft", "clip"))


# ---- jobs, with made-up measurements: the sum of the weights
fingerprint = clipsft.task_fingerprint    # cached: it takes longer than a small job


@pytest.fixture
def work(monkeypatch):
    """No true measurements and no figure; -> the list of what was computed."""
    done = []
    monkeypatch.setattr(clipsft, "task_fingerprint", fingerprint)
    monkeypatch.setattr(data, "MAX_NEW", 4)

    def watch(name):
        real = getattr(clipsft, name)

        def watched(*args):
            done.append(name)
            return real(*args)
        monkeypatch.setattr(clipsft, name, watched)

    def evaluate(model, base, n, seed):
        mine, other = [sum(p.double().sum().item() for p in m.parameters()) for m in (model, base)]
        numbers = dict.fromkeys(("ood_a", "ood_b", *ev.COMPARED), mine)
        return numbers | dict(of_base=other, of_seed=seed, sample="")
    for name in ("pretrain", "finetune", "grpo"):
        watch(name)
    monkeypatch.setattr(ev, "evaluate", evaluate)
    monkeypatch.setattr(ev, "figure", lambda rows, path: None)
    return done


def go(out, line=""):
    """Run the small command and more flags -> the rows of the folder."""
    clipsft.main([*SMALL, "--out_dir", str(out), *line.split()])
    return ev.read_rows(out)


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def assert_refused(work, out, line, said):
    """In one line; nothing is computed, nothing written."""
    work.clear()
    before = contents(out)
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        go(out, line)
    assert work == []
    assert contents(out) == before


def test_the_rows_of_a_run_and_its_checkpoints(work, tmp_path):
    rows = go(tmp_path, "--seed 3")
    assert [(row["method"], row["stage"], row["step"]) for row in rows] == [
        ("base", "base", 0), ("base", "rl", 0), ("clip", "sft", 4), ("clip", "rl", 4),
        ("clip", "sft", 7), ("sft", "sft", 4), ("sft", "rl", 4), ("sft", "sft", 7)]
    assert {(row["seed"], row["of_seed"], row["of_base"]) for row in rows} == {
        (3, 3, rows[0]["id"])}
    assert len({row["id"] for row in rows if row["stage"] == "sft"}) == 4
    for name, row in zip(("base", "base-0-rl", "clip-4", "clip-4-rl"), rows):
        model = load_checkpoint(tmp_path / f"s3-{name}.pt")
        assert ev.evaluate(model, model, 0, 0)["id"] == row["id"], name


@pytest.mark.parametrize("line, computed", [
    ("", []), ("--methods sft clip dft", ["finetune"]),
    ("--rl_methods", []),    # a job with RL serves a run without
    ("--methods sft --seeds 2 --rl_methods sft", ["pretrain", "grpo", "finetune", "grpo"])])
def test_nothing_finished_is_computed_twice(work, tmp_path, line, computed):
    rows = go(tmp_path)
    before = contents(tmp_path)
    before.pop("metrics.jsonl")
    work.clear()
    more = go(tmp_path, line)
    assert work == computed
    assert [row for row in more if row in rows] == rows
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("line, said", [
    ("--aggregate constant", "aggregate = token, now constant"),
    ("--eps_high inf", "eps_high = 0.05, now inf"),
    ("--eval_n 32", "eval_n = 16, now 32"),
    ("--rl_from 3", r"rl_from = \[4\], now \[3\]"),
    ("--seed 1 --lr 1e-1", "lr = 0.003, now 0.1"),              # nothing of this seed is there
    ("--methods dft --n_embd 8", "n_embd = 16, now 8")])        # nor of this method
def test_other_settings_than_those_of_the_folder_are_refused(work, tmp_path, line, said):
    go(tmp_path)
    assert_refused(work, tmp_path, line, said)


def test_rl_that_is_asked_for_later_is_refused(work, tmp_path):
    go(tmp_path, "--rl_methods")
    assert_refused(work, tmp_path, "", r"s0-clip.json .*rl_methods = \[\], now \['clip'\]")


def test_a_changed_line_of_methods_is_refused_and_one_that_is_gone_passed_over(
        work, tmp_path, monkeypatch):
    go(tmp_path)
    monkeypatch.setitem(clipsft.METHODS, "clip", dict(loss="clip", eps_high=0.1))
    said = r"s0-clip.json was made with eps_high = 0.05, now 0.1"
    assert_refused(work, tmp_path, "--methods sft", said)
    monkeypatch.delitem(clipsft.METHODS, "clip")
    go(tmp_path, "--methods sft")
    assert work == []
    monkeypatch.setitem(clipsft.METHODS, "sft", dict(loss="sft", beta=9.0))
    assert_refused(work, tmp_path, "--methods sft", r"s0-sft.json was made with beta = 0.5, now 9")


def test_a_setting_that_an_old_file_does_not_have_is_refused(work, tmp_path):
    go(tmp_path)
    job = ev.read_json(tmp_path / "s0-sft.json")
    del job["settings"]["beta"]
    ev.write_json(tmp_path / "s0-sft.json", job)
    assert_refused(work, tmp_path, "", r"s0-sft.json was made with beta = None, now 0.5")


@pytest.fixture
def fresh_eval_sets(monkeypatch):
    monkeypatch.setattr(clipsft, "task_fingerprint", fingerprint.__wrapped__)
    ev.eval_sets.cache_clear()
    yield
    ev.eval_sets.cache_clear()


def other_expert(problem, rng, p_word):
    return data.terse(problem.values)


def other_pair(rng, split):
    return data.draw_id(rng, split), data.draw(rng, split)


@pytest.mark.parametrize("name, value", [
    ("OPS", "SATE"), ("expert", other_expert), ("draw_pair", other_pair)])
def test_a_changed_task_is_refused(work, tmp_path, monkeypatch, fresh_eval_sets, name, value):
    go(tmp_path)
    monkeypatch.setattr(data, name, value)
    ev.eval_sets.cache_clear()
    assert_refused(work, tmp_path, "--methods dft", "of another task")


def trained(step, clipped=False):
    """Statistics of an update that trains one token; its loss is the number of the update."""
    one = torch.tensor([[True]])
    return step, dict(loss=torch.tensor(float(step)), tokens=torch.tensor([[7]]), mask=one,
                      clipped=one & clipped)


def test_a_method_changes_its_own_settings_only(work, tmp_path, monkeypatch):
    given = []

    def stub(model, base, ids, mask, c, seed):
        given.append((c.loss, c.eps_high, c.old_every))
        yield trained(c.steps)
    monkeypatch.setattr(clipsft, "finetune", stub)
    go(tmp_path, "--methods sft clip-unbounded clip-paper1 --rl_methods")
    assert given == [("sft", 0.05, 3), ("clip", math.inf, 3), ("clip", 0.5, 24)]


def test_measured_steps_and_the_means_over_a_round_of_the_old_policy(work, tmp_path, monkeypatch):
    monkeypatch.setattr(clipsft, "finetune", lambda model, base, ids, mask, c, seed: (
        trained(step, step in (2, 3)) for step in range(1, c.steps + 1)))
    monkeypatch.setattr(clipsft, "EVAL_STEPS", (2, 8))
    rows = go(tmp_path, "--methods sft --rl_methods --steps 12")
    assert [(row["step"], row["loss"], row["clip_frac"]) for row in rows[2:]] == [
        (2, 1.5, 1 / 2), (4, 3, near(2 / 3)), (8, 7, 0), (12, 11, 0)]


def test_rl_starts_from_all_weights_has_the_base_and_leaves_fine_tuning_alone(
        work, tmp_path, monkeypatch):
    """Its row has the means of its last ten steps."""
    def ruin(model, base, c, seed):
        assert all(p.requires_grad for p in model.parameters())
        of_base.append(ev.evaluate(base, base, 0, 0)["id"])
        torch.nn.init.zeros_(model.lm_head.weight)
        for step in range(1, 16):
            yield dict(reward=float(step))
    of_base = []
    monkeypatch.setattr(clipsft, "grpo", ruin)
    methods = "--methods sft-frozen-table --rl_methods"
    rows = go(tmp_path / "a", f"{methods} sft-frozen-table")
    assert [row["reward"] for row in rows if row["stage"] == "rl"] == [10.5, 10.5]
    assert of_base == [rows[0]["id"]] * 2
    without = go(tmp_path / "b", methods)
    curves = [[row for row in some if row["stage"] == "sft"] for some in (rows, without)]
    assert curves[0] == curves[1]


def test_a_frozen_table_stays_bitwise_and_all_else_is_trained(work, tmp_path):
    go(tmp_path, "--methods sft-frozen-table --rl_methods sft-frozen-table")
    base, tuned = [load_checkpoint(tmp_path / f"s0-{name}.pt").named_parameters()
                   for name in ("base", "sft-frozen-table-4")]
    same = [name for (name, W0), (_, W) in zip(base, tuned) if torch.equal(W0, W)]
    assert same == ["transformer.wte.weight"]


def test_a_method_gets_its_demonstrations_and_mask(work, tmp_path, monkeypatch):
    asked = []

    def without(base, ids, mask, skip, seed):
        asked.append((skip, seed))
        return ~mask

    def stub(model, base, ids, mask, c, seed):
        expected = data.demonstrations(10, 1, p_word=0.6)
        assert torch.equal(ids, expected[0])
        assert torch.equal(mask, expected[1] if c.skip == "none" else ~expected[1])
        yield trained(c.steps)
    monkeypatch.setattr(clipsft, "without_improbable", without)
    monkeypatch.setattr(clipsft, "finetune", stub)
    go(tmp_path, "--seed 1 --p_word 0.6 --methods sft sft-skip-low sft-skip-random --rl_methods")
    assert asked == [("low", 1), ("random", 1)]


@pytest.mark.parametrize("place", [1, 3, 4, 7])
def test_a_kill_before_any_renaming_changes_nothing(work, tmp_path, monkeypatch, place):
    line = "--methods sft --rl_methods sft"
    rename = os.replace
    renamed = []

    def rename_or_die(source, target):
        renamed.append(target)
        if len(renamed) == place:
            raise SystemExit("killed")
        rename(source, target)
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="killed"):
        patched.setattr(os, "replace", rename_or_die)
        go(tmp_path / "a", line)
    go(tmp_path / "a", line)
    go(tmp_path / "b", line)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab"]
    assert metrics[0] == metrics[1]


# ---- the base of another run folder
def test_base_from_takes_the_base_bitwise_for_other_data_and_evaluations(work, tmp_path):
    go(tmp_path / "a")
    work.clear()
    go(tmp_path / "b", f"--p_word 0.6 --eval_n 32 --base_from {tmp_path / 'a'}")
    mine, other = [load_checkpoint(tmp_path / name / "s0-base.pt").state_dict() for name in "ba"]
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert "pretrain" not in work


@pytest.mark.parametrize("flags, said", [
    ("--n_embd 8", "n_embd = 16, now 8"), ("--base_lr 1", "base_lr = 0.01, now 1.0"),
    ("--dtype bf16", "dtype = fp32, now bf16"), ("--seeds 2", "there is no .*s1-base.json")])
def test_base_from_refuses_another_base_before_any_work(work, tmp_path, flags, said):
    go(tmp_path / "a")
    work.clear()
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        go(tmp_path / "b", f"{flags} --base_from {tmp_path / 'a'}")
    assert work == []
    assert not (tmp_path / "b").exists()


# ---- how a run ends
def test_a_damaged_job_is_named_and_may_be_deleted(work, tmp_path):
    rows = go(tmp_path)
    job = tmp_path / "s0-sft.json"
    job.write_bytes(job.read_bytes()[:-10])
    assert_refused(work, tmp_path, "", "s0-sft.json")
    job.unlink()
    assert go(tmp_path) == rows


def test_a_run_with_true_measurements_writes_strict_json(tmp_path, monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    monkeypatch.setattr(ev, "figure", lambda rows, path: None)
    rows = go(tmp_path, "--methods sft clip-unbounded --rl_methods --rl_from --steps 1")
    for path in tmp_path.glob("*.json*"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert [math.isnan(row["logp_high"]) for row in rows] == [True] * 3    # nothing is so sure


def test_a_run_that_diverges_says_what_to_try(tmp_path):
    with pytest.raises(SystemExit, match="^error: nll is .*lower learning rate"):
        go(tmp_path, "--methods sft --rl_methods --lr 1e38 --eval_n 16")
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["s0-base.json"]


def test_grpo_with_more_updates_than_rows_that_have_spread(start):
    model, ids, mask = start
    model = copy.deepcopy(model)
    before = model.lm_head.weight.clone()
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]])    # two of four rows have an advantage
    c = replace(C, rl_updates=16)
    stats = list(rl.grpo(model, None, c, 0, lambda *args: (ids[:4], mask[:4], rewards)))
    assert stats[0]["reward"] == 0.75
    assert torch.isfinite(model.lm_head.weight).all()
    assert not torch.equal(model.lm_head.weight, before)


# ---- two processes, both started at once: importing torch takes long
SMOKE = ("--preset smoke --n_layer 1 --base_steps 1 --base_batch 8 --demos 64 --methods sft "
         "--rl_methods --rl_from --eval_n 16")
ENDLESS = f"{SMOKE} --steps 1000000"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Their folder; a process that does not end; one whose reader goes after a line."""
    runs = tmp_path_factory.mktemp("runs")
    python = f"exec {sys.executable} {clipsft.__file__}"
    lines = [f"{python} {ENDLESS} --out_dir {runs}/endless",
             f"set -o pipefail; {sys.executable} -m cProfile {clipsft.__file__} {SMOKE} --steps 1 "
             f"--out_dir {runs}/head | head -1"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    processes = []
    for line in lines:
        processes.append(subprocess.Popen(["bash", "-c", line], env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    yield runs, *processes
    for process in processes:
        process.kill()


def test_ctrl_c_ends_at_once_with_one_line_and_the_same_command_goes_on(
        launched, work, monkeypatch):
    runs, endless, _ = launched
    end = time.time() + 300    # a busy machine may take long
    while not (runs / "endless" / "s0-base.json").exists():
        assert endless.poll() is None and time.time() < end, endless.communicate()
        time.sleep(0.01)
    endless.send_signal(signal.SIGINT)
    _, err = endless.communicate(timeout=60)
    assert endless.returncode == 1
    assert err == "\ninterrupted; the same command goes on from the finished jobs\n"
    monkeypatch.setattr(clipsft, "task_fingerprint", fingerprint.__wrapped__)
    monkeypatch.setattr(clipsft, "finetune", lambda *args: [trained(1000000)])
    clipsft.main([*ENDLESS.split(), "--out_dir", str(runs / "endless")])
    assert work == []    # the base was there


def test_under_the_profiler_a_reader_that_has_gone_does_not_end_the_work(launched):
    runs, _, head = launched
    out, err = head.communicate(timeout=300)
    assert (head.returncode, err) == (0, "")
    assert out.split() == ev.header().split()
    assert (runs / "head" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_flag_that_no_method_would_heed_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        clipsft.read_flags("--methods sft-1e-4 clip-3e-5 --lr 1e-3".split())
    assert "--lr reaches no method" in capsys.readouterr().err
    assert clipsft.read_flags("--methods sft sft-1e-4 --lr 1e-3".split()).lr == 1e-3
