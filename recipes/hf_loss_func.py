"""Clipped SFT through compute_loss_func of Hugging Face's Trainer, without a subclass.

    clip = ClippedLoss()
    Trainer(..., compute_loss_func=clip, callbacks=[clip]).train()

The more awkward way: such a function is shown neither inputs nor model, so it is a callback as
well, and overhears them. hf_trainer.py is shorter where a subclass will do.

Needs clipped.py beside it. The Trainer counts the tokens of an update, some versions with the label
at position 0, which is never trained: it must be -100, or training stops with an error. Costs, on
GPT-2 of 124M parameters, 4 x 128 tokens, float32, AdamW, one x86 core (CPU time): 13.4 s an update
(the first: 20.1 s) against 10.0 s for the Trainer's own loss, 3.6 GB at the peak against 3.1 GB.
Does not cover: what hf_trainer.py does not. TRL runs the model once more for its own logs, and will
drop compute_loss_func in its version 2.
Run with transformers 5.24, TRL 1.16, peft 0.21 and torch 2.13, and with transformers 4.52, TRL
0.19, peft 0.17 and torch 2.14; on CPUs.
"""
import torch
from transformers import TrainerCallback

from clipped import OldPolicy, clip_loss, logits_of, masked_mean, next_tokens, token_logprobs


class ClippedLoss(TrainerCallback):
    old_every = 8        # K, updates a refresh
    eps_low = 0.2        # of no effect: the advantage is 1
    eps_high = 0.28

    def on_init_end(self, args, state, control, model, **kwargs):
        model.register_forward_hook(self.overhear, with_kwargs=True)

    def overhear(self, model, args, kwargs, outputs):
        self.inputs = kwargs
        if not isinstance(outputs, dict):    # the Trainer would take the first for the loss
            return {"logits": logits_of(outputs)}

    def on_train_begin(self, args, state, control, model, **kwargs):
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError("set average_tokens_across_devices=True, or the mean is not over all "
                             "tokens of an update")
        if args.label_smoothing_factor:
            raise ValueError("this loss has no label smoothing: set label_smoothing_factor=0")
        self.old = OldPolicy(model, self.old_every)

    def on_step_begin(self, args, state, control, **kwargs):
        self.old.begin_update(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.old = None                      # frees the copy of the weights

    def __call__(self, outputs, labels, num_items_in_batch=None):
        targets = next_tokens(labels)
        inputs = self.inputs                 # before the old policy's pass is overheard too
        logp = token_logprobs(logits_of(outputs), targets)
        if not torch.is_grad_enabled():      # evaluation
            return masked_mean(-logp, targets >= 0)
        if (labels[:, 0] != -100).any():
            raise ValueError("set labels[:, 0] = -100: no token comes before it, so it is not "
                             "trained, but it would be counted")
        old_logp = self.old.logp(logp, targets, **inputs)
        loss = clip_loss(logp, old_logp, self.eps_low, self.eps_high)
        n = num_items_in_batch
        if n is not None:
            n = torch.as_tensor(n, device=loss.device).clamp(min=1)
        return masked_mean(loss, targets >= 0, n)
