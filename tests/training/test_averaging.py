"""WeightAverage: the average of the weights in NT-ASGD."""

import pytest
import torch
from torch import nn

from pytbptt.training.averaging import WeightAverage

UPDATED, SKIPPED = torch.tensor(True), torch.tensor(False)


def test_averaging_begins_when_validation_stops_improving() -> None:
    average = WeightAverage(nn.Linear(1, 1), nonmono=2)
    triggered = [average.record_validation(loss) for loss in (5.0, 4.0, 3.0, 3.5, 4.5, 1.0)]
    # 4.5 is the first loss above the minimum of all but the `nonmono` losses before it: min(5.0, 4.0).
    assert triggered == [False, False, False, False, True, False]


def test_average_covers_updates_since_trigger_and_is_swapped_in_and_out() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, nonmono=1)
    for loss in (1.0, 2.0, 3.0):
        average.record_validation(loss)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(UPDATED)
        average.update(SKIPPED)
    with average.use_averaged_weights():
        assert model.weight.item() == pytest.approx(3.0)
    assert model.weight.item() == 6.0


def test_weight_average_state_dict_round_trip() -> None:
    model = nn.Linear(2, 1)
    original, restored = WeightAverage(model, nonmono=1), WeightAverage(model, nonmono=1)
    for loss in (1.0, 2.0, 3.0):
        original.record_validation(loss)
    original.update(UPDATED)
    restored.load_state_dict(original.state_dict())
    for average in (original, restored):
        average.update(UPDATED)
    assert original.mean is not None
    assert restored.mean is not None
    assert all(torch.equal(original.mean[name], restored.mean[name]) for name in original.mean)


def test_average_inactive_before_trigger() -> None:
    model = nn.Linear(1, 1)
    before = model.weight.item()
    average = WeightAverage(model, nonmono=5)
    average.update(UPDATED)
    with average.use_averaged_weights():
        assert model.weight.item() == before
