"""Embedding and softmax whose rare words are cheaper than the frequent ones."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytbptt.errors import InputError
from pytbptt.nn.cross_entropy import UNSCORED, Rows, linear, linear_cross_entropy
from pytbptt.nn.unscriptable import Unscriptable
from pytbptt.runtime.device import accumulation_dtype, free_to_read, has_values

Initialiser = Callable[[Tensor], object]

_WEIGHT_INIT: Initialiser = partial(nn.init.normal_, std=0.02)
_PROJECTION_INIT: Initialiser = partial(nn.init.normal_, std=0.01)

NEVER = -1e4
"""The bias of a type that is never predicted: its probability is 0, and no sum over it is spoilt, in any dtype."""


class AdaptiveEmbedding(Unscriptable):
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
            cutoffs: where the second and later clusters begin, ascending; those at or above V are dropped.
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
            self.weights.append(_filled(weight_init, vocab_size, d_embed))
            if d_embed != d_model:
                self.projections.append(_filled(projection_init, d_model, d_embed))
        else:
            for width, first, end in zip(self.widths, self.edges, self.edges[1:], strict=False):
                self.weights.append(_filled(weight_init, end - first, width))
                self.projections.append(_filled(projection_init, d_model, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, d_model) from int64 ids (…).

        Raises:
            InputError: on the CPU, an id outside the vocabulary. (A GPU would have to wait for the answer.)
        """
        check_ids("tokens", tokens, self.edges[-1])
        if self.div_val == 1:
            embedded = F.embedding(tokens, self.weights[0])
            if len(self.projections):
                embedded = F.linear(embedded, self.projections[0])
            return embedded * self.scale
        # Each token is looked up in every cluster, the rows of the wrong ones are made 0, and one product projects them
        # side by side: no shape depends on the tokens. It is less than div_val / (div_val - 1) times as wide.
        rows = []
        inside_any = (tokens >= 0) & (tokens < self.edges[-1])
        for weight, first, end in zip(self.weights, self.edges, self.edges[1:], strict=False):
            outside = (tokens < first) | (tokens >= end)
            # The remainder spreads the others' tokens over the table: their gradients, all 0, queue for no single row.
            # An id outside the vocabulary stays outside the table, where the lookup itself refuses it.
            place = tokens - first
            place = place.remainder(end - first).where(outside & inside_any, place)
            rows.append(F.embedding(place, weight).masked_fill(outside.unsqueeze(-1), 0.0))
        return F.linear(torch.cat(rows, dim=-1), torch.cat(list(self.projections), dim=1)) * self.scale


class AdaptiveSoftmax(Unscriptable):
    """Log-probabilities of all words, at the price of the frequent ones.

    The head scores the first cluster's words and one entry for each later cluster (tail)::

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
            embedding: share its tables (weight tying); None for tables of one's own.
            share_projections: where the embedding is shared, share its projections too, but for the head's.
            weight_init, projection_init: fill a new weight in place; biases start at zero.

        Raises:
            InputError: as for `AdaptiveEmbedding`, or an embedding of other clusters.
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
        self.sizes = sizes
        self.weights = nn.ParameterList(
            embedding.weights if embedding is not None else [_filled(weight_init, *shape) for shape in tables]
        )
        self.biases = nn.ParameterList([_filled(nn.init.zeros_, rows) for rows, _ in tables])
        self.projections = nn.ParameterList()
        if div_val > 1 or d_embed != d_model:
            for i, width in enumerate(widths):
                if embedding is not None and share_projections and i > 0:
                    self.projections.append(embedding.projections[0 if div_val == 1 else i])
                else:
                    self.projections.append(_filled(projection_init, d_model, width))
        tails = len(sizes) - 1
        self.cluster_weight = _filled(weight_init, tails, d_embed) if tails else None
        self.cluster_bias = _filled(nn.init.zeros_, tails) if tails else None

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        capacity: Sequence[int] | None = None,
    ) -> Any:
        """`log_prob`, or with targets `nll`: both call the module, for whoever waits for that to bring its weights."""
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
            reduction: "none" keeps the targets apart.
            capacity: for each tail, how many targets it is evaluated for; with more of them the result is NaN, and so
                is the gradient of hidden. Every shape is then known beforehand, and the host waits for nothing. None:
                as many as there are, for which a GPU is asked; where there is nothing to ask, as in an exported graph
                or under torch.func, as many as there could be.

        Returns:
            The sum over scored targets in nats, float32 or wider, or (…) with 0 where none is scored; and their
            number, int64 ().

        Raises:
            InputError: shapes that differ; another number of capacities than tails, or one below 0; on the CPU, a
                target outside the vocabulary.
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
        scored = targets != UNSCORED
        check_ids("targets", targets.masked_fill(~scored, 0), self.edges[-1])

        cluster = torch.zeros_like(targets)
        for edge in self.edges[1:-1]:
            cluster = cluster + (targets >= edge)
        head_targets = torch.where(cluster > 0, self.sizes[0] + cluster - 1, targets)
        inputs, wanted = [self._projected(0, hidden)], [head_targets]
        # Every tail is run, on no rows if need be: DistributedDataParallel waits for each parameter's gradient.
        if capacity is not None:
            rooms = capacity
        else:
            rooms = self.count(targets) if has_values(targets) else [len(targets)] * (len(self.sizes) - 1)
        rows_of_tails = self._rows_of_tails(cluster, rooms)
        for i, (rows, used) in enumerate(rows_of_tails, start=1):
            inputs.append(self._projected(i, hidden.index_select(0, rows)))
            wanted.append((targets[rows] - self.edges[i]).masked_fill(~used, UNSCORED))
        head, *tails = linear_cross_entropy(inputs, wanted, *self._tables(), self._softmaxes())
        if capacity is not None:
            for i, size in enumerate(capacity, start=1):
                head = head * head.new_ones(()).masked_fill((cluster == i).sum() > size, math.nan)
        if reduction == "sum":
            return sum([tail.sum() for tail in tails], head.sum()), scored.sum()
        for (rows, _), tail in zip(rows_of_tails, tails, strict=True):
            head = head.index_add(0, rows, tail)
        return head.view(shape), scored.sum()

    def count(self, targets: Tensor) -> list[int]:
        """How many of the targets lie in each tail; a GPU is waited for."""
        return [int(((targets >= first) & (targets < end)).sum()) for first, end in pairwise(self.edges[1:])]

    def _rows_of_tails(self, cluster: Tensor, capacity: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Each tail's rows, as many as its capacity, and which of them are its own: the last ones may be others'."""
        if len(capacity) != len(self.sizes) - 1 or min(capacity, default=0) < 0:
            tails = len(self.sizes) - 1
            raise InputError(f"capacity: found {list(capacity)}, expected {tails} numbers of at least 0, one a tail")
        if not capacity:
            return []
        by_cluster, begin = cluster.argsort(stable=True), (cluster == 0).sum()
        found = []
        for i, size in enumerate(capacity, start=1):
            place, count = torch.arange(min(size, len(cluster)), device=cluster.device), (cluster == i).sum()
            found.append((by_cluster[(begin + place).clamp(max=len(cluster) - 1)], place < count))
            begin = begin + count
        return found

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (…, V), float32 or wider, from hidden (…, d_model)."""
        return self(hidden)  # type: ignore[no-any-return]

    def _log_prob(self, hidden: Tensor) -> Tensor:
        hidden_rows = hidden.reshape(-1, hidden.shape[-1])
        weights, biases = self._tables()

        def log_softmax(i: int) -> Tensor:
            inputs = self._projected(i, hidden_rows)
            scores = [linear(inputs, weights[n][a:b], biases[n][a:b]) for n, a, b in self._softmaxes()[i]]
            joined = torch.cat(scores, dim=1) if len(scores) > 1 else scores[0]
            return joined.to(accumulation_dtype(joined.dtype)).log_softmax(dim=1)

        head, shortlist = log_softmax(0), self.sizes[0]
        clusters = [head[:, :shortlist]]
        for i in range(1, len(self.sizes)):
            clusters.append(log_softmax(i) + head[:, shortlist + i - 1, None])
        joined = torch.cat(clusters, dim=1) if len(clusters) > 1 else head
        return joined.view(*hidden.shape[:-1], self.edges[-1])

    def _projected(self, i: int, hidden: Tensor) -> Tensor:
        """The input (N, width) of cluster i from hidden (N, d_model)."""
        return F.linear(hidden, self.projections[i].t()) if len(self.projections) else hidden

    def _tables(self) -> tuple[list[Tensor], list[Tensor]]:
        """All weights and all biases; the clusters' own come last."""
        weights, biases = list(self.weights), list(self.biases)
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weights, biases = [*weights, self.cluster_weight], [*biases, self.cluster_bias]
        return weights, biases

    def _softmaxes(self) -> list[list[Rows]]:
        """Which rows of these are the outputs of the head, and of each tail."""
        if self.div_val == 1:
            softmaxes = [[(0, first, end)] for first, end in pairwise(self.edges)]
        else:
            softmaxes = [[(i, 0, size)] for i, size in enumerate(self.sizes)]
        if self.cluster_weight is not None:
            softmaxes[0].append((len(self.weights), 0, len(self.cluster_weight)))
        return softmaxes


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
    """Refuse ids outside the vocabulary where asking is cheap: on the CPU, outside of torch.compile.

    Raises:
        InputError: names the first id that is outside.
    """
    if not free_to_read(ids) or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name}: found id {low if low < 0 else high}, expected 0 to {vocab_size - 1} (the vocabulary)"
        )


def _filled(initialiser: Initialiser, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape))
    with torch.no_grad():
        initialiser(parameter)
    return parameter


class TailCapacity:
    """For each tail, as many targets as a chunk has had in it, and a quarter more.

    Counted on the host, where chunks come from, so nobody waits for the device, and no target is left out. It grows
    now and then, and never shrinks: shapes, and a CUDA graph of them, last. How many rows a product has may change its
    last bits, so a checkpoint holds this too.
    """

    def __init__(self, softmax: AdaptiveSoftmax) -> None:
        self._softmax = softmax
        self.rooms = [0] * len(softmax.sizes[1:])
        """For each tail."""

    def of(self, chunks: list[Tensor]) -> tuple[int, ...]:
        """Room enough for each of these chunks' targets, int64 (B, T) on the CPU."""
        for targets in chunks:
            counts = self._softmax.count(targets)
            self.rooms = [
                room if count <= room else min(count + count // 4 + 64, targets.numel())
                for room, count in zip(self.rooms, counts, strict=True)
            ]
        return tuple(self.rooms)

    def state_dict(self) -> list[int]:
        """The rooms."""
        return self.rooms

    def load_state_dict(self, rooms: list[int]) -> None:
        """Begin with these rooms."""
        self.rooms = list(rooms)
