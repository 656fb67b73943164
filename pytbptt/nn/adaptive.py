"""Adaptive embedding and adaptive softmax: rare tokens take fewer parameters and less time than frequent ones."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt.errors import InputError
from pytbptt.nn.cross_entropy import IGNORE_INDEX, OutputRange, linear, linear_cross_entropy
from pytbptt.nn.unscriptable import UnscriptableModule
from pytbptt.runtime.device import accumulation_dtype, can_read_on_host, has_values
from pytbptt.runtime.renamed import Renamed

Initialiser = Callable[[Tensor], object]

_WEIGHT_INIT: Initialiser = partial(nn.init.normal_, std=0.02)
_PROJECTION_INIT: Initialiser = partial(nn.init.normal_, std=0.01)

MASKED_BIAS = -1e4
"""The softmax bias of a token that is never predicted: its probability is 0 in every dtype, and nothing overflows."""


def init_parameter(initialiser: Initialiser, *shape: int) -> nn.Parameter:
    """A parameter of this shape, filled by the initialiser."""
    parameter = nn.Parameter(torch.empty(shape))
    with torch.no_grad():
        initialiser(parameter)
    return parameter


class AdaptiveEmbedding(UnscriptableModule):
    """Token embeddings in clusters of decreasing frequency, cluster i of width d_embed // div_val ** i.

    With div_val 1 there is a single table, and a projection only where d_embed differs from d_model; otherwise every
    cluster has its table and its projection to d_model.

    Source: Baevski & Auli, "Adaptive Input Representations for Neural Language Modeling" (2019), section 3; laid out
    as in Transformer-XL.
    """

    def __init__(
        self,
        vocab_size: int,
        d_embed: int,
        d_model: int,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 1,
        scale: float = 1.0,
        weight_init: Initialiser = _WEIGHT_INIT,
        projection_init: Initialiser = _PROJECTION_INIT,
    ) -> None:
        """
        Args:
            vocab_size: V; ids are 0 … V - 1, the most frequent first.
            d_embed: width of the first cluster.
            d_model: width of the result.
            cutoffs: where the second and later clusters start, ascending; those at or above V are dropped.
            div_val: each cluster is narrower than the one before it by this factor.
            scale: the result is multiplied by it.
            weight_init, projection_init: fill a new weight in place.

        Raises:
            InputError: cutoffs that do not ascend, or a div_val that leaves a cluster without width.
        """
        super().__init__()
        self.edges = cluster_edges(vocab_size, cutoffs)
        self.widths = cluster_widths(len(self.edges) - 1, d_embed, div_val)
        self.d_model = d_model
        self.div_val = div_val
        self.scale = scale
        self.weights = nn.ParameterList()
        self.projections = nn.ParameterList()
        if div_val == 1:
            self.weights.append(init_parameter(weight_init, vocab_size, d_embed))
            if d_embed != d_model:
                self.projections.append(init_parameter(projection_init, d_model, d_embed))
        else:
            for width, first, end in zip(self.widths, self.edges, self.edges[1:], strict=False):
                self.weights.append(init_parameter(weight_init, end - first, width))
                self.projections.append(init_parameter(projection_init, d_model, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, d_model) from int64 ids (…).

        Raises:
            InputError: an id outside the vocabulary; checked on the CPU only, because a check on a GPU would
                synchronise.
        """
        check_ids("tokens", tokens, self.edges[-1])
        if self.div_val == 1:
            embedded = F.embedding(tokens, self.weights[0])
            if len(self.projections):
                embedded = F.linear(embedded, self.projections[0])
            return embedded * self.scale
        # Every token is looked up in every cluster, rows of wrong clusters are set to 0, and one product projects the
        # concatenation: so no shape depends on the tokens. It is less than div_val / (div_val - 1) times as wide.
        rows = []
        inside_any = (tokens >= 0) & (tokens < self.edges[-1])
        for weight, first, end in zip(self.weights, self.edges, self.edges[1:], strict=False):
            outside = (tokens < first) | (tokens >= end)
            # The remainder spreads tokens of other clusters over the table, so that their gradients, all 0, are not all
            # added to one row. An id outside the vocabulary stays outside the table, and the lookup raises.
            row = tokens - first
            row = row.remainder(end - first).where(outside & inside_any, row)
            rows.append(F.embedding(row, weight).masked_fill(outside.unsqueeze(-1), 0.0))
        return F.linear(torch.cat(rows, dim=-1), torch.cat(list(self.projections), dim=1)) * self.scale


class AdaptiveSoftmax(UnscriptableModule):
    """A softmax in clusters of decreasing frequency, which evaluates a rare cluster only for targets within it.

    The head scores the words of the first cluster and one entry for each later cluster (tail)::

        log p(w) = log p_head(w)                                 w in the first cluster
        log p(w) = log p_head(tail i) + log p_tail_i(w)          w in tail i

    Without cutoffs it is the plain softmax with a bias.

    Source: Grave et al., "Efficient softmax approximation for GPUs" (2017), section 4; weights and projections laid
    out and tied as in Transformer-XL, its clusters in order.
    """

    def __init__(
        self,
        vocab_size: int,
        d_embed: int,
        d_model: int,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 1,
        embedding: AdaptiveEmbedding | None = None,
        share_projections: bool = True,
        weight_init: Initialiser = _WEIGHT_INIT,
        projection_init: Initialiser = _PROJECTION_INIT,
    ) -> None:
        """
        Args:
            vocab_size, d_embed, d_model, cutoffs, div_val: as for `AdaptiveEmbedding`; d_model is the input's width.
            embedding: share its tables (weight tying); None: the softmax has its own.
            share_projections: if the embedding is shared, share its projections too, except the head's.
            weight_init, projection_init: fill a new weight in place; biases start at zero.

        Raises:
            InputError: as for `AdaptiveEmbedding`, or the embedding has different clusters.
        """
        super().__init__()
        self.edges = cluster_edges(vocab_size, cutoffs)
        widths = cluster_widths(len(self.edges) - 1, d_embed, div_val)
        if embedding is not None and (embedding.edges, embedding.widths) != (self.edges, widths):
            found = f"clusters {embedding.edges} of widths {embedding.widths}"
            raise InputError(f"AdaptiveSoftmax: embedding: found {found}, expected {self.edges} of {widths}")
        self.div_val = div_val
        sizes = [end - first for first, end in pairwise(self.edges)]
        tables = [(vocab_size, d_embed)] if div_val == 1 else list(zip(sizes, widths, strict=True))
        self.cluster_sizes = sizes
        self.weights = nn.ParameterList(
            embedding.weights if embedding is not None else [init_parameter(weight_init, *shape) for shape in tables]
        )
        self.biases = nn.ParameterList([init_parameter(nn.init.zeros_, rows) for rows, _ in tables])
        self.projections = nn.ParameterList()
        if div_val > 1 or d_embed != d_model:
            for i, width in enumerate(widths):
                if embedding is not None and share_projections and i > 0:
                    self.projections.append(embedding.projections[0 if div_val == 1 else i])
                else:
                    self.projections.append(init_parameter(projection_init, d_model, width))
        tails = len(sizes) - 1
        self.cluster_weight = init_parameter(weight_init, tails, d_embed) if tails else None
        self.cluster_bias = init_parameter(nn.init.zeros_, tails) if tails else None

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        capacity: Sequence[int] | None = None,
    ) -> Any:
        """`log_prob`, or with targets `nll`. Both go through the module's call, so that its hooks run: FSDP gathers the
        weights in them."""
        return self._log_prob(hidden) if targets is None else self._nll(hidden, targets, reduction, capacity)

    def nll(
        self,
        hidden: Tensor,
        targets: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        capacity: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of the targets; only the tails that they lie in are evaluated.

        Args:
            hidden: (…, d_model).
            targets: int64 (…); -100 is not scored.
            reduction: "sum", or "none" for one value per target.
            capacity: for each tail, how many targets it is evaluated for; if there are more, the result and the
                gradient of hidden are NaN. With it all shapes are known in advance, and the host does not wait for a
                GPU. None: as many as there are, which waits for a GPU; under torch.export and torch.func, where values
                cannot be read, as many as there are rows.

        Returns:
            The sum over scored targets in nats, float32 or wider (with reduction "none": (…), 0 where a target is not
            scored); and the number of scored targets, int64 ().

        Raises:
            InputError: shapes that differ; not one capacity of at least 0 for each tail; on the CPU, a target outside
                the vocabulary.
        """
        return self(hidden, targets, reduction, capacity)  # type: ignore[no-any-return]  # a module's call is untyped

    def _nll(
        self, hidden: Tensor, targets: Tensor, reduction: str, capacity: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
            found = f"{targets.dtype} {tuple(targets.shape)}"
            raise InputError(f"targets: found {found}, expected torch.int64 {tuple(hidden.shape[:-1])}")
        shape = targets.shape
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        scored = targets != IGNORE_INDEX
        check_ids("targets", targets.masked_fill(~scored, 0), self.edges[-1])

        cluster = torch.zeros_like(targets)
        for edge in self.edges[1:-1]:
            cluster = cluster + (targets >= edge)
        head_targets = torch.where(cluster > 0, self.cluster_sizes[0] + cluster - 1, targets)
        inputs, cluster_targets = [self._projected(0, hidden)], [head_targets]
        # Every tail is evaluated, if need be for no rows: DistributedDataParallel expects a gradient of each parameter.
        if capacity is not None:
            capacities = capacity
        else:
            capacities = (
                self.tail_counts(targets) if has_values(targets) else [len(targets)] * (len(self.cluster_sizes) - 1)
            )
        tail_rows = self._tail_rows(cluster, capacities)
        for i, (rows, valid) in enumerate(tail_rows, start=1):
            inputs.append(self._projected(i, hidden.index_select(0, rows)))
            cluster_targets.append((targets[rows] - self.edges[i]).masked_fill(~valid, IGNORE_INDEX))
        head, *tails = linear_cross_entropy(inputs, cluster_targets, *self._tables(), self._output_ranges())
        if capacity is not None:
            for i, size in enumerate(capacity, start=1):
                head = head * head.new_ones(()).masked_fill((cluster == i).sum() > size, math.nan)
        if reduction == "sum":
            return sum([tail.sum() for tail in tails], head.sum()), scored.sum()
        for (rows, _), tail in zip(tail_rows, tails, strict=True):
            head = head.index_add(0, rows, tail)
        return head.view(shape), scored.sum()

    count, sizes = Renamed("tail_counts"), Renamed("cluster_sizes")

    def tail_counts(self, targets: Tensor) -> list[int]:
        """How many of the targets are in each tail; waits for a GPU."""
        return [int(((targets >= first) & (targets < end)).sum()) for first, end in pairwise(self.edges[1:])]

    def _tail_rows(self, cluster: Tensor, capacity: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """For each tail, as many row indices as its capacity, and a mask of those that are in it; the rest are
        padding."""
        if len(capacity) != len(self.cluster_sizes) - 1 or min(capacity, default=0) < 0:
            tails = len(self.cluster_sizes) - 1
            raise InputError(f"capacity: found {list(capacity)}, expected {tails} numbers of at least 0, one a tail")
        if not capacity:
            return []
        by_cluster, start = cluster.argsort(stable=True), (cluster == 0).sum()
        found = []
        for i, size in enumerate(capacity, start=1):
            position, count = torch.arange(min(size, len(cluster)), device=cluster.device), (cluster == i).sum()
            found.append((by_cluster[(start + position).clamp(max=len(cluster) - 1)], position < count))
            start = start + count
        return found

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (…, V), float32 or wider, from hidden (…, d_model)."""
        return self(hidden)  # type: ignore[no-any-return]

    def _log_prob(self, hidden: Tensor) -> Tensor:
        hidden_rows = hidden.reshape(-1, hidden.shape[-1])
        weights, biases = self._tables()

        def log_softmax(i: int) -> Tensor:
            inputs = self._projected(i, hidden_rows)
            scores = [linear(inputs, weights[n][a:b], biases[n][a:b]) for n, a, b in self._output_ranges()[i]]
            joined = torch.cat(scores, dim=1) if len(scores) > 1 else scores[0]
            return joined.to(accumulation_dtype(joined.dtype)).log_softmax(dim=1)

        head, shortlist = log_softmax(0), self.cluster_sizes[0]
        clusters = [head[:, :shortlist]]
        for i in range(1, len(self.cluster_sizes)):
            clusters.append(log_softmax(i) + head[:, shortlist + i - 1, None])
        joined = torch.cat(clusters, dim=1) if len(clusters) > 1 else head
        return joined.view(*hidden.shape[:-1], self.edges[-1])

    def _projected(self, i: int, hidden: Tensor) -> Tensor:
        """The input (N, width) of cluster i from hidden (N, d_model)."""
        return F.linear(hidden, self.projections[i].t()) if len(self.projections) else hidden

    def _tables(self) -> tuple[list[Tensor], list[Tensor]]:
        """All weights and all biases; those of the head's cluster entries come last."""
        weights, biases = list(self.weights), list(self.biases)
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weights, biases = [*weights, self.cluster_weight], [*biases, self.cluster_bias]
        return weights, biases

    def _output_ranges(self) -> list[list[OutputRange]]:
        """Which rows of `_tables` are the outputs of the head, and of each tail."""
        if self.div_val == 1:
            ranges = [[(0, first, end)] for first, end in pairwise(self.edges)]
        else:
            ranges = [[(i, 0, size)] for i, size in enumerate(self.cluster_sizes)]
        if self.cluster_weight is not None:
            ranges[0].append((len(self.weights), 0, len(self.cluster_weight)))
        return ranges


def cluster_edges(vocab_size: int, cutoffs: tuple[int, ...]) -> list[int]:
    """0, the cutoffs below the vocabulary's size, and that size.

    Raises:
        InputError: a vocabulary below 1, or cutoffs that do not ascend from at least 1.
    """
    if vocab_size < 1:
        raise InputError(f"vocab_size: found {vocab_size}, expected at least 1")
    if any(low >= high for low, high in zip((0, *cutoffs), cutoffs, strict=False)):
        raise InputError(f"cutoffs: found {tuple(cutoffs)}, expected ascending sizes from 1 on")
    return [0, *(cutoff for cutoff in cutoffs if cutoff < vocab_size), vocab_size]


def cluster_widths(clusters: int, d_embed: int, div_val: int) -> list[int]:
    """The embedding's width in each cluster.

    Raises:
        InputError: a div_val below 1, or so large that a cluster is left without width.
    """
    if div_val < 1 or d_embed // div_val ** (clusters - 1) < 1:
        raise InputError(f"div_val: found {div_val}, expected at least 1 and small enough for d_embed {d_embed}")
    return [d_embed // div_val**i for i in range(clusters)]


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Check ids where reading them is cheap: on the CPU, outside of torch.compile.

    Raises:
        InputError: names the first id that is outside.
    """
    if not can_read_on_host(ids) or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name}: found id {low if low < 0 else high}, expected 0 to {vocab_size - 1} (the vocabulary)"
        )


class TailCapacity:
    """How many targets each tail of an adaptive softmax is evaluated for: the most that a chunk has had, plus a
    quarter.

    The targets are counted on the host, so no target is left out and nothing waits for the device. Capacities grow
    rarely and never shrink, so that tensor shapes, and CUDA graphs captured with them, stay valid. The number of rows
    of a product may change its last bits: checkpoints store the capacities, so that a resumed run repeats them.
    """

    def __init__(self, softmax: AdaptiveSoftmax) -> None:
        self._softmax = softmax
        self.capacities = [0] * len(softmax.cluster_sizes[1:])

    def fit(self, chunks: list[Tensor]) -> tuple[int, ...]:
        """Raise the capacities to what these chunks' targets need, int64 (B, T) on the CPU, and return them."""
        for targets in chunks:
            counts = self._softmax.tail_counts(targets)
            self.capacities = [
                capacity if count <= capacity else min(count + count // 4 + 64, targets.numel())
                for capacity, count in zip(self.capacities, counts, strict=True)
            ]
        return tuple(self.capacities)

    def state_dict(self) -> list[int]:
        """The capacity of each tail."""
        return self.capacities

    def load_state_dict(self, capacities: list[int]) -> None:
        """Restore what `state_dict` returned."""
        self.capacities = list(capacities)
