"""Which points of the grid are measured, and which is the knee."""

import pytest

from pytbptt.errors import InputError
from pytbptt.tuning.plan import Plan, make_plan
from pytbptt.tuning.speed import SpeedPoint, knee, survey


def plan_of(bptts: tuple[int, ...], batch_sizes: tuple[int, ...], largest_update: int) -> Plan:
    return Plan(bptts, batch_sizes, largest_update, training=0, stability=0, bias=0, context=0)


def saturating(bptt: int, batch_size: int) -> SpeedPoint:
    """A fixed cost for each update, and one for each step of the recurrence."""
    return SpeedPoint(bptt, batch_size, bptt * batch_size / (0.002 + 0.0005 * bptt + 1e-4 * bptt * batch_size))


def test_the_survey_stays_within_memory_and_the_plan_and_stops_where_nothing_is_gained() -> None:
    plan = plan_of((8, 16, 32, 64, 128, 256, 512), (4, 8, 16, 32, 64, 128, 256, 512), 16_384)
    points = survey(plan, lambda bptt, batch_size: bptt * batch_size <= 8192, saturating)
    assert all(point.bptt * point.batch_size <= 8192 for point in points)
    assert len(points) < 40  # of the 53 that fit
    best = max(saturating(b, s).tokens_per_second for b in plan.bptts for s in plan.batch_sizes if b * s <= 8192)
    assert max(point.tokens_per_second for point in points) == pytest.approx(best, rel=0.1)


def test_the_knee_is_the_smallest_update_within_a_tenth_of_the_fastest() -> None:
    points = [SpeedPoint(8, 8, 500.0), SpeedPoint(16, 8, 900.0), SpeedPoint(8, 16, 950.0), SpeedPoint(64, 64, 1000.0)]
    assert knee(points) == SpeedPoint(8, 16, 950.0)


def test_a_plan_holds_the_users_own_sizes_and_fits_the_corpus() -> None:
    plan = make_plan(3, 1_500_000, "cpu", 10_000_000, bptt=150, batch_size=15)
    assert 150 in plan.bptts
    assert 15 in plan.batch_sizes
    assert plan.bptts[-1] == 512
    tiny = make_plan(3, 1000, "cpu", 2000, bptt=8, batch_size=4)
    assert tiny.largest_update < 1000
    assert all(bptt * 4 < 2000 for bptt in tiny.bptts)
    large = make_plan(3, 150_000_000, "cpu", 100_000_000, bptt=150, batch_size=15)
    assert large.training < plan.training / 90
    with pytest.raises(InputError, match="found 500 tokens to train on, expected at least 1024"):
        make_plan(3, 1000, "cpu", 500, bptt=8, batch_size=4)
