import math
import socket
import sys
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

def gpt2(model, ids, n_head=2):
    """The oracle: GPT-2's equations in float64, a head at a time; ids (B, T) -> logits (B, T, V),
    through which gradients flow to the model's parameters."""
    w = {k: p.double() for k, p in model.named_parameters()}
    wte = w["transformer.wte.weight"]        # also the head: tied

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * w[name + ".weight"] + w[name + ".bias"]
    x = wte[ids] + w["transformer.wpe.weight"][:ids.shape[1]]
    past = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for i in range(1 + max(int(k.split(".")[2]) for k in w if ".h." in k)):
        p = f"transformer.h.{i}."
        heads = []
        for q, k, v in zip(*(m.chunk(n_head, -1) for m in
                             linear(norm(x, p + "ln_1"), p + "attn.c_attn").chunk(3, -1))):
            score = (q @ k.mT / math.sqrt(q.shape[-1])).exp() * past
            heads.append(score / score.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(heads, -1), p + "attn.c_proj")
        a = linear(norm(x, p + "ln_2"), p + "mlp.c_fc")
        x = x + linear(a * (1 + torch.erf(a / math.sqrt(2))) / 2, p + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ wte.T

def oracle(model, ids, T=1.0):
    """log pi of every token but the first by gpt2(): ids (B, T) -> (B, T-1) float64."""
    return (gpt2(model, ids)[:, :-1] / T).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
