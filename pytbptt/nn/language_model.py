"""What every language model here offers: chunks and a memory in, hidden states and the next memory out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytbptt import memory as memories
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import AdaptiveSoftmax
from pytbptt.nn.tying import restored_ties, shared_entries
from pytbptt.nn.unscriptable import Unscriptable
from pytbptt.runtime.device import autocast_dtype


@memories.register
@dataclass(frozen=True)
class LossResult:
    """What a chunk cost."""

    objective: Tensor
    """(), what is differentiated: the mean over scored targets (0 where there is none), plus any regularisation."""
    nll: Tensor
    """(), sum over scored targets in nats, detached; float32 or wider. Perplexity is exp(sum of nll / sum of count)."""
    count: Tensor
    """int64 (), how many targets were scored."""


@dataclass
class ModelConfig:
    """What a model is made from: its sizes and regularisation.

    A new architecture is a file with a subclass of this and one of `LanguageModel`, and a line in `ARCHITECTURES`.
    """

    arch: ClassVar[str]
    """What --arch calls it."""
    op: ClassVar[str]
    """The op that computes it."""
    has_mem_len: ClassVar[bool] = False
    """Whether it has mem_len, tokens of the past that every chunk reads again, with same_length and initial_memory."""
    lag_chunk: ClassVar[int]
    """Tokens that are read at a time where the gradient is followed back; fewer cost more for each token."""
    vocab_size: int = 0
    """Number of token types; 0: taken from the data."""

    @property
    def memory_length(self) -> int:
        """Tokens of the past that every chunk reads again; 0 where a state stands for them."""
        return 0

    @property
    def op_size(self) -> int:
        """The last dimension of the op's tensors, where its kernels have bounds on it; else 0."""
        return 0

    def changed(self, **changes: Any) -> "ModelConfig":
        """The same but for these fields."""
        return dataclasses.replace(self, **changes)

    def build(self) -> "LanguageModel":
        """A model with new weights.

        Raises:
            InputError: sizes that make no model, by name.
        """
        raise NotImplementedError


class LanguageModel(Unscriptable):
    """A model that reads a stream in chunks and carries its memory from one to the next.

    Its memory is a dataclass of tensors for `pytbptt.memory`, the same shape from the first chunk to the last. Weights
    that are shared stay so when the model is moved, or given a state_dict, also with assign=True.
    """

    config: ModelConfig
    softmax: AdaptiveSoftmax
    warm_up_is_exact: ClassVar[bool] = True
    """Whether `warm_up` makes the loss of a stream that of the whole text."""

    def forward(
        self,
        tokens: Tensor,
        memory: Any = None,
        reset: Tensor | None = None,
        detach: bool = True,
        targets: Tensor | None = None,
        capacity: Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """Read one chunk, and score its targets if there are any.

        Args:
            tokens: int64 (B, T).
            memory: what the previous chunk of the same streams gave; None starts as `init_memory` does.
            reset: bool (B, T); where true, nothing before that token may be seen, by it or by any later token.
            detach: False leaves the graph in the memory that comes back, so that gradients cross the chunk's edge.
            targets: int64 (B, T), the token that follows each token; -100 is not scored.
            capacity: room for the targets of each tail of the softmax, as for `AdaptiveSoftmax.nll`.

        Returns:
            The last layer's hidden states (B, T, E), or with targets a `LossResult`; and the memory for the next chunk,
            of the kind given.

        Raises:
            InputError: tokens, memory, reset or targets that do not fit the model or each other; a projected memory in
                training, where it would be out of date.
        """
        raise NotImplementedError

    def _score(self, output: Tensor, targets: Tensor, capacity: Sequence[int] | None) -> LossResult:
        """What targets cost after such an output; without regularisation."""
        nll, count = self.softmax.nll(output, targets, capacity=capacity)
        return LossResult(nll / count.clamp(min=1), nll.detach(), count)

    def init_memory(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The memory of `batch_size` streams before their first token; by default where and as wide as the weights."""
        raise NotImplementedError

    def init_evaluation_memory(self, batch_size: int) -> Any:
        """As `init_memory`, in the form that is the fastest to carry on with while no weight changes."""
        return self.init_memory(batch_size)

    def warm_up(self, bptt: int) -> int:
        """Tokens to read ahead of a stream, in chunks of `bptt`, so that its loss is what one stream from the text's
        beginning gives; or nearly so, where that is not `warm_up_is_exact`."""
        raise NotImplementedError

    @property
    def knows_chunks(self) -> bool:
        """Whether what a token sees depends on its place in the chunk, so that other chunks give another loss."""
        return False

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Any = None,
        reset: Tensor | None = None,
        detach: bool = True,
        capacity: Sequence[int] | None = None,
    ) -> tuple[LossResult, Any]:
        """Read one chunk and score its targets: the model itself, called with targets."""
        return self(tokens, memory, reset, detach, targets, capacity)  # type: ignore[no-any-return]

    def log_prob(self, output: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of every next token, float32 or wider, from hidden states (B, T, E)."""
        return self.softmax.log_prob(output)

    def num_parameters(self) -> int:
        """How many weights the model has; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Any, recurse: bool = True) -> "LanguageModel":
        with restored_ties(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        error_msgs = arguments[-1]
        error_msgs.extend(shared_entries(self, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


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


def check_kind(name: str, memory: object, *kinds: type) -> None:
    """Refuse what is no memory of this model; `name` is the model's.

    Raises:
        InputError: names the type that was found.
    """
    if not isinstance(memory, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{name}: memory: found {type(memory).__name__}, expected {expected}")


def check_memory(name: str, found: Tensor, expected: tuple[int, ...], stream_dim: int, dtype: torch.dtype) -> None:
    """Refuse a memory of other streams or of another model; `name` says whose and which tensor.

    Under autocast any floating-point dtype goes where another is expected.

    Raises:
        InputError: the tensor's shape or dtype is not the one that the model and its tokens expect.
    """
    if found.dim() == len(expected) and found.shape[stream_dim] != expected[stream_dim]:
        streams = f"found {found.shape[stream_dim]} streams, expected {expected[stream_dim]} as tokens"
        raise InputError(f"{name}: {streams}")
    if tuple(found.shape) != expected:
        raise InputError(f"{name}: found shape {tuple(found.shape)}, expected {expected}")
    autocast = found.is_floating_point() and dtype.is_floating_point and autocast_dtype(found) is not None
    if found.dtype != dtype and not autocast:
        raise InputError(f"{name}: found {found.dtype}, expected {dtype} as the model's weights")
