"""When CUDA kernels are as good as eager PyTorch: on the emulator and on a GPU alike.

Errors are root mean squares, relative to the exact result's. The tolerance is twice what eager PyTorch is off by in the
same dtype, the most of several draws of the inputs: where a result has few elements, the error of one draw is chance.
Twice eager's is never taken to be less than one rounding of the result itself. To it comes what the log-sum-exp, a
float32 in units of log2, rounds off: the backward computes the softmax's weights from it once more, and all of a row's
are off by ln 2 times that, where eager, which keeps its weights, has no such error. Only float32 notices.

Where the exact result is zero, because the gradients of a row's scores cancel, eager may find exactly zero; the
kernels of rel_attention, which subtract one dot product of D terms from another, each some square root of D large, may
be off by CANCELLED roundings of the largest result (17 at most were measured, at D 96).

A product that sums `terms` factors one after another, as a BLAS may, is off by more than one that sums them in parts,
as eager PyTorch does where it adds up a product for every step. With terms of one size, partial sum k is sqrt(k) of
them, and is rounded by 0.42 of 2^-24 of itself in the root mean square: 0.3 sqrt(terms) 2^-24 of the result in all.
SUMMED allows for half as much again and more.

Eager PyTorch in TF32 is float32 whose products' operands are rounded (`eager_in_tf32`): which of them a GPU's library
takes in TF32 depends on their sizes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

DRAWS = 4
CANCELLED = 32
SUMMED = 0.5 * 2.0**-24


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Not pytest's monkeypatch, whose newer versions delete what torch makes up at every access."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def round_to_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@contextmanager
def eager_in_tf32(rounded: bool = True) -> Iterator[None]:
    """torch.einsum of float32, and so its backward, as with TF32 allowed; where not `rounded`, nothing changes."""
    torchs = torch.einsum

    def einsum(equation: str, *operands: Tensor) -> Tensor:
        if operands[0].dtype != torch.float32:
            return torchs(equation, *operands)
        out = torchs(equation, *(t + (round_to_tf32(t.detach()) - t).detach() for t in operands))
        out.register_hook(round_to_tf32)
        return out

    torch.einsum = einsum if rounded else torchs
    try:
        yield
    finally:
        torch.einsum = torchs


def root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def assert_as_good_as_eager(
    results: dict[str, Tensor],
    draws: list[tuple[dict[str, Tensor], dict[str, Tensor]]],
    unit: float,
    log_sum_exp: Tensor | None = None,
    terms: Mapping[str, int] | None = None,
) -> None:
    """
    Args:
        results: what the kernels computed of the first draw.
        draws: the exact results and eager PyTorch's, of every draw.
        unit: one rounding, relative, of the arithmetic in question.
        log_sum_exp: of the first draw too, where the kernels keep one.
        terms: of results that are one product each, how many it sums.
    """
    rounded_off = 0.0
    if log_sum_exp is not None:
        rounded_off = math.log(2) * 2.0**-24 * float(log_sum_exp[log_sum_exp.isfinite()].abs().max())
    exact = draws[0][0]
    largest = max(root_mean_square(t) for t in exact.values())
    for name, result in results.items():
        scale = root_mean_square(exact[name])
        if scale < 1e-9 * largest:
            tolerance = CANCELLED * unit * largest
        else:
            eager = max(root_mean_square(b[name] - a[name]) / root_mean_square(a[name]) for a, b in draws)
            summed = SUMMED * math.sqrt((terms or {}).get(name, 0))
            tolerance = (max(2 * eager, unit) + rounded_off + summed) * scale
        error = root_mean_square(result.double() - exact[name])
        assert error <= tolerance, f"{name}: error {error:.2e}, expected at most {tolerance:.2e}"
