"""Starting runs: fairseq's flags, changed settings, fine-tuning, missing splits, launching of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pytbptt.train as train_program
from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint import BEST_CHECKPOINT, LAST_CHECKPOINT
from pytbptt.errors import InputError
from pytbptt.runtime.cli import FAIRSEQ_REPLACEMENTS, flag_names
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS_FILE, read_metrics
from pytbptt.training.run import train
from tests.common.cli import RunCli

LSTM = "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2"
XL = "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9"
RUN = "--tokens-per-sample 8 --batch-size 4 --lr 0.01 --log-interval 1 --log-format simple --device cpu"


IGNORED_FLAGS = (
    "--task truncated_bptt_lm --criterion adaptive_loss --no-progress-bar --num-workers 2 --ddp-backend no_c10d "
    "--no-epoch-checkpoints --sample-break-mode none --valid-subset valid --distributed-world-size 1 "
    "--skip-invalid-size-inputs-valid-test --required-batch-size-multiple 1 --user-dir examples/truncated_bptt"
)


def train_run(corpus: str, save_dir: Path, *flags: str, model: str = LSTM) -> list[dict[str, object]]:
    train(read_command_line([corpus, *model.split(), *RUN.split(), "--save-dir", str(save_dir), *flags]))
    return read_metrics(save_dir / METRICS_FILE)


def test_irrelevant_fairseq_flags_are_accepted() -> None:
    settings = read_command_line(["data", *IGNORED_FLAGS.split()])
    assert settings.logging.log_format == "simple"
    assert read_command_line(["data", "--no-progress-bar", "--log-format", "json"]).logging.log_format == "json"
    assert read_command_line(["data"]).logging.log_format == "tqdm"
    with pytest.raises(InputError, match="--sample-break-mode: found eos, expected one of"):
        read_command_line(["data", "--sample-break-mode", "eos"])


@pytest.mark.parametrize("flag", FAIRSEQ_REPLACEMENTS)
def test_unsupported_fairseq_flags_name_alternatives(flag: str) -> None:
    known = {*flag_names(read_command_line(["data"])), *flag_names(read_command_line(["data", "--arch", "awd_lstm"]))}
    assert flag not in known
    with pytest.raises(InputError) as error:
        read_command_line(["data", flag, "1"])
    suggested = {word.strip(",;:()") for word in str(error.value).split() if word.startswith("--")} - {flag}
    assert suggested <= {*known, "--no-tie-weights"}


def test_destructive_flags_are_never_suggested() -> None:
    for flag in ("--restor", "--restarts", "--re-start", "--reset-stream"):
        with pytest.raises(InputError) as error:
            read_command_line(["data", flag])
        assert "--restart?" not in str(error.value)
        assert "--reset-streams?" not in str(error.value)


@pytest.mark.parametrize("flags", [(), ("--bptt-chunks", "3"), ("--update-freq", "2")], ids=str)
def test_max_epoch_sets_schedule_length(corpus: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    entries = train_run(corpus, tmp_path / "run", "--max-epoch", "2", *flags)
    rates = [entry["lr"] for entry in entries if entry["split"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 * rates[0]
    stopped = checkpoints.read(tmp_path / "run" / LAST_CHECKPOINT)["progress"]["stopped"]
    assert stopped == "the end of epoch 2 (--max-epoch)"


def test_dropout_can_change_on_resume(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_run(corpus, tmp_path / "run", "--max-update", "3")
    capsys.readouterr()
    train_run(corpus, tmp_path / "run", "--max-update", "6", "--dropout", "0.1", "--weight-drop", "0.2")
    output = capsys.readouterr()
    assert "--dropout 0.1 from now on, 0.4 so far" in output.out + output.err
    last = checkpoints.read(tmp_path / "run" / LAST_CHECKPOINT)
    assert (last["progress"]["update"], last["config"]["model"]["dropout"]) == (6, 0.1)
    with pytest.raises(InputError, match="holds a run with d_hidden 16, the settings say 20"):
        train_run(corpus, tmp_path / "run", "--max-update", "9", "--d-hidden", "20")


@pytest.mark.parametrize("model", [LSTM, XL], ids=["lstm", "xl"])
def test_finetune_starts_from_weights_only(corpus: str, tmp_path: Path, model: str) -> None:
    before = train_run(corpus, tmp_path / "first", "--max-update", "40", model=model)
    trained = checkpoints.load_checkpoint(tmp_path / "first" / BEST_CHECKPOINT)
    converted = tmp_path / "converted.pt"
    checkpoints.write(converted, checkpoints.weights_only_checkpoint(trained.model, trained.vocabulary))
    for source in (tmp_path / "first" / BEST_CHECKPOINT, converted):
        folder = tmp_path / f"from-{source.name}"
        arguments = ("--finetune-from-model", str(source), "--dropout", "0", "--optimizer", "sgd")
        after = train_run(corpus, folder, *arguments, "--lr", "1e-12", "--max-update", "1", model=model)
        best = min(entry["loss"] for entry in before if entry["split"] == "valid")
        last = next(entry for entry in reversed(after) if entry["split"] == "valid")
        assert (last["step"], last["loss"]) == (1, pytest.approx(best, abs=1e-6))
        # The same command again resumes its own run instead of loading those weights again.
        train_run(corpus, folder, *arguments, "--lr", "0.1", "--max-update", "3", model=model)
        assert checkpoints.read(folder / LAST_CHECKPOINT)["progress"]["update"] == 3
        assert not torch.equal(
            next(checkpoints.load_checkpoint(folder / LAST_CHECKPOINT).model.parameters()),
            next(trained.model.parameters()),
        )
    size = "--d-inner" if model == XL else "--d-hidden"
    with pytest.raises(InputError, match=f"found a model of other settings, expected these flags: {size} 16"):
        train_run(corpus, tmp_path / "other", "--finetune-from-model", str(converted), size, "24", model=model)
    assert not (tmp_path / "other").exists()


def test_finetune_from_another_vocabulary_raises(tmp_path: Path, corpus: str, run_cli: RunCli) -> None:
    train_run(corpus, tmp_path / "first", "--max-update", "1")
    (tmp_path / "text").write_text("a b c\n" * 30)
    run_cli("prepare", "--trainpref", "text", "--destdir", "data", "--nwordssrc", 40)
    with pytest.raises(InputError, match=r"found (another vocabulary|a model of other settings)"):
        train_run(
            str(tmp_path / "data"), tmp_path / "run", "--finetune-from-model", str(tmp_path / "first" / LAST_CHECKPOINT)
        )


def test_missing_test_split_is_skipped(tmp_path: Path, run_cli: RunCli, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("a b c d\n" * 50)
    run_cli("prepare", "--trainpref", "text", "--destdir", "data")
    os.rename("data/train.bin", "data/dev.bin")
    os.rename("data/train.idx", "data/dev.idx")
    run_cli("prepare", "--trainpref", "text", "--destdir", "data", "--srcdict", "data/dict.txt")
    entries = train_run("data", tmp_path / "run", "--test", "--max-update", "2", "--valid-subset", "dev")
    output = capsys.readouterr()
    assert "data: no test split, so --test has no effect" in output.out + output.err
    assert "test" not in json.loads((tmp_path / "run" / "results.json").read_text())
    assert [entry["step"] for entry in entries if entry["split"] == "valid"] == [2]


def start_two_processes(corpus: str, save_dir: Path, *flags: str) -> subprocess.Popen[str]:
    run = [*LSTM.split(), *RUN.split(), "--save-dir", str(save_dir), "--distributed-world-size", "2"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "pytbptt.train", corpus, *run, *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )


def test_launches_two_processes(corpus: str, tmp_path: Path) -> None:
    valid = start_two_processes(corpus, tmp_path / "run", "--max-update", "12")
    invalid = start_two_processes(corpus, tmp_path / "invalid", "--reset-on", "no-symbol")
    _, stderr = valid.communicate(timeout=200)
    assert valid.returncode == 0, stderr
    assert "starting 2 processes" in stderr
    checkpoint = checkpoints.read(tmp_path / "run" / LAST_CHECKPOINT)
    assert (checkpoint["loader"]["streams"], len(checkpoint["rng"]), checkpoint["progress"]["update"]) == (8, 2, 12)
    _, stderr = invalid.communicate(timeout=200)
    assert invalid.returncode == 2
    assert stderr.count("no-symbol") == 1, stderr


@pytest.mark.fault
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_child_processes_end_with_launcher(corpus: str, tmp_path: Path, signal_number: signal.Signals) -> None:
    flags = ("--max-update", "1000000", "--save-interval-updates", "1")
    launcher = start_two_processes(corpus, tmp_path / "run", *flags)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / LAST_CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(signal_number)
    _, stderr = launcher.communicate(timeout=200)  # returns when all three processes have closed the pipe
    assert launcher.returncode == (0 if signal_number == signal.SIGTERM else -signal_number), stderr
    assert checkpoints.read(tmp_path / "run" / LAST_CHECKPOINT)["progress"]["update"] > 0


def test_default_process_count_is_gpu_count(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("RANK", raising=False)
    started: list[int] = []
    monkeypatch.setattr(train_program, "launch", lambda count: started.append(count) or 0)
    monkeypatch.setattr(train_program, "train", lambda settings: started.append(1))
    for arguments, expected in (((), 4), (("--distributed-world-size", "2"), 2), (("--device", "cpu"), 1)):
        settings = read_command_line([corpus, *LSTM.split(), *arguments])
        if expected == 1:
            train_program.launch_or_train(settings)
        else:
            with pytest.raises(SystemExit):
                train_program.launch_or_train(settings)
        assert started.pop() == expected
    with pytest.raises(InputError, match="--distributed-world-size: found 5, expected at most the 4 GPUs"):
        train_program.launch_or_train(read_command_line([corpus, *LSTM.split(), "--distributed-world-size", "5"]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")  # torchrun on several machines: more processes than this one has GPUs
    train_program.launch_or_train(read_command_line([corpus, *LSTM.split(), "--distributed-world-size", "8"]))
    assert started.pop() == 1
    with pytest.raises(InputError, match="--distributed-world-size: found 4, but WORLD_SIZE says 8"):
        train_program.launch_or_train(read_command_line([corpus, *LSTM.split(), "--distributed-world-size", "4"]))
