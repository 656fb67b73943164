"""Measure the bias of truncated gradients: gradient decay by lag and relative bias by backward length.

Source: Aicher, Foti and Fox, "Adaptively Truncating Backpropagation Through Time to Control Gradient Bias" (2019). The
gradient of a loss is a sum over lags k, of which truncated backpropagation leaves out the later ones::

    dL_t/dtheta = sum_k  dL_t/dstate_(t-k) · (dstate_(t-k)/dtheta, with the state before it held fixed)

The norm of the second factor is about the same at every lag; call it M. What is left out is then at most M times the
sum of phi_k = E ||dL_t/dstate_(t-k)|| over the lags left out. phi is measured up to a maximum lag (`measure_lags`) and
extrapolated geometrically from its later half (`truncation_bias`).

The same holds with chunks of c tokens as time steps. Small chunks give finer resolution; large ones are faster.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pytbptt.memory
from pytbptt.errors import InputError
from pytbptt.runtime.renamed import Renamed

Step = Callable[[Any, Any], tuple[Tensor, Any]]
"""(chunk, state) to (loss (), state), both with their autograd graphs."""

RESAMPLES = 500
"""Bootstrap resamples behind an interval."""


class Interval(NamedTuple):
    """An estimate, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LagNorms:
    """Gradient norms by lag, one row per sampled loss; float64."""

    chunk_length: int
    """Tokens in a chunk, which is what a lag counts."""
    state: Tensor
    """(samples, lags), column k - 1: the loss's gradient w.r.t. the state k chunks before the end of its chunk."""
    parameters_lag0: Tensor
    """(samples,): its gradient w.r.t. the parameters, through its own chunk."""
    parameters_lag1: Tensor
    """(samples,): its gradient w.r.t. the parameters, through the previous chunk."""

    own, before = Renamed("parameters_lag0"), Renamed("parameters_lag1")


@dataclass(frozen=True)
class TruncationBias:
    """What truncation costs at every backward length."""

    lags: tuple[int, ...]
    """Lags in tokens: distance from a state to the end of the loss's chunk."""
    norms: tuple[Interval, ...]
    """E ||dL/dstate|| at each of them."""
    decay: Interval
    """Geometric decay per token, fitted to the later half of the lags."""
    lengths: tuple[int, ...]
    """Backward lengths in tokens, ascending."""
    bias: tuple[Interval, ...]
    """Relative bias of the gradient at each of them: the norm of what is left out over the whole gradient's; infinite
    where the gradient does not decay."""

    def shortest(self, tolerance: float) -> int | None:
        """The smallest length whose confidence interval lies below the tolerance; None if there is none."""
        return next((n for n, bias in zip(self.lengths, self.bias, strict=True) if bias.high < tolerance), None)


def measure_lags(
    step: Step,
    chunks: Iterable[Any],
    state: Any,
    parameters: Iterable[Tensor],
    *,
    chunk_length: int,
    lags: int,
    every: int = 1,
) -> LagNorms:
    """Measure how gradients decay with lag along a stream, weights unchanged.

    One forward pass per chunk, keeping the last `lags` graphs; from each sampled loss one backward pass through them.
    No `.grad` is touched.

    A batch counts as one sample (root mean square over streams). For memories with an entry per token, only the entries
    written by a chunk count at its lag; older ones belong to larger lags.

    Args:
        step: reads a chunk; for a language model
            `result, memory = model.loss(tokens, targets, memory, reset, detach=False)`. Dropout, if the model is in
            training mode, is measured too.
        chunks: what `step` takes, in the stream's order, `chunk_length` tokens each.
        state: initial state, any pytree of tensors; None if `step` accepts None.
        parameters: those of the model.
        chunk_length: tokens in a chunk.
        lags: chunks to look back from a loss, at least 2.
        every: sample every n-th chunk's loss.

    Raises:
        InputError: too small numbers, too few chunks for one sample, no parameter that requires a gradient, or a state
            without floating-point tensors.
    """
    for name, value, minimum in (("chunk_length", chunk_length, 1), ("lags", lags, 2), ("every", every, 1)):
        if value < minimum:
            raise InputError(f"measure_lags: {name}: found {value}, expected at least {minimum}")
    weights = [parameter for parameter in parameters if parameter.requires_grad]
    if not weights:
        raise InputError("measure_lags: found no parameter that requires a gradient, expected at least one")
    graphs: deque[_ChunkGraph] = deque(maxlen=lags)
    rows: list[list[float]] = []
    read = 0
    for chunk in chunks:
        state_in = pytree.tree_map_only(Tensor, _leaf, state)
        with torch.enable_grad():
            loss, state = step(chunk, state_in)
        if not _floats(state):
            raise InputError("measure_lags: found a state without floating-point tensors, expected at least one")
        read += 1
        if state_in is None:  # there is no initial state to differentiate
            continue
        graphs.append(_ChunkGraph(state_in, loss, state))
        if len(graphs) == lags and read % every == 0:
            rows.append(_backward_through_lags(graphs, weights, chunk_length))
    if not rows:
        needed = f"at least {lags + every} to look {lags} back from one in {every}"
        raise InputError(f"measure_lags: found {read} chunks, expected {needed}")
    norms = torch.tensor(rows, dtype=torch.float64)
    return LagNorms(chunk_length, state=norms[:, 2:], parameters_lag0=norms[:, 0], parameters_lag1=norms[:, 1])


def truncation_bias(
    measured: LagNorms,
    lengths: Sequence[int] | None = None,
    *,
    new: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> TruncationBias:
    """The relative bias of the truncated gradient at each backward length, with bootstrap intervals over the samples.

    With k1 new tokens per update and backward length k2, the token at index i of the window reaches i tokens back; an
    update therefore omits, for each of its k1 scored tokens (i = k2 - k1 … k2 - 1), the lags beyond i. (TBPTT with lag
    K in the paper is k1 = 1, k2 = K.) M is measured at the first lag, so that the chunk's own contribution, which is
    never truncated, is included.

    The full gradient's norm is estimated as the sum over measured lags minus the extrapolated tail: the paper's lower
    bound, if all terms were aligned. They are not, so this is an estimate: 0.3 to 1.3 times the true bias for AWD-LSTM
    (median 0.6) and 1 to 4.2 times for Transformer-XL (median 2), over 25 small untrained models each.

    Args:
        measured: the result of `measure_lags`.
        lengths: backward lengths k2 in tokens, at least the chunk length; default: all measured multiples. Other
            lengths count their last, partial chunk as a whole one.
        new: k1; default: as many as the length, which is plain truncated BPTT with `bptt = length`. Lengths below it
            are left out.
        confidence: of the intervals.
        seed: of the resampling.

    Raises:
        InputError: a length below the chunk length (the measurement cannot resolve it), or new or confidence out of
            range.
    """
    if new is not None and new < 1:
        raise InputError(f"truncation_bias: new: found {new}, expected at least 1")
    if not 0 < confidence < 1:
        raise InputError(f"truncation_bias: confidence: found {confidence}, expected more than 0 and less than 1")
    c, (samples, lags) = measured.chunk_length, measured.state.shape
    lengths = [c * n for n in range(1, lags + 1)] if lengths is None else sorted(lengths)
    lengths = [length for length in lengths if new is None or length >= new]
    for length in lengths:
        if length < c:
            raise InputError(f"truncation_bias: found a length of {length} tokens, expected at least a chunk's {c}")
    generator = torch.Generator().manual_seed(seed)
    resamples = torch.randint(samples, (RESAMPLES, samples), generator=generator)
    rows = torch.cat([torch.arange(samples).unsqueeze(0), resamples])  # row 0 is the point estimate

    phi = measured.state[rows].mean(1)
    decay, tail = _fit_tail(phi)
    lag0_norm = phi[:, 0] * measured.parameters_lag0[rows].mean(1) / measured.parameters_lag1[rows].mean(1)
    lag0_norm = torch.where(phi[:, 0] > 0, lag0_norm, 1.0)  # no gradient through the state: the bias is 0
    # Column i: sum of phi over lags greater than i.
    longest = -(-max(lengths, default=0) // c)
    truncated = torch.cat(
        [
            phi.flip(1).cumsum(1).flip(1) + tail.unsqueeze(1),
            tail.unsqueeze(1) * decay.unsqueeze(1) ** torch.arange(max(0, longest - lags)),
        ],
        dim=1,
    )
    total_norm = lag0_norm + phi.sum(1) - tail
    reached_lags = [torch.arange(length - (new or length), length) // c for length in lengths]
    bias = [torch.where(total_norm > 0, truncated[:, index].mean(1) / total_norm, torch.inf) for index in reached_lags]

    def interval(values: Tensor) -> Interval:
        resampled = values[1:].sort().values
        low, high = (resampled[round((RESAMPLES - 1) * q)] for q in ((1 - confidence) / 2, (1 + confidence) / 2))
        return Interval(float(values[0]), float(low), float(high))

    return TruncationBias(
        lags=tuple(c * (n + 1) for n in range(lags)),
        norms=tuple(interval(column) for column in phi.unbind(1)),
        decay=interval(decay ** (1 / c)),
        lengths=tuple(lengths),
        bias=tuple(interval(column) for column in bias),
    )


class _ChunkGraph(NamedTuple):
    """The autograd graph of one chunk, detached from the others."""

    state_in: Any
    loss: Tensor
    state_out: Any


def _backward_through_lags(graphs: Sequence[_ChunkGraph], weights: list[Tensor], chunk_length: int) -> list[float]:
    """Gradient norms of the last chunk's loss: w.r.t. the parameters in its own and the previous chunk, then w.r.t. the
    states by lag."""
    parameter_norms, state_norms = [], []
    outputs, upstream = [graphs[-1].loss], [torch.ones_like(graphs[-1].loss)]
    for lag, graph in enumerate(reversed(graphs)):
        inputs, parameters = _floats(graph.state_in), weights if lag < 2 else []
        gradients = torch.autograd.grad(
            outputs, [*inputs, *parameters], upstream, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if lag < 2:
            parameter_norms.append(_norm(gradients[len(inputs) :]))
        state_gradients = gradients[: len(inputs)]
        state_norms.append(_norm(_newly_written(graph.state_in, state_gradients, chunk_length)))
        if lag + 1 < len(graphs):
            previous_outputs = _floats(graphs[-2 - lag].state_out)
            passed = [(out, g) for out, g in zip(previous_outputs, state_gradients, strict=True) if out.requires_grad]
            outputs, upstream = [out for out, _ in passed], [g for _, g in passed]
    return parameter_norms + state_norms


def _newly_written(state: Any, gradients: Sequence[Tensor], chunk_length: int) -> list[Tensor]:
    """The gradients w.r.t. the entries that the previous chunk wrote (all of them, for a recurrent state)."""
    leaves, structure = pytree.tree_flatten(state)
    remaining = iter(gradients)
    leaves = [next(remaining) if _is_float(leaf) else leaf for leaf in leaves]
    rebuilt = pytree.tree_unflatten(leaves, structure)
    return _floats(pytbptt.memory.latest(rebuilt, chunk_length) if dataclasses.is_dataclass(state) else rebuilt)


def _fit_tail(phi: Tensor) -> tuple[Tensor, Tensor]:
    """The geometric decay per lag of the later half of (rows, lags), fitted to the logarithms, and the sum of what
    follows the last lag; both (rows,). If that half is zero, the tail is zero."""
    first = phi.shape[1] // 2
    later_half = phi[:, first:]
    nonzero = later_half > 0
    lag = torch.arange(first + 1, phi.shape[1] + 1, dtype=phi.dtype).expand_as(later_half)
    count = nonzero.sum(1).clamp(min=1)
    log_phi = torch.where(nonzero, later_half, 1.0).log()
    mean_lag, mean_log_phi = (lag * nonzero).sum(1) / count, log_phi.sum(1) / count
    centred_lag = (lag - mean_lag.unsqueeze(1)) * nonzero
    slope = (centred_lag * log_phi).sum(1) / centred_lag.square().sum(1)
    decay = slope.exp()
    next_phi = (mean_log_phi + slope * (phi.shape[1] + 1 - mean_lag)).exp()
    tail = torch.where(decay < 1, next_phi / (1 - decay), torch.inf)
    too_few = nonzero.sum(1) < 2
    return torch.where(too_few, 0.0, decay), torch.where(too_few, 0.0, tail)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if _is_float(leaf)]


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())
