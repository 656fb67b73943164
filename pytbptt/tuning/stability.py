"""How gradients behave with each bptt, over a short run from the same weights."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pytbptt.data import IndexedTokens
from pytbptt.training.config import TrainSettings
from pytbptt.tuning.plan import FEWEST_STREAMS, Plan
from pytbptt.tuning.trial import Start, Trial

FEWEST_UPDATES, MOST_UPDATES = 8, 64


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
    step: Callable[[float], None],
) -> list[StabilityPoint]:
    """A short run with each bptt, at the settings' peak learning rate.

    Updates have the same number of tokens and there are as many of them whatever the bptt, which decides only over how
    many of those tokens gradients flow; shorter chunks come from more streams.

    Args:
        step: called with the share that is done since the last call.
    """
    size = min(FEWEST_STREAMS * plan.bptts[-1], plan.largest_update)
    updates = max(FEWEST_UPDATES, min(MOST_UPDATES, plan.stability // size))
    points = []
    for bptt in plan.bptts:
        with Trial(settings, tokens, device, bptt=bptt, batch_size=max(1, size // bptt), start=start) as trial:
            points.append(describe(bptt, [trial.update() for _ in range(updates)]))
        step(1 / len(plan.bptts))
    return points


def describe(bptt: int, norms: list[float]) -> StabilityPoint:
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
