"""Measure the gradient with each bptt: its bias from truncation, and whether it explodes."""

import math
import statistics
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.nn.language_model import LanguageModel
from pytbptt.training.config import TrainSettings
from pytbptt.truncation import TruncationBias, measure_lags, truncation_bias
from pytbptt.tuning.plan import MIN_STREAMS, Plan
from pytbptt.tuning.trial import InitialWeights, Trial

MEMORY_TOKEN_COST = 0.2
"""Relative cost of attending to a memory token, compared with training on a token."""
SHORT_CHUNK_COST = 3
"""Slow-down per token because of the short chunks."""
STREAMS = 4
MAX_LAG = 256
"""Maximum lag in tokens; beyond it the decay is extrapolated."""
MIN_SAMPLES, MAX_SAMPLES = 12, 64
MIN_UPDATES, MAX_UPDATES = 8, 64


def measure_bias(
    model: LanguageModel, tokens: IndexedTokens, device: torch.device, plan: Plan, reset_on: str, seed: int
) -> TruncationBias:
    """The truncation bias of the gradient with each of the plan's bptts, in evaluation mode (without dropout).

    bptts shorter than lag_chunk are skipped.
    """
    model.eval()
    length = model.config.lag_chunk
    chunk_cost = length + MEMORY_TOKEN_COST * model.config.memory_length
    streams = max(1, min(STREAMS, len(tokens) // (4 * MAX_LAG)))
    loader = StreamLoader(tokens, streams, length, reset_on=reset_on)
    chunks = loader.tokens_per_stream // length
    lags = max(1, min(MAX_LAG // length, plan.bptts[-1] // length, chunks // 2))
    samples = int(max(MIN_SAMPLES, min(MAX_SAMPLES, plan.bias / (SHORT_CHUNK_COST * lags * streams * chunk_cost))))
    every = max(1, min(lags, (chunks - lags) // samples))

    def step(chunk: Chunk, memory: Any) -> tuple[Tensor, Any]:
        chunk = chunk.to(device)
        result, memory = model.loss(chunk.tokens, chunk.targets, memory, chunk.reset, detach=False)
        return result.objective, memory

    measured = measure_lags(
        step,
        islice(loader, min(chunks, lags + every * samples)),
        model.init_memory(streams),
        model.parameters(),
        chunk_length=length,
        lags=lags,
        every=every,
    )
    return truncation_bias(measured, [bptt for bptt in plan.bptts if bptt >= length], seed=seed)


@dataclass(frozen=True)
class StabilityPoint:
    """The norms of the gradients of a short run, before clipping."""

    bptt: int
    updates: int
    not_finite: int
    """Updates skipped because of a non-finite gradient."""
    mean: float
    """Of those that were finite; NaN if none was."""
    spread: float
    """Their standard deviation over their mean."""
    largest: float
    """The largest over the median."""


def measure_stability(
    settings: TrainSettings,
    tokens: IndexedTokens,
    device: torch.device,
    plan: Plan,
    start: InitialWeights,
) -> list[StabilityPoint]:
    """A short run with each bptt from the same weights, at the settings' peak learning rate.

    All bptts use the same number of updates and tokens per update; shorter chunks use more streams.
    """
    size = min(MIN_STREAMS * plan.bptts[-1], plan.largest_update)
    updates = max(MIN_UPDATES, min(MAX_UPDATES, plan.stability // size))
    points = []
    for bptt in plan.bptts:
        with Trial(settings, tokens, device, bptt=bptt, batch_size=max(1, size // bptt), start=start) as trial:
            points.append(describe_norms(bptt, [trial.update() for _ in range(updates)]))
    return points


def describe_norms(bptt: int, norms: list[float]) -> StabilityPoint:
    """A run's gradient norms in a few numbers; NaN stands for one that was not finite."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    mean = statistics.fmean(finite) if finite else math.nan
    return StabilityPoint(
        bptt=bptt,
        updates=len(norms),
        not_finite=len(norms) - len(finite),
        mean=mean,
        spread=statistics.pstdev(finite) / mean if finite and mean > 0 else math.nan,
        largest=max(finite) / statistics.median(finite) if finite and mean > 0 else math.nan,
    )
