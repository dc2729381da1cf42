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
