"""The interface of the language models: chunk and memory in, hidden states and next memory out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytbptt import memory as memories
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import AdaptiveSoftmax
from pytbptt.nn.tying import preserve_ties, sync_tied_entries
from pytbptt.nn.unscriptable import UnscriptableModule
from pytbptt.runtime.device import autocast_dtype
from pytbptt.runtime.renamed import Renamed


@memories.register
@dataclass(frozen=True)
class LossResult:
    """The loss of a chunk."""

    objective: Tensor
    """(), to differentiate: the mean over scored targets (0 if there are none), plus any regularisation."""
    nll: Tensor
    """(), sum over scored targets in nats, detached; float32 or wider. Perplexity is exp(sum of nll / sum of count)."""
    count: Tensor
    """int64 (), how many targets were scored."""


@dataclass
class ModelConfig:
    """A model's sizes and regularisation.

    A new architecture is a file with a subclass of this and one of `LanguageModel`, and a line in `ARCHITECTURES`.
    """

    arch: ClassVar[str]
    """Its name for --arch."""
    op: ClassVar[str]
    """The op of pytbptt.ops that it uses."""
    has_mem_len: ClassVar[bool] = False
    """Whether it has the fields mem_len, same_length and initial_memory."""
    lag_chunk: ClassVar[int]
    """Chunk length for measuring how gradients decay with lag; shorter chunks cost more per token."""
    vocab_size: int = 0
    """Number of token types; 0: as many as the data has."""

    @property
    def memory_length(self) -> int:
        """Tokens of the past that every chunk attends to; 0 for models whose memory is a state."""
        return 0

    @property
    def op_size(self) -> int:
        """The last dimension of the op's tensors, if its kernels support some sizes only; else 0."""
        return 0

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    changed = Renamed("replace")

    def build(self) -> "LanguageModel":
        """A model with new weights.

        Raises:
            InputError: an invalid size or probability; the message names it.
        """
        raise NotImplementedError


class LanguageModel(UnscriptableModule):
    """A model that reads a stream in chunks and carries its memory from one to the next.

    Its memory is a dataclass of tensors (see `pytbptt.memory`) of the same shapes from the first chunk to the last.
    Tied weights stay tied when the model is moved or loads a state_dict, even with assign=True.
    """

    config: ModelConfig
    softmax: AdaptiveSoftmax
    warm_up_is_exact: ClassVar[bool] = True
    """Whether `warm_up` tokens make a stream's loss equal to that of the whole text in one stream."""

    def forward(
        self,
        tokens: Tensor,
        memory: Any = None,
        reset: Tensor | None = None,
        detach: bool = True,
        targets: Tensor | None = None,
        capacity: Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Read one chunk, and score its targets if they are given.

        Args:
            tokens: int64 (B, T).
            memory: the memory that the previous chunk of the same streams returned; None: as `init_memory` returns.
            reset: bool (B, T); where true, neither that token nor any later one sees anything before it.
            detach: False keeps the graph of the returned memory, so that gradients flow across the chunk's edge.
            targets: int64 (B, T), the token that follows each token; -100 is not scored.
            capacity: for how many targets each tail of the softmax is evaluated; see `AdaptiveSoftmax.nll`.

        Returns:
            The last layer's hidden states (B, T, E), or with targets a `LossResult`; and the memory for the next chunk,
            of the same type as the given one.

        Raises:
            InputError: tokens, memory, reset or targets do not fit the model or each other; a projected memory in
                training mode, where its projections would be out of date after an update.
        """
        raise NotImplementedError

    def _score(self, output: Tensor, targets: Tensor, capacity: Sequence[int] | None) -> LossResult:
        """The loss of the targets given the model's output, without regularisation."""
        nll, count = self.softmax.nll(output, targets, capacity=capacity)
        return LossResult(nll / count.clamp(min=1), nll.detach(), count)

    def init_memory(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The memory of `batch_size` streams before their first token; device and dtype default to the weights'."""
        raise NotImplementedError

    def init_evaluation_memory(self, batch_size: int) -> Any:
        """As `init_memory`, in the form that is fastest while no weight changes."""
        return self.init_memory(batch_size)

    def warm_up(self, bptt: int) -> int:
        """Tokens to read before a stream, in chunks of `bptt`, so that its loss is that of reading the whole text in
        one stream; exactly or, unless `warm_up_is_exact`, approximately."""
        raise NotImplementedError

    @property
    def is_chunk_dependent(self) -> bool:
        """Whether what a token sees depends on its position in the chunk, so that other chunks give another loss."""
        return False

    knows_chunks = Renamed("is_chunk_dependent")

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Any = None,
        reset: Tensor | None = None,
        detach: bool = True,
        capacity: Sequence[int] | None = None,
    ) -> tuple[LossResult, Any]:
        """Read one chunk and score its targets; the same as calling the model with targets."""
        return self(tokens, memory, reset, detach, targets, capacity)  # type: ignore[no-any-return]

    def log_prob(self, output: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of every next token, float32 or wider, from hidden states (B, T, E)."""
        return self.softmax.log_prob(output)

    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Any, recurse: bool = True) -> "LanguageModel":
        with preserve_ties(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        error_msgs = arguments[-1]
        error_msgs.extend(sync_tied_entries(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def check_chunk(name: str, tokens: Tensor, reset: Tensor | None) -> None:
    """Check tokens and resets; `name` is the model's, for the message.

    Raises:
        InputError: not int64 (B, T) with B, T >= 1, and bool (B, T).
    """
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
        found = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise InputError(f"{name}: tokens: found {found}, expected torch.int64 (B, T) with at least one token")
    if reset is not None and (reset.shape != tokens.shape or reset.dtype != torch.bool):
        found = f"{reset.dtype} {tuple(reset.shape)}"
        raise InputError(f"{name}: reset: found {found}, expected torch.bool {tuple(tokens.shape)} as tokens")


def check_memory_type(name: str, memory: object, *memory_types: type) -> None:
    """Check that a memory is of this model; `name` is the model's.

    Raises:
        InputError: it is of another type.
    """
    if not isinstance(memory, memory_types):
        expected = " or ".join(memory_type.__name__ for memory_type in memory_types)
        raise InputError(f"{name}: memory: found {type(memory).__name__}, expected {expected}")


def check_memory(name: str, found: Tensor, expected: tuple[int, ...], stream_dim: int, dtype: torch.dtype) -> None:
    """Check one tensor of a memory, which `name` names for the message.

    Under autocast any floating-point dtype is accepted.

    Raises:
        InputError: the tensor's shape or dtype is not what the model and its tokens expect.
    """
    if found.dim() == len(expected) and found.shape[stream_dim] != expected[stream_dim]:
        streams = f"found {found.shape[stream_dim]} streams, expected {expected[stream_dim]} as tokens"
        raise InputError(f"{name}: {streams}")
    if tuple(found.shape) != expected:
        raise InputError(f"{name}: found shape {tuple(found.shape)}, expected {expected}")
    autocast = found.is_floating_point() and dtype.is_floating_point and autocast_dtype(found) is not None
    if found.dtype != dtype and not autocast:
        raise InputError(f"{name}: found {found.dtype}, expected {dtype} as the model's weights")
