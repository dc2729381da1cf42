"""Clipped SFT with sharded weights: FSDP, FSDP2, DeepSpeed ZeRO.

Sharded weights cannot be copied one by one. Instead the sharded model scores the batches of the
next K updates before the first of them, all processes alike, and their log-probs are kept:

    for refresh in range(refreshes):
        updates = [[next(loader)] for _ in range(8)]        # K = 8 updates of one micro-batch each
        clipped_updates(model, updates, backward, step)

    FSDP:       backward = torch.Tensor.backward; step = optimizer.step and zero_grad
    DeepSpeed:  backward = engine.backward;       step = engine.step; one micro-batch an update,
                gradient_accumulation_steps 1 in its config, for it would divide once more

Needs clipped.py beside it. All processes need equal numbers of micro-batches. Costs, on GPT-2 of
124M parameters, 4 x 128 tokens an update, float32, one x86 core, not sharded (CPU time): 14.4 s an
update against 9.5 s for plain SFT, 3.2 GB against 3.3 GB. There is no copy of the weights.
Does not cover: parallelism other than of data. DeepSpeed was not run. With padding on the left and
absolute positions, as GPT-2 has, position_ids must be in the batch.
Run with FSDP2 in two CPU processes, torch 2.13.
"""
import torch

from clipped import (check_equal, check_no_dropout, clip_loss, logits_of, masked_mean, next_tokens,
                     token_logprobs, update_tokens)


def score(model, batch):
    """batch: the model's arguments by name, and labels (B, T) -> logp, targets, both (B, T)."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    targets = next_tokens(batch["labels"])
    return token_logprobs(logits_of(model(**inputs)), targets), targets


def clipped_updates(model, updates, backward, step, eps_low=0.2, eps_high=0.28):
    """K updates, the old policy being the model as it stands now -> their losses in this process.

    updates: K lists of micro-batches, each a dict of tensors (B, T): input_ids, labels and what
    else the model takes. backward(loss) once a micro-batch, step() once an update.
    ValueError if K is 1."""
    if len(updates) < 2:
        raise ValueError("one update a refresh is plain SFT: give 2 or more")
    check_no_dropout(model)
    with torch.no_grad():
        old = [[score(model, batch)[0] for batch in batches] for batches in updates]
    losses = []
    for batches, old_logps in zip(updates, old):
        targets = [next_tokens(batch["labels"]) for batch in batches]
        tokens = update_tokens(targets, targets[0].device)
        total = 0.0
        for batch, old_logp in zip(batches, old_logps):
            logp, y = score(model, batch)
            if not losses:
                check_equal(logp.detach(), old_logp, y >= 0)
            loss = clip_loss(logp, old_logp, eps_low, eps_high)
            loss = masked_mean(loss, y >= 0, tokens)
            backward(loss)
            total += loss.item()
        step()
        losses.append(total)
    return losses
