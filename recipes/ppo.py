"""A PPO or GRPO trainer: advantage 1, and old log-probs of the policy at the start of the batch."""
import torch

from clipped import clipped_surrogate, masked_mean, token_logprobs


def ppo_batch(model, opt, ids, mask, updates=8):            # demonstrations in place of rollouts
    assert 1 < updates <= len(ids), "one update a batch is plain SFT"
    with torch.no_grad():
        old_logp = token_logprobs(model(ids)[:, :-1], ids[:, 1:])
    parts, losses = (ids, mask[:, 1:], old_logp, torch.ones_like(old_logp)), []
    for x, m, old, advantage in zip(*(t.tensor_split(updates) for t in parts)):
        logp = token_logprobs(model(x)[:, :-1], x[:, 1:])
        assert losses or (logp - old).abs().mean() < 0.02, "r is not 1 at first: is dropout 0?"
        loss = -masked_mean(clipped_surrogate(logp, old, advantage, 0.2, 0.28), m)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    return losses
