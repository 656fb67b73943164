"""Transformer-XL's attention over a memory and a chunk."""

import torch
from torch import Tensor, nn

from pytbptt import ops
from pytbptt.nn import aligned


class RelativeAttention(nn.Module):
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
        self.qkv_net = aligned.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = aligned.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = aligned.Linear(n_head * d_head, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(n_head, d_head)) if content_bias is None else content_bias
        self.position_bias = nn.Parameter(torch.zeros(n_head, d_head)) if position_bias is None else position_bias

    def project_memory(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, M, H, D) of a memory's hidden states (B, M, E)."""
        key_value = aligned.linear(hidden, self.qkv_net.weight[self.n_head * self.d_head :])
        key, value = key_value.view(*hidden.shape[:2], 2, self.n_head, self.d_head).unbind(2)
        return key, value

    def forward(
        self,
        hidden: Tensor,
        position: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        first_key: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from every place of the chunk.

        Args:
            hidden: (B, T, E).
            position: (R, H, D), the table of distances projected by `r_net`.
            memory: keys and values (B, M, H, D), oldest first; None for no memory.
            first_key, window: as for `pytbptt.ops.rel_attention`.

        Returns:
            The result (B, T, E), and the chunk's own keys and values (B, T, H, D).
        """
        query, key, value = self.qkv_net(hidden).view(*hidden.shape[:2], 3, self.n_head, self.d_head).unbind(2)
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
        return self.o_net(attended.flatten(2)), key, value


def sinusoid(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table (rows, width) whose row d is [sin | cos] of d / 10000 ** (2k / width), k = 0 … width / 2 - 1.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, in Transformer-XL's order.
    """
    # 16-bit floats can't even count the distances.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    distance = torch.arange(rows, device=device, dtype=exact)
    inverse_frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, device=device, dtype=exact) / width)
    angle = torch.outer(distance, inverse_frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
