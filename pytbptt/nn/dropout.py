"""Dropout that is faster than PyTorch's on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt.ops.philox import dropout_threshold
from pytbptt.runtime.device import is_in_func_transform


def dropout(input: Tensor, p: float, training: bool = True) -> Tensor:
    """torch.nn.functional.dropout; on the CPU it takes about half the time and draws different random numbers.

    PyTorch draws one Bernoulli variable for every element there. Here 16 random bits decide, so that each int64 of the
    default generator serves four elements; p is rounded to a multiple of 1 / 65536, and the kept elements are scaled
    accordingly.
    """
    if not training or p == 0.0:
        return input
    if input.device.type != "cpu" or p == 1.0 or torch.compiler.is_compiling() or is_in_func_transform():
        return F.dropout(input, p)
    threshold, count = dropout_threshold(p), input.numel()
    random_bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep_mask = random_bits.view(torch.int16)[:count].view(input.shape) >= threshold - 2**15
    return input * keep_mask.to(input.dtype).mul_(65536 / (65536 - threshold))


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
