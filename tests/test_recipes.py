"""The recipes that need torch alone. What needs transformers is in test_recipes_hf.py."""
import ast
import os
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import clipsft
import model as M
import rl
from recipes_oracle import (EPS, K, RECIPES, T, V, clips, cut, left_padded, oracle, rows,
                            same_gradients, snapshot)

import clipped
import nanogpt
import ppo
import sharded
from clipped import OldPolicy, token_logprobs, update_tokens

INF = float("inf")


def gpt():
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(vocab_size=V, block_size=40, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


class NanoGPT(nn.Module):
    """nanoGPT's interface, (X, Y) -> logits, loss. The logits pass through a module first."""

    def __init__(self, then=nn.Identity()):
        super().__init__()
        self.gpt = gpt()
        self.then = then

    def forward(self, X, Y=None):
        return self.then(self.gpt(X)), None


def train(model, updates=10, start=0, micro=1, lr=0.5, labels=None, stride=1):
    """nanoGPT's loop with its recipe, micro-batches of 4 rows; step counts by `stride`.
    -> losses, weights before and gradients of each update."""
    ids, all_labels = rows(4 * micro)
    X = ids[:, :-1]
    Y = (all_labels if labels is None else labels)[:, 1:].clamp(min=-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    old = OldPolicy(model, K)
    losses, weights, grads = [], [], []
    for step in range(start, start + updates):
        tokens = update_tokens([Y])
        optimizer.zero_grad()
        losses.append(0.0)
        for x, y in zip(X.split(4), Y.split(4)):
            old.begin_update(step * stride)
            loss = nanogpt.clipped_loss(model, old, x, y, tokens)
            loss.backward()
            losses[-1] += loss.item()
        weights.append(snapshot(model))
        grads.append({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
    return losses, weights, grads


# ------------------------------------------------------------------------------------- functions
def test_equal_to_the_projects():
    torch.manual_seed(0)
    logp, old_logp, adv = torch.randn(3, 5, 7)
    mask = torch.rand(5, 7) < 0.5
    args = (logp, old_logp, adv, 0.2, EPS)
    assert torch.equal(clipped.clipped_surrogate(*args), rl.clipped_surrogate(*args))
    args = (logp, old_logp, 0.2, EPS)
    assert torch.equal(clipped.clip_loss(*args), clipsft.clip_loss(*args))
    assert clipped.masked_mean(logp, mask) == rl.masked_mean(logp, mask)
    z, y = torch.randn(5, 7, V), torch.randint(0, V, (5, 7))
    assert torch.allclose(token_logprobs(z, y), M.token_logprobs(z, y), atol=1e-6)


def test_weight_of_a_token_by_hand():
    """The gradient with respect to log pi is -r up to 1.28, then 0; A < 0 is cut below .8."""
    r = torch.tensor([0.5, 1.25, 1.4])
    logp = r.log().requires_grad_()
    old_logp = torch.zeros(3, requires_grad=True)
    clipped.clip_loss(logp, old_logp, 0.2, 0.28).sum().backward()
    assert logp.grad.tolist() == pytest.approx([-0.5, -1.25, 0])
    assert old_logp.grad is None
    gain = clipped.clipped_surrogate(r.log(), torch.zeros(3), -1.0, 0.2, 0.28)
    assert gain.tolist() == pytest.approx([-0.8, -1.25, -1.4])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_what_is_copied_stands_alone_and_survives_python_O(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not any(isinstance(node, ast.Assert) for node in nodes)
    assert set(imported) <= {"clipped", "transformers"}
    if path.name == "clipped.py":
        assert not imported


def test_means_by_hand():
    x = torch.tensor([[1.0, 2.0, float("nan")]])
    mask = torch.tensor([[1, 1, 0]])
    assert clipped.masked_mean(x, mask) == 1.5
    assert clipped.masked_mean(x, mask, n=6) == 0.5
    assert clipped.masked_mean(x, 0 * mask) == 0
    assert update_tokens([torch.tensor([[3, -1], [0, -100]]), torch.tensor([[4, 4]])]) == 4
    assert update_tokens([torch.tensor([[-1]])]) == 1    # nothing: 0 / 1, not 0 / 0


def test_token_logprobs_of_a_masked_vocabulary_by_hand():
    """softmax(0, log 3, -inf) = 1/4, 3/4, 0; a row that is not trained may be NaN."""
    z = torch.tensor([[0.0, 1.0986123, -INF], [-INF, -INF, -INF]], requires_grad=True)
    logp = token_logprobs(z, torch.tensor([1, -1]))
    assert logp.tolist() == pytest.approx([-0.2876821, 0])
    logp.sum().backward()
    assert z.grad.flatten().tolist() == pytest.approx([-0.25, 0.25, 0, 0, 0, 0])


def test_token_logprobs_in_chunks(monkeypatch):
    monkeypatch.setattr(clipped.TokenLogprobs, "CHUNK", 2 * V)    # 2 rows at a time, 15 in all
    torch.manual_seed(0)
    z, y, weight = torch.randn(3, 5, V), torch.randint(0, V, (3, 5)), torch.randn(3, 5)
    z.requires_grad_()
    (weight * token_logprobs(z, y)).sum().backward()
    exact = z.detach().double().requires_grad_()
    (weight * exact.log_softmax(-1).gather(-1, y[..., None])[..., 0]).sum().backward()
    assert (z.grad - exact.grad).abs().max() < 1e-6


class Float32Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


def test_no_float32_copy_of_the_logits(monkeypatch):
    monkeypatch.setattr(clipped.TokenLogprobs, "CHUNK", 4 * V)
    z = torch.randn(2, 20, V, dtype=torch.bfloat16, requires_grad=True)
    with Float32Sizes() as sizes:
        token_logprobs(z, torch.zeros(2, 20, dtype=torch.long)).sum().backward()
    assert sizes.largest == 4 * V


def test_logits_of_any_output():
    z = torch.zeros(2, 7, V)
    for outputs in (z, (z, None), [z], dict(loss=1, logits=z)):
        assert clipped.logits_of(outputs) is z
    with pytest.raises(TypeError, match="no logits"):
        clipped.logits_of(dict(loss=z, logits=None))
    with pytest.raises(ValueError, match="not one row for each target"):
        token_logprobs(z, torch.zeros(2, 5, dtype=torch.long))


# ------------------------------------------------------------------------------- nanoGPT's loop
@pytest.mark.parametrize("micro", [1, 2])
def test_nanogpt_is_the_mean_over_all_tokens_of_an_update(micro):
    model = NanoGPT()
    losses, weights, grads = train(model, micro=micro)
    for i in (0, 1, 7, 8, 9):
        old = weights[i - i % K]
        right, right_grads = oracle(model, weights[i], old, *rows(4 * micro))
        assert losses[i] == pytest.approx(right, abs=2e-5)
        same_gradients(grads[i], right_grads)
    assert clips(losses)


def test_a_resume_begins_with_a_refresh():
    losses, _, _ = train(NanoGPT(), start=5, updates=5)
    minus_one = [abs(loss + 1) < 1e-6 for loss in losses]    # updates 5 to 9
    assert minus_one == [True, False, False, True, False]


def test_a_smaller_step_begins_a_new_run():
    """A notebook's cell, run twice."""
    model = nn.Linear(2, 2)
    old = OldPolicy(model)
    old.begin_update(3)
    nn.init.zeros_(model.weight)
    old.begin_update(1)
    assert torch.equal(old.weights["weight"], model.weight)


def test_a_compiled_model():
    assert clips(train(torch.compile(NanoGPT(), backend="eager"))[0])


# ------------------------------------------------------------------------------ what is refused
class Noise(nn.Module):
    """Dropout without a dropout module, on logits far from 0, as GPT-2's are."""

    def forward(self, z):
        return nn.functional.dropout(z, 0.1, self.training) - 50


class Adapter(nn.Module):
    """LoRA: B is 0 at first, so dropout does not show in the logits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.A = nn.Linear(V, 4, bias=False)
        self.B = nn.Linear(4, V, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.B.weight)

    def forward(self, z):
        return z + self.B(self.A(self.dropout(z)))


class MaskVocabulary(nn.Module):
    def forward(self, z):
        z = nn.functional.dropout(z, 0.5, self.training)
        return z.masked_fill(torch.arange(V) >= V - 4, -INF)


def test_dropout_without_a_module_is_noticed():
    with pytest.raises(RuntimeError, match="dropout and noise"):
        train(NanoGPT(Noise()), updates=1)
    assert clips(train(NanoGPT(Noise()).eval())[0])


def test_adapter_dropout_is_noticed_before_the_first_update():
    model = NanoGPT(Adapter(0.05))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="dropout 0.05 at then.dropout"):
        train(model)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert clips(train(model.eval())[0])


def test_a_masked_vocabulary_clips_or_stops():
    _, labels = rows(4)
    labels[labels >= V - 4] = -100
    assert clips(train(NanoGPT(MaskVocabulary()).eval(), labels=labels)[0])
    with pytest.raises(RuntimeError, match="dropout and noise"):
        train(NanoGPT(MaskVocabulary()), labels=labels)
    with pytest.raises(RuntimeError, match="dropout and noise"):
        clipped.check_equal(torch.zeros(1), torch.full((1,), -INF) + INF, torch.ones(1) > 0)
    labels[0, -1] = V - 1
    with pytest.raises(RuntimeError, match="masked out of the vocabulary"):
        train(NanoGPT(MaskVocabulary()).eval(), labels=labels)


def test_a_model_that_ignores_its_weights_is_noticed():
    """As TRL 1.7 made of deep copies: forward is that of another, live model."""
    model = NanoGPT()
    model.forward = NanoGPT().forward
    with pytest.raises(RuntimeError, match="ignores the weights"):
        train(model, updates=1)


def test_plain_sft_is_refused():
    """A refresh at every update: by K, by a step that counts samples, or micro-batches."""
    with pytest.raises(ValueError, match="plain SFT"):
        OldPolicy(nn.Linear(2, 2), every=1)
    with pytest.raises(ValueError, match="one by one"):
        train(NanoGPT(), stride=16)
    model = NanoGPT()
    old = OldPolicy(model)
    y = rows(4)[1][:, 1:]
    with pytest.raises(RuntimeError, match="not micro-batches"):
        for micro_step in range(17):
            old.begin_update(micro_step)
            nanogpt.clipped_loss(model, old, y.clamp(min=0), y, 1).backward()
            if micro_step % 8 == 7:
                torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_begin_update_must_be_called():
    logp = torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="begin_update"):
        OldPolicy(nn.Linear(2, 2)).logp(logp, logp.long(), logp)


# ---------------------------------------------------------------------- no trace, no false alarm
def test_the_old_policy_leaves_no_trace():
    """Running statistics count the model's own passes alone, and no random number is drawn."""
    model = NanoGPT(nn.BatchNorm1d(T - 1, affine=False))
    attributes, names = set(vars(model)), list(model.state_dict())
    state = torch.get_rng_state()
    train(model, updates=3, micro=2)
    assert model.then.num_batches_tracked == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert (set(vars(model)), list(model.state_dict())) == (attributes, names)


@pytest.mark.parametrize("trained", [["lm_head.weight"], ["ln_f.bias"], ["A.weight", "B.weight"]])
def test_no_false_alarm_when_few_weights_train(trained):
    """Tied embeddings alone: pre-LayerNorm removes a constant that is added to them."""
    model = NanoGPT(Adapter())
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(any(name.endswith(end) for end in trained))
    losses, _, _ = train(model)
    assert clips(losses, by=1e-5)


def test_no_false_alarm_while_the_learning_rate_is_0():
    assert train(NanoGPT(), lr=0.0, updates=17)[0] == pytest.approx([-1] * 17, abs=1e-6)


def test_no_false_alarm_when_updates_are_skipped():
    """A GradScaler may skip the first 7 updates and let the 8th through."""
    model = NanoGPT()
    old = OldPolicy(model)
    y = rows(4)[1][:, 1:]
    for step in range(9):
        old.begin_update(step)
        nanogpt.clipped_loss(model, old, y.clamp(min=0), y, 1).backward()
        if step == 7:
            torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_no_false_alarm_when_nothing_is_trained():
    assert train(NanoGPT(), labels=torch.full((4, T), -100))[0] == [0] * 10


# ---------------------------------------------------------- PPO, sharded weights, two processes
class AverageOfThePast(nn.Module):
    """As transformers: keyword arguments, a dict; places where attention_mask is 0 do not count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, 16)
        self.head = nn.Linear(16, V)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.embedding(input_ids) * attention_mask[..., None]
        n = attention_mask.cumsum(1).clamp(min=1)
        return dict(logits=self.head(3 * x.cumsum(1) / n[..., None]))


@pytest.mark.parametrize("recipe", ["ppo", "sharded", "sharded, 2 micro-batches"])
def test_ppo_and_sharded_with_padding_on_the_left(recipe):
    model = AverageOfThePast()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    before = []
    optimizer.register_step_pre_hook(lambda *_: before.append(snapshot(model)))
    batch, ids, labels = left_padded(16)
    if recipe == "ppo":
        losses = ppo.ppo_batch(model, optimizer, batch, updates=4)
    else:
        updates = [cut(part, 2 if "2" in recipe else 4) for part in cut(batch, 4)]
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        losses = sharded.clipped_updates(model, updates, torch.Tensor.backward, optimizer.step)
    for i, loss in enumerate(losses):
        part = slice(4 * i, 4 * i + 4)
        right, _ = oracle(model, before[i], before[0], ids[part], labels[part])
        assert loss == pytest.approx(right, abs=2e-5)
    assert clips(losses, by=1e-4)


@pytest.mark.parametrize("noise, message", [(nn.Dropout(0.1), "dropout 0.1 at then"),
                                            (Noise(), "dropout and noise")])
def test_ppo_and_sharded_notice_dropout(noise, message):
    model = NanoGPT(noise)
    model.forward = lambda input_ids: NanoGPT.forward(model, input_ids)
    batch = dict(zip(["input_ids", "labels"], rows(4)))
    with pytest.raises(RuntimeError, match=message):
        ppo.ppo_batch(model, torch.optim.SGD(model.parameters()), batch, updates=2)
    with pytest.raises(RuntimeError, match=message):
        sharded.clipped_updates(model, [[batch], [batch]], torch.Tensor.backward, int)


def test_ppo_and_sharded_refuse_plain_sft():
    batch = dict(zip(["input_ids", "labels"], rows(2)))
    with pytest.raises(ValueError, match="plain SFT"):
        ppo.ppo_batch(None, None, batch, updates=1)
    with pytest.raises(ValueError, match="as many rows"):
        ppo.ppo_batch(None, None, batch, updates=3)
    with pytest.raises(ValueError, match="plain SFT"):
        sharded.clipped_updates(None, [[batch]], None, None)


def share(rank, world, **named):
    """A process's rows: 0, 2, 4, ... have fewer trained tokens than 1, 3, 5, ..."""
    return {name: x[rank::world] for name, x in named.items()}


def nanogpt_job(rank, world):
    raw_model = NanoGPT()
    model = DistributedDataParallel(raw_model) if world > 1 else raw_model
    ids, labels = rows(8)
    batch = share(rank, world, X=ids[:, :-1], Y=labels[:, 1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    old = OldPolicy(raw_model)
    for i in range(4):
        old.begin_update(i)
        tokens = update_tokens([batch["Y"]])
        nanogpt.clipped_loss(model, old, **batch, tokens=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return raw_model


def ppo_job(rank, world):
    raw_model = AverageOfThePast()
    model = DistributedDataParallel(raw_model) if world > 1 else raw_model
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    ppo.ppo_batch(model, optimizer, share(rank, world, **left_padded(16)[0]), updates=4)
    return raw_model


def sharded_job(rank, world):
    model = AverageOfThePast()
    if world > 1:
        fully_shard(model.head)
        fully_shard(model)
        with pytest.raises(RuntimeError, match="see sharded.py"):
            OldPolicy(model).begin_update(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    batch = share(rank, world, **left_padded(16)[0])
    updates = [cut(part, 2 // world) for part in cut(batch, 4 // world)]
    sharded.clipped_updates(model, updates, torch.Tensor.backward, step)
    return model


JOBS = [nanogpt_job, ppo_job, sharded_job]


def one_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    for job in JOBS:
        weights = {}
        for name, p in job(rank, 2).named_parameters():
            weights[name] = p.full_tensor() if hasattr(p, "full_tensor") else p
        if rank == 0:
            torch.save(weights, folder / job.__name__)
    torch.distributed.barrier()
    os._exit(0)    # gloo's threads may hang or abort at a normal exit


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes(tmp_path):
    """DDP in nanoGPT's loop and in PPO, FSDP2 in the sharded recipe: the weights after training are
    those of one process on the same rows."""
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    for job in JOBS:
        found = torch.load(tmp_path / job.__name__)
        for name, p in job(0, 1).named_parameters():
            assert (found[name] - p).abs().max() < 1e-5, (job.__name__, name)
