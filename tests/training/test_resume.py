"""Killed at any instant and started again, a run ends with the same bits as one that was left alone."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.checkpoint import BEST, LAST
from pytbptt.evaluation.scoring import score
from pytbptt.training.config import read_command_line
from pytbptt.training.logging import METRICS, read_metrics
from pytbptt.training.run import train

SETTINGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --bptt-variation awd --rotate",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0.2 --dropatt 0.1",
}
COMMON = (
    "--tokens-per-sample 8 --batch-size 4 --update-freq 2 --max-update 120 --lr 0.01 --log-interval 7 "
    "--save-interval-updates 5 --validate-interval-updates 20 --log-format json --seed 3 --device cpu"
)
TIMES = {"tokens_per_second", "peak_memory_bytes"}


def command(corpus: str, arch: str, save_dir: Path) -> list[str]:
    words = f"-m pytbptt.train {corpus} --save-dir {save_dir} {SETTINGS[arch]} {COMMON}"
    return [sys.executable, *words.split()]


def start(corpus: str, arch: str, save_dir: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(corpus, arch, save_dir),
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of an architecture that nothing interrupted."""

    @functools.cache
    def run(arch: str) -> Path:
        save_dir = tmp_path_factory.mktemp("alone") / arch
        train(read_command_line(command(corpus, arch, save_dir)[3:]))
        return save_dir

    return run


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def kill_after(process: subprocess.Popen[str], save_dir: Path, lines: int, number: int = signal.SIGKILL) -> None:
    """Kill the process as soon as its metrics have so many lines."""
    while process.poll() is None:
        metrics = save_dir / METRICS
        if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
            process.send_signal(number)
            break
        time.sleep(0.001)
    process.communicate(timeout=200)


def outcome(save_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics = [
        {key: value for key, value in entry.items() if key not in TIMES} for entry in read_metrics(save_dir / METRICS)
    ]
    return torch.load(save_dir / LAST, weights_only=True), metrics


def assert_same(found: Any, expected: Any, where: str = "checkpoint") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, (one, two) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, two, f"{where}[{n}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("arch", SETTINGS)
def test_killed_runs_end_with_the_same_bits(
    corpus: str, tmp_path: Path, alone: Callable[[str], Path], arch: str
) -> None:
    killed = tmp_path / "killed"
    for lines in (3, 11):  # before an epoch's end and after a validation
        kill_after(start(corpus, arch, killed), killed, lines)
    assert not (killed / "results.json").exists()
    finish(start(corpus, arch, killed))

    expected, expected_metrics = outcome(alone(arch))
    found, found_metrics = outcome(killed)
    for checkpoint in (expected, found):
        checkpoint["config"]["run"].pop("save_dir")
    assert_same(found, expected)
    assert found_metrics == expected_metrics
    assert len(found_metrics) == 17 + 6
    assert_same(
        torch.load(killed / BEST, weights_only=True)["model"],
        torch.load(alone(arch) / BEST, weights_only=True)["model"],
    )


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    corpus: str, tmp_path: Path, alone: Callable[[str], Path]
) -> None:
    stopped = tmp_path / "stopped"
    process = start(corpus, "awd_lstm", stopped)
    while not (stopped / METRICS).exists() or not (stopped / METRICS).read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "stopped by SIGTERM after update" in errors
    assert torch.load(stopped / LAST, weights_only=True)["progress"]["stopped"] == ""
    finish(start(corpus, "awd_lstm", stopped))
    (expected, expected_metrics), (found, found_metrics) = outcome(alone("awd_lstm")), outcome(stopped)
    assert_same(found["model"], expected["model"])
    assert found_metrics == expected_metrics


def test_a_stop_in_the_middle_of_a_validation_does_not_wait_for_it(
    corpus: str, tmp_path: Path, alone: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves undone, the same command does."""
    stopped = tmp_path / "stopped"
    settings = read_command_line(command(corpus, "awd_lstm", stopped)[3:])

    def stop_first(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pytbptt.training.loop.score", stop_first)
        train(settings)
    left, metrics = outcome(stopped)
    assert (left["progress"]["update"], left["progress"]["validated_at"], left["progress"]["stopped"]) == (20, -1, "")
    assert {entry["split"] for entry in metrics} == {"train"}
    train(settings)
    (expected, expected_metrics), (found, found_metrics) = outcome(alone("awd_lstm")), outcome(stopped)
    for checkpoint in (expected, found):
        checkpoint["config"]["run"].pop("save_dir")
    assert_same(found, expected)
    assert found_metrics == expected_metrics
