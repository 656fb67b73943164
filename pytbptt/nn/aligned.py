"""Products of matrices whose sizes a GPU's tensor cores do not like.

In 16 bits, cuBLAS serves matrices whose rows begin at multiples of 16 bytes by its fast kernels, and others, such as
those of the paper's widths 410 and 2,100 or of a vocabulary of odd size, by kernels that take several times as long.
Inside of `padded_products` such products are made of copies that are padded with zeros: parameters, results and
gradients keep their sizes, and their values but for the order of sums. That takes some ten more launches for each
product and its gradients, so it pays where a CUDA graph launches them, and not where Python does.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pytbptt.runtime.device import autocast_dtype
from pytbptt.runtime.setting import Setting

ALIGNED = 8
"""Elements of 16 bits in 16 bytes."""

padding = Setting(False)


@contextmanager
def padded_products(chosen: bool = True) -> Iterator[None]:
    """Whether torch.nn.functional.linear, whoever calls it inside, makes padded copies where sizes ask for it."""
    with padding.choose(chosen), _Padded() if chosen else nullcontext():
        yield


class _Padded(TorchFunctionMode):
    """Lets `linear` serve where torch.nn.functional.linear is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


def needs_padding(dtype: torch.dtype, device: torch.device, *sizes: int) -> bool:
    """Whether a product of matrices with rows of such sizes is to be made of padded copies."""
    if not padding.get() or device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    # Of a few rows there is nothing to gain, and torch.compile pads by itself.
    return any(size % ALIGNED for size in sizes) and min(sizes) >= ALIGNED and not torch.compiler.is_compiling()


def pad(tensor: Tensor, rows: bool = False) -> Tensor:
    """Zeros behind every row of a tensor (…, n), as many as n takes to be aligned; with `rows`, below a matrix too."""
    sizes = [0, -tensor.shape[-1] % ALIGNED]
    if rows:
        sizes += [0, -tensor.shape[-2] % ALIGNED]
    return F.pad(tensor, sizes) if any(sizes) else tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear; where it pads, there are gaps between the rows of the result (a view)."""
    dtype = autocast_dtype(input) or input.dtype
    if not needs_padding(dtype, input.device, *weight.shape):
        return F.linear(input, weight, bias)
    padded = F.linear(
        pad(input.to(dtype)), pad(weight.to(dtype), rows=True), None if bias is None else pad(bias.to(dtype))
    )
    return padded[..., : len(weight)]
