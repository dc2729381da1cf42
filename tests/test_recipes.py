"""The recipes of recipes/, held against an oracle: - mean min(r, 1 + eps) over the trained
tokens, one token at a time, in float64, from two snapshots of the weights."""
import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

import model as M

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import clipped
import nanogpt as nanogpt_recipe
import ppo
import sharded

V, T, K, EPS = 124, 12, 8, 0.28
HF = ["trainer", "sft_trainer", "compute_loss_func"]

# ------------------------------------------------------------------------------------------- oracle
def snapshot(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}

def oracle(model, now, old, ids, labels, eps=EPS):
    """(loss, gradients by name) of weights `now` against `old` on all the trained tokens."""
    m, q = copy.deepcopy(model).double().eval(), copy.deepcopy(model).double().eval()
    m.__dict__.pop("old_policy", None)
    m.load_state_dict(now), q.load_state_dict(old)
    total, n = 0.0, 0
    for row, y in zip(ids, labels):
        p = logits(m(row[None]))[0].softmax(-1)
        with torch.no_grad():
            p_old = logits(q(row[None]))[0].softmax(-1)
        for t in range(len(y) - 1):
            if y[t + 1] != -100:
                r = p[t, y[t + 1]] / p_old[t, y[t + 1]]
                total, n = total - (r if r < 1 + eps else torch.tensor(1 + eps).double()), n + 1
    loss = total / n
    if loss.requires_grad:
        loss.backward()
    return loss.item(), {k: p.grad for k, p in m.named_parameters() if p.grad is not None}

def logits(out):
    return out if torch.is_tensor(out) else out[0] if isinstance(out, tuple) else out["logits"]

def same_gradients(found, right):
    """A tensor that the oracle's gradient does not reach may hold zeros. Else: relative error."""
    for k, g in right.items():
        assert (found[k].double() - g).norm() <= 1e-3 * g.norm() + 1e-6, k

def rows(n, first=-100, seed=0):
    """n demonstrations of equal length, prompts of different length; first: may label 0 count?"""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (n, T), generator=g)
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[:0 if first == 0 else 1 + i % 7] = -100
    return ids, labels

# ----------------------------------------------------------------------------- without transformers
def gpt(seed=0):
    torch.manual_seed(seed)
    m = M.GPT(M.GPTConfig(vocab_size=V, block_size=40, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m

class Pair(nn.Module):
    """nanoGPT's interface: (X, Y) -> logits, loss."""
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, X, Y=None):
        return self.inner(X), None

def nanogpt(model, start=0, n=10, micro=1, lr=0.5):
    """-> losses, snapshots by update, gradients by update, and the batches."""
    snaps, grads, losses = {}, {}, []
    ids, labels = rows(4 * micro)
    X, Y = ids[:, :-1], torch.where(labels == -100, -1, labels)[:, 1:]
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    for i in range(start, start + n):
        opt.zero_grad()
        for j in range(micro):
            part = slice(4 * j, 4 * j + 4)
            loss = nanogpt_recipe.clipped_step(model, model, X[part], Y[part], i, j)
            losses.append(loss.item())
            (loss / micro).backward()
        snaps[i] = snapshot(model)
        grads[i] = {k: p.grad.clone() for k, p in model.named_parameters()}
        opt.step()
    return losses, snaps, grads, ids, labels

def test_nanogpt_values_and_gradients():
    model = Pair(gpt())
    losses, snaps, grads, ids, labels = nanogpt(model)
    for i in range(10):
        right, g = oracle(model, snaps[i], snaps[i - i % K], ids, labels)
        assert losses[i] == pytest.approx(right, abs=2e-5), i
        same_gradients(grads[i], g)
    assert losses[0] == pytest.approx(-1, abs=1e-6) and losses[8] == pytest.approx(-1, abs=1e-6)
    assert all(x < -1.001 for i, x in enumerate(losses) if i % K)

def test_nanogpt_micro_steps(monkeypatch):
    """The old policy changes between updates only, and is copied once a refresh."""
    model, copies, made = Pair(gpt()), [], clipped.OldPolicy.__init__

    def count(self, model):
        copies.append(1)
        made(self, model)
    monkeypatch.setattr(clipped.OldPolicy, "__init__", count)
    losses, snaps, _, ids, labels = nanogpt(model, micro=2)
    for i in range(10):
        for j in range(2):
            part = slice(4 * j, 4 * j + 4)
            right, _ = oracle(model, snaps[i], snaps[i - i % K], ids[part], labels[part])
            assert losses[2 * i + j] == pytest.approx(right, abs=2e-5), (i, j)
    assert len(copies) == 2

@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("other", [True, False])
def test_nanogpt_a_second_run_and_a_resume(start, other):
    """Another model or the same one, in the same session, from the start or from update 5: the
    first run's old policy is gone."""
    model = Pair(gpt())
    nanogpt(model, n=4)
    losses, *_ = nanogpt(Pair(gpt(1)) if other else model, start + (start > 0), n=4)
    assert losses[0] == pytest.approx(-1, abs=1e-6)
    assert all(x < -1.001 for i, x in enumerate(losses[1:3], start + 2) if i % K)

def test_no_false_alarm_while_the_learning_rate_is_0():
    losses, *_ = nanogpt(Pair(gpt()), lr=0.0)
    assert losses == pytest.approx([-1] * 10, abs=1e-6)

def test_dropout_is_noticed():
    model = Pair(nn.Sequential(gpt(), nn.Dropout(0.1)))
    with pytest.raises(RuntimeError, match="dropout"):
        nanogpt(model)

def test_a_model_that_ignores_its_weights_is_noticed():
    """What TRL 1.7 did to deepcopy: forward is a closure over the live model."""
    model, live = Pair(gpt()), gpt()
    model.forward = lambda X, Y: (live(X), None)
    with pytest.raises(RuntimeError, match="plain SFT"):
        nanogpt(model, n=1)

def test_a_refresh_at_every_update_is_noticed():
    model = gpt()
    with pytest.raises(RuntimeError, match="plain SFT"):
        clipped.old_policy(model, 0, every=1)
    with pytest.raises(RuntimeError, match="plain SFT"):
        for samples in range(0, 64, 16):              # a step that counts samples, not updates
            clipped.old_policy(model, samples)

def test_a_wrapper_does_not_inherit_the_old_policy_of_what_it_wraps():
    """As PEFT's wrappers do, which pass on every attribute."""
    class Wrapper(nn.Module):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)
    wrapper = Wrapper()
    wrapper.inner = gpt()
    clipped.old_policy(wrapper.inner, 0)
    assert clipped.old_policy(wrapper, 1).model is wrapper

def test_compiled_model():
    model = torch.compile(Pair(gpt()), backend="eager")
    losses, *_ = nanogpt(model)
    assert losses[0] == pytest.approx(-1, abs=1e-5) == losses[8]
    assert all(x < -1.001 for i, x in enumerate(losses) if i % K)

def test_logits_from_any_output():
    z = torch.zeros(2)
    assert all(clipped.logits_of(out) is z for out in (z, (z, None), dict(loss=1, logits=z)))

def test_ppo():
    model = gpt()
    ids, labels = rows(8)
    start, snaps = snapshot(model), []
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    step = opt.step
    opt.step = lambda: (snaps.append(snapshot(model)), step())
    losses = ppo.ppo_batch(model, opt, ids, labels != -100, updates=4)
    hand = [oracle(model, s, start, ids[2 * i:2 * i + 2], labels[2 * i:2 * i + 2])[0]
            for i, s in enumerate(snaps)]
    assert losses == pytest.approx(hand, abs=2e-5) and losses[0] == pytest.approx(-1, abs=1e-6)
    assert all(abs(x + 1) > 1e-3 for x in losses[1:])
    with pytest.raises(AssertionError):
        ppo.ppo_batch(model, opt, ids, labels != -100, updates=1)

def test_sharded():
    model, losses, snaps = gpt(), [], []
    ids, labels = rows(8)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [dict(input_ids=ids[i:i + 2], labels=labels[i:i + 2]) for i in range(0, 8, 2)]

    def update(loss):
        snaps.append(snapshot(model)), losses.append(loss.item())
        opt.zero_grad(), loss.backward(), opt.step()
    start = snapshot(model)
    sharded.clipped_updates(model, update, batches)
    hand = [oracle(model, s, start, b["input_ids"], b["labels"])[0]
            for s, b in zip(snaps, batches)]
    assert losses == pytest.approx(hand, abs=2e-5) and losses[0] == pytest.approx(-1, abs=1e-6)
    assert all(abs(x + 1) > 1e-3 for x in losses[1:])

# ------------------------------------------------------------------------- transformers and TRL
def hf_model(dropout=0.0):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0,
        eos_token_id=0))

def make(kind, path, data, model=None, **args):
    """A trainer by one of the recipes; its .seen: weights, gradients and batches of each update."""
    import transformers as tf
    settings, extra, base = tf.TrainingArguments, {}, tf.Trainer
    if kind == "sft_trainer":
        trl = pytest.importorskip("trl", reason="the recipe for SFTTrainer needs trl")
        datasets = pytest.importorskip("datasets")
        from tokenizers import Tokenizer, models
        words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
        extra["processing_class"] = tf.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="0", pad_token="1", unk_token="0")
        settings, base = trl.SFTConfig, trl.SFTTrainer
        data = datasets.Dataset.from_dict({k: [r[k].tolist() for r in data] for k in data[0]})
        args["dataset_kwargs"] = dict(skip_prepare_dataset=True)
    else:
        extra["data_collator"] = lambda b: {k: torch.stack([r[k] for r in b]) for k in b[0]}
    if kind == "compute_loss_func":
        from hf_loss_func import Clip
        clip, cls = Clip(), tf.Trainer
        extra |= dict(compute_loss_func=clip, callbacks=[clip])
    else:
        from hf_trainer import ClippedSFT
        cls = type("Clipped", (ClippedSFT, base), {})
    seen = []

    class Watch(tf.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            seen.append(dict(now=snapshot(model), batches=[], losses=[]))

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            seen[-1]["grads"] = {k: p.grad.float().clone() for k, p in model.named_parameters()
                                 if p.grad is not None}

    class Spy(cls):
        def training_step(self, model, inputs, *a, **k):
            seen[-1]["batches"].append({k: v.clone() for k, v in inputs.items()})
            loss = super().training_step(model, inputs, *a, **k)
            seen[-1]["losses"].append(loss.item())
            return loss
    kw = dict(per_device_train_batch_size=8, max_steps=10, learning_rate=0.2, optim="sgd",
              lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True,
              save_strategy="no", logging_strategy="no", disable_tqdm=True,
              gradient_checkpointing=False, bf16=False, seed=1)
    trainer = Spy(model=model or hf_model(), train_dataset=data, eval_dataset=data,
                  args=settings(str(path), **kw | args), **extra)
    trainer.add_callback(Watch())
    trainer.seen = seen
    return trainer

def table(n, **kw):
    return [dict(input_ids=i, labels=y, attention_mask=torch.ones_like(i))
            for i, y in zip(*rows(n, **kw))]

def against_oracle(seen, model, tolerance=5e-5, gradients=True, first=0):
    for i, s in enumerate(seen):
        ids, labels = (torch.cat([b[k] for b in s["batches"]]) for k in ("input_ids", "labels"))
        old = seen[i - (i + first) % K if i >= (i + first) % K else 0]["now"]
        right, g = oracle(model, s["now"], old, ids, labels)
        assert sum(s["losses"]) == pytest.approx(right, abs=tolerance), i
        if gradients:
            same_gradients(s["grads"], g)

def moved(losses, by=1e-3):
    """-1 at the refreshes, elsewhere not."""
    return all((abs(x + 1) > by) == (i % K > 0) for i, x in enumerate(losses))

@pytest.fixture
def hf(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate", reason="these recipes need transformers and "
                                     "accelerate")
    pytest.importorskip("transformers")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")     # transformers sets it and leaves it
    accelerate.state.AcceleratorState._reset_state(True)
    return tmp_path

@pytest.mark.parametrize("kind", HF)
def test_hf_values_and_gradients(kind, hf):
    """-1 at a refresh, the oracle's value and gradient between; -100 and label 0."""
    trainer = make(kind, hf, table(16))
    trainer.train()
    seen = trainer.seen
    against_oracle(seen, hf_model())
    assert [sum(seen[i]["losses"]) for i in (0, 8)] == pytest.approx([-1, -1], abs=1e-5)
    assert moved([sum(s["losses"]) for s in seen])

@pytest.mark.parametrize("kind", HF)
def test_hf_accumulation(kind, hf):
    """4 x 4 = 1 x 16, with micro-batches of different numbers of tokens."""
    runs = []
    for size, steps in ((4, 4), (16, 1)):
        trainer = make(kind, hf, table(16), per_device_train_batch_size=size, max_steps=4,
                       gradient_accumulation_steps=steps)
        trainer.train()
        against_oracle(trainer.seen, hf_model())
        runs.append([sum(s["losses"]) for s in trainer.seen])
        assert len(trainer.seen[0]["losses"]) == steps
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)

@pytest.mark.parametrize("kind", ["trainer", "sft_trainer"])
def test_hf_label_0_is_never_counted(kind, hf):
    trainer = make(kind, hf, table(16, first=0), max_steps=3)
    assert trainer.train_dataset[0]["labels"][0] != -100
    trainer.train()
    against_oracle(trainer.seen, hf_model())

@pytest.mark.parametrize("kind", HF)
def test_hf_bf16(kind, hf):
    trainer = make(kind, hf, table(16), bf16=True, max_steps=9)
    trainer.train()
    found = [sum(s["losses"]) for s in trainer.seen]
    assert [found[0], found[8]] == pytest.approx([-1, -1], abs=1e-6) and moved(found)
    against_oracle(trainer.seen, hf_model(), tolerance=0.03, gradients=False)

@pytest.mark.parametrize("kind", HF)
def test_hf_evaluation_is_the_plain_nll(kind, hf):
    from transformers import Trainer, TrainingArguments
    trainer = make(kind, hf, table(16), max_steps=3, per_device_eval_batch_size=16,
                   eval_strategy="steps", eval_steps=1)
    ids, labels = rows(16)

    def nll():
        with torch.no_grad():
            logp = copy.deepcopy(trainer.model).double()(input_ids=ids).logits.log_softmax(-1)
        y = labels[:, 1:]
        return -logp[:, :-1].gather(-1, y.clamp(min=0)[..., None])[..., 0][y != -100].mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll(), abs=1e-4)      # before train()
    trainer.train()
    against_oracle(trainer.seen, hf_model())                  # undisturbed by evaluation between
    found = trainer.evaluate()["eval_loss"]
    stock = Trainer(model=trainer.model, eval_dataset=table(16), args=TrainingArguments(
        str(hf), per_device_eval_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True),
        data_collator=lambda b: {k: torch.stack([r[k] for r in b]) for k in b[0]})
    assert found == pytest.approx(nll(), abs=1e-4)
    assert found == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-4)

@pytest.mark.parametrize("kind", HF)
def test_hf_a_second_run_and_a_resume(kind, hf):
    trainer = make(kind, hf, table(16), max_steps=5, save_strategy="steps", save_steps=5)
    for _ in range(2):
        trainer.seen.clear()
        trainer.train()
        against_oracle(trainer.seen, hf_model())
        assert sum(trainer.seen[0]["losses"]) == pytest.approx(-1, abs=1e-5)
    again = make(kind, hf, table(16), max_steps=10)         # a new process has a new trainer
    trainer.args.max_steps = 10                             # the same one goes on where it was
    for one in (trainer, again):
        one.seen.clear()
        one.train(resume_from_checkpoint=str(hf / "checkpoint-5"))
        assert len(one.seen) == 5
        against_oracle(one.seen, hf_model(), first=5)
        assert [sum(one.seen[i]["losses"]) for i in (0, 3)] == pytest.approx([-1, -1], abs=1e-5)

class Bare(nn.Module):
    """A model of one's own: bare logits, a tuple or a dict; knows nothing of loss kwargs."""
    def __init__(self, form):
        super().__init__()
        self.gpt, self.form = gpt(), form

    def forward(self, input_ids, attention_mask=None, labels=None):
        z = self.gpt(input_ids)
        return dict(tensor=z, tuple=(z,), dict=dict(logits=z))[self.form]

@pytest.mark.parametrize("kind", ["trainer", "compute_loss_func"])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_hf_any_output(kind, form, hf):
    trainer = make(kind, hf, table(16), model=Bare(form), max_steps=2, prediction_loss_only=True,
                   per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    against_oracle(trainer.seen, Bare(form))
    assert 0 < trainer.evaluate()["eval_loss"] < 30

@pytest.mark.parametrize("kind", HF)
def test_hf_nothing_to_train(kind, hf):
    data = table(8)
    for row in data:
        row["labels"][:] = -100
    trainer = make(kind, hf, data, max_steps=2)
    trainer.train()
    assert [sum(s["losses"]) for s in trainer.seen] == [0, 0]

@pytest.mark.parametrize("kind", HF)
def test_hf_gradient_checkpointing(kind, hf):
    for reentrant in (True, False):
        trainer = make(kind, hf, table(16), max_steps=3, gradient_checkpointing=True,
                       gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        trainer.train()
        against_oracle(trainer.seen, hf_model())

@pytest.mark.parametrize("kind", HF)
def test_hf_dropout_is_noticed(kind, hf):
    with pytest.raises(RuntimeError, match="dropout"):
        make(kind, hf, table(16), model=hf_model(0.1)).train()

@pytest.mark.parametrize("kind", HF)
def test_hf_warm_up_from_0(kind, hf):
    """A first step at learning rate 0 changes nothing: r = 1 twice, and no false alarm."""
    args = dict(warmup_steps=2, lr_scheduler_type="linear", max_steps=4)
    trainer = make(kind, hf, table(16), **args)
    trainer.train()
    assert sum(trainer.seen[1]["losses"]) == pytest.approx(-1, abs=1e-5)
    assert abs(sum(trainer.seen[3]["losses"]) + 1) > 1e-4

@pytest.mark.parametrize("kind", HF)
def test_hf_lora(kind, hf):
    """Only the adapters are copied; B = 0 at first is no false alarm."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.0)
    trainer = make(kind, hf, table(16), model=peft.get_peft_model(hf_model(), lora))
    trainer.train()
    losses = [sum(s["losses"]) for s in trainer.seen]
    assert all("lora" in k for k in trainer.model.old_policy.weights)
    assert [losses[0], losses[8]] == pytest.approx([-1, -1], abs=1e-5)
    assert moved(losses, 1e-4)
    torch.manual_seed(0)
    against_oracle(trainer.seen, peft.get_peft_model(hf_model(), lora), gradients=False)

# --------------------------------------------------------------------------------- two processes
def three_updates(kind, path, world):
    """[loss, gradient norm] of each update, on the same global batches for any world."""
    trainer = make(kind, Path(path) / kind, table(16), max_steps=3, max_grad_norm=1e9,
                   per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
                   logging_strategy="steps", logging_steps=1, average_tokens_across_devices=True)
    trainer.train()
    return [[x["loss"], x["grad_norm"]] for x in trainer.state.log_history if "grad_norm" in x]

def test_hf_two_processes(hf):
    """As with one process on the same global batch."""
    kinds = HF if importlib.util.find_spec("trl") else ["trainer", "compute_loss_func"]
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                            OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    outputs = [open(hf / f"rank{r}.txt", "w+") for r in range(2)]
    jobs = [subprocess.Popen([sys.executable, __file__, str(hf), *kinds], stdout=out, stderr=out,
                             env=env | dict(RANK=str(r), LOCAL_RANK=str(r)))
            for r, out in enumerate(outputs)]
    try:
        one = {kind: three_updates(kind, hf, 1) for kind in kinds}
        for job, out in zip(jobs, outputs):
            assert job.wait(timeout=300) == 0, Path(out.name).read_text()[-3000:]
    finally:
        for job, out in zip(jobs, outputs):
            job.kill(), out.close()
    two = json.loads((hf / "two.json").read_text())
    for kind in kinds:
        assert len(one[kind]) == 3
        assert two[kind] == [pytest.approx(x, rel=1e-3) for x in one[kind]], kind
        assert one[kind][0][0] == pytest.approx(-1, abs=1e-3) and abs(one[kind][1][0] + 1) > 0.01

if __name__ == "__main__":    # one of the two processes
    torch.set_num_threads(1)
    found = {kind: three_updates(kind, sys.argv[1], 2) for kind in sys.argv[2:]}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "two.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)    # gloo's threads may hang or abort at a normal exit
