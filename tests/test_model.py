import math
import os
from pathlib import Path

import pytest
import torch

import data
import model as M
from model import GPT, BadInput, GPTConfig


def reference_logits(state, ids, n_head):
    """GPT-2 written down again from its equations, in float64, one row and one head at a time."""
    w = {k: v.double() for k, v in state.items()}

    def norm(x, name):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * w[name + ".weight"] + w[name + ".bias"]
    out = []
    for row in ids:
        x = w["transformer.wte.weight"][row] + w["transformer.wpe.weight"][:len(row)]
        layers = 1 + max(int(k.split(".")[2]) for k in w if ".h." in k)
        for i in range(layers):
            p = f"transformer.h.{i}."
            qkv = norm(x, p + "ln_1") @ w[p + "attn.c_attn.weight"].T + w[p + "attn.c_attn.bias"]
            q, k, v = qkv.split(x.shape[1], 1)
            D = x.shape[1] // n_head
            heads = []
            for h in range(n_head):
                cut = slice(h * D, (h + 1) * D)
                score = q[:, cut] @ k[:, cut].T / math.sqrt(D)
                score[torch.triu(torch.ones_like(score), 1).bool()] = -math.inf
                heads.append(score.exp() / score.exp().sum(1, keepdim=True) @ v[:, cut])
            x = x + torch.cat(heads, 1) @ w[p + "attn.c_proj.weight"].T + w[p + "attn.c_proj.bias"]
            a = norm(x, p + "ln_2") @ w[p + "mlp.c_fc.weight"].T + w[p + "mlp.c_fc.bias"]
            a = a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))
            x = x + a @ w[p + "mlp.c_proj.weight"].T + w[p + "mlp.c_proj.bias"]
        out.append(norm(x, "transformer.ln_f") @ w["lm_head.weight"].T)
    return torch.stack(out)


def test_forward_equals_gpt2_written_down_again(tiny):
    ids = torch.randint(0, 120, (3, 17))
    expected = reference_logits(tiny.state_dict(), ids, 2)
    assert torch.allclose(tiny(ids).double(), expected, atol=1e-4)


def test_parameters_are_named_and_shaped_as_in_gpt2(tiny):
    shapes = {k: tuple(v.shape) for k, v in tiny.state_dict().items()}
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (124, 32)
    assert shapes["transformer.wpe.weight"] == (40, 32)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (96, 32)
    assert shapes["transformer.h.1.mlp.c_proj.bias"] == (32,)
    assert len(shapes) == 2 + 2 * 12 + 2 + 1
    assert tiny.lm_head.weight is tiny.transformer.wte.weight


def test_initial_scale():
    torch.manual_seed(0)
    sd = GPT(GPTConfig(124, 40, 8, 4, 192)).state_dict()
    assert sd["transformer.h.3.attn.c_attn.weight"].std().item() == pytest.approx(0.04, rel=0.02)
    assert sd["transformer.h.3.mlp.c_proj.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    assert sd["transformer.h.3.mlp.c_proj.bias"].abs().max() == 0
    assert sd["transformer.ln_f.weight"].min() == 1


def test_no_position_sees_the_future(tiny):
    ids = torch.randint(0, 120, (1, 12))
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 120
    assert torch.equal(tiny(ids)[:, :7], tiny(other)[:, :7])
    assert not torch.allclose(tiny(ids)[:, 7:], tiny(other)[:, 7:])


def ragged_prompts(n=40):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 11, (n,), generator=g)
    prompts = torch.randint(0, 120, (n, 10), generator=g)
    prompts[torch.arange(10) >= lengths[:, None]] = data.PAD
    return prompts, lengths


def grow(model, prompt, max_new, eos):
    """Greedy decoding without a cache: the whole row through forward() for every token."""
    row = prompt[None]
    for _ in range(max_new):
        row = torch.cat([row, model(row)[:, -1:].argmax(-1)], 1)
        if row[0, -1] == eos:
            break
    return row[0]


def test_generate_equals_growing_each_row_alone(tiny):
    prompts, lengths = ragged_prompts()
    free, _ = tiny.generate(prompts, lengths, 14, -1, data.PAD)
    eos = int(free[0, lengths[0] + 6])            # a token that really comes up ends some rows
    ids, mask = tiny.generate(prompts, lengths, 14, eos, data.PAD)
    ended = 0
    for i in range(len(prompts)):
        n = int(lengths[i])
        row = grow(tiny, prompts[i, :n], 14, eos)
        assert ids[i, :len(row)].tolist() == row.tolist()
        assert (ids[i, len(row):] == data.PAD).all()
        assert mask[i].nonzero().flatten().tolist() == list(range(n, len(row)))
        ended += int(row[-1] == eos)
    assert 0 < ended < len(prompts)
    thrice, its_mask = tiny.generate(prompts, lengths, 14, eos, data.PAD, 3)
    assert torch.equal(thrice, ids.repeat_interleave(3, 0))
    assert torch.equal(its_mask, mask.repeat_interleave(3, 0))


def test_equal_lengths_take_the_same_way_as_ragged_ones(tiny):
    prompts, _ = ragged_prompts()
    prompts = prompts[:, :3]
    ids, _ = tiny.generate(prompts, torch.full((40,), 3), 12, -1, data.PAD)
    for i in range(0, 40, 7):
        assert ids[i].tolist() == grow(tiny, prompts[i], 12, -1).tolist()


def test_sampling_follows_the_softmax_at_temperature(tiny):
    prompt, T = torch.tensor([[5, 6, 7]]), 1.7
    ids, _ = tiny.generate(prompt, torch.tensor([3]), 1, data.EOS, data.PAD, 20000, T,
                           torch.Generator().manual_seed(0))
    p = (tiny(prompt)[0, -1] / T).softmax(-1)
    freq = torch.bincount(ids[:, 3], minlength=124) / 20000
    assert (freq - p).abs().max() < 4 * (p.max() / 20000).sqrt()
    assert (freq > 0).sum() > 20


def test_every_token_can_be_sampled_the_last_one_too():
    model = GPT(GPTConfig(3, 8, 1, 1, 4))
    for p in model.parameters():
        p.data.zero_()                                                      # uniform over 3 tokens
    ids, _ = model.generate(torch.tensor([[0]]), torch.tensor([1]), 1, -1, 0, 3000, 1.0,
                            torch.Generator().manual_seed(0))
    assert torch.bincount(ids[:, 1]).tolist() == pytest.approx([1000] * 3, abs=130)   # 5 sigma


def test_rows_that_have_finished_cost_nothing(tiny, monkeypatch):
    """A look every fourth token: rows that are done are dropped, and with none left it is over."""
    seen, block = [], tiny.transformer.h[0]
    real = block.forward
    monkeypatch.setattr(block, "forward", lambda x, *a: seen.append(len(x)) or real(x, *a))
    prompts = torch.arange(30).view(10, 3)
    prompts[:4] = prompts[0]
    free, _ = tiny.generate(prompts, torch.full((10,), 3), 1, -1, data.PAD)
    eos = int(free[0, 3])
    first = int((free[:, 3] == eos).sum())
    assert 4 <= first < 10                         # so many rows end at once
    seen.clear()
    tiny.generate(prompts, torch.full((10,), 3), 12, eos, data.PAD)
    assert seen[:4] == [10] * 4 and seen[4] <= 10 - first
    seen.clear()
    prompts = prompts[free[:, 3] == eos]
    ids, mask = tiny.generate(prompts, torch.full((first,), 3), 12, eos, data.PAD)
    assert seen == [first] * 4 and mask.sum(1).tolist() == [1] * first


def test_scoring_agrees_with_sampling(tiny):
    """The log-probability under which a token was drawn is the one training gives it."""
    prompts, lengths = ragged_prompts(6)
    ids, mask = tiny.generate(prompts, lengths, 8, -1, data.PAD, 2, 1.3,
                              torch.Generator().manual_seed(0))
    logp = M.response_logprobs(tiny, ids, mask, temperature=1.3)
    for i in (0, 5, 11):
        for t in mask[i].nonzero().flatten().tolist():
            p = (tiny(ids[i:i + 1, :t])[0, -1].double() / 1.3).softmax(-1)[ids[i, t]]
            assert logp[i, t - 1].item() == pytest.approx(p.log().item(), abs=1e-4)
    assert (logp[~mask[:, 1:]] == 0).all()


def test_rows_of_a_prompt_differ_and_seeds_repeat(tiny):
    prompts, lengths = ragged_prompts(4)

    def go(seed):
        return tiny.generate(prompts, lengths, 8, -1, data.PAD, 3, 1.0,
                             torch.Generator().manual_seed(seed))[0]
    assert torch.equal(go(0), go(0)) and not torch.equal(go(0), go(1))
    assert len({tuple(r) for r in go(0).tolist()}) == 12
    assert torch.equal(go(0)[:3, :3], prompts[:1, :3].expand(3, 3))


def test_sampling_leaves_the_global_generator_alone(tiny):
    before = torch.get_rng_state()
    tiny.generate(*ragged_prompts(4), 8, -1, data.PAD, 2, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_too_long_for_the_block(tiny):
    with pytest.raises(ValueError, match="block_size 40"):
        tiny.generate(torch.zeros(1, 10).long(), torch.tensor([10]), 31, data.EOS, data.PAD)
    ids, _ = tiny.generate(torch.zeros(1, 10).long(), torch.tensor([10]), 30, -1, data.PAD)
    assert ids.shape == (1, 40)                    # all of it may be used


def test_sampling_in_bfloat16(tiny):
    """Under autocast the cache is bfloat16, and the answers nearly those of float32."""
    prompts, lengths = ragged_prompts()
    for P, n in ((10, lengths), (3, torch.full((40,), 3))):
        exact, _ = tiny.generate(prompts[:, :P], n, 4, -1, data.PAD)
        with torch.autocast("cpu", torch.bfloat16):
            ids, _ = tiny.generate(prompts[:, :P], n, 4, -1, data.PAD)
        assert (ids == exact).float().mean() > 0.9
    ids, _ = tiny.bfloat16().generate(prompts, lengths, 4, -1, data.PAD)    # weights, not autocast
    assert (ids[:, :10][prompts != data.PAD] == prompts[prompts != data.PAD]).all()


# ---- log-probabilities
def test_token_logprobs_literal_and_extremes():
    logits = torch.tensor([[0.0, math.log(3.0)], [1e4, -1e4]])
    got = M.token_logprobs(logits, torch.tensor([1, 1]))
    assert got[0].item() == pytest.approx(math.log(0.75)) and got[1].item() == -2e4
    assert M.token_logprobs(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32
    deep = logits[torch.tensor([[0, 1, 0], [1, 1, 1]])]                     # (2, 3, V)
    at = torch.tensor([[1, 0, 0], [1, 0, 1]])
    assert M.token_logprobs(deep, at).flatten().tolist() == pytest.approx(
        [math.log(0.75), 0, math.log(0.25), -2e4, 0, -2e4])


def test_response_logprobs_shift_by_hand(tiny):
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])
    logp = M.response_logprobs(tiny, ids, mask)
    full = tiny(ids).log_softmax(-1)
    # row 0: tokens 2, 3, 4 and EOS at 5 are predicted at positions 1, 2, 3, 4
    assert logp[0].tolist() == pytest.approx(
        [0.0] + [full[0, t, ids[0, t + 1]].item() for t in (1, 2, 3, 4)], abs=1e-5)
    assert logp[1].tolist() == pytest.approx(
        [full[1, 0, ids[1, 1]].item(), full[1, 1, data.EOS].item(), 0, 0, 0], abs=1e-5)


def test_chunks_change_neither_value_nor_gradient(tiny, monkeypatch):
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])
    grads, chunks, head = [], [], tiny.lm_head.forward
    monkeypatch.setattr(tiny.lm_head, "forward", lambda h: chunks.append(len(h)) or head(h))
    for limit, sizes in ((2**26, [6]), (124 * 6, [6]), (124 * 2, [2, 2, 2]), (1, [1] * 6)):
        tiny.zero_grad()
        chunks.clear()
        out = M.response_logprobs(tiny, ids, mask, max_elements=limit)
        assert chunks == sizes                     # no more logits than allowed at a time
        (out * torch.arange(10.0).view(2, 5)).sum().backward()
        grads.append((out.detach(), [p.grad.clone() for p in tiny.parameters()]))
    for out, g in grads[1:]:
        assert torch.allclose(grads[0][0], out, atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0][1], g))


def test_trim_keeps_every_response_token():
    ids, mask = torch.arange(20).view(2, 10), torch.zeros(2, 10).bool()
    mask[0, 2:5], mask[1, 3:6] = True, True
    a, b, c = M.trim(ids, mask, ids[:, 1:])
    assert a.shape == b.shape == (2, 6) and c.shape == (2, 5) and c[0, -1] == 5


# ---- optimizer and randomness
def test_update_clips_the_gradient_norm_and_refuses_nan(tiny):
    opt = M.adamw(tiny, 1.0)
    tiny(torch.zeros(1, 2).long()).sum().backward()
    for p in tiny.parameters():
        p.grad.fill_(math.nan)
    before = [p.clone() for p in tiny.parameters()]
    with pytest.raises(FloatingPointError, match="nan"):
        M.update(tiny, opt, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.parameters()))


def test_first_adam_step_is_the_learning_rate(tiny):
    opt = M.adamw(tiny, 1.0, weight_decay=0.5)
    before = [p.clone() for p in tiny.parameters()]
    for p in tiny.parameters():
        p.grad = torch.full_like(p, 100.0)
    norm = M.update(tiny, opt, 1e-2)
    n = sum(p.numel() for p in tiny.parameters())
    assert norm == pytest.approx(100 * math.sqrt(n), rel=1e-4)
    for a, b in zip(before, tiny.parameters()):
        # Adam's first step has size lr; weight decay lr * 0.5 * w only where dim >= 2
        assert torch.allclose(b, a * (1 - 0.005 * (a.dim() >= 2)) - 1e-2, atol=1e-5)
        assert b.grad is None
    plain = M.adamw(tiny, 0.3)
    assert [g["weight_decay"] for g in plain.param_groups] == [0, 0]
    assert plain.defaults["betas"] == (0.9, 0.95) and plain.defaults["lr"] == 0.3
    assert plain.defaults["fused"]
    # Adam does not see the length of its first gradient; plain descent does: it is clipped to 1
    before = [p.clone() for p in tiny.parameters()]
    for p in tiny.parameters():
        p.grad = torch.full_like(p, 100.0)
    M.update(tiny, torch.optim.SGD(tiny.parameters(), 1.0), 0.5)
    moved = sum((a - b).pow(2).sum() for a, b in zip(before, tiny.parameters())).sqrt()
    assert moved.item() == pytest.approx(0.5, rel=1e-3)


def test_generator_is_keyed():
    def draw(*key):
        return torch.rand(3, generator=M.generator("cpu", *key)).tolist()
    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({tuple(draw(*k)) for k in [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1)]}) == 4


# ---- checkpoints
def test_checkpoint_round_trip(tiny, tmp_path):
    M.save_checkpoint(tmp_path / "a.pt", tiny, step=3, rows=[dict(x=1.5)])
    back, extra = M.load_checkpoint(tmp_path / "a.pt")
    assert extra == dict(step=3, rows=[dict(x=1.5)])
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), back.parameters()))
    assert back.lm_head.weight is back.transformer.wte.weight
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 3  # so does plain torch
    assert os.listdir(tmp_path) == ["a.pt"]


def test_damaged_checkpoints_are_refused(tiny, tmp_path):
    path = tmp_path / "a.pt"
    M.save_checkpoint(path, tiny)
    good = path.read_bytes()
    for i in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1:])
        with pytest.raises(BadInput, match="damaged"):
            M.load_checkpoint(path)
    for bad in (good[:-1], good[:1000], b"", b"hello"):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="truncated"):
            M.load_checkpoint(path)
    with pytest.raises(BadInput, match="cannot read"):
        M.load_checkpoint(tmp_path / "none.pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_malicious_checkpoint_does_not_run(tmp_path, monkeypatch):
    import hashlib
    monkeypatch.chdir(tmp_path)
    torch.save(dict(gpt={}, model=Evil()), "evil.pt")
    raw = (tmp_path / "evil.pt").read_bytes()
    (tmp_path / "evil.pt").write_bytes(raw + hashlib.sha256(raw).digest())
    with pytest.raises(BadInput, match="not a checkpoint"):
        M.load_checkpoint("evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_foreign_checkpoints_are_refused(tmp_path):
    import hashlib
    import io
    for content in (dict(a=1), [1, 2], dict(gpt=dict(n_layer=1), model={}),
                    dict(gpt=dict(foo=1), model={})):
        b = io.BytesIO()
        torch.save(content, b)
        (tmp_path / "x.pt").write_bytes(b.getvalue() + hashlib.sha256(b.getvalue()).digest())
        with pytest.raises(BadInput, match="not a checkpoint"):
            M.load_checkpoint(tmp_path / "x.pt")


def test_a_missing_folder_is_one_line(tiny, tmp_path):
    with pytest.raises(BadInput, match="cannot write"):
        M.save_checkpoint(tmp_path / "no" / "x.pt", tiny)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    M.atomic_write(tmp_path / "f", b"old")

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        M.atomic_write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    monkeypatch.setattr(Path, "unlink", lambda self, **_: full(0))    # now it cannot even clean up
    with pytest.raises(BadInput, match="No space left"):
        M.atomic_write(tmp_path / "f", b"new")


@pytest.mark.parametrize("error, code, text", [
    (BadInput("--lr 0"), 2, "error: --lr 0"),
    (OSError(30, "Read-only file system"), 1, "Read-only"),
    (FloatingPointError("norm nan"), 1, "stopped: norm nan"), (KeyboardInterrupt(), 130, "interr")])
def test_programs_end_in_one_line(error, code, text, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as e:
        M.run_main(main)
    err = capsys.readouterr().err
    assert e.value.code == code and text in err and err.count("\n") == 1


def test_overfits_one_batch():
    torch.manual_seed(0)
    ids, mask = data.batch([("S 10 10 10 : 7 K 3 J >", "10 + 10 = 20"), ("M 3 >", "3")])
    model = GPT(GPTConfig(124, 40, 2, 2, 32))
    opt = M.adamw(model, 1.0)
    for _ in range(120):
        logp = M.response_logprobs(model, ids, mask)
        (-logp.sum() / mask.sum()).backward()
        M.update(model, opt, 5e-3)
    assert -M.response_logprobs(model, ids, mask).sum() / mask.sum() < 0.01
    out, sampled = model.generate(ids[1:, :3], torch.tensor([3]), 8, data.EOS, data.PAD)
    assert data.decode(out[0][sampled[0]].tolist()) == "3 <eos>"       # and it learnt to stop


def test_device_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="no CUDA device"):
            M.pick_device("cuda")
    assert M.pick_device("cpu").type == "cpu"
