"""What every language model here offers: chunks and a memory in, hidden states and the next memory out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytbptt.errors import InputError
from pytbptt.nn.adaptive import AdaptiveSoftmax


@dataclass(frozen=True)
class LossResult:
    """What a chunk cost."""

    objective: Tensor
    """(), what is differentiated: the mean over scored targets (0 where there is none), plus any regularisation."""
    nll: Tensor
    """(), sum over scored targets in nats, detached; float32 or wider. Perplexity is exp(sum of nll / sum of count)."""
    count: Tensor
    """int64 (), how many targets were scored."""


class LanguageModel(nn.Module):
    """A model that reads a stream in chunks and carries its memory from one to the next.

    Its memory is a dataclass of tensors for `pytbptt.memory`, the same shape from the first chunk to the last.
    """

    softmax: AdaptiveSoftmax

    def forward(
        self, tokens: Tensor, memory: Any = None, reset: Tensor | None = None, detach: bool = True
    ) -> tuple[Tensor, Any]:
        """Read one chunk.

        Args:
            tokens: int64 (B, T).
            memory: what the previous chunk of the same streams gave; None starts as `init_memory` does.
            reset: bool (B, T); where true, nothing before that token may be seen, by it or by any later token.
            detach: False leaves the graph in the memory that comes back, so that gradients cross the chunk's edge.

        Returns:
            The last layer's hidden states (B, T, E), and the memory for the next chunk.

        Raises:
            InputError: tokens, memory or reset that do not fit the model or each other.
        """
        raise NotImplementedError

    def init_memory(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The memory of `batch_size` streams before their first token; by default where and as wide as the weights."""
        raise NotImplementedError

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Any = None,
        reset: Tensor | None = None,
        detach: bool = True,
        capacity: Sequence[int] | None = None,
    ) -> tuple[LossResult, Any]:
        """Read one chunk and score its targets.

        Args:
            targets: int64 (B, T), the token that follows each token; -100 is not scored.
            tokens, memory, reset, detach: as for the model itself.
            capacity: room for the targets of each tail of the softmax, as for `AdaptiveSoftmax.nll`.

        Returns:
            What the chunk cost, and the memory for the next chunk.
        """
        output, memory = self(tokens, memory, reset, detach)
        nll, count = self.softmax.nll(output, targets, capacity=capacity)
        return LossResult(nll / count.clamp(min=1), nll.detach(), count), memory

    def log_prob(self, output: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of every next token, float32 or wider, from hidden states (B, T, E)."""
        return self.softmax.log_prob(output)

    def num_parameters(self) -> int:
        """How many weights the model has; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def check_chunk(name: str, tokens: Tensor, reset: Tensor | None) -> None:
    """Refuse tokens and resets that no model can read; `name` is the model's, for the message.

    Raises:
        InputError: shapes or dtypes other than int64 (B, T) with B, T >= 1 and bool (B, T).
    """
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise InputError(f"{name}: tokens: found {found}, expected torch.int64 (B, T) with at least one token")
    if reset is not None and (reset.shape != tokens.shape or reset.dtype != torch.bool):
        found = f"{reset.dtype} {tuple(reset.shape)}"
        raise InputError(f"{name}: reset: found {found}, expected torch.bool {tuple(tokens.shape)} as tokens")


def check_memory(name: str, found: Tensor, expected: tuple[int, ...], stream_dim: int) -> None:
    """Refuse a memory of other streams or of another model; `name` says whose and which tensor.

    Raises:
        InputError: the tensor's shape is not the one that the model and its tokens expect.
    """
    if found.dim() == len(expected) and found.shape[stream_dim] != expected[stream_dim]:
        streams = f"found {found.shape[stream_dim]} streams, expected {expected[stream_dim]} as tokens"
        raise InputError(f"{name}: {streams}")
    if tuple(found.shape) != expected:
        raise InputError(f"{name}: found shape {tuple(found.shape)}, expected {expected}")
