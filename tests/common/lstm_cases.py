"""Random inputs of lstm, results by name, and the check of a kernel's error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pytbptt.ops import backend, lstm
from pytbptt.ops.lstm import reference
from tests.common import error_bounds

# The outputs, and the gradients of the inputs.
RESULTS = ("output", "h_n", "c_n", "gates", "weight_hh", "h0", "c0")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors = dict[str, Tensor]
LstmOp = Callable[..., tuple[Tensor, Tensor, Tensor]]


def make_inputs(
    T: int, B: int, H: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """gates, weight_hh, h0, c0; c0 in float32 unless all are in float64."""
    generator = torch.Generator(device).manual_seed(T + 10 * B + 100 * H + 10000 * seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)

    weight_hh = (normal(4 * H, H) / H**0.5).to(dtype)
    return normal(T, B, 4 * H).to(dtype), weight_hh, normal(B, H).to(dtype), normal(B, H).to(cell_dtype(dtype))


def cell_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_fused(*inputs: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    with backend("fused"):
        return lstm(*inputs, reset=reset)


def run_reference(*inputs: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.lstm(*inputs, reset)


def make_grad_outputs(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random gradients of output, h_n and c_n, rounded as the kernels get them for inputs of `dtype`."""
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    output, h_n, c_n = (
        torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64).to(rounded).to(t.dtype)
        for t, rounded in zip(outputs, (dtype, dtype, cell_dtype(dtype)), strict=True)
    )
    return output, h_n, c_n


def outputs_and_gradients(
    op: LstmOp, inputs: Inputs, reset: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensors:
    """RESULTS of an implementation, computed in `dtype` (by default the inputs')."""
    input_dtype = inputs[0].dtype
    dtype = dtype or input_dtype
    dtypes = (dtype, dtype, dtype, cell_dtype(dtype))
    leaves = [t.detach().to(d).requires_grad_() for t, d in zip(inputs, dtypes, strict=True)]
    outputs = op(*leaves, reset=reset)
    grad_outputs = make_grad_outputs(outputs, input_dtype)
    # With T = 0, output has no graph.
    pairs = [(t, grad) for t, grad in zip(outputs, grad_outputs, strict=True) if t.requires_grad]
    gradients = torch.autograd.grad([t for t, _ in pairs], leaves, [grad for _, grad in pairs], materialize_grads=True)
    return dict(zip(RESULTS, [t.detach() for t in (*outputs, *gradients)], strict=True))


@contextmanager
def without_onednn() -> Iterator[None]:
    """Without oneDNN, whose AMX matmul spreads NaN to neighbouring rows for some K."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def assert_error_within_baseline(
    run: Callable[[Inputs], Tensors],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    reset: Tensor | None = None,
    *,
    in_tf32: bool = False,
    device: str = "cpu",
    scale: float = 1.0,
) -> None:
    """Checks `run`, which returns RESULTS, against float64 within the bounds of tests/common/error_bounds.py.

    Args:
        size: T, B, H.
        in_tf32: whether `run` rounds operands of products to TF32.
        scale: of gates and c0.
    """
    T, B, _ = size
    inputs = []
    for seed in error_bounds.input_draws(*size):
        gates, weight_hh, h0, c0 = make_inputs(*size, dtype, seed, device)
        inputs.append((gates * scale, weight_hh, h0, c0 * scale))
    actual = [run(one) for one in inputs]
    expected = [outputs_and_gradients(run_reference, one, reset, torch.float64) for one in inputs]
    baselines = []
    for order in error_bounds.summation_orders(*size):
        with error_bounds.SequentialSumMode(order, in_tf32):
            baselines.append([outputs_and_gradients(run_reference, one, reset) for one in inputs])
    assert [t.dtype for t in actual[0].values()] == [t.dtype for t in baselines[0][0].values()]
    unit = 2.0**-10 if in_tf32 else torch.finfo(dtype).eps
    # A kernel may sum the gradient of weight_hh over all steps and rows in one chain.
    error_bounds.assert_error_within_baseline(actual, expected, baselines, unit, {"weight_hh": T * B})
