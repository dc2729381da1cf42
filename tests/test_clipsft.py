import copy
import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch

import clipsft
import data
from clipsft import METHODS, Batch, Config, clip_loss, dft_loss, finetune, parse, sft_loss
from model import GPT, BadInput, GPTConfig, adamw, arg, load_checkpoint

ROOT = Path(clipsft.__file__).parent
SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --base_steps 6 --base_lr 1e-2 --base_adam_lr 2e-2 "
         "--base_docs 10 "
         "--base_batch 4 --steps 7 --lr 3e-3 --demos 10 --batch_size 4 --old_every 3 "
         "--eps_high 0.05 --rl_from 4 --rl_steps 1 --rl_prompts 2 --rl_group 2 --eval_n 16 "
         "--device cpu --aggregate token --grad_accum 1 --skip none --passes 1").split()
C = parse(Config, SMALL, "")
SMOKE = "--preset smoke --device cpu --seeds 2 --workers 2".split()
LONG = " ".join([*SMALL, "--workers 2 --steps 1000000 --rl_methods"])
BASE, SFT, CLIP = "s0-base_cell.json", "s0-sft-sft_cell.json", "s0-clip-sft_cell.json"

def keyed(*key):
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

def same_weights(a, b, atol):
    """All but the biases of the keys: these have no gradient, and Adam blows up its rounding."""
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        near = torch.isclose(x.double(), y.double(), rtol=0, atol=atol)
        assert near[:16].all() and (near[16:32].all() or name.endswith("c_attn.bias")), name
        assert near[32:].all(), name

@pytest.fixture(scope="module")
def start():
    """A one-layer model trained until it has probabilities of every size, and its data."""
    torch.manual_seed(0)
    model, (ids, mask) = GPT(GPTConfig(data.N_VOCAB, 40, 1, 2, 16)), data.demonstrations(10, 3)
    c = replace(C, steps=40, lr=1e-2, batch_size=10)
    list(finetune(model, None, ids, mask, "sft", c, 0, adamw(model, c.lr)))
    return model, ids, mask

# ---- losses
def test_losses_and_their_weights_by_hand():
    p = torch.tensor([0.1, 0.25, 0.5, 0.9], dtype=torch.double)
    assert sft_loss(p.log()).tolist() == pytest.approx([2.30259, 1.38629, 0.69315, 0.10536], 1e-4)
    ratio = torch.tensor([0.5, 1.0, 1.19, 1.4], dtype=torch.double)
    for eps, losses, weights in ((0.2, [-0.5, -1, -1.19, -1.2], [0.5, 1, 1.19, 0]),
                                 (math.inf, [-0.5, -1, -1.19, -1.4], [0.5, 1, 1.19, 1.4])):
        logp = p.log().requires_grad_()
        loss = clip_loss(logp, p.log() - ratio.log(), 0.2, eps)
        loss.sum().backward()
        assert loss.tolist() == pytest.approx(losses)
        assert (-logp.grad).tolist() == pytest.approx(weights)
    z = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.double, requires_grad=True)
    dft_loss(z.log_softmax(0)[1]).backward()
    pi = [math.exp(x) / sum(map(math.exp, z.tolist())) for x in z.tolist()]
    assert z.grad.tolist() == pytest.approx([-pi[1] * ((i == 1) - pi[i]) for i in range(4)])
    assert dft_loss(p.log())[2].item() == pytest.approx(0.5 * math.log(2))

def test_right_after_a_refresh_clip_is_sft(start, monkeypatch):
    model, ids, mask = start
    b, seen, clip = Batch(ids, mask, model, copy.deepcopy(model), None), [], METHODS["clip"]
    x, y = (torch.autograd.grad(METHODS[m](b, C)[mask[:, 1:]].mean(), [*model.parameters()],
                                retain_graph=True) for m in ("clip", "sft"))
    assert all(torch.allclose(u, v, rtol=0, atol=1e-6) for u, v in zip(x, y))
    monkeypatch.setitem(METHODS, "clip", lambda b, c: seen.append(b) or clip(b, c))
    for k, fresh in ((3, [0, 3, 6]), (7, [0]), (50, [0])):
        seen.clear()
        mine = copy.deepcopy(model)
        c = replace(C, old_every=k)
        list(finetune(mine, model, ids, mask, "clip", c, 0, adamw(mine, C.lr)))
        assert [i for i, b in enumerate(seen) if torch.equal(b.logp, b.old_logp)] == fresh
    last, mine = seen[-1], seen[-1].model          # K >= steps: the base, frozen
    assert torch.equal(last.base_logp, last.old_logp) and not last.old_logp.requires_grad
    b = Batch(last.ids, last.mask, last.old, last.old, mine)
    assert not torch.equal(b.base_logp, b.logp) and b.logp is b.logp and "old_logp" not in vars(b)

@pytest.fixture
def micro(monkeypatch):
    """How each batch is cut: a list of (aggregate, number of parts)."""
    log, real = [], clipsft.micro_batches
    monkeypatch.setattr(clipsft, "micro_batches", lambda *a: log.append(a[1:]) or real(*a))
    return log

# ---- the loop, once more by plain loops in float64
def plain(model, ids, mask, method, c, seed, opts=None, rate=lambda step: 1):
    """finetune in place, token by token -> [(loss, clip_frac)], a pair an update."""
    base, log, per_epoch = copy.deepcopy(model), [], max(1, len(ids) // c.batch_size)
    opts = opts or [torch.optim.AdamW(model.parameters(), c.lr, betas=(0.9, 0.95), weight_decay=0)]
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    for step in range(c.steps):
        if step % c.old_every == 0:
            old = copy.deepcopy(model)
        group = c.old_every // c.passes          # batches of one refresh, passed again and again
        at = step // c.old_every * group + step % c.old_every % group
        order = torch.randperm(len(ids), generator=keyed(seed, at // per_epoch)).tolist()
        rows, beyond = order[at % per_epoch * c.batch_size:][:c.batch_size], []
        z, z_old, z_base = (m(ids[rows]).log_softmax(-1) for m in (model, old, base))
        per_row = [[] for _ in rows]
        for i, t in mask[rows, 1:].nonzero().tolist():
            at = i, t, ids[rows[i], t + 1]
            r, loss = (z[at] - z_old[at].detach()).exp(), -z[at]
            beyond.append(method == "clip" and r.item() > 1 + c.eps_high)
            if method == "clip":
                loss = -1 - c.eps_high + 0 * r if beyond[-1] else -r
            if method == "dft":
                loss = loss * z[at].exp().item()
            if method == "kl":
                loss = loss + 0.5 * (z[i, t].exp() * (z[i, t] - z_base[i, t].detach())).sum()
            per_row[i].append(loss)
        total = {"token": sum(map(sum, per_row)) / len(beyond),
                 "sequence": sum(sum(x) / len(x) for x in per_row) / len(rows),
                 "constant": sum(map(sum, per_row)) / len(rows) / data.MAX_NEW}[c.aggregate]
        model.zero_grad()
        total.backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad /= max(1, norm)
        for opt, lr in zip(opts, rates):
            opt.param_groups[0]["lr"] = lr * rate(step)
            opt.step()
        log.append((total.item(), sum(beyond) / len(beyond)))
    return log

@pytest.mark.parametrize("method, own", [
    ("sft", {}), ("clip", {}), ("clip", dict(eps_high=math.inf, aggregate="sequence")), ("dft", {}),
    ("clip", dict(old_every=7, aggregate="constant")), ("clip", dict(aggregate="sequence")),
    ("kl", dict(batch_size=16)), ("clip", dict(old_every=6, passes=3, batch_size=3))])
def test_fine_tuning_by_plain_loops(start, micro, method, own):
    """Weights and statistics, with any number of micro-batches."""
    (model, ids, mask), c = start, replace(C, **own)
    theirs = copy.deepcopy(model).double()
    log = plain(theirs, ids, mask, method, c, 5)
    for n in (1, 2, 4):
        ours, c = copy.deepcopy(model), replace(c, grad_accum=n)
        got = [*finetune(ours, copy.deepcopy(model), ids, mask, method, c, 5, adamw(ours, c.lr))]
        same_weights(ours, theirs, 1e-5)
        assert got == [(i, dict(loss=pytest.approx(x, abs=1e-4), clip_frac=pytest.approx(clipped)))
                       for i, (x, clipped) in enumerate(log, 1)]
        assert micro[-7:] == [(c.aggregate, n)] * 7
    at = [i for i, (_, clipped) in enumerate(log) if clipped]
    assert bool(at) == (method == "clip" and c.eps_high < 1) and not {0, c.old_every} & set(at)

@pytest.mark.parametrize("steps, accum", [(5, 1), (110, 3)])    # in the warm-up of 100; past it
def test_pre_training_by_plain_loops(micro, steps, accum):
    got = clipsft.pretrain(replace(C, base_steps=steps, grad_accum=accum, aggregate="constant"), 3)
    rng = random.Random("3/docs")
    docs = [data.base_document(rng) for _ in range(10)]
    torch.manual_seed(3)
    model = GPT(GPTConfig(data.N_VOCAB, 40, 1, 2, 16)).double()
    block = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or ".h." not in n]
    opts = [torch.optim.Muon(block, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, 2e-2, betas=(0.9, 0.98), weight_decay=0)]
    plain(model, *data.batch([(p.prompt, text) for p, text in docs]), "sft",
          replace(C, steps=steps, old_every=steps), 3, opts,
          lambda step: min(1, (step + 1) / 100) * (steps - step) / steps)
    same_weights(got, model, 1e-5 if steps == 5 else 1e-3)
    assert micro == [("token", 2 * accum)] * steps

@pytest.mark.parametrize("seed", range(4))
def test_skipped_tokens_by_hand(monkeypatch, seed):
    p = torch.tensor([[0.01, 0.05, 0.101, 0.9], [0.01, 0.099, 0.5, 0.02]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()    # prompt, response, padding
    monkeypatch.setattr(clipsft, "response_logprobs", lambda *a: p.log())
    none, low, some = (clipsft.skipped(None, None, mask, replace(C, skip=how), seed)
                       for how in ("none", "low", "random"))
    assert torch.equal(none, mask) and low.tolist() == [[0, 0, 0, 1, 1], [1, 0, 0, 1, 0]]
    noise = torch.rand((2, 4), generator=keyed(seed, "noise"))
    for i, t in sorted(mask[:, 1:].nonzero().tolist(), key=lambda w: noise[tuple(w)])[:2]:
        none[i, t + 1] = False                     # as many as are low
    assert torch.equal(some, none)

# ---- settings
def test_method_settings():
    assert clipsft.variant("sft", C) == ("sft", C)
    assert clipsft.variant("clip:eps_high=inf,old_every=24,", C) == (
        "clip", replace(C, eps_high=math.inf, old_every=24))
    own = dict(skip="low", lr=1e-4, steps=9, demos=2, batch_size=1, p_word=0.0)
    text = "sft:" + ",".join(f"{k}={v}" for k, v in own.items())
    assert clipsft.variant(text, C) == ("sft", replace(C, **own))

@pytest.mark.parametrize("line, said", [
    ("--methods sft nope", "nope: choose from sft, clip, dft, kl"), ("--methods clip:eps=1", "eps"),
    ("--methods clip:eps_high=-1", "eps_high.* -1 .*gt 0"), ("--methods sft:skip=high", "skip"),
    ("--methods clip:lr", "lr"), ("--methods sft:rl_steps=5", "rl_steps"), ("--p_word 1", "lt 1"),
    ("--old_every 1", "old_every 1 with clip"), ("--methods sft clip:old_every=1", "old_every 1"),
    ("--methods sft:steps=3 --rl_methods sft:steps=3", "ends at step 3"), ("--rl_from 9", "step"),
    ("--eps_high 0", "eps_high"), ("--lr nan", "lr"), ("--preset huge", "preset"), ("x y", "x y"),
    ("--n_head 3", "n_head 3"), ("--workers 2", "--workers 1"),
    ("--out_dir /dev/null/x", "/dev/null/x"), ("--out_dir /proc/nowhere", "/proc/nowhere"),
    ("--methods", "method"), ("--rl_methods nope", "nope")])
def test_bad_command_lines_are_one_line_and_write_nothing(line, said, quick, tmp_path):
    with pytest.raises(BadInput, match=f"^error: .*{said}.*$"):
        go(tmp_path / "r", *line.split())
    assert os.listdir(tmp_path) == []

def test_help_is_short_and_has_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        clipsft.main(["--help"])
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) < 65 and max(map(len, lines)) < 100
    assert {f"--{name}" for name in asdict(C)} <= {x.split()[0] for x in lines if x.strip()}

@pytest.mark.parametrize("name", ["other", "main"])
def test_as_many_processes_as_cpus_but_one_in_a_notebook(tmp_path, monkeypatch, name):
    flags = [*SMALL, "--out_dir", str(tmp_path / "r")]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(sys.modules["__main__"], name, clipsft.main, raising=False)
    assert clipsft.prepare(flags).workers == 1     # also after `from clipsft import main`
    monkeypatch.setattr(sys.modules["__main__"], "main", clipsft.main, raising=False)
    monkeypatch.setattr(clipsft.main, "__module__", "__main__")
    assert [clipsft.prepare(flags + x).workers for x in ([], ["--workers", "3"])] == [7, 3]

# ---- cells
@pytest.fixture
def quick(monkeypatch):
    """No measurements and no report; -> a list of what was computed."""
    log = []

    def watch(name, real):
        monkeypatch.setattr(clipsft, name, functools.wraps(real)(lambda *a: log.append(
            " ".join([name, *(x for x in a if isinstance(x, str))])) or real(*a)))
    for name in ("pretrain", "finetune", "grpo"):
        watch(name, getattr(clipsft, name))
    monkeypatch.setattr(clipsft.ev, "report", lambda out: None)
    monkeypatch.setattr(clipsft.ev, "evaluate", lambda *a: {
        k: sum(p.double().sum().item() for p in m.parameters()) for k, m in zip("xy", a)})
    return log

def go(out, *flags):
    clipsft.main([*SMALL, "--out_dir", str(out), *flags])
    return {p.name: json.loads(p.read_text()) for p in sorted(out.glob("cells/*.json"))}

def stamps(out, what="*.*"):
    return {p: p.stat().st_mtime_ns for p in out.rglob(what)}

def test_a_run_and_what_may_be_added_to_it(quick, tmp_path, monkeypatch, capsys):
    cells, out, sft = go(tmp_path / "a"), tmp_path / "a", "finetune sft"
    assert quick == ["pretrain", sft, sft, "finetune clip", *["grpo"] * 3]
    rows = [r for rows in cells.values() for r in rows]
    assert [(r["method"], r["stage"], r["step"]) for r in rows] == [
        ("base", "rl", 0), ("base", "base", 0), ("clip", "rl", 4), ("clip", "sft", 4),
        ("clip", "sft", 7), ("sft", "rl", 4), ("sft", "sft", 4), ("sft", "sft", 7)]
    assert all(r["seed"] == 0 and r["y"] == cells[BASE][0]["x"] for r in rows)
    assert cells["s0-sft-4-rl_cell.json"][0]["x"] != cells[BASE][0]["x"]
    assert len({r["x"] for r in rows if r["stage"] == "sft"}) == 4 and cells[CLIP][0]["clip_frac"]
    for name in ("base", "sft-4", "clip-4", "base-rl", "sft-4-rl", "clip-4-rl"):
        load_checkpoint(out / "ckpt" / f"s0-{name}.pt")
    said, before = capsys.readouterr().out, stamps(out)
    assert all(f"seed 0 {x} " in said for x in ("base", "sft, step 7", "clip, step 4, then RL"))
    for flags, work in (
            ("", []), ("--methods sft clip dft", ["finetune dft"]),
            ("--methods sft --rl_methods --seeds 2", ["pretrain", sft, sft])):
        quick.clear()
        assert cells.items() <= go(out, *flags.split()).items() and quick == work
        assert before.items() <= stamps(out).items()

    @dataclass
    class Mine(Config):
        power: float = arg(2.0, "mine", gt=0)
    monkeypatch.setattr(clipsft, "Config", Mine)
    monkeypatch.setitem(METHODS, "mine", lambda b, c: -c.power * b.logp)
    mine = go(out, "--methods", "mine")["s0-mine-sft_cell.json"][0]["loss"]
    assert mine > 1.5 * cells[SFT][0]["loss"] and quick[-1] == "finetune mine"
    del before[out / "config.json"]                # the new flag was added to it
    assert json.loads((out / "config.json").read_text())["power"] == 2
    for line in ("--lr 2e-2", "--power 3", "--rl_from 3", "--n_embd 8", "--aggregate constant",
                 "--eval_n 32"):
        with pytest.raises(BadInput, match=f"^error: .*another {line.split()[0]} .*now .*$"):
            go(out, *line.split())
    assert quick[-1] == "finetune mine" and before.items() <= stamps(out).items()
    quick.clear()                                  # another folder takes the base from the cache
    assert go(tmp_path / "b") == cells and quick == [sft, "finetune clip", *["grpo"] * 3]

@pytest.mark.parametrize("n", range(20))
def test_a_kill_at_any_moment_changes_nothing(quick, tmp_path, monkeypatch, n):
    """The process ends at the n-th renaming of a file, half of the time before it."""
    rename, calls = os.replace, []

    def rename_or_die(a, b):
        calls.append(b)
        if len(calls) <= n // 2 or n % 2:
            rename(a, b)
        if len(calls) > n // 2:
            raise SystemExit("killed")
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="killed"):
        m.setattr(os, "replace", rename_or_die)
        go(tmp_path / "a" / "r", "--methods", "sft")
    before = stamps(tmp_path, "*_cell.json")
    again, whole = (go(tmp_path / x / "r", "--methods", "sft") for x in "ab")
    assert again == whole and before.items() <= stamps(tmp_path).items()

@pytest.mark.parametrize("first, gone, then", [
    ("", "no file", "--methods clip:eps_high=0.4 --rl_methods clip:eps_high=0.4"),
    ("--rl_methods", "no file", ""), ("", "s0-base.pt", "--methods sft clip dft"),
    ("", "no file", "--methods sft sft:skip=low")])
def test_cells_find_their_checkpoints_and_tokens(quick, tmp_path, first, gone, then):
    go(tmp_path / "r", *first.split())
    (tmp_path / "r" / "ckpt" / gone).unlink(missing_ok=True)
    go(tmp_path / "r", *then.split())

def test_steps_that_are_measured_and_the_means_between(quick, tmp_path, monkeypatch):
    """With loops that yield statistics and do not train; the cache holds the base."""
    go(tmp_path / "a", "--seed", "1")
    monkeypatch.setattr(clipsft, "EVAL_STEPS", (2, 8))
    monkeypatch.setattr(clipsft, "skipped", lambda base, ids, mask, c, seed: (c.skip, seed))
    masks, given = [], Mock(wraps=data.demonstrations)
    for name, key in (("finetune", "loss"), ("grpo", "reward")):
        monkeypatch.setattr(clipsft, name, functools.wraps(getattr(clipsft, name))(
            lambda *a, key=key: masks.append(a[3:4]) or ((i, {key: i}) for i in range(1, 16))))
    monkeypatch.setattr(data, "demonstrations", given)
    cells = go(tmp_path / "r", *"--seed 1 --steps 12 --rl_from 3 12 --p_word 0.6 --methods".split(),
               "sft", "dft:old_every=1,skip=low,steps=2", "clip:old_every=2")
    assert [(r["step"], r["loss"]) for r in cells["s1-sft-sft_cell.json"]] == [
        (2, 1.5), (3, 3), (8, 6), (12, 10.5)]
    assert cells["s1-sft-12-rl_cell.json"][0]["reward"] == 10.5      # the last ten of 15
    assert masks[:3] == [(("none", 1),), (("low", 1),), (("none", 1),)]
    assert given.call_args_list.count(call(10, 1, p_word=0.6)) == 3
    assert {p.name for p in (tmp_path / "r" / "ckpt").iterdir()} == {    # RL asks for these
        f"s1-{x}.pt" for x in ("base", "base-rl", "sft-3", "sft-12", "sft-3-rl", "sft-12-rl")}

def test_a_new_loss(quick, tmp_path, monkeypatch):
    for loss, flags, error, said in (
            (lambda b, c: -(b.logp - b.old_logp), ["--old_every", "1"], BadInput, "--old_every 1"),
            (lambda b, c: -b.logp.mean(), [], BadInput, "mine must be one per token"),
            (lambda b, c: -b.lopg, [], AttributeError, "lopg")):
        monkeypatch.setitem(METHODS, "mine", loss)
        with pytest.raises(error, match=said):
            go(tmp_path / "a", "--methods", "mine", *flags)
        assert not quick and not os.listdir(tmp_path)
    monkeypatch.setitem(METHODS, "mine", lambda b, c: -(b.logp - b.old_logp).exp())
    assert go(tmp_path / "a", "--methods", "mine")["s0-mine-sft_cell.json"][0]["clip_frac"] > 0

def test_the_cache_of_bases(quick, tmp_path, monkeypatch):
    def bases(flags, seed=0):
        c = clipsft.prepare([*SMALL, "--out_dir", str(tmp_path / f"r{flags}"), *flags.split()])
        return clipsft.base_cell(c, seed)[0]["x"], len([*tmp_path.glob("base-*.pt")])
    assert bases("") == bases("--lr 1 --steps 9 --eval_n 32 --aggregate constant")
    for n, flag in enumerate(("n_layer 2", "n_head 1", "n_embd 8", "base_steps 7", "base_lr 1e-3",
                              "base_batch 9", "base_docs 41", "dtype bf16", "grad_accum 2"), 2):
        assert bases(f"--{flag}")[1] == n, flag
    monkeypatch.setattr(clipsft, "finetune", lambda *a: finetune(*a))
    assert bases("")[1] == 11 and bases("", seed=1)[1] == 12      # another loop, another seed

def test_damaged_files_are_named_and_may_be_deleted(quick, tmp_path):
    whole, (base,) = go(tmp_path / "a"), tmp_path.glob("base-*.pt")
    for path, out in ((base, "b"), (tmp_path / "a" / "cells" / SFT, "a")):
        path.write_bytes(path.read_bytes()[:-100])
        for _ in range(2):
            with pytest.raises(BadInput, match=f"^error: .*{path.name}.*delete.*$"):
                go(tmp_path / out)
        path.unlink()
        assert go(tmp_path / out) == whole

def test_how_a_run_ends(quick, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"^error: .*lower learning rate \(s0-sft-sft_cell\)$"):
        go(tmp_path / "a", "--lr", "1e9")
    monkeypatch.setitem(METHODS, "sft", lambda b, c: b.logp if len(b.ids) == 2 else b.lopg)
    with pytest.raises(RuntimeError, match=r'test_clipsft.py", line \d+[^"]*\n.*lopg'):
        go(tmp_path / "b")
    assert [p.name for p in tmp_path.glob("?/cells/*")] == [BASE] * 2
    monkeypatch.setattr(clipsft, "run", Mock(side_effect=BrokenProcessPool("x")))
    with pytest.raises(BadInput, match="^error: a worker .* the same command goes on from here$"):
        go(tmp_path / "c")

# ---- processes
@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Three runs at once beside each other, for importing torch takes long: {name: (process, run
    folder)}. "wrong" runs a copy of the code in which a new method has a typo."""
    runs, got = tmp_path_factory.mktemp("runs"), {}
    (runs / "code").mkdir()
    for f in ROOT.glob("*.py"):
        (runs / "code" / f.name).write_text(f.read_text().replace("METHODS = {\n", "METHODS = {\n"
            "    'typo': lambda b, c: b.logp if len(b.ids) == 2 else b.lopg,\n"))
    for name, where, flags in (
            ("killed", ROOT, " ".join(SMOKE)),
            ("stopped", ROOT, f"{LONG} --seeds 2"),
            ("wrong", runs / "code", f"{LONG} --methods sft typo")):
        got[name] = subprocess.Popen(
            [sys.executable, "clipsft.py", *flags.split(), "--out_dir", str(runs / name)],
            cwd=where, text=True, stdout=-1, stderr=-1, start_new_session=True), runs / name
    yield got
    for p, _ in got.values():
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)

def wait_for(p, out, cells):
    end = time.time() + 300                        # a busy machine may take long to import torch
    while len([*out.glob("cells/*.json")]) < cells:
        assert p.poll() is None and time.time() < end, p.communicate()
        time.sleep(0.01)

def test_kill_9_and_the_same_command_with_the_smoke_preset(launched, tmp_path):
    p, out = launched["killed"]
    wait_for(p, out, 1)
    time.sleep(random.uniform(0, 0.2))
    p.kill()
    p.communicate(timeout=10)                      # returns once no worker holds its pipes
    assert p.returncode == -9 and not (out / "metrics.jsonl").exists()
    for folder in (out, tmp_path / "r"):
        clipsft.main([*SMOKE, "--workers", "1", "--out_dir", str(folder)])
    again, whole = ((folder / "metrics.jsonl").read_text() for folder in (out, tmp_path / "r"))
    rows = [json.loads(line) for line in whole.splitlines()]
    assert again == whole and {(r["seed"], r["method"], r["stage"]) for r in rows} == {
        (s, *x) for s in (0, 1) for x in [("base", "base"), ("base", "rl"), *itertools.product(
            ("sft", "clip"), ("sft", "rl"))]}
    assert all(0 <= r["ood"] <= 1 and r["nll"] > 0 for r in rows)

def test_ctrl_c_ends_in_seconds(launched):
    p, out = launched["stopped"]
    wait_for(p, out, 2)
    os.killpg(p.pid, signal.SIGINT)                # as a terminal does: to the workers, too
    err = p.communicate(timeout=10)[1]
    assert p.returncode == 130 and "same command goes on" in err and "Traceback" not in err, err

def test_an_error_in_a_worker_ends_the_run_and_names_the_line(launched):
    p, out = launched["wrong"]
    err, code = p.communicate(timeout=300)[1], out.parent / "code" / "clipsft.py"
    line = code.read_text().split("'typo'")[0].count("\n") + 1
    assert p.returncode == 1 and f'{code}", line {line}, in' in err, err
