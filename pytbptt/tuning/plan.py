"""Measurement plan, computed from the model's size rather than elapsed time, so that it is reproducible."""

from dataclasses import dataclass

from pytbptt.errors import InputError

OPERATIONS_PER_SECOND = {"cpu": 60e9, "cuda": 20e12}
"""Assumed training throughput in FLOP/s (6 per parameter and token): two AVX2 cores, a mid-range GPU."""
MIN_PARAMETERS = 500_000
"""Below this, speed no longer depends on the model's size (overhead dominates)."""
MIN_BPTT, MAX_BPTT, MIN_STREAMS = 8, 512, 4
MIN_TOKENS = 1024


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurements, all in tokens unless said otherwise."""

    bptts: tuple[int, ...]
    """Powers of two plus the user's value, ascending."""
    batch_sizes: tuple[int, ...]
    """Powers of two, ascending, and the user's own; in streams."""
    largest_update: int
    """Maximum tokens in one update, over all its streams."""
    training: int
    """To train on if there are no weights yet."""
    stability: int
    """For the short run with each bptt."""
    bias: int
    """For the backward passes that measure the bias of truncation."""
    context: int
    """To score with each memory length."""


def make_plan(minutes: float, parameters: int, device: str, corpus: int, bptt: int, batch_size: int) -> Plan:
    """The plan for a time budget.

    Args:
        minutes: of all measurements.
        parameters: weights of the model.
        device: cpu or cuda.
        corpus: tokens to train on.
        bptt, batch_size: the user's own.

    Raises:
        InputError: too few tokens to measure anything.
    """
    if corpus < MIN_TOKENS:
        raise InputError(f"DATA: found {corpus} tokens to train on, expected at least {MIN_TOKENS} to measure with")
    per_minute = 60 * OPERATIONS_PER_SECOND[device] / (6 * max(parameters, MIN_PARAMETERS))
    budget = minutes * per_minute
    largest_update = max(MIN_STREAMS * 4 * MIN_BPTT, min(_power_of_two(budget / 120), (corpus - 1) // 2))
    longest = min(MAX_BPTT, max(4 * MIN_BPTT, _power_of_two(largest_update / MIN_STREAMS)))
    bptts = {bptt, *_doublings(MIN_BPTT, longest)}
    batch_sizes = {batch_size, *_doublings(MIN_STREAMS, largest_update // MIN_BPTT)}
    return Plan(
        bptts=tuple(sorted(length for length in bptts if length * MIN_STREAMS < corpus)),
        batch_sizes=tuple(sorted(streams for streams in batch_sizes if streams * MIN_BPTT < corpus)),
        largest_update=largest_update,
        training=int(0.25 * budget),
        stability=int(0.15 * budget / len(bptts)),
        bias=int(0.2 * budget),
        context=int(0.05 * budget),
    )


def _doublings(first: int, last: int) -> list[int]:
    return [first << n for n in range((last // first).bit_length()) if first << n <= last]


def _power_of_two(value: float) -> int:
    """The largest power of two that is at most the value; at least 1."""
    return 1 << max(0, int(value).bit_length() - 1)
