"""Statistics of gradient norms."""

import math

import pytest

from pytbptt.tuning.gradient import describe_norms


def test_non_finite_norms_are_counted_and_excluded_from_statistics() -> None:
    point = describe_norms(64, [1.0, math.nan, 3.0, 2.0, math.inf])
    assert (point.bptt, point.updates, point.not_finite) == (64, 5, 2)
    assert point.mean == pytest.approx(2.0)
    assert point.spread == pytest.approx((2 / 3) ** 0.5 / 2.0)
    assert point.largest == pytest.approx(1.5)


def test_statistics_without_finite_norms_are_nan() -> None:
    point = describe_norms(64, [math.nan, math.nan])
    assert point.not_finite == 2
    assert math.isnan(point.mean)
    assert math.isnan(point.spread)
