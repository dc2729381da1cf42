"""rl.py - the clipped surrogate that SFT and RL share, and GRPO on in-distribution prompts.

One step: sample G responses to each of P prompts, reward each by the verifier, compare it with its
group, and by PPO's clipped surrogate raise the better ones and lower the worse.
Shapes: P prompts, G responses a prompt, B = P * G rows, T tokens.
"""
import copy
import random

import torch

import data
from model import adamw, generator, response_logprobs, set_lr, trim, update


def clipped_surrogate(logp, old_logp, adv, eps_low, eps_high):
    """Per-token PPO objective, to be maximised. logp, old_logp (B, T), adv broadcasts, -> (B, T).

    With adv = 1 this is clipped SFT: the lower bound never acts, min(r, clip(r)) = min(r, 1+eps).
    The log-ratio is held within +-20, so that exp never overflows."""
    # r_t = pi(y_t) / pi_old(y_t)                                              PPO, 1707.06347 eq. 6
    ratio = (logp - old_logp.detach()).clamp(-20, 20).exp()
    # min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)               PPO eq. 7; two bounds: DAPO eq. 8
    return torch.min(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)


def is_clipped(logp, old_logp, adv, eps_low, eps_high):
    """Which tokens are past the bound, where clipped_surrogate gives no gradient: the ratio is too
    high for adv > 0, too low for adv < 0. Arguments as there -> (B, T) bool."""
    ratio = (logp - old_logp).exp()
    too_high = (adv > 0) & (ratio > 1 + eps_high)
    too_low = (adv < 0) & (ratio < 1 - eps_low)
    return too_high | too_low


def group_advantage(rewards, scale="std"):
    """rewards (P, G) float -> advantages (P, G). A group without spread teaches nothing: exactly 0.
    scale 'std': GRPO, with n - 1 as in TRL and verl; 'none': Dr. GRPO."""
    # A_i = R_i - mean(R)                                                      Dr. GRPO 2503.20783
    adv = rewards - rewards.mean(1, keepdim=True)
    if scale == "std":
        # A_i = (R_i - mean(R)) / std(R)                                GRPO 2402.03300 sec. 4.1.2
        adv = adv / rewards.std(1, keepdim=True).clamp(min=1e-6)
    elif scale != "none":
        raise ValueError(f"scale is 'std' or 'none', not {scale!r}")
    return torch.where(has_spread(rewards)[:, None], adv, 0.0)


def has_spread(rewards):
    """Of which groups the rewards differ, by more than rounding: (P, G) -> (P,) bool."""
    return rewards.amax(1) - rewards.amin(1) > 1e-6


def masked_mean(x, mask, how="token", budget=1):
    """Scalar mean of x (B, T) where mask (B, T) is not 0; of nothing it is 0, not NaN.
    token: every token of the batch weighs the same (DAPO, PSFT). sequence: the mean over rows of
    each row's own mean (GRPO, paper 1's code). constant: sum / (B * budget), budget the longest
    response allowed (Dr. GRPO)."""
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)    # where, not *: NaN * 0 is NaN
    if how == "token":
        return x.sum() / mask.sum().clamp(min=1)
    if how == "sequence":
        return (x.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if how == "constant":
        return x.sum() / (len(x) * budget)
    raise ValueError(f"a mean is 'token', 'sequence' or 'constant', not {how!r}")


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(pi || ref) at tokens sampled from pi, (B, T) -> (B, T) nats:
    unbiased and never negative. (Differentiated, it is the gradient of KL(ref || pi).)"""
    # k3 = ref/pi - 1 - log(ref/pi)                                          GRPO, 2402.03300 eq. 4
    log_ratio = (ref_logp - logp).clamp(-20, 20)
    return torch.expm1(log_ratio) - log_ratio


def respond(model, problems, n=1, temperature=0.0, noise=None):
    """Let the model answer each problem n times, all at once; temperature 0 is greedy.
    -> B = n * len(problems) texts without <eos>, ids (B, T), mask (B, T) True at sampled tokens."""
    prompts = torch.tensor([data.encode(problem.prompt) for problem in problems])
    ids, mask = model.generate(prompts.to(model.device), data.MAX_NEW, data.EOS, data.PAD, n,
                               temperature, noise)
    texts = []
    for row, row_mask in zip(ids.tolist(), mask.tolist()):
        said = [token for token, kept in zip(row, row_mask) if kept and token != data.EOS]
        texts.append(data.decode(said))
    return texts, ids, mask


def reward_of(verdict, kind):
    """strict: 1 if all is right, else 0; composite: for each right step and for the right cards and
    total a part of 1 (data.Verdict)."""
    if kind == "strict":
        return float(verdict.strict)
    if kind == "composite":
        return verdict.partial
    raise ValueError(f"a reward is 'strict' or 'composite', not {kind!r}")


def rollout(model, c, step, seed):
    """Sample c.rl_group responses to c.rl_prompts fresh ID problems of the rl split.
    -> ids (B, T), mask (B, T) True at sampled tokens, rewards (P, G) on the CPU."""
    rng = random.Random(f"{seed}/rl/{step}")
    problems = [data.draw_id(rng, "rl") for _ in range(c.rl_prompts)]
    noise = generator(model.device, seed, "rollout", step)
    texts, ids, mask = respond(model, problems, c.rl_group, c.temperature, noise)
    rewards = []
    for i, text in enumerate(texts):
        problem = problems[i // c.rl_group]    # the responses to a problem are neighbours
        rewards.append(reward_of(data.verify(problem, text), c.reward))
    return ids, mask, torch.tensor(rewards).view(c.rl_prompts, c.rl_group)


def grpo_step(model, opt, c, step, seed, ref, sample=rollout):
    """One rollout and c.rl_updates updates of `model` in place. ref: the policy that the KL is to.
    sample: a rollout, on another task than the cards if need be. -> dict of statistics: the mean
    reward, the shares of clipped tokens and of groups without spread, the mean length in tokens."""
    ids, mask, rewards = sample(model, c, step, seed)
    spread = has_spread(rewards)                                             # (P,)
    adv = group_advantage(rewards, c.adv_scale)                              # (P, G)
    stats = dict(reward=rewards.mean().item(), clip_frac=0.0,
                 zero_spread=(~spread).float().mean().item(),
                 length=mask.sum(1).float().mean().item())
    if c.kl_coef == 0:
        # Groups without spread have no gradient: they are left out, and the means below are over
        # the rows that are left (DAPO's filter; it also refills the batch). A KL acts on all rows.
        if not spread.any():
            return stats
        kept = spread.repeat_interleave(c.rl_group).to(ids.device)           # (B,)
        ids, mask = trim(ids[kept], mask[kept])
        adv = adv[spread]
    row_adv = adv.view(-1, 1).to(ids.device)                                 # (B, 1)
    with torch.no_grad():    # scored as in training, not as sampled: at first r is exactly 1
        old_logp = response_logprobs(model, ids, mask, c.temperature)        # (B, T-1)
        if c.kl_coef > 0:
            ref_logp = response_logprobs(ref, ids, mask, c.temperature)      # (B, T-1)
    set_lr(opt, c.rl_lr * min(1, (step + 1) / 5))    # warmed up over five steps
    order = torch.randperm(len(ids), generator=generator("cpu", seed, "rl-order", step))
    clipped = torch.zeros_like(mask[:, 1:])                                  # (B, T-1)
    updates = min(c.rl_updates, len(ids))
    for rows in order.to(ids.device).tensor_split(updates):
        logp = response_logprobs(model, ids[rows], mask[rows], c.temperature)
        old = old_logp[rows]                                                 # (b, T-1)
        a = row_adv[rows]                                                    # (b, 1)
        gain = clipped_surrogate(logp, old, a, c.rl_eps_low, c.rl_eps_high)
        if c.kl_coef > 0:
            gain = gain - c.kl_coef * kl_k3(logp, ref_logp[rows])
        loss = -masked_mean(gain, mask[rows, 1:], c.aggregate, data.MAX_NEW)
        loss.backward()
        norm = update(model, opt)
        if not norm.isfinite():
            raise FloatingPointError("RL: the gradient is not finite: try a lower --rl_lr")
        clipped[rows] = is_clipped(logp.detach(), old, a, c.rl_eps_low, c.rl_eps_high)
    stats["clip_frac"] = masked_mean(clipped.float(), mask[:, 1:]).item()
    return stats


def grpo(model, base, c, seed, sample=rollout):
    """Run GRPO on `model` in place: yields statistics after each of c.rl_steps steps. sample as in
    grpo_step."""
    opt = adamw(model, c.rl_lr)
    ref = base    # unused without a KL
    if c.kl_coef > 0 and c.kl_to == "start":
        ref = copy.deepcopy(model).requires_grad_(False)
    for step in range(c.rl_steps):
        yield grpo_step(model, opt, c, step, seed, ref, sample)
