"""rl.py against values worked by hand and a GRPO step written once more with plain loops."""
import copy
import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import keyed, oracle
from torch.distributions import Categorical, kl_divergence

import data
import rl
from clipsft import Config
from model import kl_exact

C = Config(rl_prompts=4, rl_group=4, rl_updates=2, rl_steps=4, rl_lr=1e-3, temperature=1.3)


@pytest.mark.parametrize("adv, ratio, value, slope", [    # slope: d value / d logp
    (1, 0.5, 0.5, 0.5), (1, 1, 1, 1), (1, 1.25, 1.25, 1.25), (1, 2, 1.28, 0), (3, 1.5, 3.84, 0),
    (-1, 0.5, -0.8, 0), (-1, 0.9, -0.9, -0.9), (-1, 1, -1, -1), (-1, 2, -2, -2), (-2, 1.5, -3, -3),
    (1, math.exp(-30), math.exp(-20), 0), (-1, math.exp(30), -math.exp(20), 0)])    # held at +-20
def test_the_surrogate_and_its_slope_by_hand(adv, ratio, value, slope):
    logp = torch.tensor([[-1 + math.log(ratio)]], dtype=torch.double, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.double, requires_grad=True)
    gain = rl.clipped_surrogate(logp, old, torch.tensor([[float(adv)]]), 0.2, 0.28)
    gain.sum().backward()
    assert gain.item() == pytest.approx(value)
    assert logp.grad.item() == pytest.approx(slope)
    assert old.grad is None


@pytest.mark.parametrize("adv, clipped", [    # of the ratios .5, .85, 1, 1.25, 1.3
    (2, [0, 0, 0, 0, 1]), (-2, [1, 0, 0, 0, 0]), (0, [0, 0, 0, 0, 0])])
def test_what_is_clipped_by_hand(adv, clipped):
    old = torch.full((1, 5), -1.0)
    logp = old + torch.tensor([[0.5, 0.85, 1, 1.25, 1.3]]).log()
    got = rl.is_clipped(logp, old, torch.tensor([[adv]]), 0.2, 0.28)
    assert got.int().tolist() == [clipped]


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    # means 1/4, 1/2; unbiased variances (9/16 + 3/16) / 3 = 1/4 and (4 / 4) / 3 = 1/3
    half = 0.5 * math.sqrt(3)
    assert rl.group_advantage(rewards).tolist() == [
        pytest.approx([1.5, -0.5, -0.5, -0.5]), pytest.approx([half, half, -half, -half])]
    assert rl.group_advantage(rewards, "none").tolist() == [[0.75, -0.25, -0.25, -0.25],
                                                            [0.5, 0.5, -0.5, -0.5]]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_without_spread_the_advantage_is_exactly_0(scale):
    rewards = torch.tensor([[1.0] * 7, [0.0] * 6 + [1.0]])
    assert rl.group_advantage(rewards, scale).any(1).tolist() == [False, True]
    assert rl.has_spread(rewards).tolist() == [False, True]


def test_a_spread_of_rounding_is_none():
    third = 1 / 3
    rewards = torch.tensor([[third, third + 1e-7], [third, third + 1e-5]])
    assert rl.has_spread(rewards).tolist() == [False, True]
    assert rl.group_advantage(rewards)[0].tolist() == [0, 0]


@pytest.mark.parametrize("kind, reward", [("strict", 0), ("composite", 5 / 6)])
def test_rewards_by_hand(kind, reward):
    almost = data.Verdict(strict=False, any=True, error="sums", partial=5 / 6)
    right = data.Verdict(strict=True, any=True, error="", partial=1.0)
    assert rl.reward_of(almost, kind) == reward
    assert rl.reward_of(right, kind) == 1


@pytest.mark.parametrize("how, budget, mean", [
    ("token", 1, 11 / 4), ("sequence", 1, (2 + 5 + 0) / 3), ("constant", 1, 11 / 3),
    ("constant", 10, 11 / 30)])
def test_masked_means_by_hand(how, budget, mean):
    x = torch.tensor([[1.0, 2, 3, math.nan], [5, math.nan, 9, 9], [7, 7, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])    # what is masked may be NaN
    for same in (mask, mask.bool(), -2 * mask, mask / 2):
        assert rl.masked_mean(x, same, how, budget).item() == pytest.approx(mean)
    assert rl.masked_mean(x, 0 * mask, how, budget) == 0    # of nothing


def test_an_unknown_scale_mean_or_reward_is_named():
    with pytest.raises(ValueError, match="'var'"):
        rl.group_advantage(torch.ones(2, 2), "var")
    with pytest.raises(ValueError, match="'median'"):
        rl.masked_mean(torch.ones(2, 2), torch.ones(2, 2), "median")
    with pytest.raises(ValueError, match="'some'"):
        rl.reward_of(None, "some")


def test_k3_averages_to_the_kl():
    p = torch.tensor([0.7, 0.2, 0.1])
    ref = torch.tensor([0.1, 0.3, 0.6])
    kl = kl_divergence(Categorical(p), Categorical(ref))
    assert (p * rl.kl_k3(p.log(), ref.log())).sum().item() == pytest.approx(kl.item(), abs=1e-6)


def test_k3_by_hand_and_held_at_20():
    two = math.log(2)
    k3 = rl.kl_k3(torch.tensor([0.0, two, -1e4, 0.0]), torch.tensor([two, 0.0, 0.0, -1e4]))
    assert k3.tolist() == pytest.approx([1 - two, two - 0.5, math.exp(20) - 21, 19])


@pytest.fixture
def policy(tiny, monkeypatch):
    """A model of short responses: EOS is frequent, and there is room for six tokens."""
    monkeypatch.setattr(data, "MAX_NEW", 6)
    with torch.no_grad():
        tiny.transformer.ln_f.weight.fill_(1.0)
        tiny.transformer.ln_f.bias.fill_(0.3)
        tiny.lm_head.weight[data.EOS] = 0.5
    return tiny


def reward_by(monkeypatch, rule):
    """Let rule(problem, response) decide what share is right; strict is any."""
    def verify(problem, response):
        right = rule(problem, response)
        return data.Verdict(strict=right > 0, any=True, error="", partial=right)

    monkeypatch.setattr(data, "verify", verify)


def reward_in_turn(monkeypatch, rewards):
    turns = itertools.cycle(rewards)
    reward_by(monkeypatch, lambda problem, response: next(turns))


def test_each_problem_is_answered_n_times_without_eos(policy, monkeypatch):
    monkeypatch.setattr(data, "MAX_NEW", 3)
    problems = [data.Problem("S", (10, 10, 10), ("7", "K", "3", card)) for card in "245"]
    texts, ids, mask = rl.respond(policy, problems, 4, 1.0, keyed("noise"))
    assert len(texts) == 12
    for i, text in enumerate(texts):
        assert data.decode(ids[i, :10].tolist()) == problems[i // 4].prompt
        said = data.decode(ids[i][mask[i]].tolist())
        assert text == said.removesuffix("<eos>").strip()
    assert 0 < (ids == data.EOS).any(1).sum() < 12


@pytest.mark.parametrize("reward, worth", [("strict", 1), ("composite", 0.25)])
def test_a_rollout_asks_id_problems_of_the_rl_split_and_rewards_them(
        policy, monkeypatch, reward, worth):
    asked = []

    def quarter_for_a_two(problem, response):
        asked.append(problem)
        return 0.25 * ("2" in response)

    reward_by(monkeypatch, quarter_for_a_two)
    ids, mask, rewards = rl.rollout(policy, replace(C, reward=reward), 3, 1)
    assert asked == [problem for problem in asked[::4] for _ in range(4)]
    assert len(set(asked)) == 4
    assert all(data.split_of(problem.hand) == "rl" for problem in asked)
    assert {problem[:2] for problem in asked} == {("S", (10, 10, 10))}
    said = [data.decode(row[row_mask].tolist()) for row, row_mask in zip(ids, mask)]
    expected = [worth * ("2" in text) for text in said]
    assert rewards.flatten().tolist() == expected
    assert len(set(expected)) == 2


def test_seed_and_step_choose_the_problems_and_the_sample(policy):
    ids, _, _ = rl.rollout(policy, C, 3, 1)
    noise = keyed(1, "rollout", 3)
    again, _ = policy.generate(ids[::4, :10], 6, data.EOS, data.PAD, 4, 1.3, noise)
    assert ids.equal(again)
    for step, seed in ((1, 3), (3, 0), (2, 1)):
        assert not ids[:, :10].equal(rl.rollout(policy, C, step, seed)[0][:, :10])


GROUPS = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def plain_advantages(c):
    """Row number -> advantage, of the rows that are trained."""
    adv = {}
    for i, group in enumerate(GROUPS):
        if c.kl_coef == 0 and len(set(group)) == 1:    # only a KL acts there
            continue
        std = statistics.stdev(group) if c.adv_scale == "std" else 1
        for j, reward in enumerate(group):
            adv[4 * i + j] = (reward - sum(group) / 4) / (std or 1)
    return adv


def plain_gain(c, new, old, ref, adv):
    """What one token gains, and whether it is clipped: bounds .9 and 1.6."""
    ratio = math.exp(new.item() - old)
    clipped = (ratio > 1.6 and adv > 0) or (ratio < 0.9 and adv < 0)
    gain = (1.6 if ratio > 1 else 0.9) * adv if clipped else (new - old).exp() * adv
    k3 = (ref - new).exp() - 1 - (ref - new)
    return gain - c.kl_coef * k3, clipped


def plain_mean(c, gains):
    """gains: a list of each row's tokens."""
    if c.aggregate == "token":
        return sum(sum(row) for row in gains) / sum(len(row) for row in gains)
    if c.aggregate == "sequence":
        return sum(sum(row) / len(row) for row in gains) / len(gains)
    return sum(sum(row) for row in gains) / (6 * len(gains))


def plain_step(model, ref, c, step, sizes, lr):
    """Updates of `model` on so many rows each, by SGD -> the share of clipped
    tokens, the mean length of responses."""
    ids, mask, _ = rl.rollout(model, c, step, 3)
    adv = plain_advantages(c)
    old_logp = oracle(model, ids, 1.3).tolist()
    ref_logp = oracle(ref, ids, 1.3).tolist()
    was_clipped = []
    for part in torch.randperm(len(adv), generator=keyed(3, "rl-order", step)).split(sizes):
        logp = oracle(model, ids, 1.3)
        gains = []
        for row in [list(adv)[i] for i in part]:
            places = [t for t in range(ids.shape[1] - 1) if mask[row, t + 1]]
            tokens = [plain_gain(c, logp[row, t], old_logp[row][t], ref_logp[row][t], adv[row])
                      for t in places]
            gains.append([gain for gain, _ in tokens])
            was_clipped += [clipped for _, clipped in tokens]
        slopes = torch.autograd.grad(plain_mean(c, gains), list(model.parameters()))
        norm = math.sqrt(sum(slope.pow(2).sum() for slope in slopes))
        for p, slope in zip(model.parameters(), slopes):
            p.data += lr * slope / max(1, norm)
    lengths = [sum(row) for row in mask.tolist()]
    return sum(was_clipped) / len(was_clipped), sum(lengths) / len(ids)


@pytest.mark.parametrize("aggregate, scale, kl, step, sizes, lr", [    # a fifth more each step to 1
    ("token", "std", 0.0, 7, [6, 5, 5], 1.0), ("sequence", "none", 0.3, 0, [8, 8, 8], 0.2),
    ("constant", "none", 0.0, 4, [6, 5, 5], 1.0), ("token", "std", 0.3, 3, [8, 8, 8], 0.8)])
def test_a_step_is_that_of_plain_loops(policy, monkeypatch, aggregate, scale, kl, step, sizes, lr):
    c = replace(C, aggregate=aggregate, adv_scale=scale, kl_coef=kl, rl_prompts=6, rl_updates=3,
                rl_lr=1.0, rl_eps_low=0.1, rl_eps_high=0.6)
    reward_in_turn(monkeypatch, sum(GROUPS, []))
    plain = copy.deepcopy(policy)
    ref = copy.deepcopy(policy)
    for p in ref.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=keyed("ref"))
    stats = rl.grpo_step(policy, torch.optim.SGD(policy.parameters(), 9.0), c, step, 3, ref)
    clip_frac, length = plain_step(plain, ref, c, step, sizes, lr)
    for p, expected in zip(policy.parameters(), plain.parameters()):
        assert torch.allclose(p, expected, atol=1e-5)
    assert 0 < clip_frac < 1
    assert stats == pytest.approx(dict(reward=11 / 24, zero_spread=2 / 6, clip_frac=clip_frac,
                                       length=length))


@pytest.mark.parametrize("kl, n_updates", [(0.0, 0), (0.1, 2)])
def test_without_spread_only_a_kl_makes_updates(policy, monkeypatch, kl, n_updates):
    updates = []

    def counted(*args):
        updates.append(args)
        return torch.ones(())    # the norm of the gradient
    monkeypatch.setattr(rl, "update", counted)
    reward_in_turn(monkeypatch, [0])
    opt = torch.optim.SGD(policy.parameters())
    stats = rl.grpo_step(policy, opt, replace(C, kl_coef=kl), 0, 0, policy)
    assert len(updates) == n_updates
    assert stats["zero_spread"] == 1
    assert stats["clip_frac"] == 0


def test_each_update_in_bfloat16_uses_the_weights_of_its_moment(policy, monkeypatch):
    """Autocast keeps its copies of the weights until its region ends: it must not span a step."""
    errors = []
    score = rl.response_logprobs

    def watched(model, ids, mask, temperature):
        logp = score(model, ids, mask, temperature)
        if logp.requires_grad:
            error = (logp - oracle(model, ids, 1.3))[mask[:, 1:]]
            errors.append(error.abs().mean().item())
        return logp

    policy.config.bf16 = True
    reward_in_turn(monkeypatch, [1, 0])
    monkeypatch.setattr(rl, "response_logprobs", watched)
    assert len(list(rl.grpo(policy, None, replace(C, rl_updates=4, rl_lr=5e-2), 0))) == 4
    assert len(errors) == 4 * 4
    assert max(errors) < 0.05    # 0.7 on stale weights


@pytest.mark.parametrize("kl_coef", [0.0, 5.0])
def test_grpo_finds_a_reward_unless_a_kl_holds_it(policy, monkeypatch, kl_coef):
    """Rewarded is a response that begins with an even number."""
    even = [str(number) for number in range(0, 100, 2)]
    reward_by(monkeypatch, lambda problem, response: response.split(" ")[0] in even)
    monkeypatch.setattr(data, "MAX_NEW", 3)
    start = copy.deepcopy(policy)
    c = replace(C, rl_prompts=8, rl_group=8, rl_steps=25, rl_lr=3e-3, kl_coef=kl_coef)
    rewards = [stats["reward"] for stats in rl.grpo(policy, None, c, 0)]
    gain = statistics.mean(rewards[-5:]) - statistics.mean(rewards[:3])
    ids = torch.arange(80).view(8, 10)
    now, before = [Categorical(logits=model(ids)) for model in (policy, start)]
    moved = kl_divergence(now, before).mean()
    assert (gain > 0.3) == (kl_coef == 0)
    assert (moved < 0.1) == (kl_coef > 0)


@pytest.mark.parametrize("kl_to, approaches", [("base", True), ("start", False)])
def test_without_a_reward_a_kl_to_the_base_goes_there_and_one_to_the_start_stays(
        policy, kl_to, approaches):
    base = copy.deepcopy(policy)
    for p in base.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=keyed("base"))
    c = replace(C, rl_steps=12, kl_coef=1.0, kl_to=kl_to, rl_lr=2e-3)
    ids, _, _ = rl.rollout(policy, c, 0, 9)

    def distance():
        with torch.no_grad():
            return kl_exact(policy(ids), base(ids)).mean().item()
    before = distance()
    kept = copy.deepcopy(base)
    stats = list(rl.grpo(policy, base, c, 0))
    assert [found["reward"] for found in stats] == [0] * 12
    if approaches:
        assert distance() < 0.8 * before, (before, distance())
    else:
        assert distance() == pytest.approx(before, rel=0.1)
    assert all(map(torch.equal, base.parameters(), kept.parameters()))


def test_another_rollout_is_another_task(policy):
    """Every response that begins with the word 7 is rewarded: it becomes likely."""
    prompts = torch.tensor([data.encode(data.draw_id(random.Random(0), "rl").prompt)] * 4)
    seven = data.encode("7")[0]

    def sample(model, c, step, seed):
        ids, mask = model.generate(prompts, 4, data.EOS, data.PAD, c.rl_group, 1.0, keyed(step))
        return ids, mask, (ids[:, 10] == seven).float().view(4, c.rl_group).cpu()

    def likely():
        with torch.no_grad():
            return policy(prompts[:1])[0, -1].softmax(-1)[seven].item()
    before = likely()
    c = replace(C, rl_steps=20, rl_group=16, rl_lr=3e-3, temperature=1.0)
    stats = list(rl.grpo(policy, None, c, 0, sample))
    assert stats[-1]["reward"] > 2 * max(before, 0.01)
    assert likely() > 10 * before
