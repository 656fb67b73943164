"""A run that is stopped in any way and resumed ends bitwise equal to an uninterrupted one."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.checkpoint import BEST_CHECKPOINT, LAST_CHECKPOINT
from pytbptt.evaluation.scoring import score
from pytbptt.runtime.distributed import mixed_precision
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS_FILE, Log
from pytbptt.training.run import train
from pytbptt.training.trainer import Trainer
from tests.common.resume_runs import MODEL_FLAGS, assert_equal, assert_runs_equal, load_run, train_arguments
from tests.common.subprocesses import start_program


@pytest.mark.parametrize("arch", MODEL_FLAGS)
def test_killed_run_resumes_bitwise_equal(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], arch: str
) -> None:
    killed = tmp_path / "killed"
    for lines in (3, 11):  # before an epoch's end and after a validation
        program = start_program("train", *train_arguments(corpus, arch, killed))
        program.wait_for_lines(killed / METRICS_FILE, lines)
        program.kill()
    assert not (killed / "results.json").exists()
    ended = start_program("train", *train_arguments(corpus, arch, killed)).finish()
    assert ended.returncode == 0, ended.stderr
    assert_runs_equal(killed, uninterrupted_run(arch))
    assert len(load_run(killed)[1]) == 17 + 6
    assert_equal(
        torch.load(killed / BEST_CHECKPOINT, weights_only=True)["model"],
        torch.load(uninterrupted_run(arch) / BEST_CHECKPOINT, weights_only=True)["model"],
    )


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_stopped_by_signal_resumes_bitwise_equal(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], signal_number: signal.Signals
) -> None:
    stopped = tmp_path / "stopped"
    program = start_program("train", *train_arguments(corpus, "awd_lstm", stopped))
    program.wait_for_lines(stopped / METRICS_FILE, 1)
    program.send(signal_number)
    ended = program.finish()
    assert ended.returncode == 0
    assert f"stopped by {signal_number.name} after update" in ended.stderr
    assert torch.load(stopped / LAST_CHECKPOINT, weights_only=True)["progress"]["stopped"] == ""
    train(read_command_line(train_arguments(corpus, "awd_lstm", stopped)))
    assert_runs_equal(stopped, uninterrupted_run("awd_lstm"))


def test_signal_during_validation_stops_without_finishing_it(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run validates."""
    stopped = tmp_path / "stopped"
    settings = read_command_line(train_arguments(corpus, "awd_lstm", stopped))

    def score_after_signal(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("pytbptt.training.trainer.score", score_after_signal)
        train(settings)
    checkpoint, metrics = load_run(stopped)
    progress = checkpoint["progress"]
    assert (progress["update"], progress["validated_at"], progress["stopped"]) == (20, -1, "")
    assert {entry["split"] for entry in metrics} == {"train"}
    train(settings)
    assert_runs_equal(stopped, uninterrupted_run("awd_lstm"))


@pytest.mark.parametrize("arch", MODEL_FLAGS)
def test_bf16_run_resumes_bitwise_equal(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], arch: str
) -> None:
    settings = read_command_line(train_arguments(corpus, arch, tmp_path / "run", "--bf16", "--max-epoch", "1"))
    train(settings)
    assert 0 < load_run(tmp_path / "run")[0]["progress"]["update"] < 120
    train(read_command_line(train_arguments(corpus, arch, tmp_path / "run", "--bf16")))
    actual, metrics = load_run(tmp_path / "run")
    expected, expected_metrics = load_run(uninterrupted_run(arch, "--bf16"))
    assert_equal({**actual, "progress": 0}, {**expected, "progress": 0})
    # Only training entries: the run with --max-epoch also validated at its end.
    train_entries = [[entry for entry in each if entry["split"] == "train"] for each in (metrics, expected_metrics)]
    assert train_entries[0] == train_entries[1]


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("awd_lstm", "--bptt-backward 19"),
        ("transformer_xl", "--bptt-backward 30 --reset-on </s>"),
        ("awd_lstm", "--bptt-chunks 3"),
        ("transformer_xl", "--bptt-adaptive --bptt-backward 24 --bptt-tolerance 0.005 --bptt-interval 10"),
    ],
)
def test_bptt_variants_resume_bitwise_equal(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], arch: str, variant: str
) -> None:
    flags = [*variant.split(), "--lr-scheduler", "constant", "--max-update"]
    train(read_command_line(train_arguments(corpus, arch, tmp_path / "run", *flags, "20")))
    kept = load_run(tmp_path / "run")[0]["progress"]["kept"]
    assert kept == 0 if "chunks" in variant else kept > 0
    train(read_command_line(train_arguments(corpus, arch, tmp_path / "run", *flags, "40")))
    assert_runs_equal(tmp_path / "run", uninterrupted_run(arch, *flags, "40"))


def test_fp16_grad_scaler_resumes_bitwise_equal(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 on the CPU, for which the trainer has no flag."""
    init = Trainer.__init__

    def init_with_scaler(trainer: Trainer, *args: Any) -> None:
        init(trainer, *args)
        trainer.step.dtype = torch.float16
        trainer.step.bptt.autocast = mixed_precision(trainer.distributed.device, torch.float16)
        trainer.step.bptt.scaler = torch.amp.GradScaler("cpu", growth_interval=9)

    monkeypatch.setattr(Trainer, "__init__", init_with_scaler)
    run, uninterrupted, constant = tmp_path / "run", tmp_path / "uninterrupted", ("--lr-scheduler", "constant")
    train(read_command_line(train_arguments(corpus, "awd_lstm", run, *constant, "--max-update", "40")))
    assert load_run(run)[0]["scaler"]["scale"] != torch.amp.GradScaler("cpu").get_scale()
    train(read_command_line(train_arguments(corpus, "awd_lstm", run, *constant, "--max-update", "120")))
    train(read_command_line(train_arguments(corpus, "awd_lstm", uninterrupted, *constant)))
    assert_runs_equal(run, uninterrupted)


def test_save_interval_minutes_saves_by_the_clock(corpus: str, tmp_path: Path) -> None:
    never = ("--save-interval-updates", "0", "--validate-interval-updates", "1000", "--max-update", "30")
    always = (*never, "--save-interval-minutes", "1e-9", "--keep-last", "100")
    train(read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "always", *always)))
    train(read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "never", *never)))
    assert len(list((tmp_path / "always").glob("checkpoint_[0-9]*.pt"))) == 29
    assert not list((tmp_path / "never").glob("checkpoint_[0-9]*.pt"))


def test_reset_streams_keeps_weights_and_starts_new_streams(corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(read_command_line(train_arguments(corpus, "transformer_xl", folder, "--max-update", "50")))
    wider = train_arguments(corpus, "transformer_xl", folder, "--batch-size", "6", "--tokens-per-sample", "5")
    train(read_command_line([*wider, "--reset-streams", "--max-update", "51"]))
    checkpoint, metrics = load_run(folder)
    assert (checkpoint["loader"]["streams"], checkpoint["loader"]["index"]) == (12, 1)
    assert checkpoint["progress"]["update"] == 51
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]  # a new model would have about the loss of metrics[0]
    # The same command again resumes the new streams.
    train(read_command_line([*wider, "--reset-streams", "--max-update", "52"]))
    assert load_run(folder)[0]["loader"]["index"] == 2


def test_kill_between_validation_entry_and_checkpoint_duplicates_no_entry(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def log_then_kill(*args: Any, **entry: Any) -> None:
        valid(*args, **entry)
        raise KilledError

    valid, settings = Log.valid, read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(Log, "valid", log_then_kill)
        with pytest.raises(KilledError):
            train(settings)
    train(settings)
    assert_runs_equal(tmp_path / "run", uninterrupted_run("awd_lstm"))


def test_best_loss_is_forgotten_if_validation_data_change(corpus: str, tmp_path: Path) -> None:
    other = tmp_path / "data-bin"
    shutil.copytree(corpus, other)
    train(read_command_line(train_arguments(str(other), "awd_lstm", tmp_path / "run", "--max-update", "40")))
    for kind in ("bin", "idx"):
        shutil.copy(other / f"test.{kind}", other / f"valid.{kind}")
    train(read_command_line(train_arguments(str(other), "awd_lstm", tmp_path / "run", "--max-update", "60")))
    losses = [entry["loss"] for entry in load_run(tmp_path / "run")[1] if entry["split"] == "valid"]
    assert load_run(tmp_path / "run")[0]["progress"]["best_loss"] == losses[-1]


def test_signal_during_final_test_defers_results_to_next_start(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "run", "--max-update", "5", "--test"))

    def score_after_signal(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("pytbptt.training.report.score", score_after_signal)
        train(settings)
    assert "stopped by SIGTERM after update 5" in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()
    (tmp_path / "run" / BEST_CHECKPOINT).write_bytes(b"damaged")
    train(settings)
    assert f"falling back to {tmp_path / 'run' / LAST_CHECKPOINT}" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").exists()


def test_broken_stdout_pipe_does_not_stop_training(corpus: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    settings = read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "run", "--max-update", "20"))
    broken_pipe = os.fdopen(writer, "w")
    with contextlib.redirect_stdout(broken_pipe):
        train(settings)
    with contextlib.suppress(BrokenPipeError):
        broken_pipe.close()
    assert load_run(tmp_path / "run")[0]["progress"]["update"] == 20
