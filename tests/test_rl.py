"""rl.py against values worked by hand and a GRPO step written once more with plain loops."""
import copy
import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from conftest import oracle
from torch.distributions import Categorical, kl_divergence

import data
import rl
from eval import respond
from model import generator
from rl import clipped_surrogate, group_advantage, kl_k3, masked_mean, micro_batches

@pytest.mark.parametrize("adv, ratio, value, weight", [    # weight: of grad log pi, by hand
    (1, 0.5, 0.5, 0.5), (1, 1, 1, 1), (1, 1.25, 1.25, 1.25), (1, 2, 1.28, 0), (3, 1.5, 3.84, 0),
    (-1, 0.5, -0.8, 0), (-1, 0.9, -0.9, -0.9), (-1, 1, -1, -1), (-1, 2, -2, -2), (-2, 1.5, -3, -3),
    (1, math.exp(-30), math.exp(-20), 0.0), (-1, math.exp(30), -math.exp(20), 0.0)])    # +-20 held
def test_surrogate_and_its_gradient_by_hand(adv, ratio, value, weight):
    logp = torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.double, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.double, requires_grad=True)
    out = clipped_surrogate(logp, old, torch.tensor([[float(adv)]]), 0.2, 0.28)
    grad, none = torch.autograd.grad(out.sum(), (logp, old), allow_unused=True)
    assert none is None and (out.item(), grad.item()) == pytest.approx((value, weight))

@pytest.mark.parametrize("low", [0.01, 0.2, 0.99])
def test_in_clipped_sft_the_lower_bound_never_acts(low):
    logp = torch.linspace(-3, 1, 41, dtype=torch.double).requires_grad_()
    out, r = clipped_surrogate(logp, torch.zeros(41), 1.0, low, 0.28), logp.detach().exp()
    grad, = torch.autograd.grad(out.sum(), logp)
    assert torch.allclose(out, r.clamp(max=1.28)) and torch.allclose(grad, r * (r < 1.28))

def test_group_advantage_by_hand_and_exactly_zero_without_spread():
    r, h = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]), 0.75 ** 0.5
    # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4: (3/4) / (1/2) = 1.5
    assert group_advantage(r).allclose(torch.tensor([[1.5, -.5, -.5, -.5], [h, h, -h, -h]]))
    assert (4 * group_advantage(r, "none")).tolist() == [[3, -1, -1, -1], [2, 2, -2, -2]]
    for scale in ("std", "none"):                     # seven times .1 has no exact mean
        assert not group_advantage(torch.tensor([[0.1] * 7, [0.0] * 6 + [1.0]]), scale)[0].any()
        assert not group_advantage(torch.rand(5, 1), scale).any()

@pytest.mark.parametrize("how, budget, value, one", [("token", 1, 11 / 4, 2), (
    "sequence", 1, 3.5, 1), ("constant", 1, 11 / 2, 1), ("constant", 10, 0.55, 0.1)])
def test_masked_mean_by_hand_with_any_mask_that_is_zero_or_not(how, budget, value, one):
    x = torch.tensor([[1.0, 2, 3, math.nan], [5, math.nan, 9, 9]])    # what is masked may be NaN
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    for m in (mask.bool(), mask, mask.double(), -2 * mask, mask * 0.5):
        assert masked_mean(x, m, how, budget).item() == pytest.approx(value)
        assert masked_mean(x, m * 0 > 0, how, budget) == 0             # of nothing 0, not NaN
    assert masked_mean(x, mask * (x == 2), how, budget).item() == pytest.approx(one)
    assert masked_mean(x, mask) == 11 / 4                              # per token unless told

def test_k3_estimates_the_kl_of_its_samples_and_has_a_direction():
    (p, q), two = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]), math.log(2.0)
    k3, P, Q = kl_k3(p.log(), q.log()), Categorical(p), Categorical(q)    # each outcome of pi
    assert (k3 >= 0).all() and abs(kl_divergence(P, Q) - kl_divergence(Q, P)) > 0.05
    assert (p * k3).sum().item() == pytest.approx(kl_divergence(P, Q).item(), abs=1e-6)
    got = kl_k3(torch.tensor([0.0, two, -1e4, 0.0]), torch.tensor([two, 0.0, 0.0, -1e4]))    # +-20
    assert got.tolist() == pytest.approx([1 - two, two - 0.5, math.e ** 20 - 21, 19])

@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_micro_batches_sum_to_the_mean_of_the_whole_batch(how, n):
    new, t = torch.tensor([[5], [1], [3], [1], [8]]), torch.arange(10)    # after prompts of two
    mask, x = (t >= 2) & (t < 2 + new), torch.randn(5, 10, generator=generator("cpu", 0))
    rows, shares = zip(*micro_batches(mask, how, n))
    parts = [s * masked_mean(x[r], mask[r], how, 9).item() for r, s in zip(rows, shares)]
    assert sum(parts) == pytest.approx(masked_mean(x, mask, how, 9).item(), abs=1e-6)
    assert len(rows) == min(n, 5) and max(map(len, rows)) == math.ceil(5 / n)
    assert torch.cat(rows).tolist() == ([1, 3, 2, 0, 4] if n > 1 else [0, 1, 2, 3, 4])
    assert [s for _, s in micro_batches(torch.tensor([[False, True]]), how, n)] == [1]
    assert all(s <= 1 for _, s in micro_batches(mask & False, how, n))    # of nothing: not NaN

C = rl.RLConfig(rl_prompts=4, rl_group=4, rl_updates=2, rl_steps=4, rl_lr=1e-3, temperature=1.3)

def reward(tiny, monkeypatch, won=(1, 0), rule=None, max_new=6):
    """Let rule(problem, text) decide, or won in turn; responses are short, EOS is frequent."""
    turn = itertools.cycle(won)
    rule = rule or (lambda p, text: next(turn))
    monkeypatch.setattr(data, "verify", lambda p, text: data.Verdict(rule(p, text), True))
    monkeypatch.setattr(data, "MAX_NEW", max_new)
    tiny.transformer.ln_f.load_state_dict(dict(weight=torch.ones(32), bias=torch.full((32,), 0.3)))
    tiny.lm_head.weight.data[data.EOS] = 0.5

def test_rollout_draws_from_the_rl_split_and_counts_what_was_cut(tiny, monkeypatch):
    seen = []
    reward(tiny, monkeypatch, rule=lambda p, text: seen.append((p, text)) or "2" in text)
    ids, mask, rewards, truncated = rl.rollout(tiny, C, 3, 1)
    problems, won = [p for p, _ in seen[::4]], [float("2" in text) for _, text in seen]
    assert [p for p, _ in seen] == [p for p in problems for _ in range(4)] and len({*problems}) == 4
    assert all(data.split_of(p.hand) == "rl" and p.rule in data.ID_RULES for p in problems)
    assert rewards.shape == (4, 4) and rewards.flatten().tolist() == won and 0 < sum(won) < 16
    said = [row[m].tolist() for row, m in zip(ids, mask)]
    assert [data.decode([t for t in s if t != data.EOS]) for s in said] == [t for _, t in seen]
    assert 0 < truncated < 1 and truncated == sum(data.EOS not in s for s in said) / 16
    assert ids.equal(respond(tiny, problems, 4, 1.3, generator("cpu", 1, "rollout", 3))[1])
    assert not any(ids[:, :9].equal(rl.rollout(tiny, C, *k)[0][:, :9]) for k in ((1, 1), (3, 0)))

@pytest.mark.parametrize("aggregate, scale, kl, accum, at, lr", [
    ("token", "std", 0.0, 1, 7, 1.0), ("sequence", "none", 0.3, 2, 0, 0.2),
    ("constant", "none", 0.0, 3, 4, 1.0), ("token", "none", 0.3, 2, 3, 0.8)])
def test_a_whole_step_by_plain_loops(tiny, monkeypatch, aggregate, scale, kl, accum, at, lr):
    """Two updates written down once more token by token, in float64 by the oracle's log-probs."""
    groups = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    reward(tiny, monkeypatch, itertools.chain(*groups))
    c = dataclasses.replace(C, aggregate=aggregate, adv_scale=scale, kl_coef=kl, grad_accum=accum,
                            rl_lr=1.0, rl_eps_low=0.1, rl_eps_high=0.6, rl_prompts=6)
    model, trained, ref = (copy.deepcopy(tiny) for _ in range(3))
    for p in ref.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator("cpu", 1)))
    stats = rl.grpo_step(trained, [torch.optim.SGD(trained.parameters(), 1.0)], c, at, 3, ref)
    ids, mask, _, truncated = rl.rollout(tiny, c, at, 3)
    assert len(set(mask.sum(1).tolist())) > 3
    adv = {4 * g + j: (x - sum(group) / 4) / (statistics.stdev(group) if scale == "std" else 1)
           for g, group in enumerate(groups) if kl or len(set(group)) > 1    # only a KL acts there
           for j, x in enumerate(group)}
    old, start = (oracle(m, ids, 1.3).tolist() for m in (tiny, ref))
    clipped, tokens, order = 0, 0, torch.randperm(
        len(adv), generator=generator("cpu", 3, "rl-order", at))
    for rows in order.chunk(2):
        logp, per_row = oracle(model, ids, 1.3), []
        for i in [list(adv)[i] for i in rows]:
            per_row.append([])
            for t in mask[i, 1:].nonzero().flatten().tolist():
                new, a, f = logp[i, t], adv[i], start[i][t] - logp[i, t]
                r = (new - old[i][t]).exp()
                inside = 0.9 <= r <= 1.6 or (r < 0.9 and a > 0) or (r > 1.6 and a < 0)
                gain = r * a if inside else (0.9 if r < 0.9 else 1.6) * a
                per_row[-1].append(gain - kl * (f.exp() - 1 - f))
                clipped, tokens = clipped + (not inside and a != 0), tokens + 1
        sums, n = [sum(row) for row in per_row], [len(row) for row in per_row]
        mean = {"token": sum(sums) / sum(n), "constant": sum(sums) / (len(rows) * 6),
                "sequence": sum(x / k for x, k in zip(sums, n)) / len(rows)}[aggregate]
        grads = torch.autograd.grad(mean, list(model.parameters()))
        norm = math.sqrt(sum(g.pow(2).sum() for g in grads))
        for p, g in zip(model.parameters(), grads):
            p.data.add_(lr * g / max(1, norm))        # lr warmed up, gradient norm clipped to 1
    assert all(torch.allclose(*p, atol=1e-5) for p in zip(model.parameters(), trained.parameters()))
    assert 0 < clipped < tokens and stats == dict(
        reward=pytest.approx(11 / 24), rollout_truncated=truncated,
        zero_spread=pytest.approx(2 / 6), clip_frac=pytest.approx(clipped / tokens))

def test_without_spread_only_a_kl_makes_updates(tiny, monkeypatch):
    reward(tiny, monkeypatch, [0])
    updates = []
    monkeypatch.setattr(rl, "update", lambda *args: updates.append(args))
    for kl, expected in ((0.0, 0), (0.1, 2)):
        stats = rl.grpo_step(tiny, None, dataclasses.replace(C, kl_coef=kl), 0, 0, tiny)
        assert len(updates) == expected and stats["zero_spread"] == 1 and stats["clip_frac"] == 0

def test_every_update_in_bfloat16_uses_the_weights_of_its_moment(tiny, monkeypatch):
    """Autocast keeps its casts of the weights until its region ends: it must not span a step."""
    reward(tiny, monkeypatch)
    tiny.config.bf16, errors, score, before = True, [], rl.response_logprobs, copy.deepcopy(tiny)

    def scored(model, ids, mask, T):
        got, m = score(model, ids, mask, T), mask[:, 1:]
        if got.requires_grad:
            errors.append((got - oracle(model, ids, 1.3))[m].abs().mean().item())
        return got
    monkeypatch.setattr(rl, "response_logprobs", scored)
    list(rl.grpo(tiny, dataclasses.replace(C, rl_updates=4, grad_accum=2, rl_lr=5e-2), 0))
    assert len(errors) == 4 * 4 * 2 and max(errors) < 0.05    # 0.7 on stale weights
    assert not any(map(torch.equal, before.parameters(), tiny.parameters()))

def test_grpo_raises_the_reward_and_a_kl_holds_the_policy_near_its_start(tiny, monkeypatch):
    """Reward: the response begins with an even number. A real policy gradient finds that."""
    even, ids, moved = {*map(str, range(0, 100, 2))}, torch.arange(80).view(8, 10), []
    reward(tiny, monkeypatch, rule=lambda p, text: text.split(" ")[0] in even, max_new=3)
    for coef in (0.0, 5.0):
        model = copy.deepcopy(tiny)
        c = dataclasses.replace(C, rl_prompts=8, rl_group=8, rl_steps=25, rl_lr=3e-3, kl_coef=coef)
        steps, log = zip(*rl.grpo(model, c, 0))
        gain = sum(s["reward"] for s in log[-5:]) / 5 - sum(s["reward"] for s in log[:3]) / 3
        moved.append(kl_divergence(*(Categorical(logits=m(ids)) for m in (model, tiny))).mean())
        assert steps == tuple(range(1, 26)) and (gain > 0.3) == (coef == 0)
    assert moved[1] < 0.2 * moved[0]
