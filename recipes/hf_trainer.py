"""Clipped SFT in Hugging Face's Trainer or TRL's SFTTrainer: one class, put in front of either.

    from trl import SFTTrainer                      # or: from transformers import Trainer

    class ClippedTrainer(ClippedSFT, SFTTrainer):
        pass

    ClippedTrainer(model=..., args=SFTConfig(..., logging_steps=1), train_dataset=...).train()

It logs loss -1 at updates 1, 9, 17, ... and not between. Evaluation reports the plain negative
log-likelihood, and hands compute_metrics the logits. The loss is a mean over all trained tokens of
an update, over its micro-batches and processes.

Needs clipped.py beside it, and labels in every batch. Costs, on GPT-2 of 124M parameters, 4 x 128
tokens, float32, AdamW, one x86 core (CPU time): 13.4 s an update (the first: 21.5 s) against 10.0 s
for the Trainer's own loss, 3.6 GB at the peak against 3.1 GB.
Does not cover: FSDP and DeepSpeed ZeRO-3 (stop with an error), nn.DataParallel, context, sequence
and tensor parallelism, encoder-decoders and prompt tuning (logits and labels must match, place by
place), auxiliary losses, label smoothing (error). SFTTrainer's extra logs, such as entropy, are
left out. A run that is resumed begins with a refresh.
Run with transformers 5.24, TRL 1.16, peft 0.21 and torch 2.13, and with transformers 4.52, TRL
0.19, peft 0.17 and torch 2.14; on CPUs.
"""
import torch

from clipped import (OldPolicy, clip_loss, logits_of, masked_mean, next_tokens, token_logprobs,
                     update_tokens)


class ClippedSFT:
    old_every = 8        # K, updates a refresh
    eps_low = 0.2        # of no effect: the advantage is 1
    eps_high = 0.28
    old = None           # the old policy

    def train(self, *args, **kwargs):
        if self.args.label_smoothing_factor:
            raise ValueError("this loss has no label smoothing: set label_smoothing_factor=0")
        self.old = None                          # every run begins with a refresh
        self.model_accepts_loss_kwargs = True    # the loss is divided here, by self.tokens, alone
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """The Trainer calls this once an update, for its micro-batches."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if self.old is None:
            self.old = OldPolicy(self.model, self.old_every)
        self.old.begin_update(self.state.global_step)
        targets = [next_tokens(batch["labels"]) for batch in batches]
        self.tokens = update_tokens(targets, self.args.device)
        return batches, self.tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        targets = next_tokens(inputs.pop("labels"))
        inputs.pop("skip_logits", None)          # set in evaluation with Liger's kernels
        outputs = model(**inputs)
        logp = token_logprobs(logits_of(outputs), targets)
        if torch.is_grad_enabled():
            old_logp = self.old.logp(logp, targets, **inputs)
            loss = clip_loss(logp, old_logp, self.eps_low, self.eps_high)
            loss = masked_mean(loss, targets >= 0, self.tokens)
        else:                                    # evaluation
            loss = masked_mean(-logp, targets >= 0)
        if not return_outputs:
            return loss
        if not isinstance(outputs, dict):        # the Trainer would take the first for the loss
            outputs = {"logits": logits_of(outputs)}
        return loss, outputs
