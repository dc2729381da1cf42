"""compute_loss_func: clip = Clip(); Trainer(..., compute_loss_func=clip, callbacks=[clip])."""
import torch
from transformers import TrainerCallback

from clipped import clip_loss, logits_of, old_policy, token_logprobs


class Clip(TrainerCallback):
    old_every, eps_high = 8, 0.28

    def on_train_begin(self, args, state, control, model, **_):
        model.old_policy = None
        self.hook = model.register_forward_pre_hook(self.overhear, with_kwargs=True)

    def overhear(self, model, args, kwargs):
        self.inputs = kwargs

    def on_step_begin(self, args, state, control, model, **_):
        self.old = old_policy(model, state.global_step, every=self.old_every)

    def on_train_end(self, *_, **__):
        self.hook.remove()

    def __call__(self, outputs, labels, num_items_in_batch=None):
        y, logits = labels[:, 1:], logits_of(outputs)
        mask = y != -100
        n = mask.sum() if num_items_in_batch is None else num_items_in_batch
        n = torch.as_tensor(n).clamp(min=1)
        logp = token_logprobs(logits[:, :-1], y.clamp(min=0))
        if not torch.is_grad_enabled():                             # evaluation
            return -logp[mask].sum() / n
        old = self.old(logits, **self.inputs)
        old_logp = token_logprobs(old[:, :-1], y.clamp(min=0))
        return clip_loss(logp, old_logp, 0.2, self.eps_high)[mask].sum() / n
