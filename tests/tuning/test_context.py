"""The effective context of measured losses, and the memory lengths to measure."""

from pytbptt.tuning.context import ContextPoint, effective_context, lengths_to_measure


def points(*hardest: float) -> list[ContextPoint]:
    return [ContextPoint(8 << n, 1.0, loss) for n, loss in enumerate(hardest)]


def test_effective_context_is_shortest_without_further_gain() -> None:
    assert effective_context(points(5.0, 4.0, 3.9, 3.89, 3.88)) == 32
    assert effective_context(points(5.0, 5.0, 5.0)) == 8
    assert effective_context(points(5.0, 4.0, 3.0)) == 32  # the loss still decreases at the longest
    assert effective_context(points(5.0, 4.99, 4.98, 4.9)) == 64  # small gains add up
    assert effective_context(points(5.0, 4.0, 4.5, 5.0)) == 16  # longer contexts may increase the loss


def test_lengths_to_measure_reach_four_times_the_trained_length() -> None:
    assert lengths_to_measure(128) == [8, 16, 32, 64, 128, 256, 512]
    assert lengths_to_measure(9) == [8, 16, 32]
