"""nanoGPT's loop: replaces `logits, loss = model(X, Y)`; the rest of train.py stays."""
from clipped import clip_loss, masked_mean, old_policy, token_logprobs


def clipped_step(model, raw_model, X, Y, iter_num, micro_step):
    old = old_policy(raw_model, iter_num, micro_step)
    logits, _ = model(X, Y)                       # Y: next tokens, -1 where nothing is trained
    logp, old_logp = (token_logprobs(z, Y.clamp(min=0)) for z in (logits, old(logits, X, Y)))
    return masked_mean(clip_loss(logp, old_logp, 0.2, 0.28), Y != -1)
