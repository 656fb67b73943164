"""How gradients behave with each bptt: what truncation leaves out of them, and whether they explode."""

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
from pytbptt.tuning.plan import FEWEST_STREAMS, Plan
from pytbptt.tuning.trial import Start, Trial

MEMORY_COST = 0.2
"""Of reading a token of memory, beside training on a token."""
COST = 3
"""A token in so short a chunk takes so much longer than one in training's."""
STREAMS = 4
LONGEST_LAG = 256
"""Tokens to look back, at most; beyond, the decay is taken to go on."""
FEWEST_SAMPLES, MOST_SAMPLES = 12, 64
FEWEST_UPDATES, MOST_UPDATES = 8, 64


def measure_bias(
    model: LanguageModel, tokens: IndexedTokens, device: torch.device, plan: Plan, reset_on: str, seed: int
) -> TruncationBias:
    """The truncation bias of the gradient with each of the plan's bptts, in evaluation mode (without dropout).

    A bptt shorter than the chunk that lags count is left out.
    """
    model.eval()
    length = model.config.lag_chunk
    read = length + MEMORY_COST * model.config.memory_length
    streams = max(1, min(STREAMS, len(tokens) // (4 * LONGEST_LAG)))
    loader = StreamLoader(tokens, streams, length, reset_on=reset_on)
    chunks = loader.tokens_per_stream // length
    lags = max(1, min(LONGEST_LAG // length, plan.bptts[-1] // length, chunks // 2))
    samples = int(max(FEWEST_SAMPLES, min(MOST_SAMPLES, plan.bias / (COST * lags * streams * read))))
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
    """Updates whose gradient was infinite or NaN, and which changed nothing."""
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
    start: Start,
) -> list[StabilityPoint]:
    """A short run with each bptt from the same weights, at the settings' peak learning rate.

    Updates have the same number of tokens and there are as many of them whatever the bptt, which decides only over how
    many of those tokens gradients flow; shorter chunks come from more streams.
    """
    size = min(FEWEST_STREAMS * plan.bptts[-1], plan.largest_update)
    updates = max(FEWEST_UPDATES, min(MOST_UPDATES, plan.stability // size))
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
