"""Which calls are captured and replayed, and with what."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pytbptt.errors import RunError
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from tests.recorded_graph import HostReadError, recorded  # noqa: F401 - a fixture

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("recorded")


class Counted:
    """Doubles, adds, and counts how often Python was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.total = torch.zeros(())

    def __call__(self, values: list[Tensor], times: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.total += values[0].sum()
        return values[0] * times, self.total + 0


def test_the_second_call_in_a_row_is_captured_and_later_ones_are_replayed() -> None:
    function = Counted()
    graphed = CUDAGraphRunner(function, CPU)
    for n in range(1, 6):
        doubled, total = graphed([torch.full((3,), float(n))], 2)
        assert doubled.tolist() == [2.0 * n] * 3
        assert float(total) == 3 * n * (n + 1) / 2
    assert function.calls == 2


def test_other_shapes_go_through_the_function_and_the_graph_is_still_there_afterwards() -> None:
    function = Counted()
    graphed = CUDAGraphRunner(function, CPU)
    lengths = [4, 4, 4, 1, 4, 4, 1]
    for length in lengths:
        assert graphed([torch.ones(length)], 3)[0].tolist() == [3.0] * length
    assert function.calls == 1 + 1 + 2  # eagerly, captured, and the short ones
    assert float(function.total) == sum(lengths)


def test_another_number_is_another_shape_and_its_graph_replaces_the_former() -> None:
    function = Counted()
    graphed = CUDAGraphRunner(function, CPU)
    for times in (2, 2, 2, 5, 5, 5, 2):
        assert graphed([torch.ones(2)], times)[0].tolist() == [times] * 2
    assert function.calls == 5


def test_a_graph_reads_weights_and_no_copy_of_them_that_autocast_had_made() -> None:
    """Autocast drops its copies where the caller's context ends."""
    weight = torch.nn.Parameter(torch.ones(4, 4))

    def projected(value: Tensor) -> Tensor:
        return torch.nn.functional.linear(value, weight)

    graphed = CUDAGraphRunner(projected, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert graphed(torch.ones(1, 4)).tolist() == [[4.0] * 4]
        weight.fill_(2.0)
        assert graphed(torch.ones(1, 4)).tolist() == [[8.0] * 4]


def test_what_cannot_be_captured_says_how_to_do_without() -> None:
    def asks(value: Tensor) -> Tensor:
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("operation not permitted when stream is capturing")
        return value

    graphed = CUDAGraphRunner(asks, CPU)
    graphed(torch.ones(()))
    with pytest.raises(RunError, match=r"CUDA graph capture failed: operation not.*--cuda-graph off"):
        graphed(torch.ones(()))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            "CUDA error: not permitted\nCUDA kernel errors might be reported later",
            "capture failed: CUDA error: not permitted;",
        ),
        ("CUDA out of memory. Tried to allocate", "^CUDA out of memory"),
    ],
)
def test_what_went_wrong_in_a_capture_is_told_and_not_that_its_end_did(
    found: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def capture(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def fails(value: Tensor) -> Tensor:
        if calls:
            raise RuntimeError(found)
        calls.append(value)
        return value

    calls: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphed = CUDAGraphRunner(fails, CPU)
    graphed(torch.ones(()))
    with pytest.raises(RuntimeError, match=told) as caught:
        graphed(torch.ones(()))
    assert "\n" not in str(caught.value)


def test_a_read_in_a_capture_is_noticed() -> None:
    """What the tests of the trainer rely on."""
    graphed = CUDAGraphRunner(lambda value: value * float(value), CPU)
    graphed(torch.ones(()))
    with pytest.raises(HostReadError, match="_local_scalar_dense"):
        graphed(torch.ones(()))
