"""No tensor meets one of another device. Without a GPU: CPU tensors, some marked as on CUDA."""
import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

import clipsft

FREE = ("copy_", "__set__", "_has_compatible_shallow_copy_type")    # may see both: moves

def cuda(device):
    return torch.device(device).type == "cuda"

def tensors(x):
    if isinstance(x, (list, tuple)):
        return [t for y in x for t in tensors(y)]
    return [x] if isinstance(x, torch.Tensor) and x.numel() else []

class Generator(torch.Generator):
    def __new__(cls, device):
        return super().__new__(cls, "cpu")

    def __init__(self, device):
        self.cuda = cuda(device)

class TwoDevices(TorchFunctionMode):
    """Marked are storages, so a view, a parameter and its data agree; they are kept alive, so that
    no address is ever given to another. What an operation returns is where its inputs are."""
    def __init__(self):
        super().__init__()
        self.marked = {}

    def mark(self, out):
        for t in tensors(out):
            self.marked[t.untyped_storage().data_ptr()] = t.untyped_storage()

    def is_marked(self, t):
        return t.untyped_storage().data_ptr() in self.marked

    def __torch_function__(self, f, types, args=(), kw=None):
        kw = kw or {}
        inputs = tensors([*args, *kw.values()])
        here = [t for t in inputs if self.is_marked(t)]
        there = [t for t in inputs if t.dim() and not self.is_marked(t)]
        name = f.__name__
        if name == "__get__" and f.__self__.__name__ in ("device", "is_cuda"):
            is_cuda = f.__self__.__name__ == "is_cuda"
            return bool(here) if is_cuda else torch.device("cuda" if here else "cpu")
        target = [a for a in (*args[1:], kw.get("device")) if isinstance(a, (str, torch.device))]
        to = cuda(target[0]) if target else bool(here)
        kw = kw | (dict(device="cpu") if "device" in kw else {})
        if name in ("to", "cpu"):
            if not target:    # x.cpu(); x.to(y), as y is; x.to(dtype), as x is
                to = name == "to" and any(map(self.is_marked, inputs[-1:]))
            out = f(*("cpu" if a in target else a for a in args), **kw)
            out = out.detach().clone() if to != bool(here) else out
        else:
            index = name in ("__getitem__", "__setitem__") and self.is_marked(args[0])
            assert not (here and there) or index or name in FREE, f"{name} mixes devices"
            if isinstance(kw.get("generator"), Generator):
                assert kw["generator"].cuda == to, f"{name}: generator of another device"
            out = f(*args, **kw)
        if to and name not in FREE:
            self.mark(out)
        return out

@pytest.fixture
def two_devices(monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, map_location, weights_only: load(path))
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with TwoDevices():
        yield

def test_a_cuda_tensor_meets_no_cpu_tensor(two_devices):
    a = torch.ones(3).to("cuda")
    assert a.is_cuda and (2 * a)[:2].device.type == "cuda" and not a.cpu().is_cuda
    assert a.to(torch.float64).is_cuda and a.to(dtype=torch.int8).dtype == torch.int8
    for wrong in (lambda: a + torch.ones(3), lambda: torch.rand(3, device="cuda",
                  generator=Generator("cpu")), lambda: torch.ones(3)[a.long()]):
        with pytest.raises(AssertionError):
            wrong()

def test_every_cell_keeps_to_its_device(two_devices, tmp_path):
    """With numbers as on the CPU, where pre-training only cuts its batches into more pieces."""
    rows = {}
    for device in "cuda", "cpu":
        c = clipsft.prepare(["--preset", "smoke", "--grad_accum", "3", "--kl_coef", "0.1",
                             "--temperature", "0.9", "--out_dir", str(tmp_path / device / "run")])
        c.device = device
        rows[device] = clipsft.base_cell(c, 0) + clipsft.rl_cell(c, 0, "clip", 8)
        for method in "clip", "kl", "sft:skip=random":
            rows[device] += clipsft.sft_cell(c, 0, method)
    assert len(rows["cuda"]) == 8
    for a, b in zip(rows["cuda"], rows["cpu"], strict=True):
        assert a == pytest.approx(b, abs=1e-3, nan_ok=True)
