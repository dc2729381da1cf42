import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import clipsft
import data
import eval as ev
import model
import rl
from clipsft import Config, clip_loss, dft_loss, finetune, settings_of, sft_loss
from model import BadInput, adamw, load_checkpoint, response_logprobs, run_main, update

ROOT = Path(clipsft.__file__).parent
SMALL = Config(steps=6, eval_n=16, demos=12, batch_size=4, old_every=3)


def weight(loss, logp, *args):
    """The weight that a loss puts on grad log pi of each token: minus its gradient."""
    logp = torch.tensor(logp, dtype=torch.double, requires_grad=True)
    loss(logp, *args).sum().backward()
    return (-logp.grad).tolist()


# ---- losses
def test_the_ladder_of_weights_by_hand():
    p = [0.1, 0.2, 0.5, 0.9]
    logp = [math.log(x) for x in p]
    assert weight(sft_loss, logp) == pytest.approx([1, 1, 1, 1])
    assert weight(dft_loss, logp) == pytest.approx(p)
    old = torch.tensor([0.1, 0.1, 1.0, 0.8], dtype=torch.double).log()     # r = 1, 2, .5, 1.125
    assert weight(clip_loss, logp, old, 0.2, 0.2) == pytest.approx([1, 0, 0.5, 1.125])
    assert weight(clip_loss, logp, old, 0.2, math.inf) == pytest.approx([1, 2, 0.5, 1.125])


def test_clip_loss_values_by_hand():
    logp = torch.tensor([0.1, 0.2, 0.5]).log()
    old = torch.tensor([0.1, 0.1, 1.0]).log()
    assert clip_loss(logp, old, 0.2, 0.2).tolist() == pytest.approx([-1.0, -1.2, -0.5])
    assert sft_loss(logp).tolist() == pytest.approx([math.log(10), math.log(5), math.log(2)])
    assert dft_loss(logp).tolist() == pytest.approx([0.1 * math.log(10), 0.2 * math.log(5),
                                                     0.5 * math.log(2)])


def test_the_lower_bound_never_acts_and_likely_tokens_never_clip():
    logp, old = torch.rand(500).log(), torch.rand(500).log()
    assert torch.equal(clip_loss(logp, old, 0.01, 0.2), clip_loss(logp, old, 0.99, 0.2))
    likely = torch.full((500,), 1 / 1.2 + 1e-4).log()    # p_old > 1/(1+eps): r is below 1+eps
    free = clip_loss(logp, likely, 0.2, 0.2)
    assert torch.allclose(free, -(logp - likely).exp())


def test_dft_is_the_gradient_of_minus_p():
    logits = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    y = torch.tensor([0, 3, 6])
    (a,) = torch.autograd.grad(dft_loss(logits.log_softmax(-1).gather(1, y[:, None])).sum(), logits)
    (b,) = torch.autograd.grad(-logits.softmax(-1).gather(1, y[:, None]).sum(), logits)
    assert torch.allclose(a, b)


@pytest.mark.parametrize("name", clipsft.METHODS)
def test_losses_survive_extremes_and_match_float64(name, monkeypatch):
    c = Config()
    g = torch.Generator().manual_seed(0)

    def batch(dtype):
        logp = torch.tensor([[-1e4, 0.0, -3.0, -0.1, -50.0]], dtype=dtype, requires_grad=True)
        old = torch.tensor([[0.0, -1e4, -3.1, -0.1, -49.0]], dtype=dtype)
        return SimpleNamespace(
            logp=logp, old_logp=old, base_logp=old, mask=torch.ones(1, 5).bool(),
            fresh=torch.full((1, 5), 0.9), model=None, base=None,
            **{k: torch.tensor([[True, False, True, False, False]]) for k in
               ("low", "random", "high", "loss")})
    monkeypatch.setattr(clipsft, "kl_to_base", lambda b: torch.zeros(1, 5))
    monkeypatch.setattr(clipsft, "rotation", lambda model, base: torch.tensor(0.0))
    grads = []
    for dtype in (torch.float32, torch.float64):
        g.manual_seed(0)
        b = batch(dtype)
        loss = clipsft.METHODS[name](b, c)
        loss.sum().backward()
        assert loss.shape == (1, 5)
        assert torch.isfinite(loss).all() and torch.isfinite(b.logp.grad).all()
        grads.append(b.logp.grad.double())
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_mask_methods_leave_out_what_they_say():
    p = torch.tensor([[0.05, 0.2, 0.6, 0.9], [0.06, 1.0, 1.0, 0.5]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    noise = torch.tensor([[0.5, 0.1, 0.4, 0.9], [0.6, 0.3, 0.2, 0.0]])
    out = clipsft.left_out(p.log(), mask, noise, 0.1)
    assert out["low"].long().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert out["random"].long().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]     # two, least noise
    assert out["high"].long().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]       # two, though tied
    # -log p in the order of noise: 1.6 0 0 .5 3.0 | 2.8 .1; the improbable have 5.8: stop before
    assert out["loss"].long().tolist() == [[1, 1, 1, 0], [0, 1, 1, 0]]
    # the improbable later: .5 0 .1 0 2.8 1.6 | 3.0; if all of them are, one is left to train
    late = torch.tensor([[0.9, 0.8, 0.1, 0.3], [0.6, 0.2, 0.5, 0.0]])
    assert clipsft.left_out(p.log(), mask, late, 0.1)["loss"].long().tolist() == \
        [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert clipsft.left_out(p.log() - 9, mask, noise, 0.1)["loss"].sum() == 6
    b = SimpleNamespace(logp=torch.full((2, 4), -1.0), **out)
    for k in out:
        assert torch.equal(clipsft.METHODS[f"mask_{k}"](b, None), 1.0 * ~out[k])


def test_rest_random_rests_at_its_own_rate_with_the_weight_of_clip():
    logp = torch.tensor([[-1.0, -1.0, -2.0, -1.0]], requires_grad=True)
    b = SimpleNamespace(logp=logp, old_logp=torch.tensor([[-3.0, -1.0, -1.0, -9.0]]),
                        mask=torch.tensor([[True, True, True, False]]),
                        fresh=torch.tensor([[0.3, 0.4, 0.2, 0.9]]))
    clipsft.METHODS["rest_random"](b, Config()).sum().backward()      # one in three is beyond 1.2
    assert logp.grad[0].tolist() == pytest.approx([0, -1, 0, -1.2])
    for step, rests in ((0.6, [0.0, 0.3]), (1.0, [0.0, 0.3]), (0.1, [0.2, 0.3])):
        b.old_logp = torch.tensor([[-1.0 - step, -1.0, -2.0, -1.0]])   # r = 1.8, 2.7: beyond; 1.1
        b.fresh = torch.tensor([[rests[0], 0.33, 0.34, 0.9]])
        kept = clipsft.METHODS["rest_random"](b, Config())[0, :3] != 0
        assert kept.tolist() == [step == 0.1, step == 0.1, True]


def test_rotation_penalty_counts_moves_within_the_leading_directions_only(tiny):
    base, moved = copy.deepcopy(tiny), copy.deepcopy(tiny)
    assert clipsft.rotation(tiny, base) == 0
    W0, W = base.transformer.h[0].attn.c_proj.weight, moved.transformer.h[0].attn.c_proj.weight
    n = len(W0)
    with torch.no_grad():
        W0.copy_(torch.diag(torch.arange(n, 0.0, -1)))      # singular vectors: the axes
        W.copy_(W0)
        W[0, 1] += 0.3                                      # both leading
        W[n - 1, n - 1] += 5.0                              # both trailing
        W[0, n - 1] += 5.0                                  # one of each
        W[n // 2 - 1, 0] += 0.4                             # the last of the leading half
        W[n // 2, 0] += 5.0                                 # the first behind it
    assert clipsft.rotation(moved, base).item() == pytest.approx(0.09 + 0.16, abs=1e-4)


# ---- the loop
def record_updates(monkeypatch):
    """Replace the optimizer step by a record of the gradients it would have got."""
    log = []

    def spy(model, opt, lr):
        log.append((lr, torch.cat([p.grad.flatten() for p in model.parameters()])))
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad()
    monkeypatch.setattr(clipsft, "update", spy)
    return log


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_pretraining_by_a_plain_loop(grad_accum, tmp_path, monkeypatch):
    parts, losses = [], []    # who worked on how many rows

    def spy(model, ids, mask):
        parts.append((threading.get_ident(), len(ids)))
        return response_logprobs(model, ids, mask)
    monkeypatch.setattr(clipsft, "response_logprobs", spy)
    c = Config(n_layer=1, n_embd=16, base_steps=5, base_docs=24, base_batch=8,
               grad_accum=grad_accum)
    clipsft.train_base(c, 3, tmp_path / "base.pt", torch.device("cpu"), lambda **said:
                       losses.append(said["loss"]) if "loss" in said else None)
    rng = random.Random("3/docs")
    docs = [data.base_document(rng) for _ in range(24)]
    ids, mask = data.batch([(p.prompt, text) for p, text in docs])
    torch.manual_seed(3)
    plain = model.GPT(model.GPTConfig(data.N_VOCAB, 12 + c.max_new, 1, 2, 16))
    opt = torch.optim.AdamW([
        dict(params=[p for p in plain.parameters() if p.dim() == 2]),
        dict(params=[p for p in plain.parameters() if p.dim() == 1], weight_decay=0)],
        betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(5):
        if step % 3 == 0:    # three batches are an epoch
            order = torch.randperm(24, generator=model.generator("cpu", 3, step // 3)).tolist()
        x = ids[order[8 * (step % 3):][:8]]
        m = mask[order[8 * (step % 3):][:8]][:, 1:]
        loss = F.cross_entropy(plain(x)[:, :-1][m], x[:, 1:][m])
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        opt.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad /= max(1, norm)
        for group in opt.param_groups:
            group["lr"] = 4e-3 * (step + 1) / 100 * (5 - step) / 5
        opt.step()
    got = load_checkpoint(tmp_path / "base.pt")[0].state_dict()
    for name, w in plain.state_dict().items():
        same = torch.isclose(got[name], w, atol=2e-6)
        if name.endswith("c_attn.bias"):    # a key's bias has no gradient: Adam blows up rounding
            same[16:32] = True
        assert same.all(), name
    assert [n for _, n in parts] == ([4] * 10 if grad_accum == 1 else [2] * 20)
    assert threading.get_ident() not in dict(parts)


def test_the_first_update_of_sft_and_of_clip_is_plain_cross_entropy(tiny, monkeypatch):
    log = record_updates(monkeypatch)
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    ids, mask = data.demonstrations(12, 0)
    order = torch.randperm(12, generator=clipsft.generator("cpu", 0, "order", 0))[:4]
    logits = tiny(ids[order])
    target = torch.where(mask[order], ids[order], -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(tiny.parameters()))])
    for method in ("sft", "clip", "ratio"):
        log.clear()
        finetune(tiny, SMALL, method, 0)
        assert len(log) == 6 and all(lr == 3e-4 for lr, _ in log)
        assert torch.allclose(log[0][1], expected, atol=1e-5), method
        if method == "clip":
            clip = [g for _, g in log]
    finetune(tiny, SMALL, "sft", 0)
    sft = [g for _, g in log[-6:]]
    assert not torch.allclose(sft[2], clip[2], atol=1e-5)     # later within a refresh they differ


def test_old_policy_is_refreshed_every_k_updates(tiny, monkeypatch):
    seen = []

    def spy(b, c):
        seen.append(((b.logp - b.old_logp)[b.mask].abs().max().item()))
        return sft_loss(b.logp)
    monkeypatch.setitem(clipsft.METHODS, "clip", spy)
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    finetune(tiny, dataclasses.replace(SMALL, steps=9, old_every=3), "clip", 0)
    fresh = [x < 1e-5 for x in seen]
    assert fresh == [True, False, False] * 3


def test_a_new_method_finds_the_old_policy_refreshed(tiny, monkeypatch):
    monkeypatch.setitem(clipsft.METHODS, "mine", clipsft.METHODS["clip"])
    mine, clip = (finetune(tiny, dataclasses.replace(SMALL, lr=3e-3), m, 0)[0].state_dict()
                  for m in ("mine", "clip"))
    assert all(torch.equal(mine[k], clip[k]) for k in clip)


def test_frozen_old_policy_is_the_base(tiny, monkeypatch):
    seen = []
    monkeypatch.setitem(clipsft.METHODS, "frozen", lambda b, c: (
        seen.append((b.base_logp - b.old_logp).abs().max().item()), sft_loss(b.logp))[1])
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    finetune(tiny, SMALL, "frozen", 0)
    assert seen == [0.0] * 6


def test_same_data_order_for_all_methods_and_every_demonstration_once_an_epoch(tiny, monkeypatch):
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    batches = {}
    for name in ("sft", "clip", "dft"):
        seen = batches[name] = []
        real = clipsft.trim
        monkeypatch.setattr(clipsft, "trim",
                            lambda ids, *a: seen.append(ids.clone()) or real(ids, *a))
        finetune(tiny, SMALL, name, 0)
        monkeypatch.setattr(clipsft, "trim", real)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*batches.values()))
    ids, _ = data.demonstrations(12, 0)
    epochs = [torch.cat(batches["sft"][i:i + 3]) for i in (0, 3)]
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, ids.tolist()))
    assert not torch.equal(*epochs)


def test_checkpoints_that_rl_starts_from_are_evaluated(tiny):
    c = dataclasses.replace(SMALL, rl_from=[3, 5])
    assert [r["step"] for r in finetune(tiny, c, "sft", 0)[1]] == [3, 4, 5, 6]
    assert [r["step"] for r in finetune(tiny, c, "dft", 0)[1]] == [4, 6]


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_grad_accum_changes_nothing(tiny, monkeypatch, how):
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    log = record_updates(monkeypatch)
    for n in (1, 3):
        finetune(tiny, dataclasses.replace(SMALL, aggregate=how, grad_accum=n, steps=3), "clip", 0)
    assert all(torch.allclose(a[1], b[1], atol=1e-5) for a, b in zip(log[:3], log[3:]))


def test_kl_method_is_sft_plus_the_exact_kl(tiny, monkeypatch):
    got = []
    monkeypatch.setitem(clipsft.METHODS, "kl", lambda b, c: (
        got.append((clipsft.kl_to_base(b), b.mask)), sft_loss(b.logp))[1])
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    model, _ = finetune(tiny, dataclasses.replace(SMALL, steps=2, lr=1e-2), "kl", 0)
    assert got[0][0].abs().max() < 1e-5 and got[1][0][got[1][1]].mean() > 1e-3
    assert (got[1][0][~got[1][1]] == 0).all()


@pytest.mark.parametrize("spec, aggregate", [("sft", "token"), ("clip", "sequence"),
                                             ("mask_random", "constant"), ("rest_random", "token"),
                                             ("frozen:grad_accum=2", "token")])
def test_a_whole_run_by_plain_loops(tiny, monkeypatch, spec, aggregate):
    """Five updates, K = 3, written down once more token by token: gradients and metrics."""
    ids, mask = data.demonstrations(10, 3, p_word=0.6)
    opt = adamw(tiny, 0.01)
    for _ in range(12):                            # until there are probabilities of every size
        (-response_logprobs(tiny, ids, mask).sum()).backward()
        update(tiny, opt, 0.01)
    c = dataclasses.replace(SMALL, steps=5, demos=10, p_word=0.6, mask_p=0.3, eps_high=0.1,
                            aggregate=aggregate)
    name, got = spec.partition(":")[0], []

    def descend(model, opt, lr):
        got.append((lr, [q.grad.clone() for q in model.parameters()]))
        for q in model.parameters():
            q.data.sub_(0.2 * q.grad)
            q.grad = None
    monkeypatch.setattr(clipsft, "update", descend)
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {})
    rows = finetune(tiny, c, spec, 3)[1]

    m, words = mask[:, 1:], mask[:, 1:].nonzero().tolist()

    def logp(model):
        z = model(ids).log_softmax(-1)
        return {(i, t): z[i, t, ids[i, t + 1]] for i, t in words}

    def uniform(*key):
        return torch.rand(m.shape, generator=clipsft.generator("cpu", 3, *key))
    with torch.no_grad():
        base = {w: x.item() for w, x in logp(tiny).items()}
    table = torch.zeros(m.shape)
    for (i, t), x in base.items():
        table[i, t] = x
    never = clipsft.left_out(table, m, uniform("noise"), 0.3)["random"]
    bins = {w: min(9, int(10 * math.exp(x))) for w, x in base.items()}
    assert len(set(bins.values())) > 5 and never.any()
    model, old, losses, seen, since = copy.deepcopy(tiny), base, [], [], 0
    for step, (lr, grads) in enumerate(got):
        if step % 3 == 0 and name != "frozen":
            with torch.no_grad():
                old = {w: x.item() for w, x in logp(model).items()}
        order = torch.randperm(10, generator=clipsft.generator("cpu", 3, "order", step // 3))
        rows_now, fresh = order[step % 3 * 4:][:4].tolist(), uniform("fresh", step)
        now = {w: x for w, x in logp(model).items() if w[0] in rows_now}
        ratio = {w: math.exp(x.item() - old[w]) for w, x in now.items()}
        beyond = sum(r > 1.1 for r in ratio.values()) / len(ratio)
        loss = {}
        for w, x in now.items():
            loss[w] = {"sft": -x, "mask_random": -x * (not never[w]),
                       "rest_random": -x * min(ratio[w], 1.1) * bool(fresh[w] >= beyond)}.get(
                name, -torch.minimum((x - old[w]).exp(), torch.tensor(1.1)))
            seen.append((step, w, ratio[w] > 1.1))
        per_row = [[x for w, x in loss.items() if w[0] == i] for i in rows_now]
        total = {"token": sum(loss.values()) / len(loss),
                 "sequence": sum(sum(r) / len(r) for r in per_row) / len(per_row),
                 "constant": sum(loss.values()) / (len(per_row) * c.max_new)}[aggregate]
        expected = torch.autograd.grad(total, list(model.parameters()))
        assert lr == c.lr
        assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(expected, grads))
        for q, grad in zip(model.parameters(), grads):
            q.data.sub_(0.2 * grad)
        losses.append(total.item())
    assert [r["step"] for r in rows] == [4, 5] and len(got) == 5
    assert all((r["seed"], r["method"], r["stage"], r["init_step"]) == (3, spec, "sft", 0)
               for r in rows)
    for row, first in zip(rows, (0, 4)):
        seen_now = [x for x in seen if first <= x[0] < row["step"]]
        clips = name not in ("sft", "mask_random")
        share = sum(x[2] for x in seen_now) / len(seen_now) * clips
        assert row["clip_frac"] == pytest.approx(share) and (share > 0) == clips
        assert row["loss"] == pytest.approx(sum(losses[first:row["step"]]) / (row["step"] - first),
                                            rel=1e-3)
        for b in range(10):
            here = [x[2] for x in seen_now if bins[x[1]] == b]
            assert row["clip_bins"][b] == pytest.approx(sum(here) / max(1, len(here)) * clips)
    with torch.no_grad():
        end = {w: x.item() for w, x in logp(model).items()}
    for b in range(10):
        here = [end[w] for w in bins if bins[w] == b]
        assert rows[1]["n_bin"][b] == len(here)
        assert rows[1]["logp_bins"][b] == (pytest.approx(sum(here) / len(here), abs=1e-3)
                                           if here else None)


def test_bfloat16_is_used_wherever_a_model_runs(tiny, monkeypatch):
    log, ticks, heard = [], [], []

    def spy(f):
        def g(*args):
            log.append(torch.is_autocast_enabled("cpu"))
            return f(*args)
        return g
    monkeypatch.setattr(clipsft, "response_logprobs", spy(response_logprobs))
    monkeypatch.setattr(clipsft.ev, "evaluate", spy(lambda *a: {}))
    c = dataclasses.replace(SMALL, dtype="bf16", steps=2)
    model, rows = finetune(tiny, c, "clip", 0, tick=lambda loss: ticks.append(loss),
                           on_row=lambda *a: heard.append(a))
    assert log == [True] * 6        # base, old policy, two updates, the row: log-probs, evaluation
    assert len(ticks) == 2 and sum(ticks) / 2 == pytest.approx(rows[0]["loss"])
    assert heard == [(rows[0], model)]


def test_compile_changes_nothing_but_speed(tiny, monkeypatch):
    """torch's tracer for real, without its code generator, which takes a minute."""
    graphs, trace = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, **kw: trace(f, backend=backend, fullgraph=True,
                                                                **kw))
    c = dataclasses.replace(SMALL, steps=2)
    tiny.transformer.h = tiny.transformer.h[:1]    # half the time
    plain, rows = finetune(tiny, c, "sft", 0)
    assert not graphs
    model, same = finetune(tiny, dataclasses.replace(c, compile=True), "sft", 0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))
    assert same == rows
    prompts, lengths = torch.arange(30).view(10, 3), torch.full((10,), 3)
    eos = int(plain.generate(prompts, lengths, 1, -1, 0)[0][0, 3])
    ids, mask = plain.generate(prompts.repeat(4, 1), lengths.repeat(4), 12, eos, 0)
    assert (mask.sum(1) == 1).sum() >= 4 and len(set(mask.sum(1).tolist())) > 1    # rows are dropped
    assert torch.equal(ids, model.generate(prompts.repeat(4, 1), lengths.repeat(4), 12, eos, 0)[0])
    decode = ["softmax" in code for code in graphs]    # attention with a cache spells it out
    assert decode.count(True) == 1 and 0 < decode.count(False) <= 3    # not one a shape


def test_rows_say_what_happened(tiny):
    rows = finetune(tiny, dataclasses.replace(SMALL, lr=3e-3), "clip", 0)[1]
    assert [r["step"] for r in rows] == [4, 6]
    ids, mask = data.demonstrations(12, 0)
    with torch.no_grad():
        p = response_logprobs(tiny, ids, mask)[mask[:, 1:]].exp()
    n = torch.histc(p, 10, 0, 1).tolist()
    assert rows[0]["n_bin"] == n and len(rows[0]["clip_bins"]) == 10
    assert 0 < rows[-1]["clip_frac"] <= 1
    needed = ("seed method stage init_step step id ood random prior answer_id answer_ood "
              "format_ood nll entropy clip_frac kl_base").split()
    assert all(k in rows[0] for k in needed)
    assert finetune(tiny, SMALL, "sft", 0)[1][-1]["clip_frac"] == 0


def test_nan_stops_with_step_and_method_named(tiny, monkeypatch):
    monkeypatch.setitem(clipsft.METHODS, "sft", lambda b, c: b.logp * math.nan)
    with pytest.raises(FloatingPointError, match="sft, seed 0, step 0"):
        finetune(tiny, SMALL, "sft", 0)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["sft", "clip", "mask_random", "rest_random"])
def test_finetune_resumes_bitwise(tiny, tmp_path, method):
    c = dataclasses.replace(SMALL, steps=8, old_every=3, lr=3e-3)
    whole, rows = finetune(tiny, c, method, 0)
    count = []

    def tick(**_):
        count.append(1)
        if len(count) == 6:       # after the checkpoint of step 4, in the middle of a refresh
            raise Killed
    with pytest.raises(Killed):
        finetune(tiny, c, method, 0, tmp_path / "x", tick=tick)
    model, state = load_checkpoint(tmp_path / "x")
    state["model"] = model.state_dict()
    again, rows2 = finetune(tiny, c, method, 0, state=state)
    assert json.dumps(rows) == json.dumps(rows2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_clip_with_a_huge_band_is_the_ratio_method(tiny):
    a, _ = finetune(tiny, dataclasses.replace(SMALL, eps_high=1e9), "clip", 0)
    b, _ = finetune(tiny, SMALL, "ratio", 0)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


# ---- settings
def test_method_settings():
    name, c = settings_of("clip:eps_high=0.4,old_every=24", Config())
    assert (name, c.eps_high, c.old_every, c.lr) == ("clip", 0.4, 24, 3e-4)
    assert settings_of("sft", Config(old_every=1))[0] == "sft"
    assert clipsft.eval_steps(30) == [4, 8, 16, 30]
    assert clipsft.eval_steps(7) == [4, 7]
    assert clipsft.eval_steps(3000) == [100, 200, 300, 1000, 3000]
    assert clipsft.eval_steps(1001) == [100, 200, 300, 1000, 1001]
    assert clipsft.eval_steps(1000) == [4, 8, 16, 30, 60, 100, 200, 300, 1000]


BAD = [
    "--methods nope", "--methods clip:eps=1", "--methods clip:eps_high=x",
    "--methods clip:eps_high=-1",
    "--methods clip:methods=sft", "--methods :", "--methods", "--eps_high 0", "--eps_high -0.1",
    "--eps_low 0", "--eps_low 1", "--lr -1", "--lr 0", "--lr nan", "--lr abc", "--old_every 1",
    "--old_every 0", "--methods clip:old_every=1", "--methods ratio --old_every 1", "--steps 0",
    "--steps 1.5", "--demos 0", "--batch_size 0", "--seeds 0", "--seed -1", "--preset huge",
    "--device tpu", "--dtype fp8", "--nonsense 3", "--eps 0.1", "--n_head 3", "--n_layer 0",
    "--rl_from 0", "--rl_from x", "--rl_methods nope", "--rl_group 1", "--rl_steps 0", "--p_word 1",
    "--p_word -0.1", "--temperature 0", "--aggregate median", "--adv_scale var", "--max_new 0",
    "--kl_coef -1", "--eval_n 1", "--grad_accum 0", "--workers -1", "--base_lr 0", "--base_docs 10",
    "--mask_p 0", "--max_new 10", "--methods sft:rl_steps=5", "--methods sft:n_embd=8",
    "--device mps", "--rl_from 301", "--resume", "--resume --out_dir nowhere", "extra",
]


@pytest.mark.parametrize("line", BAD)
def test_bad_command_lines_are_one_line(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as e:
        clipsft.prepare(line.split())
    assert "\n" not in str(e.value) and len(str(e.value)) > 15
    assert os.listdir(tmp_path) == []


BAD_ELSEWHERE = [
    (rl, ""), (rl, "--init none.pt"), (rl, "--init . --out nowhere/x.pt"), (rl, "--init . --out ."),
    (rl, "--init . --rl_lr 0"), (rl, "--init . --rl_eps_low 1"), (rl, "--init . --device cpu0"),
    (rl, "--init . --lr 1"), (rl, "x.pt"), (rl, "--init ."), (ev, ""), (ev, "nowhere"), (ev, "."),
    (ev, ". --show x"), (ev, ". --show"), (ev, ". --all"), (ev, ". ."), (model, "--n_embd 65"),
    (model, "--block_size 7"), (model, "--vocab_size 1"), (model, "--rows 0"),
    (model, "--rows 2.5"),
    (model, "--sample_rows 7"), (model, "--threads -1"), (model, "--dtype fp16"), (model, "now"),
]


@pytest.mark.parametrize("module, line", BAD_ELSEWHERE)
def test_bad_command_lines_of_the_other_programs(module, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as e:
        module.main(line.split())
    assert "\n" not in str(e.value) and len(str(e.value)) > 15
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(tmp_path):
    for args in (["--device", "cuda"], ["--preset", "gpu"]):
        with pytest.raises(BadInput, match="--device cuda"):
            clipsft.prepare([*args, "--out_dir", str(tmp_path / "x")])
    assert os.listdir(tmp_path) == []


def test_run_folders_are_guarded(tmp_path):
    out = tmp_path / "r"
    args = ["--preset", "smoke", "--out_dir", str(out)]
    clipsft.prepare(args)
    with pytest.raises(BadInput, match="--resume"):
        clipsft.prepare(args)
    clipsft.prepare([*args, "--resume"])
    with pytest.raises(BadInput, match="--lr"):
        clipsft.prepare([*args, "--resume", "--lr", "0.1"])
    # the folder says the rest: a method, a seed, and the RL of a new method can be added
    c = clipsft.prepare(["--out_dir", str(out), "--resume", "--methods", "dft", "--seeds", "2",
                         "--rl_methods", "dft"])
    assert (c.preset, c.methods, c.seeds, c.eval_n, c.rl_from) == ("smoke", ["dft"], 2, 16, [8])
    config = json.loads((out / "config.json").read_text())
    assert config["methods"] == ["sft", "clip", "dft"] and config["seeds"] == 2
    assert config["rl_methods"] == ["sft", "clip", "dft"]
    clipsft.prepare(["--out_dir", str(out), "--resume", "--methods", "kl"])
    with pytest.raises(BadInput, match="--rl_methods kl"):      # kl has kept no checkpoints
        clipsft.prepare(["--out_dir", str(out), "--resume", "--rl_methods", "kl"])
    (out / "config.json").write_text("{torn")
    with pytest.raises(BadInput, match="config.json"):
        clipsft.prepare([*args, "--resume"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        clipsft.prepare(["--out_dir", str(tmp_path / "other")])
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="file"):
        clipsft.prepare(["--out_dir", str(tmp_path / "file" / "x")])


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        clipsft.prepare(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in dataclasses.fields(Config))


# ---- the whole thing, as a user runs it
SMOKE = ["--preset", "smoke", "--workers", "1", "--out_dir"]


def start(*args, **kw):
    return subprocess.Popen([sys.executable, "clipsft.py", *args], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def files(out):
    return [(out / f).read_text(encoding="utf-8") for f in ("metrics.jsonl", "summary.json")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    clipsft.main([*SMOKE, str(out)])
    return out


def test_smoke_run_writes_what_it_promises(finished, capsys):
    rows = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["method"], r["stage"], r["step"]) for r in rows] == [
        ("base", "base", 0), ("base", "rl", 2)] + [x for m in ("sft", "clip") for x in
        [(m, "sft", s) for s in (4, 8)] + [(m, "rl", 2)]]
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    config = json.loads((finished / "config.json").read_text())
    assert {"python", "torch"} <= set(config["versions"]) and config["lr"] == 3e-4
    for name in ("s0-base", "s0-sft-8", "s0-sft-8-rl", "s0-clip-8", "s0-clip-8-rl",
                 "s0-base-rl"):
        load_checkpoint(finished / "ckpt" / f"{name}.pt")
    clipsft.ev.main([str(finished)])
    text = capsys.readouterr().out
    assert all(x in text for x in ("base ", "base, then RL ", "sft, step 8 ", "clip, step 8, then RL"))
    clipsft.ev.main([str(finished), "--show", "2"])
    text = capsys.readouterr().out
    assert text.count("values") == 2 and text.count("s0-clip-8-rl") == 2


def test_show_goes_by_method_and_step(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(run / "ckpt" / "s0-sft-8.pt", run / "ckpt" / "s0-sft-16.pt")
    clipsft.ev.main([str(run), "--show", "1"])
    assert re.findall(r"s0-\S+", capsys.readouterr().out) == [
        "s0-base", "s0-base-rl", "s0-clip-8", "s0-clip-8-rl", "s0-sft-8", "s0-sft-8-rl",
        "s0-sft-16"]


def test_compile_reaches_rl(finished, monkeypatch):
    used, rollout = [], clipsft.grpo
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: lambda *a: used.append(f) or f(*a))

    def grpo(model, *args, **kw):
        used.clear()
        stats = rollout(model, *args, **kw)
        assert "step" in {f.__name__ for f in used}
        return stats
    monkeypatch.setattr(clipsft, "grpo", grpo)
    clipsft.main([*SMOKE, str(finished.parent / "compiled"), "--methods", "sft", "--compile"])
    assert used


def test_a_study_measures_its_checkpoints_once(finished):
    out = finished.parent / "study"              # the base is taken from the cache beside it
    clipsft.main(["--preset", "smoke", "--workers", "1", "--rl_from", "2", "4", "6", "8",
                  "--rl_steps", "1", "--lr", "1e-2", "--out_dir", str(out)])
    path = out / "cells" / "s0-measure.json"
    m, before = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert len(m["angles"]) == 4 and sorted(m["angles"]) == m["angles"]    # SFT turns on and on
    assert all(0 < angle < 90 for _, angle in (m["spectrum"], m["spectrum_null"]))
    assert len(m["restore"]) == 5 and len(m["interpolation"]) == 3
    assert all(v > 0 for pairs in m["drift"].values() for _, v in pairs)
    clipsft.main(["--resume", "--out_dir", str(out)])
    assert path.stat().st_mtime_ns == before     # what is finished is not computed again


def test_kill_and_resume_gives_the_same_bytes(finished, tmp_path):
    """kill -9 at random moments, then --resume: the same metrics, in other processes."""
    rng, out, kills = random.Random(time.time_ns()), tmp_path / "b", 0
    args = ["--preset", "smoke", "--out_dir", str(out)]
    for workers in "21":
        p = start(*args, "--workers", workers)
        while not (out / "metrics.jsonl").exists() and p.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        kills += p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.communicate()
        args = ["--out_dir", str(out), "--resume"]
    p = start(*args, "--workers", "1")
    err = p.communicate(timeout=100)[1]
    assert p.returncode == 0, err
    assert kills and files(out) == files(finished)


def test_a_finished_run_is_not_computed_again_nor_overwritten(finished, monkeypatch, capsys):
    before, stamp = files(finished), (finished / "cells" / "s0-sft.json").stat().st_mtime_ns
    monkeypatch.setattr(clipsft, "finetune", lambda *a: pytest.fail("computed again"))
    clipsft.main([*SMOKE, str(finished), "--resume"])
    assert files(finished) == before
    monkeypatch.setattr(sys, "argv", ["clipsft.py", *SMOKE, str(finished)])
    with pytest.raises(SystemExit) as e:
        run_main(clipsft.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.endswith("--out_dir\n") and "Traceback" not in err
    assert (finished / "cells" / "s0-sft.json").stat().st_mtime_ns == stamp


def test_a_damaged_part_of_a_run_is_named(finished):
    cell = finished / "cells" / "s0-sft.json"
    whole = cell.read_bytes()
    try:
        for damaged in (whole[:-9], b"", b"\xff" + whole[1:]):
            cell.write_bytes(damaged)
            with pytest.raises(BadInput, match=r"s0-sft.json.*\(a file in cells/ may be deleted"):
                clipsft.main([*SMOKE, str(finished), "--resume"])
    finally:
        cell.write_bytes(whole)
    clipsft.main([*SMOKE, str(finished), "--resume"])


def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "c"
    p = start("--preset", "smoke", "--base_steps", "100000", "--workers", "2", "--seeds", "2",
              "--out_dir", str(out))
    while not (out / "metrics.jsonl").exists() and p.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "--resume" in err and "Traceback" not in err


def test_seeds_whose_base_cannot_add_are_left_out(finished, capsys):
    c = Config(out_dir=str(finished), min_base=0.5)
    with pytest.raises(BadInput, match="no base can add"):
        clipsft.able(c)
    assert "seed 0 is left out" in capsys.readouterr().out
    assert clipsft.able(Config(out_dir=str(finished), min_base=0.0)) == [0]


def test_a_base_that_was_left_out_is_not_reported(finished, tmp_path):
    out = tmp_path / "a"
    shutil.copytree(finished, out)
    before = files(out)[1]
    other = json.loads(files(out)[0].splitlines()[0]) | dict(seed=9, id=1.0)
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(other) + "\n")
    ev.report(out)
    assert other["stage"] == "base" and files(out)[1] == before


def test_rl_from_a_checkpoint(finished, tmp_path, capsys):
    init = str(finished / "ckpt" / "s0-sft-8.pt")
    line = ["--rl_steps", "1", "--rl_prompts", "2", "--eval_n", "16", "--out",
            str(tmp_path / "x.pt"), "--init"]
    rl.main([*line, init])
    assert "after 1 GRPO steps" in capsys.readouterr().out
    load_checkpoint(tmp_path / "x.pt")
    with pytest.raises(BadInput, match="must not exist yet"):
        rl.main([*line, init])
    line[-2] = str(tmp_path / "y.pt")
    with pytest.raises(BadInput, match="cannot read"):
        rl.main([*line, str(tmp_path / "none")])
    with pytest.raises(BadInput, match="required"):
        rl.main([])


def test_data_prints_its_problems(capsys):
    data.main()
    text = capsys.readouterr().out
    assert "<eos>" in text and text.count("mask") == 7


def test_model_prints_its_speed(capsys):
    model.main(["--rows", "2", "--sample_rows", "8", "--n_embd", "8"])
    assert "tokens/s" in capsys.readouterr().out
