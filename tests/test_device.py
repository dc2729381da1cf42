"""On CUDA as on the CPU. torch refuses to mix devices, so a run there shows that nothing does."""
import copy
import json
from dataclasses import replace

import pytest
import torch

import clipsft
import data
import rl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SMALL = clipsft.Config(steps=4, batch_size=8, old_every=2, rl_prompts=4, rl_group=4, kl_coef=0.1)


def on_both(tiny):
    return tiny, copy.deepcopy(tiny).to("cuda")


@torch.no_grad()
def assert_moved_alike(start, here, there):
    """By their logits: the biases of the keys move by rounding alone."""
    ids = torch.arange(80).view(8, 10)
    moved = here(ids) - start(ids)
    apart = there(ids.to("cuda")).cpu() - here(ids)
    assert apart.abs().max() < 0.05 * moved.abs().max()


def test_greedy_answers_are_the_same(tiny):
    problems = [data.Problem("S", (10, 10, 10), ("7", "K", "3", card)) for card in data.DECK]
    here, there = [rl.respond(model, problems, 2) for model in on_both(tiny)]
    assert here[0] == there[0]
    assert there[1].is_cuda and there[2].is_cuda


@pytest.mark.parametrize("own", [dict(loss="clip"), dict(loss="kl"), dict(loss="asft"),
                                 dict(loss="sft", rotation=1.0)], ids=str)
def test_fine_tuning_gives_the_same_weights(tiny, own):
    ids, mask = data.demonstrations(32, 0)
    start = copy.deepcopy(tiny)
    models = on_both(tiny)
    for model in models:
        base = copy.deepcopy(model).requires_grad_(False)
        list(clipsft.finetune(model, base, ids, mask, replace(SMALL, **own), 0))
    assert_moved_alike(start, *models)


def test_grpo_gives_the_same_weights_from_the_same_rollout(tiny, monkeypatch):
    """Each device has its own random numbers, so here the CPU's rollout serves both."""
    ids, mask, _ = rl.rollout(tiny, SMALL, 0, 0)
    rewards = torch.eye(4)
    start = copy.deepcopy(tiny)
    models = on_both(tiny)
    for model in models:
        rollout = ids.to(model.device), mask.to(model.device), rewards
        monkeypatch.setattr(rl, "rollout", lambda *_: rollout)
        list(rl.grpo(model, None, replace(SMALL, rl_steps=2), 0))
    assert_moved_alike(start, *models)


def test_whole_jobs_agree(tmp_path):
    """But for what is sampled: the entropy and all of RL. Rounding differs: TF32 on CUDA."""
    nll = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        clipsft.main(["--preset", "smoke", "--device", device, "--kl_coef", "0.1", "--methods",
                      "sft", "clip", "kl", "sft-skip-low", "sft-frozen-table",
                      "--out_dir", str(folder)])
        rows = [row for path in sorted(folder.glob("*.json"))
                for row in json.loads(path.read_text())["rows"]]
        assert sum(row["stage"] == "rl" for row in rows) == 3
        nll[device] = [row["nll"] for row in rows if row["stage"] != "rl"]
    assert nll["cuda"] == pytest.approx(nll["cpu"], rel=0.02)
