"""Losses at equal tokens and at equal time."""

import pytest

from pytbptt.tuning.gain import Curve, compare


def test_runs_are_compared_where_the_slowest_ended_and_at_their_own_ends() -> None:
    fast = Curve(8, 16, (1.0, 2.0), (1000, 2000), (3.0, 2.0))
    slow = Curve(64, 16, (1.0, 2.0), (750, 1500), (3.5, 2.2))
    eight, sixty_four = compare([fast, slow])
    assert (eight.at_equal_tokens, eight.at_equal_time) == (pytest.approx(2.5), 2.0)
    assert (sixty_four.at_equal_tokens, sixty_four.at_equal_time) == (2.2, 2.2)
