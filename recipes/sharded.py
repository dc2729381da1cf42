"""Sharded weights (FSDP, DeepSpeed): the sharded model scores the next K updates beforehand."""
import torch

from clipped import clip_loss, masked_mean, token_logprobs


def clipped_updates(model, update, batches):                # K batches, one update each
    assert len(batches) > 1, "one update a refresh is plain SFT"

    def score(b):
        return token_logprobs(model(b["input_ids"])[:, :-1], b["labels"][:, 1:].clamp(min=0))
    with torch.no_grad():
        old = [score(b) for b in batches]
    for i, (b, old_logp) in enumerate(zip(batches, old)):
        logp = score(b)
        assert i or (logp - old_logp).abs().mean() < 0.02, "r is not 1 at first: is dropout 0?"
        loss = clip_loss(logp, old_logp, 0.2, 0.28)
        update(masked_mean(loss, b["labels"][:, 1:] != -100))
