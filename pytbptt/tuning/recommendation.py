"""Derive the recommendation, with reasons, from the measurements."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pytbptt.truncation import TruncationBias
from pytbptt.tuning.context import HARDEST_FRACTION, MIN_GAIN, ContextPoint, effective_context
from pytbptt.tuning.cost import GIB, MemoryResult, SpeedPoint, knee
from pytbptt.tuning.gradient import StabilityPoint

EXPLOSION_RATIO = 10.0
"""A gradient norm above this multiple of the median counts as exploding."""

EXPLODING_GRADIENTS = f"gradients explode in a short run (not finite, or over {EXPLOSION_RATIO:g} times the median)"


@dataclass(frozen=True)
class Recommendation:
    """What to train with."""

    tokens_per_sample: int
    batch_size: int
    mem_len: int | None
    """None for a model that has none."""
    reasons: tuple[str, ...]
    """A sentence for each."""


def recommend(
    tolerance: float,
    bias: TruncationBias,
    stability: Sequence[StabilityPoint],
    speed: Sequence[SpeedPoint],
    memory: MemoryResult,
    context: Sequence[ContextPoint],
) -> Recommendation:
    """The shortest bptt with bias below `tolerance` that is stable and fits into memory, and the smallest batch size
    that reaches nearly full speed.

    Args:
        tolerance: of the relative bias.
        bias: with each bptt, ascending.
        stability: with each bptt, ascending; at least one point.
        speed: over bptt and batch size; at least one point.
        memory: what fits.
        context: with each length of memory; empty for a model without.
    """
    reasons = []
    bptt, reason = _bptt(tolerance, bias)
    reasons.append(reason)
    stable = list(
        itertools.takewhile(lambda point: not point.not_finite and point.largest <= EXPLOSION_RATIO, stability)
    )
    limit = stable[-1].bptt if stable else 0
    if limit >= bptt:
        reasons.append(f"gradients are stable up to bptt {limit}, so stability sets no limit")
    elif stable:
        bptt = limit
        reasons.append(
            f"{EXPLODING_GRADIENTS} with longer bptts, so bptt is limited to {limit}; a lower --lr or --clip-norm may "
            "allow more"
        )
    else:
        reasons.append(f"{EXPLODING_GRADIENTS} even with bptt {stability[0].bptt}: lower --lr or --clip-norm first")

    streams = min(point.batch_size for point in speed)
    if memory.model.peak(bptt, streams) > memory.limit:
        bptt = max(point.bptt for point in speed)  # all measured sizes fit
        reasons.append(f"longer chunks do not fit into {memory.limit / GIB:.2f} GiB")
    fitting = [point for point in speed if memory.model.peak(bptt, point.batch_size) <= memory.limit]
    batch_size, reason = _batch_size(bptt, fitting)
    reasons.append(reason)
    largest = memory.model.largest_bptt(batch_size, memory.limit)
    peak = memory.model.peak(bptt, batch_size)
    fits = f"bptt {largest:,.0f} would fit" if largest < math.inf else "a token takes too little to be measured"
    reasons.append(f"training takes {peak / GIB:.2f} GiB of the {memory.limit / GIB:.2f} allowed; {fits}")
    mem_len = None
    if context:
        mem_len = effective_context(context)
        longest = ", the longest measured," if mem_len == context[-1].length else ""
        reasons.append(
            f"more memory than {mem_len} tokens{longest} lowers the loss of the hardest {HARDEST_FRACTION:.0%} of the "
            f"targets by less than {MIN_GAIN:.0%}"
        )
    return Recommendation(bptt, batch_size, mem_len, tuple(reasons))


def _bptt(tolerance: float, bias: TruncationBias) -> tuple[int, str]:
    shortest = bias.shortest(tolerance)
    if shortest is None:
        longest = bias.lengths[-1]
        return longest, (
            f"no bptt up to {longest} has a bias under {tolerance:.0%} (it is {_percent(bias.bias[-1].value)} there): "
            "the longest measured"
        )
    index = bias.lengths.index(shortest)
    shorter = f"; {bias.lengths[index - 1]} has {_percent(bias.bias[index - 1].value)}" if index else ""
    return shortest, (
        f"bptt {shortest} is the shortest whose gradient is biased by less than {tolerance:.0%}: by about "
        f"{_percent(bias.bias[index].value)}, {_percent(bias.bias[index].high)} at its 95% interval's end{shorter}"
    )


def _batch_size(bptt: int, speed: Sequence[SpeedPoint]) -> tuple[int, str]:
    measured = min({point.bptt for point in speed}, key=lambda length: (abs(length - bptt), length))
    row = [point for point in speed if point.bptt == measured]
    fastest = max(point.tokens_per_second for point in row)
    chosen = knee(row)
    return chosen.batch_size, (
        f"{chosen.batch_size} streams train at {chosen.tokens_per_second:,.0f} tokens/s, "
        f"{chosen.tokens_per_second / fastest:.0%} of the fastest with bptt {measured}; more of them would only mean "
        "fewer updates"
    )


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction < 10 else "over 1000%"
