"""Learning rate schedulers."""

import pytest

from pytbptt.training.config import OptimizationSettings
from pytbptt.training.schedule import learning_rate


def rates(updates: int = 100, **settings: object) -> list[float]:
    optimization = OptimizationSettings(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(optimization, update, updates) for update in range(updates + 1)]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(scheduler: str) -> None:
    actual = rates(lr_scheduler=scheduler, warmup_updates=4)
    assert actual[:4] == [0.25, 0.5, 0.75, 1.0]
    assert actual[4] == pytest.approx(1.0, abs=0.15)
    assert max(actual) == 1.0


def test_scheduler_values_after_warmup() -> None:
    assert rates(lr_scheduler="cosine")[0] == 1.0
    assert rates(lr_scheduler="cosine", min_lr=0.1)[100] == pytest.approx(0.1)
    assert rates(lr_scheduler="cosine")[50] == pytest.approx(0.5)
    assert rates(lr_scheduler="linear", min_lr=0.2)[50] == pytest.approx(0.6)
    assert rates(lr_scheduler="constant")[100] == 1.0
    assert rates(lr_scheduler="inverse_sqrt", warmup_updates=25)[99] == pytest.approx(0.5)


def test_one_cycle_rises_and_falls() -> None:
    actual = rates(lr_scheduler="one_cycle")
    peak = actual.index(max(actual))
    assert peak in (24, 25)
    assert actual[:peak] == sorted(actual[:peak])
    assert actual[peak:] == sorted(actual[peak:], reverse=True)
    assert actual[100] == pytest.approx(0.0)


def test_learning_rate_after_last_update_is_min_lr() -> None:
    assert learning_rate(OptimizationSettings(min_lr=0.125), 500, 100) == 0.125
