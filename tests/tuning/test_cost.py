"""Cost of an update: the memory model and its fit, the measurement of peaks, the grid search over speed, the knee."""

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.errors import InputError, RunError
from pytbptt.training.config import TrainSettings, read_command_line
from pytbptt.tuning import cost
from pytbptt.tuning.cost import (
    GIB,
    MemoryModel,
    MemoryPoint,
    SpeedPoint,
    check_measurable,
    fit_memory_model,
    grid_search,
    knee,
    measure_peak,
    points_to_measure,
)
from pytbptt.tuning.plan import Plan, make_plan

CPU = torch.device("cpu")
TINY = "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2"


def simulate_measurements(model: MemoryModel, noise: float) -> list[MemoryPoint]:
    """The model's peaks, every second one larger by `noise`."""
    points = points_to_measure((8, 16, 32, 64, 128, 256, 512), 8192)
    return [
        MemoryPoint(bptt, streams, int(model.peak(bptt, streams) * (1 + noise * (n % 2))))
        for n, (bptt, streams) in enumerate(points)
    ]


@pytest.mark.parametrize("per_pair", [0.0, 40.0])
def test_fit_extrapolates_to_larger_updates(per_pair: float) -> None:
    truth = MemoryModel(fixed=3e8, per_stream=2e5, per_token=3e4, per_pair=per_pair)
    *fitted, held_out = simulate_measurements(truth, 0.01)
    found = fit_memory_model(fitted, quadratic=per_pair > 0)
    assert held_out.peak == pytest.approx(found.peak(held_out.bptt, held_out.batch_size), rel=0.03)
    assert found.peak(512, 64) == pytest.approx(truth.peak(512, 64), rel=0.1)  # twice as much as was measured


def test_fitted_coefficients_are_not_negative() -> None:
    truth = MemoryModel(fixed=3e8, per_stream=0.0, per_token=3e4, per_pair=0.0)
    found = fit_memory_model(simulate_measurements(truth, -0.01), quadratic=True)
    assert min(found.fixed, found.per_stream, found.per_token, found.per_pair) >= 0


@pytest.mark.parametrize("per_pair", [0.0, 40.0])
def test_largest_bptt_is_maximum_within_limit(per_pair: float) -> None:
    model = MemoryModel(fixed=3e8, per_stream=2e5, per_token=3e4, per_pair=per_pair)
    longest = int(model.largest_bptt(16, 1e9))
    assert model.peak(longest, 16) <= 1e9 < model.peak(longest + 1, 16)
    assert model.largest_bptt(16, 2e8) == 0


def make_settings(corpus: str, *flags: str) -> TrainSettings:
    return read_command_line([corpus, *TINY.split(), "--device", "cpu", *flags])


def test_measured_peak_grows_with_tokens(corpus: str) -> None:
    small, large = (measure_peak(make_settings(corpus), CPU, bptt, 16, 8 * GIB) for bptt in (8, 128))
    assert small.peak is not None
    assert large.peak is not None
    # The softmax alone takes this much: log-probabilities of 45 types and their gradient, in float32.
    assert large.peak - small.peak > 16 * (128 - 8) * 2 * 45 * 4


def test_measure_peak_over_limit_returns_none(corpus: str) -> None:
    model = ("--d-hidden", "4000")  # weights, gradients and Adam's averages take over 3 GiB
    assert measure_peak(make_settings(corpus, *model), CPU, 8, 4, GIB) == MemoryPoint(8, 4, None)


def test_system_without_memory_measurement_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_measurable(CPU)
    monkeypatch.setattr(cost, "PROC_STATUS", tmp_path / "status")
    monkeypatch.setattr(cost, "peak_memory", lambda: None)
    with pytest.raises(InputError, match="found no way to measure memory on this system"):
        check_measurable(CPU)


def _kill_self(sender: Connection, *_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(sender: Connection, *_: Any) -> None:
    os._exit(3)


def test_oom_killed_process_returns_none(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "train_and_send_peak", _kill_self)
    assert measure_peak(make_settings(corpus), CPU, 8, 4, GIB) == MemoryPoint(8, 4, None)


def test_exit_status_of_failed_process_is_reported(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "train_and_send_peak", _crash)
    with pytest.raises(RunError, match="--tokens-per-sample 8 --batch-size 4: the process ended with status 3"):
        measure_peak(make_settings(corpus), CPU, 8, 4, GIB)


def make_test_plan(bptts: tuple[int, ...], batch_sizes: tuple[int, ...], largest_update: int) -> Plan:
    return Plan(bptts, batch_sizes, largest_update, training=0, stability=0, bias=0, context=0)


def saturating_speed(bptt: int, batch_size: int) -> SpeedPoint:
    """Costs per update, per time step and per token."""
    return SpeedPoint(bptt, batch_size, bptt * batch_size / (0.002 + 0.0005 * bptt + 1e-4 * bptt * batch_size))


def test_grid_search_stays_within_memory_and_stops_at_plateaus() -> None:
    plan = make_test_plan((8, 16, 32, 64, 128, 256, 512), (4, 8, 16, 32, 64, 128, 256, 512), 16_384)
    points = grid_search(plan, lambda bptt, batch_size: bptt * batch_size <= 8192, saturating_speed)
    assert all(point.bptt * point.batch_size <= 8192 for point in points)
    assert len(points) < 40  # of the 53 that fit
    best = max(saturating_speed(b, s).tokens_per_second for b in plan.bptts for s in plan.batch_sizes if b * s <= 8192)
    assert max(point.tokens_per_second for point in points) == pytest.approx(best, rel=0.1)


def test_knee_is_smallest_update_within_10_percent_of_fastest() -> None:
    points = [SpeedPoint(8, 8, 500.0), SpeedPoint(16, 8, 900.0), SpeedPoint(8, 16, 950.0), SpeedPoint(64, 64, 1000.0)]
    assert knee(points) == SpeedPoint(8, 16, 950.0)


def test_plan_includes_given_sizes_and_fits_corpus() -> None:
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
