"""rl.py - the clipped surrogate that SFT and RL share, and GRPO on in-distribution prompts.

    python rl.py --init runs/main/ckpt/s0-sft-100.pt      GRPO from any checkpoint

One step: sample G responses to each of P prompts, reward them by the strict verifier, compare each
with its group, and raise the better ones by PPO's clipped surrogate. No value network, no reward
model. Shapes: P prompts, G responses a prompt, B = P * G rows, T tokens.
"""
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from eval import evaluate, respond, table
from model import (BadInput, adamw, arg, autocast, generator, load_checkpoint, parse, pick_device,
                   response_logprobs, run_main, save_checkpoint, trim, update)


# -------------------------------------------------------------- the mathematics, ready to be pasted
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

    scale 'std': GRPO, the unbiased standard deviation as in TRL and verl.
    scale 'none': Dr. GRPO, the mean alone is taken off."""
    # A_i = R_i - mean(R)                                                      Dr. GRPO 2503.20783
    adv = rewards - rewards.mean(1, keepdim=True)
    if scale == "std" and rewards.shape[1] > 1:
        # A_i = (R_i - mean(R)) / std(R)                                GRPO 2402.03300 sec. 4.1.2
        adv = adv / rewards.std(1, keepdim=True).clamp(min=1e-6)
    return adv * (rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True))


def masked_mean(x, mask, how="token", budget=1):
    """Scalar mean of x (B, T) over mask (B, T). An all-False mask gives 0, not NaN.

    token: every token of the batch weighs the same (DAPO, PSFT). sequence: the mean over rows of
    each row's own mean (GRPO, paper 1's code). constant: sum / (B * budget), budget the longest
    response allowed (Dr. GRPO)."""
    x = torch.where(mask, x, 0.0)    # where, not *: NaN * 0 is NaN
    if how == "token":
        return x.sum() / mask.sum().clamp(min=1)
    if how == "sequence":
        return (x.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return x.sum() / (len(x) * budget)


def kl_k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(pi || ref) at tokens sampled from pi, (B, T) -> (B, T) nats:
    unbiased (while |log ref/pi| < 20) and never negative. (Differentiated, it is the gradient of
    KL(ref || pi).)"""
    # k3 = ref/pi - 1 - log(ref/pi)                                          GRPO, 2402.03300 eq. 4
    log_ratio = (ref_logp - logp).clamp(-20, 20)
    return torch.expm1(log_ratio) - log_ratio


def micro_batches(mask, how, n):
    """Cut a batch into n runs of rows. Yields (rows, share) such that the sum over the runs of
    share * masked_mean(x[rows], mask[rows], how) is masked_mean(x, mask, how), and so its
    gradient."""
    for rows in torch.arange(len(mask), device=mask.device).chunk(n):
        share = mask[rows].sum() / mask.sum().clamp(min=1) if how == "token" else \
            len(rows) / len(mask)
        yield rows, share


# --------------------------------------------------------------------------------------------- GRPO
@dataclass
class RLConfig:
    rl_steps: int = arg(20, "GRPO steps", above=0)
    rl_lr: float = arg(1e-4, "GRPO learning rate, after 5 warm-up steps", above=0)
    rl_prompts: int = arg(32, "prompts a GRPO step (P)", above=0)
    rl_group: int = arg(8, "responses a prompt (G)", above=1)
    rl_updates: int = arg(4, "updates a GRPO step, each on its share of the rollouts", above=0)
    rl_eps_low: float = arg(0.2, "GRPO clip below: 1 - eps_low", above=0, below=1)
    rl_eps_high: float = arg(0.28, "GRPO clip above: 1 + eps_high (DAPO's clip-higher)", above=0)
    adv_scale: str = arg("std", "group advantage: std (GRPO) or none (Dr. GRPO)",
                         choices=("std", "none"))
    kl_coef: float = arg(0.0, "weight of the KL to the policy that RL starts from", above=-1e-9)
    temperature: float = arg(1.0, "of sampling and of scoring alike", above=0)
    max_new: int = arg(28, "longest response in tokens (a demonstration has up to 23)", above=22)
    aggregate: str = arg("token", "mean of the per-token losses, see masked_mean",
                         choices=("token", "sequence", "constant"))
    grad_accum: int = arg(1, "micro-batches an update, for memory; same gradient", above=0)
    eval_n: int = arg(1000, "held-out problems under each of the two rules; a quarter as many "
                      "random rules and prior abilities", above=15)
    seed: int = arg(0, "random seed", above=-1)
    device: str = arg("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    dtype: str = arg("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16"))


def rollout(model, c, step, seed):
    """Sample c.rl_group responses to c.rl_prompts fresh ID problems of the rl split.
    -> ids (B, T), mask (B, T) True at sampled tokens, rewards (P, G), truncated fraction."""
    rng = random.Random(f"{seed}/rl/{step}")
    problems = [data.draw(rng, "rl", rule=data.ID_RULE) for _ in range(c.rl_prompts)]
    noise = generator(next(model.parameters()).device, seed, "rollout", step)
    texts, ids, mask = respond(model, problems, c.max_new, c.rl_group, c.temperature, noise)
    rewards = torch.tensor([float(data.verify(problems[i // c.rl_group], text).strict)
                            for i, text in enumerate(texts)]).view(c.rl_prompts, c.rl_group)
    ended = ((ids == data.EOS) & mask).any(1)
    return ids, mask, rewards, 1 - ended.float().mean().item()


def grpo_step(model, opt, c, step, seed, ref=None):
    """One rollout and c.rl_updates updates. -> dict of statistics. `ref` is needed for kl_coef."""
    model.eval()
    ids, mask, rewards, truncated = rollout(model, c, step, seed)
    dev = ids.device
    adv = group_advantage(rewards, c.adv_scale)                              # (P, G)
    useful = rewards.amax(1) > rewards.amin(1)                               # (P,)
    stats = dict(reward=rewards.mean().item(), rollout_truncated=truncated,
                 zero_spread=1 - useful.float().mean().item())
    if not useful.any() and not c.kl_coef:
        return stats                              # nothing to learn from: counted, not hidden
    # Groups without spread have no policy gradient: they are not even scored, and the means below
    # are over the rows that are left (DAPO's filter; DAPO also refills the batch). A KL term does
    # act on them.
    keep = (useful | (c.kl_coef > 0)).repeat_interleave(c.rl_group).to(dev)  # (B,)
    ids, mask = trim(ids[keep], mask[keep])
    adv = adv.flatten().to(dev)[keep][:, None]                               # (B, 1)
    with torch.no_grad():    # scored by the very forward pass that trains, at sampling temperature
        old_logp = response_logprobs(model, ids, mask, c.temperature)        # (B, T-1)
        ref_logp = response_logprobs(ref, ids, mask, c.temperature) if c.kl_coef else None
    order = torch.randperm(len(ids), generator=generator("cpu", seed, "rl-order", step)).to(dev)
    lr = c.rl_lr * min(1, (step + 1) / 5)
    clipped = tokens = 0
    for rows in order.chunk(c.rl_updates):
        for part, share in micro_batches(mask[rows], c.aggregate, c.grad_accum):
            part = rows[part]
            m = mask[part, 1:]
            logp = response_logprobs(model, ids[part], mask[part], c.temperature)
            gain = clipped_surrogate(logp, old_logp[part], adv[part], c.rl_eps_low, c.rl_eps_high)
            if c.kl_coef:
                gain = gain - c.kl_coef * kl_k3(logp, ref_logp[part])
            (-share * masked_mean(gain, m, c.aggregate, c.max_new)).backward()
            r, a = (logp.detach() - old_logp[part]).exp(), adv[part]
            # a token is clipped where its gradient is gone: r too high for A > 0, too low for A < 0
            off = ((a > 0) & (r > 1 + c.rl_eps_high)) | ((a < 0) & (r < 1 - c.rl_eps_low))
            clipped, tokens = clipped + (off & m).sum().item(), tokens + m.sum().item()
        update(model, opt, lr)
    return stats | dict(clip_frac=clipped / tokens)


def grpo(model, c, seed, path=None, save_every=20, state=None, tick=lambda **_: None):
    """Run GRPO on `model` in place, c.rl_steps steps. -> statistics averaged over the last 10
    steps.

    path: where to keep a resumable checkpoint; state: what load_checkpoint returned for it."""
    opt = adamw(model, c.rl_lr)
    ref = None
    if c.kl_coef:
        ref = type(model)(model.config).to(next(model.parameters()).device)
        ref.load_state_dict(state["ref"] if state else model.state_dict())
    log, start = [], 0
    if state:
        opt.load_state_dict(state["optimizer"])
        log, start = state["log"], state["step"]
    for step in range(start, c.rl_steps):
        with autocast(next(model.parameters()).device, c.dtype):
            log.append(grpo_step(model, opt, c, step, seed, ref))
        tick(**log[-1])
        if path and (step + 1) % save_every == 0:
            save_checkpoint(path, model, optimizer=opt.state_dict(), step=step + 1, log=log,
                            **(dict(ref=ref.state_dict()) if ref else {}))
    recent = log[-10:]
    keys = ("reward", "rollout_truncated", "zero_spread", "clip_frac")
    return {k: sum(s.get(k, 0.0) for s in recent) / len(recent) for k in keys}


@dataclass
class Main(RLConfig):
    init: str = arg("", "checkpoint to start from (required)")
    out: str = arg("rl.pt", "where the trained weights go; must not exist yet")


def main(argv=None):
    c = parse(Main, argv, __doc__)
    if not c.init:
        raise BadInput("--init CKPT is required, e.g. runs/main/ckpt/s0-sft-100.pt")
    if Path(c.out).exists() or not Path(c.out).parent.is_dir():
        raise BadInput(f"--out {c.out}: the file must not exist yet, its folder must")
    device = pick_device(c.device)
    model, _ = load_checkpoint(c.init, device)
    if 10 + c.max_new > model.config.block_size:
        raise BadInput(f"--max_new {c.max_new}: with a prompt of 10 tokens the block of {c.init} "
                       f"ends at {model.config.block_size}")
    rows = [(Path(c.init).stem, evaluate(model, c) | dict(clip_frac=0.0))]
    with tqdm(total=c.rl_steps, desc="GRPO") as bar:
        def tick(**stats):
            bar.set_postfix({k: f"{v:.2f}" for k, v in stats.items()})
            bar.update()
        stats = grpo(model, c, c.seed, tick=tick)
        seconds = bar.format_dict["elapsed"] / c.rl_steps
    rows.append((f"after {c.rl_steps} GRPO steps", evaluate(model, c) | stats))
    save_checkpoint(c.out, model)
    print(f"{table(rows)}\n{seconds:.2f} s a GRPO step")


if __name__ == "__main__":
    run_main(main)
