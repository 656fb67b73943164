"""Transformer-XL's attention over a memory and a chunk."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt import ops
from pytbptt.nn.unscriptable import UnscriptableModule
from pytbptt.runtime.device import accumulation_dtype
from pytbptt.runtime.renamed import Renamed


class RelativeAttention(UnscriptableModule):
    """Multi-head attention with relative positions.

    Keys and values of the memory are projected separately and passed to the op, which reads them in place: memory and
    chunk are never concatenated.

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
            content_bias, position_bias: u and v (H, D), to share them between layers; None: new ones, at zero.
        """
        super().__init__()
        self.n_head = n_head
        self.d_head = d_head
        self.dropatt = dropatt
        self.qkv_proj = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.pos_proj = nn.Linear(d_model, n_head * d_head, bias=False)
        self.out_proj = nn.Linear(n_head * d_head, d_model, bias=False)
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
        """Attend from every position of the chunk.

        Args:
            hidden: (B, T, E).
            position: the table of distances: (R, E) as `sinusoidal_embedding` returns it, or (R, H, D) as an earlier
                call did.
            memory: the inputs of earlier chunks (B, M, E), oldest first, or their keys and values, (B, M, H, D) each;
                None: no memory.
            first_key, window: as for `pytbptt.ops.rel_attention`.

        Returns:
            The result (B, T, E); the chunk's own keys and values, (B, T, H, D) each; the projected table (R, H, D).
        """
        query, key, value = self._heads(self.qkv_proj(hidden))
        if isinstance(memory, Tensor):
            memory = self._heads(linear_outputs_from(self.qkv_proj, memory, self.n_head * self.d_head))
        if position.dim() == 2:
            (position,) = self._heads(self.pos_proj(position))
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
        return self.out_proj(attended.flatten(2)), (key, value), position

    def _heads(self, projected: Tensor) -> Any:
        """Split (…, n·H·D) into a tuple of n tensors (…, H, D)."""
        return projected.view(*projected.shape[:-1], -1, self.n_head, self.d_head).unbind(-3)

    qkv_net, r_net, o_net = Renamed("qkv_proj"), Renamed("pos_proj"), Renamed("out_proj")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_FORMER_NAMES.get(name, name), value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            child, dot, rest = name.removeprefix(prefix).partition(".")
            if child in _FORMER_NAMES:
                state_dict[f"{prefix}{_FORMER_NAMES[child]}{dot}{rest}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


_FORMER_NAMES = {"qkv_net": "qkv_proj", "r_net": "pos_proj", "o_net": "out_proj"}


def current_name(parameter: str) -> str:
    """A parameter's current name, given one that a state_dict of before release 0.1 may have."""
    return ".".join(_FORMER_NAMES.get(part, part) for part in parameter.split("."))


def linear_outputs_from(layer: nn.Module, input: Tensor, first: int) -> Tensor:
    """The outputs `first:` of a linear layer, or of a module that replaces it (quantised, an adapter).

    For a plain torch.nn.Linear only these outputs are computed. Any other module is called, and its result sliced,
    since more than its weight may matter: adapters, quantised layers, hooks, parametrizations.
    """
    if type(layer) is not nn.Linear or type(layer.weight) not in (Tensor, nn.Parameter) or _has_hooks(layer):
        return layer(input)[..., first:]  # type: ignore[no-any-return]  # a module's call is untyped
    return F.linear(input, layer.weight[first:], None if layer.bias is None else layer.bias[first:])


def _has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, or a forward that was assigned to the instance."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in vars(module)


def sinusoidal_embedding(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table (rows, width) whose row d is [sin | cos] of d / 10000 ** (2k / width), k = 0 … width / 2 - 1.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5, in Transformer-XL's order.
    """
    # 16-bit floats cannot represent all distances.
    wide_dtype = accumulation_dtype(dtype)
    distance = torch.arange(rows, device=device, dtype=wide_dtype)
    inverse_frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, device=device, dtype=wide_dtype) / width)
    angle = torch.outer(distance, inverse_frequency)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
