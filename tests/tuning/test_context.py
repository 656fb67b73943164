"""The effective context of measured losses, and the measurement itself on a model that sees nothing."""

from pytbptt.tuning.context import ContextPoint, effective_context, lengths_to_measure


def points(*hardest: float) -> list[ContextPoint]:
    return [ContextPoint(8 << n, 1.0, loss) for n, loss in enumerate(hardest)]


def test_the_effective_context_is_where_longer_ones_gain_less_than_a_hundredth() -> None:
    assert effective_context(points(5.0, 4.0, 3.9, 3.89, 3.88)) == 32
    assert effective_context(points(5.0, 5.0, 5.0)) == 8
    assert effective_context(points(5.0, 4.0, 3.0)) == 32  # still gaining: the longest
    assert effective_context(points(5.0, 4.99, 4.98, 4.9)) == 64  # little by little counts as well
    assert effective_context(points(5.0, 4.0, 4.5, 5.0)) == 16  # longer than it was trained for does harm


def test_lengths_reach_four_times_what_was_trained() -> None:
    assert lengths_to_measure(128) == [8, 16, 32, 64, 128, 256, 512]
    assert lengths_to_measure(9) == [8, 16, 32]
