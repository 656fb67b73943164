"""Training speed by bptt and batch size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pytbptt.data import IndexedTokens
from pytbptt.training.config import TrainSettings
from pytbptt.tuning.plan import Plan
from pytbptt.tuning.trial import Trial

SECONDS, UPDATES = 1.0, 3
"""Least time and number of updates to measure at each point."""
GAIN = 1.05
"""What a doubling must gain for the next one to be tried."""
KNEE = 0.9
"""Share of the highest speed that is as good as the highest: what comes after it buys little."""


@dataclass(frozen=True)
class SpeedPoint:
    """One measurement."""

    bptt: int
    batch_size: int
    tokens_per_second: float


def measure_point(
    settings: TrainSettings, tokens: IndexedTokens, device: torch.device, bptt: int, batch_size: int
) -> SpeedPoint:
    """Tokens per second over the faster half of a few updates, with a full memory; one update before is not counted."""
    with Trial(settings, tokens, device, bptt=bptt, batch_size=batch_size, full_memory=True) as trial:
        trial.update()
        times: list[float] = []
        while len(times) < UPDATES or sum(times) < SECONDS:
            started = time.perf_counter()
            trial.update()  # it reads the gradient's norm, so the device has finished
            times.append(time.perf_counter() - started)
    faster = sorted(times)[: (len(times) + 1) // 2]
    return SpeedPoint(bptt, batch_size, bptt * batch_size * len(faster) / sum(faster))


def survey(plan: Plan, fits: Callable[[int, int], bool], measure: Callable[[int, int], SpeedPoint]) -> list[SpeedPoint]:
    """Measure a grid, leaving out what cannot be the answer.

    For each batch size, ascending, bptt grows until an update is too large (for the plan or the memory) or two
    steps in a row gained nothing; batch sizes grow until two in a row were no faster at their best.

    Args:
        plan: the grid.
        fits: whether a bptt and a batch size fit into memory.
        measure: measures them.
    """
    points: list[SpeedPoint] = []
    best: list[float] = []
    for batch_size in plan.batch_sizes:
        row: list[SpeedPoint] = []
        for bptt in plan.bptts:
            if bptt * batch_size > plan.largest_update or not fits(bptt, batch_size):
                break
            row.append(measure(bptt, batch_size))
            if _has_levelled([point.tokens_per_second for point in row]):
                break
        points += row
        best += [max(point.tokens_per_second for point in row)] if row else []
        if _has_levelled(best):
            break
    return points


def knee(points: Sequence[SpeedPoint]) -> SpeedPoint:
    """The smallest update that is as good as the fastest, to KNEE; of equally large ones the faster.

    Among the points of one bptt that is the fewest streams.
    """
    fastest = max(point.tokens_per_second for point in points)
    good = [point for point in points if point.tokens_per_second >= KNEE * fastest]
    return min(good, key=lambda point: (point.bptt * point.batch_size, -point.tokens_per_second))


def _has_levelled(speeds: Sequence[float]) -> bool:
    """Whether the last two steps together gained less than one GAIN."""
    return len(speeds) > 2 and max(speeds[-2:]) < GAIN * max(speeds[:-2])
