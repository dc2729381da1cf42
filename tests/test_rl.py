import copy
import dataclasses
import math
import statistics

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import data
import rl
from eval import respond
from model import generator, kl_exact, load_checkpoint, response_logprobs
from rl import clipped_surrogate, group_advantage, kl_k3, masked_mean, micro_batches


# ---- the surrogate
@pytest.mark.parametrize("adv,ratio,value,weight", [     # weight on grad log pi, by hand
    (1, 0.5, 0.5, 0.5), (1, 1.0, 1.0, 1.0), (1, 1.25, 1.25, 1.25), (1, 2.0, 1.28, 0.0),
    (-1, 0.5, -0.8, 0.0), (-1, 0.9, -0.9, -0.9), (-1, 1.0, -1.0, -1.0), (-1, 2.0, -2.0, -2.0),
    (3, 1.5, 3.84, 0.0), (-2, 1.5, -3.0, -3.0),
])
def test_surrogate_sign_grid(adv, ratio, value, weight):
    logp = torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.double, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.double, requires_grad=True)
    out = clipped_surrogate(logp, old, torch.tensor([[float(adv)]]), 0.2, 0.28)
    out.sum().backward()
    assert out.item() == pytest.approx(value) and logp.grad.item() == pytest.approx(weight)
    assert old.grad is None       # no gradient through the old policy


def test_surrogate_survives_extreme_log_probabilities():
    logp = torch.tensor([[-1e4, 0.0, -1e4, 0.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1e4, 0.0, -1e4]])
    adv = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    out = clipped_surrogate(logp, old, adv, 0.2, 0.28)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(logp.grad).all()
    assert out[0, 1].item() == pytest.approx(1.28)
    assert out[0, 0].item() == pytest.approx(0, abs=1e-6)
    far = clipped_surrogate(torch.tensor([-30.0, 30.0]), torch.zeros(2), torch.tensor([1.0, -1.0]),
                            0.2, 0.28)
    assert far.tolist() == pytest.approx([math.e ** -20, -math.e ** 20])    # held within +-20


# ---- advantages
def test_group_advantage_by_hand():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4: (3/4) / (1/2) = 1.5
    assert torch.allclose(group_advantage(r), torch.tensor(
        [[1.5, -0.5, -0.5, -0.5], [0.75 ** 0.5, 0.75 ** 0.5, -0.75 ** 0.5, -0.75 ** 0.5]]))
    pair = group_advantage(torch.tensor([[1.0, 0.0]]))       # unbiased: 1/2 over the root of 1/2
    assert pair.tolist()[0] == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5])
    assert torch.allclose(group_advantage(r, "none")[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_groups_without_spread_and_groups_of_one_are_zero(scale):
    assert (group_advantage(torch.full((3, 8), 0.1), scale) == 0).all()
    assert (group_advantage(torch.rand(5, 1), scale) == 0).all()
    # exactly zero although seven times .1 has no exact mean, and whatever the other groups are
    adv = group_advantage(torch.tensor([[0.1] * 7, [0.0] * 6 + [1.0], [0.0] * 7]), scale)
    assert (adv[[0, 2]] == 0).all() and (adv[1] != 0).all()


# ---- means
X = torch.tensor([[1.0, 2, 3, 9], [5, 9, 9, 9]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()


def test_masked_mean_by_hand():
    assert masked_mean(X, MASK, "token").item() == masked_mean(X, MASK).item() == 11 / 4
    assert masked_mean(X, MASK & (X == 3)).item() == 3                  # one token alone
    assert masked_mean(X, MASK, "constant").item() == 11 / 2
    assert masked_mean(X, MASK, "sequence").item() == (2 + 5) / 2
    assert masked_mean(X, MASK, "constant", 10).item() == pytest.approx(11 / 20)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_masked_mean_invariances(how):
    base = masked_mean(X, MASK, how, 10)
    assert masked_mean(X.flip(0), MASK.flip(0), how, 10) == base
    wide = torch.cat([X, torch.full((2, 3), math.nan)], 1)
    wide_mask = torch.cat([MASK, torch.zeros(2, 3).bool()], 1)
    assert masked_mean(wide, wide_mask, how, 10) == base
    nothing = torch.zeros_like(MASK)
    assert masked_mean(X, nothing, how, 10) == 0


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_micro_batches_give_the_gradient_of_the_full_batch(tiny, how, n):
    ids, mask = data.batch([("S 10 >", "1 2 3 4 5"), ("M >", "7"), ("S >", "1 2"), ("S 2 >", "1"),
                            ("R 3 >", "9 8 7 6 5 4 3 2")])

    def gradient(parts):
        tiny.zero_grad()
        for rows, share in parts:
            logp = response_logprobs(tiny, ids[rows], mask[rows])
            (share * masked_mean(-logp, mask[rows, 1:], how, 9)).backward()
        return torch.cat([p.grad.flatten() for p in tiny.parameters()])
    one = gradient([(torch.arange(5), 1.0)])
    many = gradient(micro_batches(mask, how, n))
    assert torch.allclose(one, many, atol=1e-5) and one.norm() > 0.1


# ---- KL
P, Q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])


def test_the_share_of_a_batch_of_one_token():
    assert [share for _, share in micro_batches(torch.tensor([[False, True]]), "token", 1)] == [1]


def test_exact_kl_against_torch_and_its_direction():
    expected = kl_divergence(Categorical(P), Categorical(Q)).item()
    got = kl_exact(P.log()[None] + 5, Q.log()[None] - 3).item()
    assert got == pytest.approx(expected, abs=1e-5)
    assert abs(expected - kl_divergence(Categorical(Q), Categorical(P)).item()) > 0.05


def test_k3_is_unbiased_for_samples_of_pi_and_by_hand():
    k3 = kl_k3(P.log(), Q.log())            # one term for each outcome of pi
    assert (k3 >= 0).all()
    assert (P * k3).sum().item() == pytest.approx(kl_exact(P.log(), Q.log()).item(), abs=1e-5)
    assert kl_k3(torch.tensor(0.0), torch.tensor(math.log(2.0))).item() == \
        pytest.approx(2 - 1 - math.log(2))
    far = kl_k3(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))     # held within +-20
    assert far.tolist() == pytest.approx([math.e ** 20 - 21, 19])
    stacked = kl_exact(torch.stack([P, Q]).log()[None], torch.stack([Q, Q]).log()[None])
    assert stacked.shape == (1, 2) and stacked[0, 1] == 0 < stacked[0, 0]  # one value a position


# ---- GRPO
class Ctx:
    """A GRPO setting small enough for a test."""
    c = rl.RLConfig(rl_prompts=4, rl_group=4, rl_updates=2, rl_steps=4, eval_n=16, rl_lr=1e-3)


def fake_reward(monkeypatch, rule):
    monkeypatch.setattr(rl.data, "verify", lambda p, text: data.Verdict(True, rule(text), True))


def test_rollout_uses_the_rl_split_the_id_rule_and_counts_truncation(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(rl.data, "verify",
                        lambda p, text: seen.append((p, text)) or data.Verdict(True, True, True))
    ids, mask, rewards, truncated = rl.rollout(tiny, Ctx.c, 0, 0)
    assert rewards.shape == (4, 4) and rewards.min() == 1
    problems = [p for p, _ in seen]
    assert problems[0] == problems[3] != problems[4]
    assert all(data.split_of(p.hand) == "rl" and p.rule == (10, 10, 10) for p in problems)
    for i, (p, text) in enumerate(seen):
        said = ids[i][mask[i]].tolist()
        assert data.decode(ids[i, :10].tolist()) == p.prompt
        assert data.decode([t for t in said if t != data.EOS]) == text
        assert data.EOS not in said[:-1]
    cut = [data.EOS not in ids[i][mask[i]].tolist() for i in range(16)]
    assert truncated == pytest.approx(sum(cut) / 16) and 0 < sum(cut)
    # every draw is keyed by seed and step, so a resumed run has the same
    again = respond(tiny, problems[::4], Ctx.c.max_new, 4, 1.0, generator("cpu", 0, "rollout", 0))
    assert torch.equal(ids, again[1])
    for step, seed in ((1, 0), (0, 1)):
        assert not torch.equal(ids, rl.rollout(tiny, Ctx.c, step, seed)[0])


def test_the_first_update_is_the_policy_gradient(tiny, monkeypatch):
    """Before any update r = 1, so the gradient is that of sum A log pi / tokens, by autograd."""
    fake_reward(monkeypatch, lambda text: len(text) % 2 == 0)
    c = dataclasses.replace(Ctx.c, rl_updates=1, temperature=1.3)
    ids, mask, rewards, _ = rl.rollout(tiny, c, 0, 0)
    spread = (rewards.amax(1) > rewards.amin(1)).sum().item()
    assert spread > 0
    loss, tokens = 0.0, 0
    for i in range(16):
        group = rewards[i // 4].double()
        if group.max() == group.min():
            continue
        a = (group[i % 4] - group.mean()) / group.var(unbiased=True).sqrt()
        logits = tiny(ids[i:i + 1, :-1])[0] / 1.3
        for t in mask[i].nonzero().flatten().tolist():
            loss = loss - a * logits[t - 1].log_softmax(-1)[ids[i, t]]
            tokens += 1
    expected = torch.autograd.grad(loss / tokens, list(tiny.parameters()))
    got = []

    def capture(model, opt, lr):
        got.append((lr, [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    monkeypatch.setattr(rl, "update", capture)
    stats = rl.grpo_step(tiny, None, c, 0, 0)
    lr, grads = got[0]
    assert len(got) == 1 and lr == pytest.approx(1e-3 / 5)          # warm-up: a fifth at step 0
    assert all(torch.allclose(a.float(), b, atol=1e-5) for a, b in zip(expected, grads))
    assert stats["clip_frac"] == 0 and stats["zero_spread"] == 1 - spread / 4


@pytest.mark.parametrize("aggregate, scale, kl, accum", [
    ("token", "std", 0.0, 1), ("sequence", "none", 0.3, 2), ("constant", "none", 0.0, 3),
    ("token", "none", 0.3, 2)])
def test_a_whole_step_by_plain_loops(tiny, monkeypatch, aggregate, scale, kl, accum):
    """Two updates, written down once more token by token: gradients, learning rate, clip_frac."""
    def verify(p, text):        # a hand with 2 always wins, one with 3 never, others by chance
        won = "2" in p.hand or ("3" not in p.hand and len(text) % 2 == 0)
        return data.Verdict(True, won, True)
    monkeypatch.setattr(rl.data, "verify", verify)
    tiny.transformer.ln_f.bias.data.fill_(0.3)
    tiny.lm_head.weight.data[data.EOS] += 0.3      # an EOS now and then: rows of unequal length
    c = dataclasses.replace(Ctx.c, aggregate=aggregate, adv_scale=scale, kl_coef=kl, max_new=6,
                            grad_accum=accum, temperature=1.3, rl_eps_low=0.1, rl_eps_high=0.15,
                            rl_prompts=8)
    ref = copy.deepcopy(tiny)
    for q in ref.parameters():
        q.data.add_(0.05 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1)))
    got = []

    def descend(model, opt, lr):
        got.append((lr, [q.grad.clone() for q in model.parameters()]))
        for q in model.parameters():
            q.data.sub_(0.5 * q.grad)
            q.grad = None
    monkeypatch.setattr(rl, "update", descend)
    stats = rl.grpo_step(copy.deepcopy(tiny), None, c, 7, 3, ref)

    ids, mask, rewards, truncated = rl.rollout(tiny, c, 7, 3)
    adv = {}
    for g, group in enumerate(rewards.tolist()):
        if kl or len(set(group)) > 1:
            spread = statistics.stdev(group) if scale == "std" else 1
            adv |= {4 * g + j: (x - sum(group) / 4) / spread for j, x in enumerate(group)}
    assert {0, 1} < {sum(group) / 4 for group in rewards.tolist()}
    assert len(set(mask.sum(1).tolist())) > 3 and (len(adv) == 32) == (kl > 0)

    def logp(model, i):
        z = model(ids[i:i + 1])[0] / 1.3
        return [z[t - 1].log_softmax(-1)[ids[i, t]] for t in mask[i].nonzero().flatten().tolist()]
    with torch.no_grad():
        old, start = ({i: logp(m, i) for i in adv} for m in (tiny, ref))
    model, clipped, tokens = copy.deepcopy(tiny), 0, 0
    order = torch.randperm(len(adv), generator=generator("cpu", 3, "rl-order", 7))
    for rows, (lr, grads) in zip(order.chunk(2), got):
        rows, per_row = [list(adv)[i] for i in rows], []
        for i in rows:
            per_row.append([])
            for new, o, f in zip(logp(model, i), old[i], start[i]):
                r, a = (new - o).exp(), adv[i]
                inside = 0.9 <= r <= 1.15 or (r < 0.9 and a > 0) or (r > 1.15 and a < 0)
                gain = r * a if inside else (0.9 if r < 0.9 else 1.15) * a
                per_row[-1].append(gain - kl * ((f - new).exp() - 1 - (f - new)))
                clipped, tokens = clipped + (not inside and a != 0), tokens + 1
        sums, n = [sum(row) for row in per_row], [len(row) for row in per_row]
        mean = {"token": sum(sums) / sum(n), "constant": sum(sums) / (len(rows) * 6),
                "sequence": sum(x / k for x, k in zip(sums, n)) / len(rows)}[aggregate]
        expected = torch.autograd.grad(-mean, list(model.parameters()))
        assert lr == c.rl_lr                                                # warmed up by step 4
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, grads))
        for q, grad in zip(model.parameters(), expected):
            q.data.sub_(0.5 * grad)
    assert len(got) == 2 and 0 < clipped < tokens
    assert stats == dict(reward=rewards.mean().item(), rollout_truncated=truncated,
                         zero_spread=sum(len({*g}) == 1 for g in rewards.tolist()) / 8,
                         clip_frac=pytest.approx(clipped / tokens))


def test_no_spread_no_update(tiny, monkeypatch):
    fake_reward(monkeypatch, lambda text: False)
    monkeypatch.setattr(rl, "update", lambda *a: pytest.fail("updated without a signal"))
    stats = rl.grpo_step(tiny, None, Ctx.c, 0, 0)
    assert stats["zero_spread"] == 1 and stats["reward"] == 0


def test_zero_learning_rate_never_clips(tiny, monkeypatch):
    from model import adamw
    fake_reward(monkeypatch, lambda text: len(text) % 2 == 0)
    c = dataclasses.replace(Ctx.c, rl_lr=1e-30, rl_eps_low=1e-4, rl_eps_high=1e-4)
    assert rl.grpo_step(tiny, adamw(tiny, 1.0), c, 0, 0)["clip_frac"] == 0
    c = dataclasses.replace(c, rl_lr=1e-2)
    assert rl.grpo_step(tiny, adamw(tiny, 1.0), c, 5, 0)["clip_frac"] > 0


def test_grpo_raises_the_reward(tiny, monkeypatch):
    """Reward: the response begins with an even number. A real policy gradient finds that."""
    fake_reward(monkeypatch, lambda text: text.split(" ")[0].isdigit()
                and int(text.split(" ")[0]) % 2 == 0)
    c = dataclasses.replace(Ctx.c, rl_prompts=8, rl_group=8, rl_steps=25, max_new=3, rl_lr=3e-3)
    log = []
    rl.grpo(tiny, c, 0, tick=lambda **s: log.append(s["reward"]))
    assert sum(log[-5:]) / 5 > sum(log[:3]) / 3 + 0.3


def test_grpo_runs_every_step_with_its_seed_and_averages_the_last_ten(tiny, monkeypatch):
    seen = []

    def step_of(model, opt, c, step, seed, ref):
        seen.append((step, seed, torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))
        return dict(reward=float(step), rollout_truncated=0.5, zero_spread=0.25)
    monkeypatch.setattr(rl, "grpo_step", step_of)
    c = dataclasses.replace(Ctx.c, rl_steps=12, dtype="bf16")
    assert rl.grpo(tiny, c, 7) == dict(reward=6.5, rollout_truncated=0.5, zero_spread=0.25,
                                       clip_frac=0.0)                     # mean of 2 .. 11
    assert seen == [(i, 7, torch.bfloat16, True) for i in range(12)]


def test_kl_holds_the_policy_near_its_start(tiny, monkeypatch):
    fake_reward(monkeypatch, lambda text: len(text) % 2 == 0)
    moved = []
    for coef in (0.0, 5.0):
        model = copy.deepcopy(tiny)
        rl.grpo(model, dataclasses.replace(Ctx.c, kl_coef=coef, rl_steps=12, max_new=4), 0)
        ids = torch.randint(0, 120, (8, 10), generator=torch.Generator().manual_seed(0))
        moved.append(kl_exact(model(ids), tiny(ids)).mean().item())
    assert moved[1] < 0.5 * moved[0]


def test_grpo_resumes_bitwise(tiny, tmp_path, monkeypatch):
    fake_reward(monkeypatch, lambda text: len(text) % 2 == 0)
    for coef in (0.0, 0.1):
        c = dataclasses.replace(Ctx.c, kl_coef=coef)
        whole = copy.deepcopy(tiny)
        stats = rl.grpo(whole, c, 0)
        part = copy.deepcopy(tiny)

        class Killed(Exception):
            pass
        steps = []

        def tick(**_):
            steps.append(1)
            if len(steps) == 4:
                raise Killed
        with pytest.raises(Killed):
            rl.grpo(part, c, 0, tmp_path / "x", save_every=3, tick=tick)
        model, state = load_checkpoint(tmp_path / "x")
        assert state["step"] == 3
        assert rl.grpo(model, c, 0, state=state) == stats
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))
