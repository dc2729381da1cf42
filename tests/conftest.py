"""What tests share: no network, one small model, and GPT-2 written once more in float64."""
import math
import socket
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test may reach the network."""
    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tiny():
    """A random two-layer model whose weights are large enough that its outputs differ by row."""
    import data
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(data.N_VOCAB, 40, 2, 2, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def keyed(*key):
    """The random numbers of a key, as model.generator promises them."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x, weights, name):
    variance = x.var(-1, unbiased=False, keepdim=True)
    y = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(x, weights, name, n_head):
    parts = [part.chunk(n_head, -1) for part in linear(x, weights, f"{name}.c_attn").chunk(3, -1)]
    not_later = torch.ones(x.shape[1], x.shape[1]).tril()
    heads = []
    for q, k, v in zip(*parts):
        score = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * not_later
        heads.append(score / score.sum(-1, keepdim=True) @ v)
    return linear(torch.cat(heads, -1), weights, f"{name}.c_proj")


def gpt2(model, ids, n_head=2):
    """The oracle: GPT-2's equations in float64, one head at a time. ids (B, T) -> logits (B, T, V),
    through which gradients flow to the model's parameters."""
    weights = {name: p.double() for name, p in model.named_parameters()}
    wte = weights["transformer.wte.weight"]    # also the head: tied
    x = wte[ids] + weights["transformer.wpe.weight"][:ids.shape[1]]
    for i in range(model.config.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(norm(x, weights, f"{block}.ln_1"), weights, f"{block}.attn", n_head)
        a = linear(norm(x, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc")
        gelu = a * (1 + torch.erf(a / math.sqrt(2))) / 2
        x = x + linear(gelu, weights, f"{block}.mlp.c_proj")
    return norm(x, weights, "transformer.ln_f") @ wte.T


def oracle(model, ids, temperature=1.0):
    """log pi of every token but the first, by gpt2: ids (B, T) -> (B, T-1) float64."""
    logp = (gpt2(model, ids)[:, :-1] / temperature).log_softmax(-1)
    return logp.gather(2, ids[:, 1:, None])[..., 0]
