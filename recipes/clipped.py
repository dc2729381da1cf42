"""What every recipe needs: losses, log-probabilities and the old policy. Needs torch alone."""
import torch


def clipped_surrogate(logp, old_logp, adv, eps_low, eps_high):
    """Per-token PPO objective, to be maximised. logp, old_logp (B, T), adv broadcasts, -> (B, T).

    With adv = 1 this is clipped SFT: the lower bound never acts, min(r, clip(r)) = min(r, 1+eps).
    The log-ratio is held within +-20, so that exp never overflows."""
    # r_t = pi(y_t) / pi_old(y_t)                                              PPO, 1707.06347 eq. 6
    ratio = (logp - old_logp.detach()).clamp(-20, 20).exp()
    # min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)               PPO eq. 7; two bounds: DAPO eq. 8
    return torch.min(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)


def clip_loss(logp, old_logp, eps_low, eps_high):
    """Clipped SFT: PPO's surrogate with advantage 1. (B, T), (B, T) -> (B, T)."""
    # L = - min(r_t, clip(r_t, 1 - e, 1 + e)), A_t = 1     PSFT 2508.17784 eq. 6; paper 1 eq. 8-9
    return -clipped_surrogate(logp, old_logp, 1.0, eps_low, eps_high)


def masked_mean(x, mask):
    """Scalar mean of x (B, T) where mask (B, T) is not 0; of nothing it is 0, not NaN."""
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)    # where, not *: NaN * 0 is NaN
    return x.sum() / mask.sum().clamp(min=1)


def token_logprobs(logits, targets):
    """log pi(target): logits (..., V) of any dtype, targets (...) -> (...) float32."""
    z, y = logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return -torch.nn.functional.cross_entropy(z, y, reduction="none").view_as(targets)


def logits_of(out):    # a tensor, a dict (the outputs of transformers are dicts) or a tuple
    return out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out


class OldPolicy:
    def __init__(self, model):
        self.model, self.new, self.step, self.updates, self.in_a_row = model, True, None, 0, 0
        self.weights = {k: p.detach().clone() for k, p in model.named_parameters()
                        if p.requires_grad}

    @torch.no_grad()
    def __call__(self, logits, *args, **kwargs):
        """The old logits of the inputs that the model now gives these logits for."""
        def run(weights):
            return logits_of(torch.func.functional_call(self.model, weights, args, kwargs))

        def gap(other):
            return (other - old).abs().mean() / old.abs().mean()
        old = run(self.weights)
        if self.new:
            if gap(logits) > 0.02:
                raise RuntimeError("r is not 1 right after a refresh: is dropout 0?")
            if gap(run({k: w + 1 for k, w in self.weights.items()})) < 0.02:
                raise RuntimeError("the model ignores the weights it is given: plain SFT")
        self.new = False
        return old


def old_policy(model, step, micro_step=0, every=8):
    """step: updates so far; micro_step: 0 at the first micro-batch of an update."""
    old = last = getattr(model, "old_policy", None)
    if last is None or last.model is not model or micro_step == 0 and (    # the latter: a resume
            step % every == 0 or step not in (last.step, last.step + 1)):
        old = model.old_policy = OldPolicy(model)
        old.in_a_row = last.in_a_row + 1 if last and last.updates == 1 else 0
        if every < 2 or old.in_a_row > 2:
            raise RuntimeError("a refresh at every update is plain SFT: does step count by one?")
    old.step, old.updates = step, old.updates + (step != old.step)
    return old
