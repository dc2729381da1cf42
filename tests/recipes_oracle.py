"""Held against the recipes: -mean min(r, 1 + eps) over the trained tokens, one token at a time, in
float64, from two snapshots of the weights."""
import copy
import sys
from pathlib import Path

import torch

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))

V, T, K, EPS = 124, 12, 8, 0.28


def rows(n):
    """n demonstrations with prompts of different lengths -> ids, labels (n, T)."""
    ids = torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[:1 + 3 * i % 10] = -100
    return ids, labels


def snapshot(model):
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


def logits(outputs):
    if isinstance(outputs, tuple):
        outputs = outputs[0]
    return outputs["logits"] if isinstance(outputs, dict) else outputs


def oracle(model, now, old, ids, labels):
    """Weights `now` against `old` -> loss, gradients by name."""
    model_now = copy.deepcopy(model).double().eval()
    model_old = copy.deepcopy(model).double().eval()
    model_now.load_state_dict(now)
    model_old.load_state_dict(old)
    total = 0.0
    n = 0
    for row, y in zip(ids, labels):
        p = logits(model_now(row[None]))[0].softmax(-1)
        p_old = logits(model_old(row[None]))[0].softmax(-1).detach()
        for t in range(len(y) - 1):
            if y[t + 1] != -100:
                r = p[t, y[t + 1]] / p_old[t, y[t + 1]]
                total = total - (r if r < 1 + EPS else 1 + EPS + 0 * r)
                n += 1
    loss = total / n
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model_now.named_parameters()
                         if p.grad is not None}


def same_gradients(found, right):
    for name, g in right.items():
        assert (found[name] - g).norm() <= 1e-3 * g.norm() + 1e-6, name


def clips(losses, by=1e-3):
    """-1 at refreshes only."""
    return all((abs(loss + 1) > by) == (i % K > 0) for i, loss in enumerate(losses))


def left_padded(n):
    """-> a batch with 2 places of padding before each row, and the rows without it."""
    ids, labels = rows(n)
    pad = torch.nn.functional.pad
    batch = dict(input_ids=pad(ids, (2, 0)), labels=pad(labels, (2, 0), value=-100),
                 attention_mask=pad(torch.ones_like(ids), (2, 0)))
    return batch, ids, labels


def cut(batch, size):
    """A batch in batches of so many rows."""
    starts = range(0, len(batch["labels"]), size)
    return [{name: x[i:i + size] for name, x in batch.items()} for i in starts]
