"""Linear layers padded to the alignment that tensor cores need.

In 16 bits, cuBLAS has fast kernels for matrices whose rows start at multiples of 16 bytes only. Others, such as those
of the paper's widths 410 and 2,100 or of a vocabulary of odd size, take several times as long. Inside of
`padded_matmuls` such products use zero-padded copies: parameters, results and gradients keep their sizes and, up to
the order of summation, their values. That adds about ten kernel launches for each layer and its gradients, so it pays
off in a CUDA graph, but not where Python launches the kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytbptt.runtime.device import autocast_dtype
from pytbptt.runtime.setting import ScopedSetting

ALIGNMENT = 8
"""In 16-bit elements, i.e. 16 bytes."""

padding = ScopedSetting(False)


@contextmanager
def padded_matmuls(enabled: bool = True) -> Iterator[None]:
    """Pad where needed in every call of torch.nn.functional.linear within the block, if `enabled`."""
    with padding.override(enabled), _PaddedLinearMode() if enabled else nullcontext():
        yield


class _PaddedLinearMode(TorchFunctionMode):
    """Replaces torch.nn.functional.linear by `padded_linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (padded_linear if func is F.linear else func)(*args, **(kwargs or {}))


def needs_padding(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Whether a product of matrices with rows of these sizes should use padded copies."""
    if not padding.get() or device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    # With few rows there is nothing to gain, and torch.compile pads by itself.
    return any(size % ALIGNMENT for size in sizes) and min(sizes) >= ALIGNMENT and not torch.compiler.is_compiling()


def pad(tensor: Tensor, rows: bool = False) -> Tensor:
    """Zero-pad the last dimension of a tensor (…, n) to a multiple of ALIGNMENT; with `rows`, the one before it too."""
    sizes = [0, -tensor.shape[-1] % ALIGNMENT]
    if rows:
        sizes += [0, -tensor.shape[-2] % ALIGNMENT]
    return F.pad(tensor, sizes) if any(sizes) else tensor


def padded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear; where it pads, the result is a view whose rows have gaps between them."""
    dtype = autocast_dtype(input) or input.dtype
    if not needs_padding(dtype, input.device, *weight.shape):
        return F.linear(input, weight, bias)
    padded = F.linear(
        pad(input.to(dtype)), pad(weight.to(dtype), rows=True), None if bias is None else pad(bias.to(dtype))
    )
    return padded[..., : len(weight)]
