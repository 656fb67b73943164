"""Dropout, drawn as fast as each device allows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt.ops.philox import dropout_threshold
from pytbptt.runtime.device import is_transformed


def dropout(input: Tensor, p: float, training: bool = True) -> Tensor:
    """torch.nn.functional.dropout of a floating tensor; on the CPU at about half the price, from other random numbers.

    PyTorch draws one Bernoulli variable for every element there. Here 16 random bits decide, four elements to each
    number of the default generator; p is rounded to 1 / 65536, and what is kept is scaled by the rounded share.
    """
    if not training or p == 0.0:
        return input
    if input.device.type != "cpu" or p == 1.0 or torch.compiler.is_compiling() or is_transformed():
        return F.dropout(input, p)
    threshold, count = dropout_threshold(p), input.numel()
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = numbers.view(torch.int16)[:count].view(input.shape) >= threshold - 2**15
    return input * kept.to(input.dtype).mul_(65536 / (65536 - threshold))


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
