"""The recipes that need transformers, some also trl or peft: skipped where these are missing."""
import importlib.util
import os
import socket
import sys

import pytest
import torch
from torch import nn

from recipes_oracle import (K, V, clips, cut, left_padded, oracle, rows, same_gradients,
                            snapshot)
from test_recipes import gpt

accelerate = pytest.importorskip("accelerate")
tf = pytest.importorskip("transformers")

import ppo
import sharded
from hf_loss_func import ClippedLoss
from hf_trainer import ClippedSFT
from to_transformers import to_transformers

KINDS = ["trainer", "loss_func"]
if importlib.util.find_spec("trl"):
    KINDS.append("sft_trainer")


@pytest.fixture(autouse=True)
def accelerate_begins_anew(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")     # transformers sets it and leaves it
    accelerate.state.AcceleratorState._reset_state(True)


def gpt2(dropout=0.0):
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(
        vocab_size=V, n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0,
        eos_token_id=0))


def table(labels=None):
    ids, all_labels = rows(16)
    labels = all_labels if labels is None else labels
    return [dict(input_ids=i, labels=y, attention_mask=torch.ones_like(i))
            for i, y in zip(ids, labels)]


def stack(batch):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}


class Watch(tf.TrainerCallback):
    """Weights before and gradients of each update."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights = []
        self.grads = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.weights.append(snapshot(model))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads.append({name: p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None})


def make(kind, path, model=None, data=None, **args):
    """A trainer whose updates train on all 16 rows, and what watches it."""
    settings = dict(per_device_train_batch_size=16, max_steps=10, learning_rate=0.2, optim="sgd",
                    lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True,
                    save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
                    gradient_checkpointing=False, per_device_eval_batch_size=16) | args
    data = data or table()
    watch = Watch()
    extra = dict(callbacks=[watch], data_collator=stack)
    base = tf.Trainer
    config = tf.TrainingArguments
    if kind == "sft_trainer":
        import datasets
        import tokenizers
        import trl
        base = trl.SFTTrainer
        config = trl.SFTConfig
        words = tokenizers.models.WordLevel({str(i): i for i in range(V)}, unk_token="0")
        extra["processing_class"] = tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), eos_token="0", pad_token="1")
        data = datasets.Dataset.from_list([{k: x.tolist() for k, x in row.items()}
                                           for row in data])
        settings["dataset_kwargs"] = dict(skip_prepare_dataset=True)
    if kind == "loss_func":
        clip = ClippedLoss()
        extra["compute_loss_func"] = clip
        extra["callbacks"].append(clip)
        clipped_trainer = base
    else:
        clipped_trainer = type("ClippedTrainer", (ClippedSFT, base), {})
    trainer = clipped_trainer(model=model or gpt2(), train_dataset=data, eval_dataset=data,
                              args=config(str(path), **settings), **extra)
    return trainer, watch


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 4])
def test_mean_over_all_tokens_of_an_update(kind, micro, tmp_path):
    trainer, watch = make(kind, tmp_path, per_device_train_batch_size=16 // micro,
                          gradient_accumulation_steps=micro)
    trainer.train()
    for i, found in enumerate(losses(trainer)):
        right, grads = oracle(gpt2(), watch.weights[i], watch.weights[i - i % K], *rows(16))
        assert found == pytest.approx(right, abs=1e-4)
        if i in (0, 1, 9):
            same_gradients(watch.grads[i], grads)
    assert clips(losses(trainer))


@pytest.mark.parametrize("kind", KINDS)
def test_label_0_is_not_counted(kind, tmp_path):
    ids, labels = rows(16)
    labels[:, 0] = ids[:, 0]
    trainer, watch = make(kind, tmp_path, data=table(labels), max_steps=2)
    if kind == "loss_func":
        with pytest.raises(ValueError, match=r"labels\[:, 0\] = -100"):
            trainer.train()
        return
    trainer.train()
    right, _ = oracle(gpt2(), watch.weights[1], watch.weights[0], *rows(16))
    assert losses(trainer) == pytest.approx([-1, right], abs=1e-4)


SETTINGS = {
    "bf16": dict(bf16=True),
    "reentrant": dict(gradient_checkpointing_kwargs=dict(use_reentrant=True)),
    "not reentrant": dict(gradient_checkpointing_kwargs=dict(use_reentrant=False)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(kind, name, tmp_path):
    """On rows with padding on the left, which tells whether the old policy sees attention_mask."""
    batch, _, _ = left_padded(16)
    data = [{column: x[i] for column, x in batch.items()} for i in range(16)]
    settings = dict(gradient_checkpointing="reentrant" in name, max_steps=9) | SETTINGS[name]
    trainer, _ = make(kind, tmp_path, data=data, **settings)
    trainer.train()
    assert clips(losses(trainer))


class Own(nn.Module):
    """A model of one's own: a tensor, a tuple or a dict."""

    def __init__(self, form):
        super().__init__()
        self.gpt = gpt()
        self.form = form

    def forward(self, input_ids, attention_mask=None, labels=None):
        z = self.gpt(input_ids)
        return dict(tensor=z, one=(z,), two=(z, 0 * z), dict=dict(logits=z))[self.form]


@pytest.mark.parametrize("kind", ["trainer", "loss_func"])
@pytest.mark.parametrize("form", ["tensor", "one", "two", "dict"])
def test_evaluation_of_any_output(kind, form, tmp_path):
    """compute_metrics is shown all logits, eval_loss is the plain nll; before and after train()."""
    shown = []

    def metrics(prediction):
        shown.append(torch.tensor(prediction.predictions))
        return {}

    trainer, _ = make(kind, tmp_path, model=Own(form), max_steps=9)
    trainer.compute_metrics = metrics
    for _ in range(2):
        loss = trainer.evaluate()["eval_loss"]
        ids, labels = rows(16)
        z = trainer.model.gpt(ids).double()
        assert torch.allclose(shown.pop(), z.float(), atol=1e-5)
        nll = nn.functional.cross_entropy(z[:, :-1].transpose(1, 2), labels[:, 1:])
        assert loss == pytest.approx(nll.item(), abs=1e-4)
        trainer.train()
        assert clips(losses(trainer))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_begins_with_a_refresh(kind, tmp_path):
    make(kind, tmp_path, max_steps=5, save_strategy="steps", save_steps=5)[0].train()
    trainer, _ = make(kind, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    minus_one = [abs(loss + 1) < 1e-4 for loss in losses(trainer)[-5:]]    # updates 5 to 9
    assert minus_one == [True, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train(kind, tmp_path):
    nothing = torch.full_like(rows(16)[0], -100)
    trainer, _ = make(kind, tmp_path, data=table(nothing), max_steps=2)
    trainer.train()
    assert losses(trainer) == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_label_smoothing_stop(kind, tmp_path):
    with pytest.raises(RuntimeError, match="dropout 0.1"):
        make(kind, tmp_path, model=gpt2(0.1))[0].train()
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        make(kind, tmp_path, label_smoothing_factor=0.1)[0].train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [{}, dict(lora_dropout=0.05)], ids=["default", "0.05"])
def test_lora(kind, dropout, tmp_path):
    """With its default, 0, it clips; with any other it stops before the first update."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", **dropout)
    model = peft.get_peft_model(gpt2(), lora)
    trainer, watch = make(kind, tmp_path, model=model, learning_rate=1.0)
    if dropout:
        with pytest.raises(RuntimeError, match="dropout 0.05"):
            trainer.train()
        assert len(watch.grads) == 0
    else:
        trainer.train()
        assert clips(losses(trainer))


def test_ppo_and_sharded_with_padding_on_the_left():
    """GPT-2 has absolute positions, so position_ids are in the batch."""
    batch, ids, labels = left_padded(8)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = ppo.score(model, batch)[0][:, 2:]
    assert torch.allclose(found, ppo.score(model, dict(input_ids=ids, labels=labels))[0], atol=1e-4)
    assert torch.equal(sharded.score(model, batch)[0][:, 2:], found)
    assert ppo.ppo_batch(model, optimizer, batch, updates=4) == pytest.approx([-1] * 4)
    updates = [[part] for part in cut(batch, 2)]
    assert sharded.clipped_updates(model, updates, torch.Tensor.backward, optimizer.step) == \
        pytest.approx([-1] * 4)


def test_to_transformers(tmp_path):
    """The same logits; without dropout, also when a trainer puts it into training mode."""
    from model import save_checkpoint
    model = gpt()
    save_checkpoint(tmp_path / "model.pt", model)
    exported = to_transformers(tmp_path / "model.pt")
    assert not exported.training
    ids, _ = rows(4)
    assert torch.allclose(exported(ids).logits, model(ids), atol=1e-4)
    assert torch.allclose(exported.train()(ids).logits, model(ids), atol=1e-4)


def three_updates(kind, path, world):
    """[loss, gradient norm] of each update, on the same 16 rows in any world."""
    trainer, _ = make(kind, path, max_steps=3, max_grad_norm=1e9, gradient_accumulation_steps=2,
                      per_device_train_batch_size=8 // world, average_tokens_across_devices=True)
    trainer.train()
    return [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]


def one_process(rank, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port,
                      MASTER_ADDR="127.0.0.1")
    found = {kind: three_updates(kind, folder, 2) for kind in KINDS}
    if rank == 0:
        torch.save(found, folder / "found")
    torch.distributed.barrier()
    os._exit(0)    # gloo's threads may hang or abort at a normal exit


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_process, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        assert process.exitcode == 0
    found = torch.load(tmp_path / "found")
    for kind in KINDS:
        one = three_updates(kind, tmp_path, 1)
        assert found[kind] == [pytest.approx(x, rel=1e-3) for x in one]
        assert clips([loss for loss, norm in one])
