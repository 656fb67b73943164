"""Transformer-XL."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pytbptt import memory as memories
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Initialiser
from pytbptt.nn.attention import RelativeAttention, sinusoidal_embedding
from pytbptt.nn.decoder_layer import DecoderLayer
from pytbptt.nn.dropout import dropout
from pytbptt.nn.language_model import LanguageModel, ModelConfig, check_chunk, check_memory, check_memory_type
from pytbptt.runtime.device import autocast_dtype, can_read_on_host, is_tracing_or_capturing


@dataclass
class TransformerXLConfig(ModelConfig):
    """Sizes and dropouts of a Transformer-XL; names and defaults are those of its implementations."""

    arch: ClassVar[str] = "transformer_xl"
    op: ClassVar[str] = "rel_attention"
    has_mem_len: ClassVar[bool] = True
    lag_chunk: ClassVar[int] = 16

    n_layer: int = 12
    """Number of layers."""
    d_model: int = 500
    """Width of the hidden states; even."""
    n_head: int = 10
    """Number of attention heads."""
    d_head: int = 50
    """Size of each head."""
    d_inner: int = 1000
    """Width inside the feed-forward layers."""
    d_embed: int = 0
    """Width of the embedding of the most frequent tokens; 0: d_model."""
    dropout: float = 0.0
    """Probability that a hidden unit is dropped in training."""
    dropatt: float = 0.0
    """Probability that an attention weight is dropped in training."""
    mem_len: int = 0
    """Memory carried from chunk to chunk, in tokens."""
    clamp_len: int = -1
    """Larger distances between tokens are treated as this one; 0 or less: no limit."""
    same_length: bool = False
    """Let every token see exactly mem_len tokens, itself included, at every position of the chunk."""
    pre_norm: bool = False
    """Normalise each sublayer's input instead of its output."""
    untie_bias: bool = True
    """Give each layer its own attention biases u and v; otherwise all layers share them."""
    cutoffs: tuple[int, ...] = (20000, 40000, 200000)
    """Frequency ranks at which the clusters of the adaptive embedding and softmax start; those beyond the vocabulary
    are ignored."""
    div_val: int = 1
    """Divide the embedding width by this factor from each cluster to the next."""
    tie_weights: bool = True
    """Share the embedding's tables with the softmax."""
    proj_share_all_but_first: bool = True
    """With --tie-weights, share the projections of all clusters but the first, too."""
    initial_memory: Literal["empty", "zeros"] = "empty"
    """Memory before the first chunk: nothing, or mem_len zero vectors that are attended to."""
    init: Literal["normal", "uniform"] = "normal"
    """Distribution of the initial weights."""
    init_range: float = 0.01
    """Bound of the initial weights, for --init uniform."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, for --init normal."""
    proj_init_std: float = 0.01
    """Standard deviation of the initial projections of embedding and softmax."""

    @property
    def memory_length(self) -> int:
        """mem_len."""
        return self.mem_len

    @property
    def op_size(self) -> int:
        """The head size."""
        return self.d_head

    def build(self) -> "TransformerXL":
        """A model with new weights.

        Raises:
            InputError: an invalid size or probability; the message names it.
        """
        return TransformerXL(self)


@memories.register
@dataclass(frozen=True)
class TransformerXLMemory:
    """The last M inputs of every layer."""

    hidden: Tensor = field(metadata={"stream_dim": 1, "time_dim": 2})
    """(L, B, M, E), oldest first."""
    first: Tensor
    """int32 (B,): index of the first visible one of the M positions; earlier ones are not filled yet, or before a
    reset."""


@memories.register
@dataclass(frozen=True)
class ProjectedMemory:
    """Keys and values of the same M inputs: faster than `TransformerXLMemory` as long as no weight changes.

    Consecutive memories share storage, so that a chunk need not copy what it keeps: clone one before writing to it. A
    memory may be continued more than once, also by several threads: the second continuation makes a copy, and no
    memory that was returned ever changes.
    """

    key: Tensor = field(metadata={"stream_dim": 1, "time_dim": 2})
    """(L, B, M, H, D), oldest first."""
    value: Tensor = field(metadata={"stream_dim": 1, "time_dim": 2})
    """(L, B, M, H, D)."""
    first: Tensor
    """int32 (B,), as in TransformerXLMemory."""

    def __getstate__(self) -> dict[str, Tensor]:
        return {"key": self.key, "value": self.value, "first": self.first}


@dataclass
class _ProjectionCache:
    """What one chunk computed that the next one can use, besides the projected memory; without it, it is recomputed.

    It is an attribute of the memory but not a field, so that copies, selections and saved memories do not have it.
    """

    position_tables: list[Tensor]
    """Every layer's projected table of distances, L times (R, H, D)."""
    buffer: "_KVBuffer | None"
    """The buffer that the memory is a view of, if another chunk may fit behind it."""
    end: int
    """Where the memory ends in the buffer."""


class _KVBuffer:
    """A buffer for keys and values with space for those of the next chunks behind the memory's."""

    def __init__(self, memory: ProjectedMemory, evicted: int) -> None:
        """Copy a memory, except the oldest entries that the next chunk evicts, and add space for M more."""
        L, B, M, H, D = memory.key.shape
        self.key = memory.key.new_empty(L, B, 2 * M, H, D)
        self.value = memory.value.new_empty(L, B, 2 * M, H, D)
        self.key[:, :, evicted:M] = memory.key[:, :, evicted:]
        self.value[:, :, evicted:M] = memory.value[:, :, evicted:]
        self._end = M
        self._lock = threading.Lock()

    def try_reserve(self, start: int, length: int) -> bool:
        """Reserve `length` entries from `start` on for the caller; False if they do not fit or were reserved before."""
        # Tensors made in inference mode cannot be written outside of it.
        if self.key.is_inference() and not torch.is_inference_mode_enabled():
            return False
        with self._lock:
            if self._end != start or start + length > self.key.shape[2]:
                return False
            self._end += length
            return True


class TransformerXL(LanguageModel):
    """A Transformer that attends to its own earlier hidden states, with positions relative to each query.

    Source: Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (2019). Mathematics
    and initialisation are those of the authors' implementation and of transformers' TransfoXL.
    """

    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig) -> None:
        """
        Raises:
            InputError: an invalid size or probability; the message names it.
        """
        super().__init__()
        _check_config(config)
        self.config = config
        d_embed = config.d_embed or config.d_model
        weight_init: Initialiser = partial(nn.init.normal_, std=config.init_std)
        if config.init == "uniform":
            weight_init = partial(nn.init.uniform_, a=-config.init_range, b=config.init_range)
        projection_init: Initialiser = partial(nn.init.normal_, std=config.proj_init_std)

        self.embedding = AdaptiveEmbedding(
            config.vocab_size,
            d_embed,
            config.d_model,
            config.cutoffs,
            config.div_val,
            config.d_model**0.5,
            weight_init,
            projection_init,
        )
        content_bias = position_bias = None
        if not config.untie_bias:
            content_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
            position_bias = nn.Parameter(torch.zeros(config.n_head, config.d_head))
        layers = nn.ModuleList(
            DecoderLayer(
                config.d_model,
                config.n_head,
                config.d_head,
                config.d_inner,
                config.dropout,
                config.dropatt,
                config.pre_norm,
                content_bias,
                position_bias,
            )
            for _ in range(config.n_layer)
        )
        layers.apply(partial(_initialise, weight_init=weight_init, layer_norm_std=config.init_std))
        self.layers = cast("Sequence[DecoderLayer]", layers)
        self.softmax = AdaptiveSoftmax(
            config.vocab_size,
            d_embed,
            config.d_model,
            config.cutoffs,
            config.div_val,
            self.embedding if config.tie_weights else None,
            config.proj_share_all_but_first,
            weight_init,
            projection_init,
        )

    def init_memory(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        projected: bool = False,
    ) -> TransformerXLMemory | ProjectedMemory:
        """The memory of `batch_size` streams before their first token.

        Args:
            device, dtype: default to the weights'.
            projected: a `ProjectedMemory`, for evaluation only: saves projecting the memory in every chunk.
        """
        config, weight = self.config, self.embedding.weights[0]
        L, M = config.n_layer, config.mem_len
        device, dtype = device or weight.device, dtype or weight.dtype
        empty = config.initial_memory == "empty"
        first = torch.full((batch_size,), M if empty else 0, dtype=torch.int32, device=device)
        if projected:
            key = torch.zeros(L, batch_size, M, config.n_head, config.d_head, device=device, dtype=dtype)
            value = torch.zeros_like(key)
            if not empty:  # it is the hidden states that are zeros: with pre_norm, their keys and values are not
                with torch.no_grad():
                    zeros = weight.new_zeros(1, 1, config.d_model)
                    table = sinusoidal_embedding(1, config.d_model, weight.device, weight.dtype)
                    for n, layer in enumerate(self.layers):
                        _, (key[n], value[n]), _ = layer(zeros, table)
            return ProjectedMemory(key, value, first)
        return TransformerXLMemory(torch.zeros(L, batch_size, M, config.d_model, device=device, dtype=dtype), first)

    def init_evaluation_memory(self, batch_size: int) -> TransformerXLMemory | ProjectedMemory:
        """Projected keys and values."""
        return self.init_memory(batch_size, projected=True)

    def warm_up(self, bptt: int) -> int:
        """As far back as the model sees: L·(M-1) tokens with same_length, less than L·(M+T) without it."""
        config = self.config
        reach = config.mem_len - 1 if config.same_length else config.mem_len + bptt
        return config.n_layer * reach if config.mem_len else 0

    @property
    def is_chunk_dependent(self) -> bool:
        """With same_length every token sees mem_len tokens; otherwise the last ones of a chunk see more."""
        return not self.config.same_length

    def forward(
        self,
        tokens: Tensor,
        memory: TransformerXLMemory | ProjectedMemory | None = None,
        reset: Tensor | None = None,
        detach: bool = True,
        targets: Tensor | None = None,
        capacity: Sequence[int] | None = None,
    ) -> tuple[Any, TransformerXLMemory | ProjectedMemory]:
        """Read one chunk, and score its targets if they are given; see `LanguageModel.forward`."""
        output, memory = self._read(tokens, memory, reset, detach)
        return output if targets is None else self._score(output, targets, capacity), memory

    def _read(
        self, tokens: Tensor, memory: TransformerXLMemory | ProjectedMemory | None, reset: Tensor | None, detach: bool
    ) -> tuple[Tensor, TransformerXLMemory | ProjectedMemory]:
        check_chunk("TransformerXL", tokens, reset)
        B, T = tokens.shape
        if memory is None:
            memory = self.init_memory(B, tokens.device)
        self._check_memory(memory, B)
        config, M = self.config, self.config.mem_len

        first_key = _first_visible(memory.first, reset, M, T)
        window = config.mem_len if config.same_length else None
        hidden = dropout(self.embedding(tokens), config.dropout, self.training)
        cache = None
        uses_cache = isinstance(memory, ProjectedMemory) and not (
            torch.is_grad_enabled() or is_tracing_or_capturing(hidden)
        )
        if uses_cache:
            cache = vars(memory).get("_projection_cache")
        position_tables = self._position_tables(T, hidden, cache)
        new_entries: list[tuple[Tensor, ...]] = []
        for n, layer in enumerate(self.layers):
            layer_input = hidden
            layer_memory: Tensor | tuple[Tensor, Tensor] | None = None
            if M > 0 and isinstance(memory, ProjectedMemory):
                layer_memory = memory.key[n], memory.value[n]
            elif M > 0 and isinstance(memory, TransformerXLMemory):
                layer_memory = memory.hidden[n]
            hidden, key_value, position_tables[n] = layer(hidden, position_tables[n], layer_memory, first_key, window)
            new_entries.append(key_value if isinstance(memory, ProjectedMemory) else (layer_input,))
        output = dropout(hidden, config.dropout, self.training)

        first = (first_key[:, -1] - T).clamp(min=0)
        if isinstance(memory, ProjectedMemory) and uses_cache:
            return output, _next_projected_memory(memory, new_entries, first, position_tables, cache)
        if detach:  # before concatenation adds to the graph
            memory, new_entries = (
                memories.detach(memory),
                [tuple(part.detach() for part in parts) for parts in new_entries],
            )
        return output, _next_memory(memory, new_entries, first)

    def _position_tables(self, length: int, hidden: Tensor, cache: _ProjectionCache | None) -> list[Tensor]:
        """For every layer, the table of the distances that the chunk can see: projected, if the cache has it
        (generation would spend most of its time projecting it again), otherwise for the layer to project."""
        config = self.config
        rows = config.mem_len + length
        if config.clamp_len > 0:
            rows = min(rows, config.clamp_len + 1)
        if config.same_length:
            rows = min(rows, config.mem_len)
        dtype = self.embedding.weights[0].dtype
        if cache is not None:
            table = cache.position_tables[0]
            if len(table) >= rows and table.dtype == (autocast_dtype(hidden) or dtype):
                return [table[:rows] for table in cache.position_tables]
        table = sinusoidal_embedding(rows, config.d_model, hidden.device, dtype)
        return [dropout(table, config.dropout, self.training)] * config.n_layer

    def _check_memory(self, memory: TransformerXLMemory | ProjectedMemory, batch_size: int) -> None:
        config, name, weight = self.config, "TransformerXL: memory", self.embedding.weights[0]
        check_memory_type("TransformerXL", memory, TransformerXLMemory, ProjectedMemory)
        check_memory(f"{name}: first", memory.first, (batch_size,), 0, torch.int32)
        layers = (config.n_layer, batch_size, config.mem_len)
        if isinstance(memory, ProjectedMemory):
            if self.training:
                raise InputError(f"{name}: found projected keys in training, expected hidden states (or model.eval())")
            heads = (*layers, config.n_head, config.d_head)
            check_memory(f"{name}: key", memory.key, heads, 1, weight.dtype)
            check_memory(f"{name}: value", memory.value, heads, 1, weight.dtype)
        else:
            check_memory(f"{name}: hidden", memory.hidden, (*layers, config.d_model), 1, weight.dtype)


def _first_visible(first: Tensor, reset: Tensor | None, mem_len: int, length: int) -> Tensor:
    """int32 (B, T): the first visible one of the M + T keys for each query, from the memory's and the chunk's
    resets."""
    from_memory = first.unsqueeze(1).expand(-1, length)
    if reset is None:
        return from_memory.contiguous()
    key_index = torch.arange(mem_len, mem_len + length, dtype=torch.int32, device=first.device)
    latest_reset = (reset * key_index).cummax(dim=1).values
    return torch.maximum(from_memory, latest_reset)


def _next_projected_memory(
    memory: ProjectedMemory,
    new_entries: list[tuple[Tensor, ...]],
    first: Tensor,
    position_tables: list[Tensor],
    cache: _ProjectionCache | None,
) -> ProjectedMemory:
    """`_next_memory` without copying the whole memory: the new entries are written behind the old ones in a buffer."""
    buffer, end, M, T = None, 0, memory.key.shape[2], new_entries[0][0].shape[1]
    # Not on a GPU, which copies a memory faster than it launches a layer.
    if T < M and can_read_on_host(first):
        if cache is not None and cache.buffer is not None and cache.buffer.try_reserve(cache.end, T):
            buffer, end = cache.buffer, cache.end + T
        else:
            buffer, end = _KVBuffer(memory, T), M + T
            buffer.try_reserve(M, T)
        for n, (key, value) in enumerate(new_entries):
            buffer.key[n, :, end - T : end], buffer.value[n, :, end - T : end] = key, value
        next_memory = ProjectedMemory(buffer.key[:, :, end - M : end], buffer.value[:, :, end - M : end], first)
    else:
        next_memory = cast("ProjectedMemory", _next_memory(memory, new_entries, first))
    vars(next_memory)["_projection_cache"] = _ProjectionCache(position_tables, buffer, end)
    return next_memory


def _next_memory(
    memory: TransformerXLMemory | ProjectedMemory, new_entries: list[tuple[Tensor, ...]], first: Tensor
) -> TransformerXLMemory | ProjectedMemory:
    """The next memory: the last M entries of this one and of each layer's new entries, (B, T, …) each."""
    if isinstance(memory, ProjectedMemory):
        keys, values = zip(*new_entries, strict=True)
        return ProjectedMemory(_keep_last(memory.key, keys), _keep_last(memory.value, values), first)
    (inputs,) = zip(*new_entries, strict=True)
    return TransformerXLMemory(_keep_last(memory.hidden, inputs), first)


def _keep_last(old: Tensor, new: tuple[Tensor, ...]) -> Tensor:
    """The last M entries of memory (L, B, M, …) and chunk (L times (B, T, …)): (L, B, M, …) in the memory's dtype."""
    M, T = old.shape[2], new[0].shape[1]
    if T >= M:
        return torch.stack([layer[:, T - M :] for layer in new]).to(old.dtype)
    return torch.cat([old[:, :, T:], torch.stack(new).to(old.dtype)], dim=2)


def _initialise(module: nn.Module, weight_init: Initialiser, layer_norm_std: float) -> None:
    """Initialise one module as Transformer-XL does."""
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            weight_init(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.normal_(1.0, layer_norm_std)
            module.bias.zero_()
        elif isinstance(module, RelativeAttention):
            weight_init(module.content_bias)
            weight_init(module.position_bias)


def _check_config(config: TransformerXLConfig) -> None:
    for name in ("vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner"):
        if getattr(config, name) < 1:
            raise InputError(f"TransformerXL: {name}: found {getattr(config, name)}, expected at least 1")
    if config.d_model % 2:
        raise InputError(f"TransformerXL: d_model: found {config.d_model}, expected an even width (sines and cosines)")
    for name in ("d_embed", "mem_len", "init_range", "init_std", "proj_init_std"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"TransformerXL: {name}: found {getattr(config, name)}, expected at least 0")
    if config.same_length and config.mem_len == 0:
        raise InputError("TransformerXL: same_length: found mem_len 0, expected at least 1 (it is what a token sees)")
    for name, choices in (("initial_memory", ("empty", "zeros")), ("init", ("normal", "uniform"))):
        if getattr(config, name) not in choices:
            found, (one, other) = getattr(config, name), choices
            raise InputError(f"TransformerXL: {name}: found {found!r}, expected {one!r} or {other!r}")
    for name in ("dropout", "dropatt"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise InputError(f"TransformerXL: {name}: found {getattr(config, name)}, expected at least 0 and below 1")
