"""Not a test: CUDA graphs played on the CPU, so that the code around a capture is tested without a GPU.

As a capture does, `Capture` records the operations on tensors and leaves no effect of them; as a replay does, `replay`
repeats them on the very same memory: whatever Python would have decided anew stays as it was recorded. Below it:
the fixtures of tests that capture. A test module takes them by assignment, as ruff sees no use of an imported fixture.
"""
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # deterministic products, as torch asks for

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib import train

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.tape = []

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd(), torch.autocast("cpu", enabled=False):
            for operation, arguments, named, result in self.tape:
                for old, new in zip(tree_leaves(result), tree_leaves(operation(*arguments, **named)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new.view(old.shape))                    # it may have been squeezed in place since


class Capture(TorchDispatchMode):
    """Stands for torch.cuda.graph."""

    def __init__(self, graph, stream=None):
        super().__init__()
        self.graph, self.undo, self.own = graph, {}, set()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        for item in tree_leaves((arguments, named or {})):
            if isinstance(item, torch.Generator):
                self.undo.setdefault(id(item), (item.set_state, item.get_state()))
            elif isinstance(item, torch.Tensor) and (storage := item.untyped_storage()).data_ptr() not in self.own:
                self.undo.setdefault(storage.data_ptr(), (storage.copy_, storage.clone()))
        result = operation(*arguments, **(named or {}))
        self.own |= {item.untyped_storage().data_ptr() for item in tree_leaves(result)
                     if isinstance(item, torch.Tensor)} - self.undo.keys()
        self.graph.tape.append((operation, arguments, named or {}, result))
        return result

    def __exit__(self, *raised):
        super().__exit__(*raised)
        for restore, value in self.undo.values():
            restore(value)


def install(monkeypatch) -> None:
    """Let `train` capture on the CPU."""
    class Training(train._Training):
        def __init__(self, *, graph, **named):
            super().__init__(graph=graph, **named)
            self.captures = graph

    monkeypatch.setattr(train, "_Training", Training)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)


@pytest.fixture(autouse=True)
def deterministic():
    """Kernels that add in a fixed order: then equal means equal to the bit."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    """Where graphs are captured: on a GPU, or recorded on the CPU."""
    if request.param == "cpu":
        install(monkeypatch)
    return request.param


@pytest.fixture
def replays(device, monkeypatch):
    """A list that has an item for each replay of a graph since the test began."""
    found, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (found.append(1), replay(graph)))
    return found


def assert_same_state(own, eager):
    """Two training states, to the bit."""
    assert own.keys() == eager.keys()
    for name, item in own.items():
        if isinstance(item, torch.Generator):
            assert torch.equal(item.get_state(), eager[name].get_state()), name
        elif isinstance(item, torch.optim.Optimizer):
            for moments, others in zip(item.state.values(), eager[name].state.values(), strict=True):
                assert moments and all(torch.equal(moments[key], others[key]) for key in others), name
        else:
            values, others = item.state_dict(), eager[name].state_dict()
            assert values and all(torch.equal(values[key], others[key]) for key in others), name
