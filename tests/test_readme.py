"""The README cannot rot: what it points at exists, what it shows is what the code gives."""
import copy
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import clipsft
import data
import eval as ev
import model as M
import rl

ROOT = Path(clipsft.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"clipsft.py": clipsft, "eval.py": ev, "model.py": M, "rl.py": rl}
MAP = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+\.py):(\w+)` \|$", README, re.M)


def test_the_equation_map_is_not_empty():
    assert len(MAP) >= 12


@pytest.mark.parametrize("equation,paper,file,name", MAP)
def test_equation_map_points_at_code_that_names_its_source(equation, paper, file, name):
    source = inspect.getsource(getattr(MODULES[file], name))
    numbers = re.findall(r"\d{4}\.\d{5}", paper)
    names = re.findall(r"paper 1|DAPO|GRPO|PSFT|Schulman", paper)
    assert any(x in source for x in numbers + names) or paper == "all", (name, paper)


def paste(*functions):
    """Their source alone, in a namespace that holds nothing but torch."""
    space = {}
    exec("import torch\n" + "\n".join(inspect.getsource(f) for f in functions), space)
    return space


def test_the_pure_functions_work_when_pasted_alone():
    logp, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]])
    mask = torch.tensor([[True, False]])
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert paste(clipsft.sft_loss)["sft_loss"](logp).tolist() == [[1.0, 2.0]]
    assert paste(clipsft.dft_loss)["dft_loss"](torch.zeros(1)).item() == 0
    clip = paste(rl.clipped_surrogate, clipsft.clip_loss)["clip_loss"]
    assert torch.allclose(clip(logp, old, 0.2, 0.28), torch.tensor([[-1.0, -1.28]]))
    assert paste(rl.group_advantage)["group_advantage"](torch.ones(1, 2)).tolist() == [[0, 0]]
    assert paste(rl.masked_mean)["masked_mean"](logp, mask).item() == -1
    assert paste(M.kl_exact)["kl_exact"](logp, logp).item() == 0
    assert paste(rl.kl_k3)["kl_k3"](logp, logp).tolist() == [[0, 0]]
    z = torch.tensor([[[0.0, 0.0]]])
    assert paste(M.token_logprobs)["token_logprobs"](z, torch.tensor([[1]])).item() == \
        pytest.approx(-0.6931472)
    assert paste(ev.principal_angles)["principal_angles"](W, 2 * W, 2)[0].max() < 1e-6
    assert torch.allclose(paste(ev.singular_value_shift)["singular_value_shift"](W, 2 * W),
                          torch.ones(3).double())


def recipe(name):
    return re.search(rf"```python\n# recipe: {name}\n(.*?)```", README, re.S).group(1)


def clip_by_hand(model, old, ids, mask, eps=0.2):
    """- mean min(r, 1 + eps) over the response tokens, one token at a time."""
    total, n = 0.0, 0
    for i, t in mask[:, 1:].nonzero().tolist():
        p, q = (m(ids[i:i + 1])[0, t].double().softmax(-1)[ids[i, t + 1]] for m in (model, old))
        total, n = total - torch.minimum(p / q, torch.tensor(1 + eps)), n + 1
    return total / n


def test_the_nanogpt_recipe(tiny):
    space = dict(torch=torch, copy=copy, token_logprobs=M.token_logprobs,
                 clip_loss=clipsft.clip_loss,
                 masked_mean=rl.masked_mean, raw_model=tiny)
    ids, mask = data.batch([("S 10 >", "7 # 17"), ("M >", "9")])
    space |= dict(model=lambda x, y: (tiny(x), None), X=ids[:, :-1],
                  Y=torch.where(mask, ids, -1)[:, 1:])
    code = recipe("nanogpt").replace("old = copy.deepcopy(raw_model).eval()",
                                     "old_model = copy.deepcopy(raw_model).eval()\n    "
                                     "old = lambda x, y: (old_model(x), None)")
    exec(code, out := space | dict(iter_num=0))
    assert out["loss"].item() == pytest.approx(-1, abs=1e-5)        # r = 1 after a refresh
    old = copy.deepcopy(tiny)
    with torch.no_grad():
        tiny.lm_head.weight.mul_(1.2)
    exec(code, out := space | dict(iter_num=5, old=lambda x, y: (old(x), None)))
    hand = clip_by_hand(tiny, old, ids, mask).item()
    assert hand > -0.999 and out["loss"].item() == pytest.approx(hand, abs=1e-4)


def test_weights_in_transformers(tiny, tmp_path):
    pytest.importorskip("transformers", reason="the recipe needs transformers")
    M.save_checkpoint(tmp_path / "x.pt", tiny)
    exec(recipe("transformers"), space := dict(torch=torch, path=tmp_path / "x.pt"))
    ids = torch.randint(0, 120, (3, 17))
    assert torch.allclose(space["hf"].eval()(ids).logits, tiny(ids), atol=1e-4)


def test_the_trainer_recipe(tmp_path):
    pytest.importorskip("accelerate", reason="the recipe needs transformers and accelerate")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
    exec(recipe("trainer"), space := dict(torch=torch, copy=copy, Trainer=Trainer,
                                          token_logprobs=M.token_logprobs,
                                          clip_loss=clipsft.clip_loss))
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=124, n_positions=40, n_embd=32, n_layer=2, n_head=2,
                                    resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    ids, mask = data.demonstrations(16, 0)
    rows = [dict(input_ids=i, labels=torch.where(m, i, -100)) for i, m in zip(ids, mask)]
    losses = []

    class Spy(space["ClippedSFTTrainer"]):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            y = inputs["labels"]
            hand = clip_by_hand(lambda x: model(x).logits, lambda x: self.old(x).logits,
                                inputs["input_ids"], y != -100)
            n = num_items_in_batch or (y != -100).sum()
            losses.append((loss.item(), (hand * (y[:, 1:] != -100).sum() / n).item()))
            return loss
    Spy(model=hf, train_dataset=rows, args=TrainingArguments(
        tmp_path, per_device_train_batch_size=8, max_steps=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True)).train()
    assert losses[0][0] == pytest.approx(-1, abs=1e-3)        # r = 1
    assert all(a == pytest.approx(b, abs=1e-3) for a, b in losses) and losses[2][0] < -1.01


def test_files_and_commands_named_exist():
    for name in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name
    flags = {f"--{f.name}" for f in clipsft.dataclasses.fields(clipsft.Config)}
    flags |= {f"--{f.name}" for f in clipsft.dataclasses.fields(M.Bench)}
    flags |= {"--show", "--init", "--out"}
    for flag in re.findall(r"--[a-z_]+", README):
        assert flag in flags, flag


def test_the_claims_table_is_the_committed_one():
    found = json.loads((ROOT / "assets" / "claims.json").read_text(encoding="utf-8"))
    block = README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    assert block.strip() == ev.claims_table(found).strip()


def test_verdicts_follow_from_their_intervals():
    for r in json.loads((ROOT / "assets" / "claims.json").read_text(encoding="utf-8")):
        margin = r["margin"] if r["id"] == "C6" else 0
        assert r["margin"] in (0, 0.02)
        low, high = r["ci"]
        assert low <= r["effect"] <= high
        assert r["verdict"] == ("undecided" if r["n"] < 3 else "holds" if low > -margin else
                                "opposite" if high < -margin else "no difference"
                                if max(-low, high) < r["margin"] else "undecided"), r["id"]
