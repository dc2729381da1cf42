"""model.py against a GPT-2 written once more in float64, and against values worked by hand."""
import copy
import math
import zlib

import pytest
import torch
from conftest import gpt2, oracle
from torch.distributions import Categorical, kl_divergence

import data
import model as M
from model import GPT, GPTConfig


def prompts(rows, places):
    return torch.randint(0, 120, (rows, places), generator=torch.Generator().manual_seed(3))


def test_the_forward_pass_is_gpt2(tiny):
    ids = prompts(3, 17)
    assert torch.allclose(tiny(ids).double(), gpt2(tiny, ids), atol=1e-4)


def test_initial_weights_are_scaled_by_width_and_depth():
    parameters = GPT(GPTConfig(124, 40, 8, 4, 192)).transformer.state_dict()
    for name in ("wte", "wpe", "h.3.attn.c_attn", "h.3.mlp.c_fc"):    # .02 at width 768
        assert parameters[f"{name}.weight"].std().item() == pytest.approx(0.04, rel=0.04)
    for name in ("h.3.attn.c_proj", "h.3.mlp.c_proj"):    # over sqrt(2 * 8)
        assert parameters[f"{name}.weight"].std().item() == pytest.approx(0.01, rel=0.04)
        assert not parameters[f"{name}.bias"].any()


def test_cached_decoding_is_the_full_forward_pass(tiny):
    ids, mask = tiny.generate(prompts(10, 5), 35, -1, data.PAD)    # fills the block; no EOS
    assert ids[:, :5].equal(prompts(10, 5))
    assert ids[:, 5:].equal(gpt2(tiny, ids).argmax(-1)[:, 4:-1])
    assert mask.tolist() == [[False] * 5 + [True] * 35] * 10
    with pytest.raises(ValueError, match="prompt 5 . response 36 exceed block_size 40"):
        tiny.generate(prompts(10, 5), 36, -1, data.PAD)


@pytest.fixture
def ended(tiny):
    """Prompts that hold the EOS token, that EOS, and what 40 rows greedily say without it, of which
    some say it and stop."""
    free, _ = tiny.generate(prompts(40, 5), 14, -1, data.PAD)
    eos = free[0, 11].item()
    start = prompts(40, 5)
    start[5:, 1] = eos
    free, _ = tiny.generate(start, 14, -1, data.PAD)
    said = free[:, 5:].tolist()
    assert 5 < sum(eos in row for row in said) < 35
    return start, eos, said


def test_a_row_ends_at_its_first_eos_and_is_padded_behind_it(tiny, ended):
    start, eos, said = ended
    ids, mask = tiny.generate(start, 14, eos, data.PAD)
    for row, row_mask, words in zip(ids.tolist(), mask.tolist(), said):
        length = words.index(eos) + 1 if eos in words else 14
        assert row[5:] == words[:length] + [data.PAD] * (14 - length)
        assert row_mask == [False] * 5 + [True] * length + [False] * (14 - length)


def test_copies_are_neighbours_and_the_order_of_prompts_does_not_matter(tiny, ended):
    start, eos, _ = ended
    ids, _ = tiny.generate(start, 14, eos, data.PAD)
    thrice, _ = tiny.generate(start, 14, eos, data.PAD, 3)
    flipped, _ = tiny.generate(start.flip(0), 14, eos, data.PAD)
    assert thrice.equal(ids.repeat_interleave(3, 0))
    assert flipped.flip(0).equal(ids)


def test_prompts_are_read_once_and_finished_rows_are_dropped(tiny, monkeypatch):
    shapes = []
    forward = tiny.transformer.h[0].forward

    def watched(x, *args):
        shapes.append(tuple(x.shape[:2]))
        return forward(x, *args)

    start = prompts(10, 3)
    start[:4] = start[0]
    free, _ = tiny.generate(start, 1, -1, data.PAD)
    eos = free[0, 3].item()
    n_end = (free[:, 3] == eos).sum().item()    # so many prompts end at once
    assert 4 <= n_end < 10
    monkeypatch.setattr(tiny.transformer.h[0], "forward", watched)
    tiny.generate(start, 12, eos, data.PAD, 2)
    assert shapes[:4] == [(10, 3)] + [(20, 1)] * 3
    assert shapes[4][0] <= 20 - 2 * n_end
    assert len(shapes) == 12    # the prompt, and every token but the last
    tiny.generate(start[:4], 12, eos, data.PAD)
    assert len(shapes) == 12 + 4    # none is left at the first look


def test_sampled_frequencies_are_the_softmax_at_temperature(tiny):
    noise = torch.Generator().manual_seed(0)
    ids, _ = tiny.generate(prompts(1, 3), 1, -1, data.PAD, 20000, 1.7, noise)
    p = (gpt2(tiny, prompts(1, 3))[0, -1] / 1.7).softmax(-1)
    frequency = torch.bincount(ids[:, 3], minlength=data.N_VOCAB) / 20000
    assert p.max() < 0.5
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-4).all()


def test_only_the_generator_decides_a_sample(tiny):
    before = torch.get_rng_state()
    samples = []
    for seed in (0, 0, 1):
        noise = torch.Generator().manual_seed(seed)
        samples.append(tiny.generate(prompts(4, 5), 8, -1, data.PAD, 3, 1.0, noise)[0])
    one, again, other = samples
    assert one.equal(again)
    assert not one.equal(other)
    assert len(set(map(tuple, one.tolist()))) == 12    # the rows of a prompt differ
    assert torch.get_rng_state().equal(before)


def test_a_generator_is_seeded_by_the_crc_of_its_key():
    assert M.generator("cpu", 0, "a", 1).initial_seed() == zlib.crc32(b"(0, 'a', 1)")


def test_response_mask_by_hand():
    ids = torch.tensor([[9, 9, 1, 9, 2, 9], [1, 9, 1, 2, 3, 4], [1, 2, 9, 9, 9, 3]])
    assert M.response_mask(ids, 2, 9).int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1],
                                                         [0, 0, 1, 0, 0, 0]]


def test_token_logprobs_by_hand_and_in_float32():
    logits = torch.tensor([[[0, math.log(3)], [1e4, -1e4]]])
    assert M.token_logprobs(logits, torch.tensor([[1, 1]])).tolist() == [
        pytest.approx([math.log(0.75), -2e4])]
    logp = M.token_logprobs(torch.zeros(1, 300, dtype=torch.bfloat16), torch.tensor([7]))
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(-math.log(300), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_kl_is_that_of_torch_distributions(dtype):
    p, q = 9 * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double()))
    assert torch.allclose(M.kl_exact(p, q).double(), expected, atol=1e-4)


PAIRS = [("S 10", "7 # 17"), ("M", "9")]    # 2 + 4 tokens, 1 + 2 tokens


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_response_logprobs_stand_one_place_before_their_tokens(tiny, temperature):
    ids, mask = data.batch(PAIRS)
    logp = oracle(tiny, ids, temperature).tolist()
    got = M.response_logprobs(tiny, ids, mask, temperature).tolist()
    assert got[0] == pytest.approx([0] + logp[0][1:], abs=1e-4)
    assert got[1] == pytest.approx(logp[1][:2] + [0, 0, 0], abs=1e-4)


def test_trim_drops_what_is_behind_the_longest_row():
    ids, mask = data.batch(PAIRS)
    wide_ids, wide_mask = torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, mask[:, :1]], 1)
    trimmed_ids, trimmed_mask = M.trim(wide_ids, wide_mask)
    assert trimmed_ids.equal(ids)
    assert trimmed_mask.equal(mask)


@pytest.fixture
def half(tiny):
    half = copy.deepcopy(tiny)
    half.config.bf16 = True
    return half


def test_bfloat16_is_near_float32(tiny, half):
    ids, mask = data.demonstrations(8, 0)
    exact = M.response_logits(tiny, ids, mask)
    logits = M.response_logits(half, ids, mask)
    assert exact.dtype == torch.float32
    assert logits.dtype == half(ids).dtype == torch.bfloat16
    assert (logits - exact).abs().max() < 0.1 * exact.std()
    exact, _ = tiny.generate(prompts(40, 5), 5, -1, data.PAD)
    ids, _ = half.generate(prompts(40, 5), 5, -1, data.PAD)
    assert (ids == exact).float().mean() > 0.9


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_bfloat16_logits_are_scored_in_float32(half, temperature):
    ids, mask = data.demonstrations(8, 0)
    logits = M.response_logits(half, ids, mask).double() / temperature
    logp = M.response_logprobs(half, ids, mask, temperature)[mask[:, 1:]]
    expected = Categorical(logits=logits).log_prob(ids[mask])
    assert torch.allclose(logp.double(), expected, atol=1e-5)


def test_every_parameter_learns_in_bfloat16_after_a_pass_without_gradients(half):
    ids, mask = data.demonstrations(8, 0)
    with torch.no_grad():    # a copy of the weights made here must not be used below
        half(ids)
    M.response_logprobs(half, ids, mask).sum().backward()
    assert all(p.grad.norm() > 0 for p in half.parameters())


def steps_of(model, gradient, *opts):
    """How far one update moves each parameter, from gradients that are all the same number."""
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    M.update(model, *opts)
    return [b - p.detach() for b, p in zip(before, model.parameters())]


def test_update_cuts_a_gradient_norm_to_1_and_clears_the_gradient(tiny):
    steps = steps_of(tiny, 100.0, torch.optim.SGD(tiny.parameters(), 0.5))
    assert sum(step.pow(2).sum() for step in steps).sqrt().item() == pytest.approx(0.5, rel=1e-3)
    steps = steps_of(tiny, 1e-5, torch.optim.SGD(tiny.parameters(), 0.5))
    assert all(torch.allclose(step, torch.tensor(5e-6), atol=2e-7) for step in steps)
    assert all(p.grad is None for p in tiny.parameters())


def test_set_lr_and_the_first_step_of_adamw_is_the_rate(tiny):
    opt = M.adamw(tiny, 0.3)
    assert opt.param_groups[0]["betas"] == (0.9, 0.95)
    M.set_lr(opt, 0.02)
    assert all(torch.allclose(step, torch.tensor(0.02), atol=1e-5) for step in
               steps_of(tiny, 100.0, opt))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_five_steps_of_muon_are_torchs(shape):
    """To 2 % of the way, for torch's Newton-Schulz steps are in bfloat16."""
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=noise)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    opts = (M.Muon([ours], 0.02),
            torch.optim.Muon([theirs], 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=noise)
        theirs.grad = ours.grad.clone()
        for opt in opts:
            opt.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(tiny):
    muon, adam = M.muon(tiny, 0.01, 0.02)
    taken = muon.param_groups[0]["params"]
    names = [name for name, p in tiny.named_parameters() if any(p is q for q in taken)]
    assert len(names) == 2 * 4
    assert all(".h." in name and name.endswith("weight") and ".ln" not in name for name in names)
    taken += adam.param_groups[0]["params"]
    assert len(taken) == len(list(tiny.parameters())) == len({id(p) for p in taken})
    rates = [(opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"])
             for opt in (muon, adam)]
    assert rates == [(0.01, 0.1), (0.02, 0)]


def test_a_checkpoint_is_bitwise(tmp_path, tiny):
    tiny.config.bf16 = True
    M.save_checkpoint(tmp_path / "a.pt", tiny)
    back = M.load_checkpoint(tmp_path / "a.pt")
    assert back.config == tiny.config
    assert back.lm_head.weight is back.transformer.wte.weight
    assert all(map(torch.equal, back.parameters(), tiny.parameters()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("change", [
    dict(gpt={}), dict(gpt=dict(foo=1)), dict(model={}), dict(model=Evil())])
def test_a_checkpoint_of_something_else_is_named(tmp_path, tiny, change):
    path = tmp_path / "a.pt"
    M.save_checkpoint(path, tiny)
    torch.save(torch.load(path) | change, path)
    with pytest.raises(ValueError, match="cannot read .*a.pt: "):
        M.load_checkpoint(path)


def test_a_checkpoint_cut_short_or_not_there_is_named(tmp_path, tiny):
    path = tmp_path / "a.pt"
    M.save_checkpoint(path, tiny)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot read .*a.pt: "):
        M.load_checkpoint(path)
    with pytest.raises(ValueError, match="cannot read .*b.pt: "):
        M.load_checkpoint(tmp_path / "b.pt")
