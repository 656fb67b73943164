"""Transformer-XL's attention over a memory and a chunk."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt import ops
from pytbptt.nn.unscriptable import Unscriptable
from pytbptt.runtime.device import accumulation_dtype


class RelativeAttention(Unscriptable):
    """Multi-head attention with relative positions.

    Keys and values of the memory are projected by themselves and handed to the op as they are: memory and chunk are
    never concatenated.

    Source: Dai et al., "Transformer-XL" (2019), section 3.3; projections without bias, as in its implementation.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        dropatt: float = 0.0,
        content_bias: nn.Parameter | None = None,
        position_bias: nn.Parameter | None = None,
    ) -> None:
        """
        Args:
            d_model: width E of input and output.
            n_head, d_head: H heads of size D.
            dropatt: probability that an attention weight is dropped in training.
            content_bias, position_bias: u and v (H, D), to share them between layers; None for one's own, at zero.
        """
        super().__init__()
        self.n_head = n_head
        self.d_head = d_head
        self.dropatt = dropatt
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(n_head, d_head)) if content_bias is None else content_bias
        self.position_bias = nn.Parameter(torch.zeros(n_head, d_head)) if position_bias is None else position_bias

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        first_key: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Attend from every place of the chunk.

        Args:
            hidden: (B, T, E).
            position: the table of distances: (R, E) as `sinusoid` makes it, or as it came back from an earlier call.
            memory: the inputs of earlier chunks (B, M, E), oldest first, or their keys and values, (B, M, H, D) each;
                None for no memory.
            first_key, window: as for `pytbptt.ops.rel_attention`.

        Returns:
            The result (B, T, E); the chunk's own keys and values, (B, T, H, D) each; the projected table (R, H, D).
        """
        query, key, value = self._heads(self.qkv_net(hidden))
        if isinstance(memory, Tensor):
            memory = self._heads(outputs_from(self.qkv_net, memory, self.n_head * self.d_head))
        if position.dim() == 2:
            (position,) = self._heads(self.r_net(position))
        attended = ops.rel_attention(
            query,
            key,
            value,
            position,
            self.content_bias,
            self.position_bias,
            memory_key=None if memory is None else memory[0],
            memory_value=None if memory is None else memory[1],
            first_key=first_key,
            window=window,
            dropout_p=self.dropatt if self.training else 0.0,
        )
        return self.o_net(attended.flatten(2)), (key, value), position

    def _heads(self, projected: Tensor) -> Any:
        """The tuple of each (…, H, D) of those that lie side by side in (…, n·H·D)."""
        return projected.view(*projected.shape[:-1], -1, self.n_head, self.d_head).unbind(-3)


def outputs_from(layer: nn.Module, input: Tensor, first: int) -> Tensor:
    """The outputs of a linear layer, or of what a tool has put in its place, from number `first` on.

    A layer that is nothing but a torch.nn.Linear makes no others. Of anything else the weight may not be all there is:
    adapters, quantised layers, hooks and parametrizations are called as they are.
    """
    if type(layer) is not nn.Linear or type(layer.weight) not in (Tensor, nn.Parameter) or _is_watched(layer):
        return layer(input)[..., first:]  # type: ignore[no-any-return]  # a module's call is untyped
    return F.linear(input, layer.weight[first:], None if layer.bias is None else layer.bias[first:])


def _is_watched(module: nn.Module) -> bool:
    """Whether someone waits for the module to be called, or has given it another forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


def sinusoid(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table (rows, width) whose row d is [sin | cos] of d / 10000 ** (2k / width), k = 0 … width / 2 - 1.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, in Transformer-XL's order.
    """
    # 16-bit floats can't even count the distances.
    exact = accumulation_dtype(dtype)
    distance = torch.arange(rows, device=device, dtype=exact)
    inverse_frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, device=device, dtype=exact) / width)
    angle = torch.outer(distance, inverse_frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
