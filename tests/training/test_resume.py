"""Stopped in whatever way and started again, a run ends with the same bits as one that was left alone."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.checkpoint import BEST, LAST
from pytbptt.evaluation.scoring import score
from pytbptt.runtime.distributed import mixed_precision
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS, Log
from pytbptt.training.run import train
from pytbptt.training.trainer import Trainer
from tests.processes import start
from tests.training.resumable import SETTINGS, arguments, assert_same, assert_same_run, outcome


@pytest.mark.parametrize("arch", SETTINGS)
def test_killed_runs_end_with_the_same_bits(corpus: str, tmp_path: Path, alone: Callable[..., Path], arch: str) -> None:
    killed = tmp_path / "killed"
    for lines in (3, 11):  # before an epoch's end and after a validation
        program = start("train", *arguments(corpus, arch, killed))
        program.wait_for_lines(killed / METRICS, lines)
        program.kill()
    assert not (killed / "results.json").exists()
    ended = start("train", *arguments(corpus, arch, killed)).finish()
    assert ended.returncode == 0, ended.stderr
    assert_same_run(killed, alone(arch))
    assert len(outcome(killed)[1]) == 17 + 6
    assert_same(
        torch.load(killed / BEST, weights_only=True)["model"],
        torch.load(alone(arch) / BEST, weights_only=True)["model"],
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], number: signal.Signals
) -> None:
    stopped = tmp_path / "stopped"
    program = start("train", *arguments(corpus, "awd_lstm", stopped))
    program.wait_for_lines(stopped / METRICS, 1)
    program.send(number)
    ended = program.finish()
    assert ended.returncode == 0
    assert f"stopped by {number.name} after update" in ended.stderr
    assert torch.load(stopped / LAST, weights_only=True)["progress"]["stopped"] == ""
    train(read_command_line(arguments(corpus, "awd_lstm", stopped)))
    assert_same_run(stopped, alone("awd_lstm"))


def test_a_stop_in_the_middle_of_a_validation_does_not_wait_for_it(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves undone, the same command does."""
    stopped = tmp_path / "stopped"
    settings = read_command_line(arguments(corpus, "awd_lstm", stopped))

    def stop_first(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pytbptt.training.trainer.score", stop_first)
        train(settings)
    left, metrics = outcome(stopped)
    assert (left["progress"]["update"], left["progress"]["validated_at"], left["progress"]["stopped"]) == (20, -1, "")
    assert {entry["split"] for entry in metrics} == {"train"}
    train(settings)
    assert_same_run(stopped, alone("awd_lstm"))


@pytest.mark.parametrize("arch", SETTINGS)
def test_bf16_resumes_to_the_bit(corpus: str, tmp_path: Path, alone: Callable[..., Path], arch: str) -> None:
    settings = read_command_line(arguments(corpus, arch, tmp_path / "run", "--bf16", "--max-epoch", "1"))
    train(settings)
    assert 0 < outcome(tmp_path / "run")[0]["progress"]["update"] < 120
    train(read_command_line(arguments(corpus, arch, tmp_path / "run", "--bf16")))
    (found, metrics), (expected, expected_metrics) = outcome(tmp_path / "run"), outcome(alone(arch, "--bf16"))
    assert_same({**found, "progress": 0}, {**expected, "progress": 0})
    # The end of the shorter run validated once more than the longer one does.
    trained = [[entry for entry in each if entry["split"] == "train"] for each in (metrics, expected_metrics)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("awd_lstm", "--bptt-backward 19"),
        ("transformer_xl", "--bptt-backward 30 --reset-on </s>"),
        ("awd_lstm", "--bptt-chunks 3"),
        ("transformer_xl", "--bptt-adaptive --bptt-backward 24 --bptt-tolerance 0.005 --bptt-interval 10"),
    ],
)
def test_the_variants_of_truncation_resume_to_the_bit(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], arch: str, variant: str
) -> None:
    words = [*variant.split(), "--lr-scheduler", "constant", "--max-update"]
    train(read_command_line(arguments(corpus, arch, tmp_path / "run", *words, "20")))
    kept = outcome(tmp_path / "run")[0]["progress"]["kept"]
    assert kept == 0 if "chunks" in variant else kept > 0
    train(read_command_line(arguments(corpus, arch, tmp_path / "run", *words, "40")))
    assert_same_run(tmp_path / "run", alone(arch, *words, "40"))


def test_the_scaler_of_float16_resumes_to_the_bit(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's float16, which the trainer itself leaves alone."""
    make = Trainer.__init__

    def with_scaler(trainer: Trainer, *those: Any) -> None:
        make(trainer, *those)
        trainer.step.dtype = torch.float16
        trainer.step.bptt.autocast = mixed_precision(trainer.distributed.device, torch.float16)
        trainer.step.bptt.scaler = torch.amp.GradScaler("cpu", growth_interval=9)

    monkeypatch.setattr(Trainer, "__init__", with_scaler)
    words = ("awd_lstm", tmp_path / "run", "--lr-scheduler", "constant", "--max-update")
    train(read_command_line(arguments(corpus, *words, "40")))
    assert outcome(tmp_path / "run")[0]["scaler"]["scale"] != torch.amp.GradScaler("cpu").get_scale()
    train(read_command_line(arguments(corpus, *words, "120")))
    train(read_command_line(arguments(corpus, "awd_lstm", tmp_path / "alone", "--lr-scheduler", "constant")))
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_a_run_saves_by_the_clock_too(corpus: str, tmp_path: Path) -> None:
    never = ("--save-interval-updates", "0", "--validate-interval-updates", "1000", "--max-update", "30")
    by_the_clock = (*never, "--save-interval-minutes", "1e-9", "--keep-last", "100")
    train(read_command_line(arguments(corpus, "awd_lstm", tmp_path / "clock", *by_the_clock)))
    train(read_command_line(arguments(corpus, "awd_lstm", tmp_path / "end", *never)))
    assert len(list((tmp_path / "clock").glob("checkpoint_[0-9]*.pt"))) == 29
    assert not list((tmp_path / "end").glob("checkpoint_[0-9]*.pt"))


def test_other_streams_begin_afresh_on_the_trained_weights_if_asked(corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(read_command_line(arguments(corpus, "transformer_xl", folder, "--max-update", "50")))
    wider = arguments(corpus, "transformer_xl", folder, "--batch-size", "6", "--tokens-per-sample", "5")
    train(read_command_line([*wider, "--reset-streams", "--max-update", "51"]))
    checkpoint, metrics = outcome(folder)
    assert (checkpoint["loader"]["streams"], checkpoint["loader"]["index"]) == (12, 1)
    assert checkpoint["progress"]["update"] == 51
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]  # of a new run's first update it would be as high
    # From here on the streams are the run's own: the same command goes on with them instead of beginning again.
    train(read_command_line([*wider, "--reset-streams", "--max-update", "52"]))
    assert outcome(folder)[0]["loader"]["index"] == 2


def test_a_kill_between_a_validations_entry_and_its_checkpoint_leaves_no_entry_twice(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def write_and_be_killed(*arguments: Any, **entry: Any) -> None:
        valid(*arguments, **entry)
        raise KilledError

    valid, settings = Log.valid, read_command_line(arguments(corpus, "awd_lstm", tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Log, "valid", write_and_be_killed)
        with pytest.raises(KilledError):
            train(settings)
    train(settings)
    assert_same_run(tmp_path / "run", alone("awd_lstm"))


def test_a_loss_on_other_validation_data_is_not_compared_with(corpus: str, tmp_path: Path) -> None:
    other = tmp_path / "data-bin"
    shutil.copytree(corpus, other)
    train(read_command_line(arguments(str(other), "awd_lstm", tmp_path / "run", "--max-update", "40")))
    for kind in ("bin", "idx"):
        shutil.copy(other / f"test.{kind}", other / f"valid.{kind}")
    train(read_command_line(arguments(str(other), "awd_lstm", tmp_path / "run", "--max-update", "60")))
    losses = [entry["loss"] for entry in outcome(tmp_path / "run")[1] if entry["split"] == "valid"]
    assert outcome(tmp_path / "run")[0]["progress"]["best_loss"] == losses[-1]


def test_a_stop_while_the_results_are_scored_leaves_them_to_the_next_start(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_command_line(arguments(corpus, "awd_lstm", tmp_path / "run", "--max-update", "5", "--test"))

    def stop_first(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pytbptt.training.report.score", stop_first)
        train(settings)
    assert "stopped by SIGTERM after update 5" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
    (tmp_path / "run" / BEST).write_bytes(b"damaged")
    train(settings)
    assert f"falling back to {tmp_path / 'run' / LAST}" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").exists()


def test_a_terminal_that_has_gone_does_not_end_a_run(corpus: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    settings = read_command_line(arguments(corpus, "awd_lstm", tmp_path / "run", "--max-update", "20"))
    gone = os.fdopen(writer, "w")
    with contextlib.redirect_stdout(gone):
        train(settings)
    with contextlib.suppress(BrokenPipeError):
        gone.close()
    assert outcome(tmp_path / "run")[0]["progress"]["update"] == 20
