"""AWD-LSTM."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pytbptt import memory as memories
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from pytbptt.nn.dropout import dropout
from pytbptt.nn.language_model import LanguageModel, ModelConfig, check_chunk, check_memory, check_memory_type
from pytbptt.nn.lstm import LSTM, locked_dropout
from pytbptt.runtime.device import accumulation_dtype
from pytbptt.runtime.renamed import Renamed

WARM_UP_TOKENS = 1024
"""Tokens after which a state is close enough to the one that a longer past would give."""


@dataclass
class AWDLSTMConfig(ModelConfig):
    """Sizes and regularisation of an AWD-LSTM; the defaults are its authors' for the Penn Treebank."""

    arch: ClassVar[str] = "awd_lstm"
    op: ClassVar[str] = "lstm"
    lag_chunk: ClassVar[int] = 8

    d_embed: int = 400
    """Width of the embedding, and of the last layer where weights are tied."""
    d_hidden: int = 1150
    """Width of the other layers."""
    n_layer: int = 3
    """Number of layers."""
    dropout: float = 0.4
    """Probability that a unit of the last layer's output is dropped in training, for the whole chunk."""
    dropouth: float = 0.25
    """Probability that a unit between layers is dropped in training, for the whole chunk."""
    dropouti: float = 0.4
    """Probability that a unit of the embedded input is dropped in training, for the whole chunk."""
    dropoute: float = 0.1
    """Probability that a token type is dropped from the embedding in training, for the whole chunk."""
    weight_drop: float = 0.5
    """Probability that a recurrent weight is dropped in training, for the whole chunk."""
    alpha: float = 2.0
    """Weight of the activation regularisation (mean square of the dropped output) in the objective."""
    beta: float = 1.0
    """Weight of the temporal regularisation (mean square of the raw output's steps) in the objective."""
    tie_weights: bool = True
    """Share the embedding's table with the softmax."""
    init_range: float = 0.1
    """Bound of the uniform distribution of the initial embedding; a larger one tells tokens apart sooner."""
    cutoffs: tuple[int, ...] = ()
    """Frequency ranks at which the clusters of the adaptive softmax start; those beyond the vocabulary are ignored;
    empty: a plain softmax."""

    def build(self) -> "AWDLSTM":
        """A model with new weights.

        Raises:
            InputError: an invalid size or probability; the message names it.
        """
        return AWDLSTM(self)


@memories.register
@dataclass(frozen=True)
class LSTMMemory:
    """Every layer's state after the last token."""

    h: tuple[Tensor, ...]
    """One (B, H) per layer; layers may differ in width."""
    c: tuple[Tensor, ...]
    """One (B, H) per layer, float32 or wider."""


class AWDLSTM(LanguageModel):
    """Stacked LSTMs with dropout wherever Merity et al. put it.

    Source: Merity et al., "Regularizing and Optimizing LSTM Language Models" (2018). Layers and initialisation are
    those of the authors' implementation.
    """

    config: AWDLSTMConfig
    warm_up_is_exact = False

    def __init__(self, config: AWDLSTMConfig) -> None:
        """
        Raises:
            InputError: an invalid size or probability; the message names it.
        """
        super().__init__()
        _check_config(config)
        self.config = config
        self.embedding = AdaptiveEmbedding(
            config.vocab_size,
            config.d_embed,
            config.d_embed,
            config.cutoffs,
            weight_init=partial(nn.init.uniform_, a=-config.init_range, b=config.init_range),
        )
        last = config.d_embed if config.tie_weights else config.d_hidden
        widths = [config.d_embed, *[config.d_hidden] * (config.n_layer - 1), last]
        layers = [LSTM(width, next_width, weight_drop=config.weight_drop) for width, next_width in pairwise(widths)]
        self.layers = cast("Sequence[LSTM]", nn.ModuleList(layers))
        self.softmax = AdaptiveSoftmax(
            config.vocab_size,
            last,
            last,
            config.cutoffs,
            embedding=self.embedding if config.tie_weights else None,
            weight_init=partial(nn.init.uniform_, a=-0.1, b=0.1),
        )

    def init_memory(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LSTMMemory:
        """The memory of `batch_size` streams before their first token: zeros; c is always float32 or wider."""
        weight = self.embedding.weights[0]
        device, dtype = device or weight.device, dtype or weight.dtype
        cell_dtype = accumulation_dtype(dtype)
        widths = [layer.hidden_size for layer in self.layers]
        return LSTMMemory(
            tuple(torch.zeros(batch_size, width, device=device, dtype=dtype) for width in widths),
            tuple(torch.zeros(batch_size, width, device=device, dtype=cell_dtype) for width in widths),
        )

    def warm_up(self, bptt: int) -> int:
        """WARM_UP_TOKENS, an approximation: how far back an LSTM remembers has no bound."""
        return WARM_UP_TOKENS

    def forward(
        self,
        tokens: Tensor,
        memory: LSTMMemory | None = None,
        reset: Tensor | None = None,
        detach: bool = True,
        targets: Tensor | None = None,
        capacity: Sequence[int] | None = None,
    ) -> tuple[Any, LSTMMemory]:
        """Read one chunk, and score its targets if they are given; see `LanguageModel.forward`.

        In training, the objective includes the regularisation of section 4.6, even if no target is scored: alpha times
        the mean square of the output after dropout (AR), and beta times the mean square of the differences between
        consecutive outputs before dropout (TAR).
        """
        raw, dropped, memory = self.forward_layers(tokens, memory, reset, detach)
        if targets is None:
            return dropped, memory
        result = self._score(dropped, targets, capacity)
        objective = result.objective
        if self.training and self.config.alpha:
            objective = objective + self.config.alpha * _mean_square(dropped)
        if self.training and self.config.beta and tokens.shape[1] > 1:
            objective = objective + self.config.beta * _mean_square(raw[:, 1:] - raw[:, :-1])
        return dataclasses.replace(result, objective=objective), memory

    def forward_layers(
        self, tokens: Tensor, memory: LSTMMemory | None, reset: Tensor | None, detach: bool
    ) -> tuple[Tensor, Tensor, LSTMMemory]:
        """The last layer's output before and after dropout, (B, T, E) each, and the next memory.

        Time is the first dimension inside, so that the rows of a step are contiguous for the recurrence.
        """
        check_chunk("AWDLSTM", tokens, reset)
        B = tokens.shape[0]
        if memory is None:
            memory = self.init_memory(B, tokens.device)
        self._check_memory(memory, B)
        config = self.config

        by_time, reset_by_time = tokens.t(), None if reset is None else reset.t()
        hidden = self.embed(by_time)
        hidden = locked_dropout(hidden, config.dropouti, self.training, time_dim=0)
        h_n, c_n = [], []
        for n, layer in enumerate(self.layers):
            if n > 0:
                hidden = locked_dropout(hidden, config.dropouth, self.training, time_dim=0)
            state = memory.h[n].unsqueeze(0), memory.c[n].unsqueeze(0)
            hidden, (h, c) = layer(hidden, state, reset=reset_by_time)
            h_n.append(h.squeeze(0).to(memory.h[n].dtype))
            c_n.append(c.squeeze(0).to(memory.c[n].dtype))
        dropped = locked_dropout(hidden, config.dropout, self.training, time_dim=0)
        next_memory = LSTMMemory(tuple(h_n), tuple(c_n))
        if detach:
            next_memory = memories.detach(next_memory)
        return hidden.transpose(0, 1), dropped.transpose(0, 1), next_memory

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding with embedding dropout (section 4.3): a dropped token type is zero everywhere in the chunk."""
        embedded: Tensor = self.embedding(tokens)
        if not self.training or self.config.dropoute == 0.0:
            return embedded
        keep_mask = dropout(embedded.new_ones(self.config.vocab_size), self.config.dropoute)
        return embedded * keep_mask[tokens].unsqueeze(-1)

    read_by_time = Renamed("forward_layers")

    def _check_memory(self, memory: LSTMMemory, batch_size: int) -> None:
        check_memory_type("AWDLSTM", memory, LSTMMemory)
        dtype, widths = self.embedding.weights[0].dtype, [layer.hidden_size for layer in self.layers]
        cell_dtype = accumulation_dtype(dtype)
        if len(memory.h) != len(widths) or len(memory.c) != len(widths):
            raise InputError(f"AWDLSTM: memory: found {len(memory.h)} layers, expected {len(widths)}")
        for n, width in enumerate(widths):
            check_memory(f"AWDLSTM: memory: h.{n}", memory.h[n], (batch_size, width), 0, dtype)
            check_memory(f"AWDLSTM: memory: c.{n}", memory.c[n], (batch_size, width), 0, cell_dtype)


def _mean_square(values: Tensor) -> Tensor:
    return values.to(accumulation_dtype(values.dtype)).square().mean()


def _check_config(config: AWDLSTMConfig) -> None:
    for name in ("vocab_size", "d_embed", "d_hidden", "n_layer"):
        if getattr(config, name) < 1:
            raise InputError(f"AWDLSTM: {name}: found {getattr(config, name)}, expected at least 1")
    for name in ("alpha", "beta", "init_range"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"AWDLSTM: {name}: found {getattr(config, name)}, expected at least 0")
    for name in ("dropout", "dropouth", "dropouti", "dropoute", "weight_drop"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise InputError(f"AWDLSTM: {name}: found {getattr(config, name)}, expected at least 0 and below 1")
