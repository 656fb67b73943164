"""CUDAGraphRunner: which calls are captured, which are replayed, and how a failed capture is reported."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pytbptt.errors import RunError
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from tests.common.fake_cuda_graph import HostSyncError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fake_cuda_graphs")


class CountingFunction:
    """Multiplies, sums over all calls, and counts how often its Python code runs."""

    def __init__(self) -> None:
        self.calls = 0
        self.total = torch.zeros(())

    def __call__(self, values: list[Tensor], times: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.total += values[0].sum()
        return values[0] * times, self.total + 0


def test_second_consecutive_call_is_captured_and_later_ones_are_replayed() -> None:
    function = CountingFunction()
    graphed = CUDAGraphRunner(function, CPU)
    for n in range(1, 6):
        doubled, total = graphed([torch.full((3,), float(n))], 2)
        assert doubled.tolist() == [2.0 * n] * 3
        assert float(total) == 3 * n * (n + 1) / 2
    assert function.calls == 2


def test_other_shapes_run_eagerly_and_keep_graph() -> None:
    function = CountingFunction()
    graphed = CUDAGraphRunner(function, CPU)
    lengths = [4, 4, 4, 1, 4, 4, 1]
    for length in lengths:
        assert graphed([torch.ones(length)], 3)[0].tolist() == [3.0] * length
    assert function.calls == 1 + 1 + 2  # eager, captured, and two of length 1
    assert float(function.total) == sum(lengths)


def test_changed_python_argument_recaptures() -> None:
    function = CountingFunction()
    graphed = CUDAGraphRunner(function, CPU)
    for times in (2, 2, 2, 5, 5, 5, 2):
        assert graphed([torch.ones(2)], times)[0].tolist() == [times] * 2
    assert function.calls == 5


def test_capture_bypasses_autocast_weight_cache() -> None:
    """Autocast frees its cached copies of weights when the caller's context ends; a graph must not read them."""
    weight = torch.nn.Parameter(torch.ones(4, 4))

    def project(value: Tensor) -> Tensor:
        return torch.nn.functional.linear(value, weight)

    graphed = CUDAGraphRunner(project, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert graphed(torch.ones(1, 4)).tolist() == [[4.0] * 4]
        weight.fill_(2.0)
        assert graphed(torch.ones(1, 4)).tolist() == [[8.0] * 4]


def test_capture_failure_suggests_cuda_graph_off() -> None:
    def fail_in_capture(value: Tensor) -> Tensor:
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("operation not permitted when stream is capturing")
        return value

    graphed = CUDAGraphRunner(fail_in_capture, CPU)
    graphed(torch.ones(()))
    with pytest.raises(RunError, match=r"CUDA graph capture failed: operation not.*--cuda-graph off"):
        graphed(torch.ones(()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "CUDA error: not permitted\nCUDA kernel errors might be reported later",
            "capture failed: CUDA error: not permitted;",
        ),
        ("CUDA out of memory. Tried to allocate", "^CUDA out of memory"),
    ],
)
def test_capture_reports_original_error(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def fail_in_second_call(value: Tensor) -> Tensor:
        if calls:
            raise RuntimeError(error)
        calls.append(value)
        return value

    calls: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphed = CUDAGraphRunner(fail_in_second_call, CPU)
    graphed(torch.ones(()))
    with pytest.raises(RuntimeError, match=message) as raised:
        graphed(torch.ones(()))
    assert "\n" not in str(raised.value)


def test_host_sync_during_capture_raises() -> None:
    """So the trainer's tests with fake graphs detect host synchronisation."""
    graphed = CUDAGraphRunner(lambda value: value * float(value), CPU)
    graphed(torch.ones(()))
    with pytest.raises(HostSyncError, match="_local_scalar_dense"):
        graphed(torch.ones(()))
