"""CUDA graphs without a GPU: what a capture runs is recorded, and a replay runs the same operators on the same tensors.

As on a GPU, Python is not asked again: a number that it had computed is what it was, and a tensor that it has replaced
since is still the old one. Unlike there, the capture itself has run, which the first replay makes up for.

What this cannot notice: a tensor from outside that is freed before a replay reads it (a recording keeps it alive), what
streams do not wait for, and what the host computes in a tensor of its own (test_no_host_sync does notice that).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten._unique2,
)


class HostReadError(Exception):
    """An operator whose result the host would have to wait for."""


class RecordedGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for function, arguments, keywords, results in self.calls:
                again = pytree.tree_leaves(function(*arguments, **keywords))
                for old, new in zip(pytree.tree_leaves(results), again, strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.overloadpacket in READS:
            raise HostReadError(str(function))
        results = function(*arguments, **(keywords or {}))
        self.calls.append((function, arguments, keywords or {}, results))
        return results


class Stream:
    device = torch.device("cpu")

    def __init__(self, device: torch.device | None = None) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextlib.contextmanager
def _capture(graph: RecordedGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    with Recorder(graph.calls):
        yield


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded as above, and on the CPU nothing is read that would not be read on a GPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for module in ("pytbptt.nn.adaptive", "pytbptt.nn.transformer_xl", "pytbptt.truncated_bptt"):
        monkeypatch.setattr(f"{module}.can_read_on_host", lambda tensor: False)
