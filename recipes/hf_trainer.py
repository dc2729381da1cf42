"""Hugging Face Trainer and TRL's SFTTrainer: class MyTrainer(ClippedSFT, SFTTrainer): pass."""
import torch

from clipped import clip_loss, logits_of, old_policy, token_logprobs


class ClippedSFT:
    old_every, eps_high = 8, 0.28

    def train(self, *args, **kwargs):
        self.model.old_policy = None                            # every run begins with its own
        self.model_accepts_loss_kwargs = True                   # divided here once, by self.n
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):               # once an update: its micro-batches
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self.old = old_policy(self.model, self.state.global_step, every=self.old_every)
        n = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        n = torch.as_tensor(n, dtype=torch.float, device=self.args.device)
        self.n = self.accelerator.reduce(n, "mean").clamp(min=1)    # DDP takes the mean too
        return batches, self.n

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        y = inputs.pop("labels")[:, 1:]
        out, mask = model(**inputs), y != -100
        logp = token_logprobs(logits_of(out)[:, :-1], y.clamp(min=0))
        if model.training:
            old = self.old(logits_of(out), **inputs)
            old_logp = token_logprobs(old[:, :-1], y.clamp(min=0))
            loss = clip_loss(logp, old_logp, 0.2, self.eps_high)[mask].sum() / self.n
        else:
            loss = -logp[mask].mean()
        return (loss, out) if return_outputs else loss
