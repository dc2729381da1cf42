"""clipped.py - clipped SFT (PSFT, 2508.17784) for a training loop of your own. Copy this one file.

Needs torch (2.9 or newer) alone. In a plain PyTorch loop:

    old = OldPolicy(model, every=8)                     # once, before the loop
    for step, (ids, labels) in enumerate(batches):      # labels: -100 where nothing is trained
        old.begin_update(step)
        targets = next_tokens(labels)
        logp = token_logprobs(model(ids), targets)
        old_logp = old.logp(logp, targets, ids)         # the same arguments as the model's
        loss = masked_mean(clip_loss(logp, old_logp, 0.2, 0.28), targets >= 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

The loss is -1 at updates 0, 8, 16, ..., where r = 1, and not between. It is -1 with wrong targets
too: the mask is targets >= 0, not labels >= 0, which lie one place further on. begin_update counts
updates, not micro-batches. With several micro-batches an update or several processes give
masked_mean the number of trained tokens, from update_tokens.

Costs, against plain SFT: one copy of the trained weights (with LoRA of the adapters), a forward
pass without gradients for each micro-batch, at the first update two. Measured on GPT-2 of 124M
parameters, 4 x 128 tokens, float32, AdamW, one x86 core (CPU time): 14.9 s an update against 9.5 s,
3.5 GB at the peak against 3.3 GB.
Does not cover: dropout (stops with an error), sharded weights (error; see sharded.py), noise in
training such as NEFTune's (error beyond .02 nats), auxiliary losses of a mixture of experts.
Run with torch 2.13 and 2.14, on CPUs.

Shapes: B rows, T tokens, V vocabulary. Log-probabilities are in nats, float32.
targets (B, T): the token that place t must predict, negative where nothing is trained.
"""
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
    """Clipped SFT: PPO's surrogate with advantage 1. (B, T), (B, T) -> (B, T), to be minimised.

    The weight on grad log pi is r up to 1 + eps_high and 0 beyond: a token rests once its
    probability has grown by that factor since the last refresh."""
    # L = - min(r_t, clip(r_t, 1 - e, 1 + e)), A_t = 1                      PSFT, 2508.17784 eq. 6
    return -clipped_surrogate(logp, old_logp, 1.0, eps_low, eps_high)


def masked_mean(x, mask, n=None):
    """Scalar mean of x (B, T) where mask (B, T) is not 0; of nothing it is 0, not NaN.

    n: divide by it instead. With the number of the whole update (see update_tokens) the gradients
    of all its micro-batches add up to that of the mean over all its tokens."""
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)    # where, not *: NaN * 0 is NaN
    if n is None:
        n = mask.sum().clamp(min=1)
    return x.sum() / n


def update_tokens(targets, device=None):
    """Trained tokens of one update, as a float: what masked_mean divides each micro-batch by.

    targets: list of (B, T), all micro-batches of this process. Over processes the number is
    averaged, because DDP and FSDP average the gradients. device: where all-reduce works."""
    n = torch.zeros((), device=device)
    for t in targets:
        n += (t >= 0).sum().to(device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(n)
        n = n / torch.distributed.get_world_size()
    return torch.where(n > 0, n, 1.0)


def next_tokens(labels):
    """labels (B, T), -100 where nothing is trained -> targets (B, T): place t predicts token t+1.

    The labels are shifted, not the logits: logits[:, :-1] would soon be a copy of all logits."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


class TokenLogprobs(torch.autograd.Function):
    """logits (N, V), targets (N,) -> log pi (N,), a chunk of rows at a time, and its gradient.

    Only one chunk is ever held in float32; autograd would hold all rows, in each pass anew."""

    CHUNK = 2 ** 24    # numbers at a time: 64 MB in float32

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        rows = max(1, TokenLogprobs.CHUNK // logits.shape[1])
        parts = []
        for z, y in zip(logits.split(rows), targets.split(rows)):
            # log pi(y) = z_y - log sum_v exp(z_v)
            logp = z.float().log_softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0]
            parts.append(logp.masked_fill(y < 0, 0.0))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        rows = max(1, TokenLogprobs.CHUNK // logits.shape[1])
        grad_logits = torch.empty_like(logits)
        for i in range(0, len(logits), rows):
            y = targets[i:i + rows, None]                                    # (rows, 1)
            g = grad[i:i + rows, None]
            # d log pi(y) / d z_v = [v = y] - pi(v)
            d = -logits[i:i + rows].float().softmax(1)
            d.scatter_add_(1, y.clamp(min=0), torch.ones_like(g))
            # masked_fill: a row that is not trained may be NaN, and NaN * 0 is NaN
            grad_logits[i:i + rows] = (d * g).masked_fill(y < 0, 0.0)
        return grad_logits, None


def token_logprobs(logits, targets):
    """log pi(target): logits (B, T, V) of any dtype, targets (B, T) -> (B, T) float32, 0 where the
    target is negative. Float32 because bfloat16 has steps of .03 near log p = -5, and the clip's
    bound is at a log-ratio of log 1.28 = .25. Logits of -inf (a masked vocabulary) are fine.

    For a large vocabulary: beside the logits it needs one chunk in float32, in the backward pass
    also the logits' gradient in their dtype. ValueError if the shapes do not match."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} are not one row for each target "
                         f"{tuple(targets.shape)}: a model that adds or drops places?")
    logp = TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return logp.view(targets.shape)


def logits_of(outputs):
    """The logits of what a model returns: a tensor, a dict as in transformers, or a tuple whose
    first is the logits. TypeError if there are none."""
    logits = outputs
    if isinstance(outputs, dict):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        logits = outputs[0]
    if not torch.is_tensor(logits):
        raise TypeError("the model returned no logits: a fused or patched loss? Switch it off")
    return logits


def check_no_dropout(model):
    """RuntimeError if a dropout module is at work: r would be noise. With LoRA it would not show at
    first, for B = 0."""
    for name, module in model.named_modules():
        is_dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        if is_dropout and module.training and module.p > 0:
            raise RuntimeError(f"dropout {module.p} at {name or 'the model'} makes r noise. Set it "
                               "to 0 in the model's (or LoRA's) config, or now:"
                               "\nfor m in model.modules():\n    if isinstance(m, torch.nn.Dropout):"
                               "\n        m.p = 0")


def check_equal(logp, old_logp, mask):
    """RuntimeError unless r = 1 at the trained tokens, as it must be right after a refresh."""
    if not logp[mask].isfinite().all():
        raise RuntimeError("a trained token has probability 0 or NaN: is it masked out of the "
                           "vocabulary, or has training diverged?")
    gap = masked_mean((logp - old_logp).abs(), mask).item()
    if not gap <= 0.02:    # not >, for NaN
        raise RuntimeError(f"right after a refresh r must be 1, but |log r| is {gap:.3f} on "
                           "average: switch off dropout and noise, give both passes the same "
                           "inputs, and call begin_update at every update")


def check_not_sharded(model):
    """RuntimeError if a parameter is only a part of itself (FSDP, FSDP2, DeepSpeed ZeRO-3)."""
    fsdp = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    for p in model.parameters():
        if fsdp or hasattr(p, "device_mesh") or hasattr(p, "ds_id"):
            raise RuntimeError("sharded weights cannot be copied one by one: see sharded.py")


class OldPolicy:
    """The policy as it stood at the last refresh: a copy of the trained weights, with which the
    model itself is run without gradients. What it gives is checked at every refresh.

    model: the model that trains, without the wrapper of DDP. every: K, updates a refresh.
    ValueError if K is 1, for then the old policy is the model itself, and clipping is plain SFT.

    It is no part of the model: nothing is added to its state_dict, its buffers and the random state
    stay as they are. It is not saved either: a run that is resumed begins with a refresh."""

    def __init__(self, model, every=8):
        if every < 2:
            raise ValueError("a refresh at every update is plain SFT: every must be 2 or more")
        self.model = model
        self.every = every
        self.step = None             # the update that is under way
        self.weights = {}            # name -> copy
        self.fresh = False           # is this the first update after a refresh?
        self.proved = False          # does the model use weights that it is given?
        self.differed = False        # was r ever other than 1 since the refresh?
        self.in_vain = 0             # refreshes in a row before which it never was

    def begin_update(self, step):
        """Call it before an update; step counts updates. Further calls in one update do nothing.

        Refreshes at the first call, then whenever K divides step. A step smaller than the last one
        begins a new run. ValueError if step grows by more than 1."""
        last = self.step
        if step == last:
            return
        if last is not None and step > last + 1:
            raise ValueError(f"step went from {last} to {step}: it must count updates, one by one")
        self.step = step
        self.fresh = last is None or step < last or step % self.every == 0
        if self.fresh:
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Make the model as it stands the old policy. RuntimeError if its weights are sharded, or
        if r was 1 all the time although the weights have changed, twice in a row. (Once may be
        chance: a GradScaler that has skipped K - 1 updates.)"""
        check_not_sharded(self.model)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        changed = any(name in trained and not torch.equal(w, trained[name])
                      for name, w in self.weights.items())
        if changed and not self.differed:
            self.in_vain += 1
        else:
            self.in_vain = 0
        if self.in_vain == 2:
            raise RuntimeError("r was 1 at every update, which is plain SFT: step must count "
                               "updates, not micro-batches")
        self.weights = {}    # first, so that there are never two copies
        self.weights = {name: p.detach().clone() for name, p in trained.items()}
        self.differed = False

    @torch.no_grad()
    def logp(self, logp, targets, *args, **kwargs):
        """Old log-probs (B, T) of targets (B, T), given the model's arguments args and kwargs for
        which the model itself has just given logp (B, T). Call it under the model's autocast.
        RuntimeError at a refresh if the two differ, or do not depend on the weights."""
        if self.step is None:
            raise RuntimeError("call begin_update(step) before the first update")
        if self.fresh:
            check_no_dropout(self.model)
        old_logp = self.run(self.weights, targets, args, kwargs)
        mask = targets >= 0
        if self.fresh and mask.any():
            check_equal(logp, old_logp, mask)
            if not self.proved:
                self.prove(old_logp, targets, args, kwargs)
        if not self.fresh and not self.differed:
            self.differed = bool((logp != old_logp)[mask].any())
        return old_logp

    def run(self, weights, targets, args, kwargs):
        """Log-probs of targets by the model with these weights, which leaves no trace in it."""
        # Buffers as copies: running statistics would count this pass as well.
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        outputs = torch.func.functional_call(self.model, (weights, buffers), args, kwargs)
        return token_logprobs(logits_of(outputs), targets)

    def prove(self, old_logp, targets, args, kwargs):
        """RuntimeError if other weights give the same log-probs: then r would be 1 for ever."""
        disturbed = {}
        for name, w in self.weights.items():
            # A wave, because LayerNorm removes a constant and softmax a shift of all logits. Added,
            # because LoRA's B is 0. It needs no random numbers.
            wave = torch.arange(w.numel(), device=w.device, dtype=torch.float32).cos_()
            disturbed[name] = w + wave.view(w.shape).to(w.dtype)
        other = self.run(disturbed, targets, args, kwargs)
        if masked_mean((other - old_logp).abs(), targets >= 0) < 1e-4:
            raise RuntimeError("the model ignores the weights that it is given: plain SFT. Is its "
                               "forward patched, or is this not the model that trains?")
        self.proved = True
