"""A fake torch.cuda.CUDAGraph on the CPU: a capture records operators, a replay runs them on the same tensors.

As with CUDA graphs, a replay runs no Python: numbers and tensors that Python computed during the capture stay what they
were. Unlike with CUDA, the operators also run during the capture; therefore the first replay does nothing.

It cannot detect a tensor that is freed before a replay reads it (the recording keeps it alive), missing synchronisation
between streams, or values that the host computes in its own tensors (test_no_host_sync.py detects those).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SYNCHRONIZING_OPS = (
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
)


class HostSyncError(Exception):
    """An operator that would make the host wait for the GPU."""


class FakeCUDAGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                new_outputs = pytree.tree_leaves(func(*args, **kwargs))
                for old, new in zip(pytree.tree_leaves(outputs), new_outputs, strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class OpRecorder(TorchDispatchMode):
    """Appends each operator's call and outputs to `calls`; raises HostSyncError for SYNCHRONIZING_OPS."""

    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in SYNCHRONIZING_OPS:
            raise HostSyncError(str(func))
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs


class Stream:
    """In place of torch.cuda.Stream."""

    device = torch.device("cpu")

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextlib.contextmanager
def _capture(graph: FakeCUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    with OpRecorder(graph.calls):
        yield


@pytest.fixture
def fake_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces torch.cuda's graphs and streams by these, and lets the library treat CPU tensors like GPU tensors, whose
    values the host should not read."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeCUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for module in ("pytbptt.nn.adaptive", "pytbptt.nn.transformer_xl", "pytbptt.truncated_bptt"):
        monkeypatch.setattr(f"{module}.can_read_on_host", lambda tensor: False)
