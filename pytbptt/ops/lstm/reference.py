"""The LSTM's recurrence in plain PyTorch: the reference that the compiled kernels are tested against."""

import torch
from torch import Tensor


def lstm(
    gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `pytbptt.ops.lstm`, checked by it."""
    h, c = h0, c0
    recurrent = weight_hh.t()
    output = []
    for t, gates_t in enumerate(gates.unbind(0)):
        if reset is not None:
            h = h.masked_fill(reset[t].unsqueeze(1), 0.0)
            c = c.masked_fill(reset[t].unsqueeze(1), 0.0)
        i, f, g, o = torch.addmm(gates_t, h, recurrent).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = (torch.sigmoid(o) * torch.tanh(c)).to(gates.dtype)
        output.append(h)
    stacked = torch.stack(output) if output else gates.new_empty(0, *h0.shape)
    return stacked, h, c
