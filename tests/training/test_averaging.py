import pytest
import torch
from torch import nn

from pytbptt.training.averaging import WeightAverage

MADE, SKIPPED = torch.tensor(True), torch.tensor(False)


def test_averaging_begins_when_validation_stops_improving() -> None:
    average = WeightAverage(nn.Linear(1, 1), nonmono=2)
    begins = [average.validated(loss) for loss in (5.0, 4.0, 3.0, 3.5, 4.5, 1.0)]
    # 4.5 is the first that is worse than the best of those before the last two (5.0, 4.0).
    assert begins == [False, False, False, False, True, False]


def test_the_mean_is_of_the_weights_since_then_and_swaps_in_and_out() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, nonmono=1)
    for loss in (1.0, 2.0, 3.0):
        average.validated(loss)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(MADE)
        average.update(SKIPPED)
    with average.use_averaged_weights():
        assert model.weight.item() == pytest.approx(3.0)
    assert model.weight.item() == 6.0


def test_it_goes_on_from_its_state_as_if_not_interrupted() -> None:
    model = nn.Linear(2, 1)
    one, two = WeightAverage(model, nonmono=1), WeightAverage(model, nonmono=1)
    for loss in (1.0, 2.0, 3.0):
        one.validated(loss)
    one.update(MADE)
    two.load_state_dict(one.state_dict())
    for average in (one, two):
        average.update(MADE)
    assert one.mean is not None
    assert two.mean is not None
    assert all(torch.equal(one.mean[name], two.mean[name]) for name in one.mean)


def test_without_a_trigger_nothing_changes() -> None:
    model = nn.Linear(1, 1)
    before = model.weight.item()
    average = WeightAverage(model, nonmono=5)
    average.update(MADE)
    with average.use_averaged_weights():
        assert model.weight.item() == before
