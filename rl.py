"""rl.py - the clipped surrogate that SFT and RL share, and GRPO on in-distribution prompts.

One step: sample G responses to each of P prompts, reward them by the strict verifier, compare each
with its group, and raise the better ones by PPO's clipped surrogate.
Shapes: P prompts, G responses a prompt, B = P * G rows, T tokens.
"""
import copy
import random
from dataclasses import dataclass

import torch

import data
from eval import respond
from model import adamw, arg, generator, response_logprobs, trim, update

def clipped_surrogate(logp, old_logp, adv, eps_low, eps_high):
    """Per-token PPO objective, to be maximised. logp, old_logp (B, T), adv broadcasts, -> (B, T).

    With adv = 1 this is clipped SFT: the lower bound never acts, min(r, clip(r)) = min(r, 1+eps).
    The log-ratio is held within +-20, so that exp never overflows."""
    # r_t = pi(y_t) / pi_old(y_t)                                              PPO, 1707.06347 eq. 6
    ratio = (logp - old_logp.detach()).clamp(-20, 20).exp()
    # min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)               PPO eq. 7; two bounds: DAPO eq. 8
    return torch.min(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)

def group_advantage(rewards, scale="std"):
    """rewards (P, G) float -> advantages (P, G). A group without spread teaches nothing: exactly 0.
    scale 'std': GRPO, the unbiased one as in TRL and verl; 'none': Dr. GRPO."""
    # A_i = R_i - mean(R)                                                      Dr. GRPO 2503.20783
    adv = rewards - rewards.mean(1, keepdim=True)
    if scale == "std" and rewards.shape[1] > 1:
        # A_i = (R_i - mean(R)) / std(R)                                GRPO 2402.03300 sec. 4.1.2
        adv = adv / rewards.std(1, keepdim=True).clamp(min=1e-6)
    return adv * (rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True))

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
    return x.sum() / (len(x) * budget)

def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(pi || ref) at tokens sampled from pi, (B, T) -> (B, T) nats:
    unbiased and never negative. (Differentiated, it is the gradient of KL(ref || pi).)"""
    # k3 = ref/pi - 1 - log(ref/pi)                                          GRPO, 2402.03300 eq. 4
    log_ratio = (ref_logp - logp).clamp(-20, 20)
    return torch.expm1(log_ratio) - log_ratio

def micro_batches(mask, how, n):
    """Cut a batch into n runs of rows, short ones together: yields (rows, share); the sum of share
    * masked_mean(x[rows], mask[rows], how) is masked_mean(x, mask, how), and so is its gradient."""
    mask = mask.bool()
    order = ((n > 1) * mask.cumsum(1).argmax(1)).argsort(stable=True)    # n = 1: as they are
    for rows in order.chunk(n):
        share = mask[rows].sum() / mask.sum().clamp(min=1) if how == "token" else \
            len(rows) / len(mask)
        yield rows, share

@dataclass
class RLConfig:
    rl_steps: int = arg(20, "GRPO steps", gt=0)
    rl_lr: float = arg(1e-4, "GRPO learning rate, after 5 warm-up steps", gt=0)
    rl_prompts: int = arg(32, "prompts a GRPO step (P)", gt=0)
    rl_group: int = arg(8, "responses a prompt (G)", gt=1)
    rl_updates: int = arg(4, "updates a GRPO step, each on its share of the rollouts", gt=0)
    rl_eps_low: float = arg(0.2, "GRPO clip below: 1 - eps_low", gt=0, lt=1)
    rl_eps_high: float = arg(0.28, "GRPO clip above: 1 + eps_high (DAPO's clip-higher)", gt=0)
    adv_scale: str = arg("std", "divisor of the advantage (GRPO, Dr. GRPO)", ("std", "none"))
    kl_coef: float = arg(0.0, "weight of the KL to the policy that RL starts from", ge=0)
    temperature: float = arg(1.0, "of sampling and of scoring alike", gt=0)
    aggregate: str = arg("token", "mean, see masked_mean", ("token", "sequence", "constant"))
    grad_accum: int = arg(1, "micro-batches an update, for memory; same gradient", gt=0)
    eval_n: int = arg(400, "held-out problems of each kind", ge=16)
    seed: int = arg(0, "first random seed", ge=0)
    device: str = arg("cpu", "runs on", ("cpu", "cuda"))

def rollout(model, c, step, seed):
    """Sample c.rl_group responses to c.rl_prompts fresh ID problems of the rl split.
    -> ids (B, T), mask (B, T) True at sampled tokens, rewards (P, G), truncated fraction."""
    rng = random.Random(f"{seed}/rl/{step}")
    problems = [data.draw(rng, "rl", rules=data.ID_RULES) for _ in range(c.rl_prompts)]
    noise = generator(next(model.parameters()).device, seed, "rollout", step)
    texts, ids, mask = respond(model, problems, c.rl_group, c.temperature, noise)
    rewards = torch.tensor([float(data.verify(problems[i // c.rl_group], text).strict)
                            for i, text in enumerate(texts)]).view(c.rl_prompts, c.rl_group)
    return ids, mask, rewards, 1 - (ids == data.EOS).any(1).float().mean().item()

def grpo_step(model, opts, c, step, seed, ref=None):
    """One rollout and c.rl_updates updates. -> dict of statistics. `ref` is needed for kl_coef."""
    ids, mask, rewards, truncated = rollout(model, c, step, seed)
    adv = group_advantage(rewards, c.adv_scale)                              # (P, G)
    useful = rewards.amax(1) > rewards.amin(1)                               # (P,)
    stats = dict(reward=rewards.mean().item(), rollout_truncated=truncated,
                 zero_spread=1 - useful.float().mean().item(), clip_frac=0.0)
    if not useful.any() and not c.kl_coef:
        return stats                              # nothing to learn from: counted, not hidden
    # Groups without spread have no policy gradient: they are not even scored, and the means below
    # are over the rows left (DAPO's filter; it also refills the batch). A KL term acts on all.
    scored = (useful | (c.kl_coef > 0)).repeat_interleave(c.rl_group).to(ids.device)    # (B,)
    ids, mask = trim(ids[scored], mask[scored])
    adv = adv.flatten().to(ids.device)[scored][:, None]                      # (B, 1)
    with torch.no_grad():    # by the very forward pass that trains, at sampling temperature
        old_logp = response_logprobs(model, ids, mask, c.temperature)        # (B, T-1)
        ref_logp = response_logprobs(ref, ids, mask, c.temperature) if c.kl_coef else None
    order = torch.randperm(len(ids), generator=generator("cpu", seed, "rl-order", step))
    clipped = tokens = 0
    for batch in order.to(ids.device).tensor_split(c.rl_updates):
        for rows, share in micro_batches(mask[batch], c.aggregate, c.grad_accum):
            rows = batch[rows]
            m = mask[rows, 1:]                                               # (B, T-1)
            logp = response_logprobs(model, ids[rows], mask[rows], c.temperature)
            gain = clipped_surrogate(logp, old_logp[rows], adv[rows], c.rl_eps_low, c.rl_eps_high)
            if c.kl_coef:
                gain = gain - c.kl_coef * kl_k3(logp, ref_logp[rows])
            (-share * masked_mean(gain, m, c.aggregate, data.MAX_NEW)).backward()
            # A token is clipped where its gradient is gone: r too high for A > 0, too low for A < 0
            r, a = (logp.detach() - old_logp[rows]).exp(), adv[rows]
            off = (a > 0) & (r > 1 + c.rl_eps_high) | (a < 0) & (r < 1 - c.rl_eps_low)
            clipped += (off & m).sum().item()
            tokens += m.sum().item()
        update(model, opts, min(1, (step + 1) / 5))
    return stats | dict(clip_frac=clipped / tokens)

def grpo(model, c, seed):
    """Run GRPO on `model` in place: yields (step, statistics) after each of c.rl_steps steps."""
    opts = adamw(model, c.rl_lr)
    ref = copy.deepcopy(model) if c.kl_coef else None
    for step in range(c.rl_steps):
        yield step + 1, grpo_step(model, opts, c, step, seed, ref)
