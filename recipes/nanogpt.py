"""Clipped SFT in nanoGPT's train.py. Four places change:

    raw_model = model.module if ddp else model                    # as it is
    old = OldPolicy(raw_model)                                    # new

    old.begin_update(iter_num)                                    # new, before the micro-steps
    batches = [get_batch('train') for _ in range(gradient_accumulation_steps)]
    tokens = update_tokens([Y for X, Y in batches], device)
    for micro_step, (X, Y) in enumerate(batches):
        if ddp:
            model.require_backward_grad_sync = (micro_step == gradient_accumulation_steps - 1)
        with ctx:
            loss = clipped_loss(model, old, X, Y, tokens)
        scaler.scale(loss).backward()

The division of the loss by gradient_accumulation_steps goes, for `tokens` counts the whole update;
so does the get_batch at the loop's end, and `lossf = loss.item() * gradient_accumulation_steps`
shows the last micro-batch's share. dropout stays at its default of 0.0.
Y: next tokens, as get_batch gives them, with -1 where nothing is to be trained.

Needs clipped.py beside it. Costs: see there; the numbers were measured with this recipe.
Does not cover: FSDP (see sharded.py). A run that is resumed begins with a refresh.
Run in nanoGPT's own train.py (3adf61e, 2025-11) in float32 and bfloat16, with DDP in a test; torch
2.13, CPUs.
"""
from clipped import clip_loss, logits_of, masked_mean, token_logprobs


def clipped_loss(model, old, X, Y, tokens, eps_low=0.2, eps_high=0.28):
    """Scalar loss of one micro-batch: X, Y (B, T), tokens from update_tokens. Losses of an update's
    micro-batches add up to the mean over all its tokens."""
    # With Y, for without it nanoGPT's model gives only the last place's logits.
    logp = token_logprobs(logits_of(model(X, Y)), Y)
    old_logp = old.logp(logp, Y, X, Y)
    return masked_mean(clip_loss(logp, old_logp, eps_low, eps_high), Y >= 0, tokens)
