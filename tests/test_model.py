"""model.py against a GPT-2 written once more in float64, and against values worked by hand."""
import copy
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from conftest import gpt2, oracle
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as M
from model import GPT, BadInput, GPTConfig

def prompts(n=40, P=5):
    return torch.randint(0, 120, (n, P), generator=M.generator("cpu", 3))

def test_forward_is_gpt2_written_down_again(tiny):
    assert torch.allclose(tiny(prompts(3, 17)).double(), gpt2(tiny, prompts(3, 17)), atol=1e-4)

def test_parameters_are_those_of_gpt2_and_scaled_by_width_and_depth(tiny):
    sd = GPT(GPTConfig(124, 40, 8, 4, 192)).state_dict()        # .02 at 768: twice that at 192
    assert len(sd) == 2 + 8 * 12 + 2 + 1 and tiny.lm_head.weight is tiny.transformer.wte.weight
    for name, std in (("wpe", .04), ("h.3.attn.c_attn", .04), ("h.3.mlp.c_proj", .01)):
        assert sd[f"transformer.{name}.weight"].std().item() == pytest.approx(std, .03)

def test_cached_decoding_of_all_rows_is_the_full_forward_of_each(tiny):
    start = prompts()
    free, everywhere = tiny.generate(start, 35, -1, data.PAD)             # fills the block
    assert everywhere.tolist() == [[False] * 5 + [True] * 35] * 40
    with pytest.raises(ValueError, match="prompt 5 . response 36 exceed block_size 40"):
        tiny.generate(start, 36, -1, data.PAD)
    eos = int(free[0, 11])                        # a token that really comes up ends some rows
    start[5:, 1], start[:, 2] = eos, data.PAD     # in a prompt it ends nothing
    ids, mask = tiny.generate(start, 14, eos, data.PAD)
    greedy = gpt2(tiny, ids).argmax(-1)[:, 4:-1].tolist()
    new = [1 + row.index(eos) if eos in row else 14 for row in greedy]
    assert ids[:, :5].equal(start) and 1 < len({*new}) and new.count(14) < 40
    for row, row_mask, said, k in zip(ids.tolist(), mask.tolist(), greedy, new):
        assert row[5:] == said[:k] + [data.PAD] * (14 - k)                # pad behind EOS
        assert row_mask == [False] * 5 + [True] * k + [False] * (14 - k)    # EOS included
    thrice = tiny.generate(start, 14, eos, data.PAD, 3)                   # neighbours
    assert all(torch.equal(a, b.repeat_interleave(3, 0)) for a, b in zip(thrice, (ids, mask)))
    last_first = tiny.generate(start.flip(0), 14, eos, data.PAD)          # no row is special
    assert new[-1] > 4 and all(torch.equal(a, b.flip(0)) for a, b in zip(last_first, (ids, mask)))

def test_prefill_is_shared_and_finished_rows_cost_nothing(tiny, monkeypatch):
    seen, real, start = [], tiny.transformer.h[0].forward, prompts(10, 3)
    monkeypatch.setattr(tiny.transformer.h[0], "forward",
                        lambda x, *a: seen.append(tuple(x.shape[:2])) or real(x, *a))
    start[:4] = start[0]
    free, _ = tiny.generate(start, 1, -1, data.PAD)
    ends = free[:, 3] == free[0, 3]               # so many rows end at once
    tiny.generate(start, 12, int(free[0, 3]), data.PAD, 2)
    assert len(seen) == 13 and seen[:5] == [(10, 3)] * 2 + [(20, 1)] * 3    # the first had one pass
    assert 4 <= ends.sum() < 10 and seen[5][0] <= 20 - 2 * ends.sum()
    tiny.generate(start[ends], 12, int(free[0, 3]), data.PAD)
    assert len(seen) == 13 + 4                    # none left: over

def test_sampled_frequencies_are_the_softmax_at_temperature(tiny):
    ids, _ = tiny.generate(prompts(1, 3), 1, -1, data.PAD, 20000, 1.7, M.generator("cpu", 0))
    p = (gpt2(tiny, prompts(1, 3))[0, -1] / 1.7).softmax(-1)
    freq = torch.bincount(ids[:, 3], minlength=data.N_VOCAB) / 20000
    assert ((freq - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-4).all() and p.max() < 0.5

@pytest.mark.parametrize("u, token", [(0.0, 2), (1 - 2**-24, data.N_VOCAB - 3)])
def test_even_the_ends_of_rand_give_no_token_of_probability_zero(tiny, monkeypatch, u, token):
    logits = torch.randn(500, data.N_VOCAB, generator=M.generator("cpu", 1))
    logits[:, [0, 1, -2, -1]] = -math.inf
    monkeypatch.setattr(tiny.lm_head, "forward", lambda h: logits)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u))
    assert set(tiny.generate(prompts(500), 1, -1, data.PAD, 1, 1.0)[0][:, 5].tolist()) == {token}

def test_rows_of_a_prompt_differ_and_only_the_keyed_generator_decides(tiny):
    assert M.generator("cpu", 0, "a", 1).initial_seed() == zlib.crc32(b"(0, 'a', 1)")
    before, (a, b, c) = torch.get_rng_state(), (tiny.generate(
        prompts(4), 8, -1, data.PAD, 3, 1.0, M.generator("cpu", s))[0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and len({*map(tuple, a.tolist())}) == 12
    assert torch.equal(before, torch.get_rng_state())

def test_token_logprobs_by_hand_and_in_float32():
    got = M.token_logprobs(torch.tensor([[[0, math.log(3)], [1e4, -1e4]]]), torch.tensor([[1, 1]]))
    assert got[0].tolist() == pytest.approx([math.log(0.75), -2e4])
    half = M.token_logprobs(torch.zeros(1, 300, dtype=torch.bfloat16), torch.tensor([7]))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(-math.log(300), abs=1e-6)

def test_exact_kl_is_that_of_torch_distributions_in_float32():
    z = 9 * torch.randn(2, 3, 4, 5, generator=M.generator("cpu", 0))
    for p, q in (z, z.bfloat16()):
        expected = kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double()))
        assert torch.allclose(M.kl_exact(p, q).double(), expected, atol=1e-4)

@pytest.mark.parametrize("T", [1.0, 1.3])
def test_response_logprobs_are_shifted_masked_and_trimmed(tiny, T):
    ids, mask = data.batch([("S 10", "7 # 17"), ("M", "9")])
    logp = oracle(tiny, ids, T).tolist()
    # row 0: tokens 2, 3, 4 and EOS at 5 are predicted at positions 1, 2, 3, 4; row 1: 1 and EOS
    expected = [[0] + logp[0][1:], logp[1][:2] + [0, 0, 0]]
    got = M.response_logprobs(tiny, ids, mask, T).tolist()
    assert got == [pytest.approx(row, abs=1e-4) for row in expected]
    wide = M.trim(*(torch.cat([x, x[:, :1], x[:, :1]], 1) for x in (ids, mask)))
    assert torch.equal(wide[0], ids) and torch.equal(wide[1], mask)

def test_bfloat16_is_near_float32_and_every_parameter_learns(tiny):
    half, (ids, mask) = copy.deepcopy(tiny), data.demonstrations(8, 0)
    half.config.bf16 = True
    exact, z = M.response_logits(tiny, ids, mask), M.response_logits(half, ids, mask)
    assert half(ids).dtype == z.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert (z - exact).abs().max() < 0.1 * exact.std()
    a, b = (m.generate(prompts(), 5, -1, data.PAD)[0] for m in (tiny, half))
    assert (a == b).float().mean() > 0.9
    with torch.no_grad():    # a cast made here must not be used where gradients are wanted
        half(ids)
    M.response_logprobs(half, ids, mask).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in half.parameters())

def test_in_bfloat16_generate_casts_each_weight_once(tiny):
    """Weights are known by their places in memory; the embeddings are looked up, the head cast."""
    at, casts = {p.data_ptr(): name for name, p in tiny.named_parameters()}, Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten._to_copy.default:
                casts[at.get(args[0].data_ptr(), "else")] += 1
            return op(*args, **(kwargs or {}))
    tiny.config.bf16 = True
    with Watch():
        out, _ = tiny.generate(prompts(), 8, -1, data.PAD)
    assert not out.is_inference() and casts.pop("else") > 8
    names = {n for n in at.values() if "ln_" not in n and "wpe" not in n}
    assert casts == dict.fromkeys(names, 1)

@pytest.mark.parametrize("T", [1.0, 1.3])
def test_bfloat16_logits_are_scored_in_float32(tiny, T):
    tiny.config.bf16, (ids, mask) = True, data.demonstrations(8, 0)
    z = M.response_logits(tiny, ids, mask).double() / T
    got = M.response_logprobs(tiny, ids, mask, T)[mask[:, 1:]]
    assert torch.allclose(got.double(), Categorical(logits=z).log_prob(ids[mask]), atol=1e-5)

def descend(model, opts, gradient, *args):
    """One update from a constant gradient -> the weights before and after."""
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    M.update(model, opts, *args)
    assert all(p.grad is None for p in model.parameters())
    return list(zip(before, model.parameters()))

def test_update_clips_the_gradient_norm_and_refuses_what_is_not_finite(tiny):
    sgd, before = [torch.optim.SGD(tiny.parameters(), 0.5)], copy.deepcopy(tiny.state_dict())
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match=f"norm is {bad}"):
            descend(tiny, sgd, bad)
        assert all(torch.equal(before[k], w) for k, w in tiny.state_dict().items())
    for length, args in ((1.0, ()), (0.4, (0.4,))):    # scale
        moved = sum((a - b).pow(2).sum() for a, b in descend(tiny, sgd, 100.0, *args)).sqrt()
        assert moved.item() == pytest.approx(0.5 * length, rel=1e-3)
    for a, b in descend(tiny, sgd, 1e-5):                                 # short enough: unclipped
        assert torch.allclose(a - b, torch.tensor(5e-6), atol=2e-7)

def test_first_step_of_each_optimizer(tiny):
    """AdamW's is its rate, for every weight. Muon's, for the matrices of blocks alone, has the root
    mean square of .2 times its rate (an orthogonal matrix, nearly), whatever the gradient."""
    for a, b in descend(tiny, M.adamw(tiny, 0.02), 100.0, 0.5):
        assert torch.allclose(b, a - 1e-2, atol=1e-5)
    assert M.adamw(tiny, 0.3)[0].param_groups[0]["betas"] == (0.9, 0.95)
    opts, matrices = M.muon(tiny, 0.01, 0.02), {id(p) for p in tiny.transformer.h.parameters()
                                                if p.dim() == 2}
    assert {id(p) for g in opts[0].param_groups for p in g["params"]} == matrices
    for p in tiny.parameters():
        p.grad = torch.randn(p.shape)
    before = [p.detach().clone() for p in tiny.parameters()]
    M.update(tiny, opts)
    for a, b in zip(before, tiny.parameters()):
        if id(b) in matrices:
            step = (a * (1 - 0.01 * 0.1) - b).pow(2).mean().sqrt()
            assert step.item() == pytest.approx(0.002, rel=0.3)
        else:
            assert torch.allclose((a - b).abs(), torch.tensor(0.02), rtol=1e-2)

def test_checkpoints_are_bitwise_and_bad_ones_are_named_until_deleted(tmp_path):
    path, model = tmp_path / "a.pt", GPT(GPTConfig(5, 4, 1, 1, 4, bf16=True))
    M.save_checkpoint(path, model)
    good, whole, foreign, harmless = path.read_bytes(), torch.load(path), [], 0

    def load():
        back = M.load_checkpoint(path)
        assert back.config == model.config and back.lm_head.weight is back.transformer.wte.weight
        assert all(map(torch.equal, back.parameters(), model.parameters()))
    assert load() is None and os.listdir(tmp_path) == ["a.pt"]
    evil = type("Evil", (), dict(__reduce__=lambda _: (exec, ("raise SystemExit('it ran')",))))()
    for change in (dict(gpt={}), dict(gpt=whole["gpt"] | dict(foo=1)), dict(model={}), [1, 2],
                   dict(model=whole["model"] | dict(more=torch.zeros(1))), dict(model=evil)):
        torch.save(whole | change if isinstance(change, dict) else change, path)
        foreign.append(path.read_bytes())
    flips = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1:] for i in range(0, len(good), 71)]
    for bad in (*flips, *foreign, good[:-1], good[:1000], b"", b"hello"):
        path.write_bytes(bad)
        try:    # a flip in the zip's padding harms nothing
            load()
            assert bad in flips and (harmless := harmless + 1) < len(flips) / 2
        except BadInput as e:
            assert f"cannot load {path} (" in str(e) and "delete it" in str(e)
        path.unlink()                             # do as the message says: it works again
        with pytest.raises(BadInput, match="cannot load .*a.pt"):
            load()
    M.save_checkpoint(path, model)
    load()

@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos"),
                                   KeyboardInterrupt(), KeyError()])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    (tmp_path / "f").write_text("old")
    mine = isinstance(error, (OSError, RuntimeError))
    with pytest.raises(BadInput if mine else type(error)) as e, M.atomic(tmp_path / "f") as tmp:
        tmp.write_text("ne")
        raise error
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]
    assert not mine or str(e.value) == f"error: cannot write {tmp_path / 'f'}: {error}"

def test_two_processes_may_write_one_file_at_the_same_time(tmp_path, monkeypatch):
    with M.atomic(tmp_path / "f") as one:
        one.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with M.atomic(tmp_path / "f") as two:
            two.write_text("two")
        assert (tmp_path / "f").read_text() == "two"
    assert (tmp_path / "f").read_text() == "one" and os.listdir(tmp_path) == ["f"]

@dataclass
class Flags:
    n: int = M.arg(3, "a number", ge=1, lt=10)
    rate: float = M.arg(0.5, "a rate", gt=0)
    kind: str = M.arg("x", "a kind", choices=("x", "y"))
    many: tuple[int, ...] = M.arg((1, 2), "some numbers", ge=0)

@pytest.mark.parametrize("argv, expected", [
    ("", [4, 0.5, "x", 1, 2]), ("--n 1 --rate 1e-9 --kind y", [1, 1e-9, "y", 1, 2]),
    ("--many 0 7 5 --n 9", [9, 0.5, "x", 0, 7, 5]), ("--many", [4, 0.5, "x"])])
def test_parse_takes_the_command_line_then_defaults_then_the_dataclass(argv, expected):
    got = M.parse(Flags, argv.split(), "", dict(n=4))
    assert [got.n, got.rate, got.kind, *got.many] == expected

@pytest.mark.parametrize("argv, why", [
    ("--no 1", "unrecognized.*--no"), ("7", "unrecognized.*7"), ("--rat 1", "unrecognized.*--rat"),
    ("--n 1.5", "--n.*'1.5'"), ("--n", "--n.*expected"), ("--n 0", "--n.*0 is not ge 1"),
    ("--n 10", "--n.*10 is not lt 10"), ("--rate 0", "--rate.*0 is not gt 0"),
    ("--rate nan", "--rate.*nan"), ("--kind z", "--kind.*'z'.*'x', 'y'"),
    ("--many 3 -1", "--many.*-1 is not ge 0"), ("--many 3 x", "--many.*'x'")])
def test_parse_says_what_is_wrong(argv, why):
    with pytest.raises(BadInput, match=f"error: .*{why}.*--help"):
        M.parse(Flags, argv.split(), "")

def test_help_shows_every_flag_with_its_default_and_exits_0(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        M.parse(Flags, ["--help"], "line\n    indented")
    out, shown = capsys.readouterr().out, ("number [3]", "rate [0.5]", "kind x|y [x]",
                                           "numbers [1 2]")
    assert "line\n    indented" in out and all(text in " ".join(out.split()) for text in shown)
