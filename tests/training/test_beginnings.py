"""How runs begin: from fairseq's commands, from weights, with several processes, with what data have and lack."""

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
from pytbptt.checkpoint import BEST, LAST
from pytbptt.errors import InputError
from pytbptt.runtime.cli import FAIRSEQ_REPLACEMENTS, flags
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS, read_metrics
from pytbptt.training.run import train
from tests.conftest import Program

LSTM = "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2"
XL = "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9"
RUN = "--tokens-per-sample 8 --batch-size 4 --lr 0.01 --log-interval 1 --log-format simple --device cpu"


def ran(corpus: str, save_dir: Path, *more: str, model: str = LSTM) -> list[dict[str, object]]:
    train(read_command_line([corpus, *model.split(), *RUN.split(), "--save-dir", str(save_dir), *more]))
    return read_metrics(save_dir / METRICS)


USUAL = (
    "--task truncated_bptt_lm --criterion adaptive_loss --no-progress-bar --num-workers 2 --ddp-backend no_c10d "
    "--no-epoch-checkpoints --sample-break-mode none --valid-subset valid --distributed-world-size 1 "
    "--skip-invalid-size-inputs-valid-test --required-batch-size-multiple 1 --user-dir examples/truncated_bptt"
)


def test_flags_that_change_nothing_are_taken() -> None:
    settings = read_command_line(["data", *USUAL.split()])
    assert settings.logging.log_format == "simple"
    assert read_command_line(["data", "--no-progress-bar", "--log-format", "json"]).logging.log_format == "json"
    assert read_command_line(["data"]).logging.log_format == "tqdm"
    with pytest.raises(InputError, match="--sample-break-mode: found eos, expected one of"):
        read_command_line(["data", "--sample-break-mode", "eos"])


@pytest.mark.parametrize("flag", FAIRSEQ_REPLACEMENTS)
def test_flags_that_would_change_something_are_explained(flag: str) -> None:
    known = {*flags(read_command_line(["data"])), *flags(read_command_line(["data", "--arch", "awd_lstm"]))}
    assert flag not in known
    with pytest.raises(InputError) as raised:
        read_command_line(["data", flag, "1"])
    named = {word.strip(",;:()") for word in str(raised.value).split() if word.startswith("--")} - {flag}
    assert named <= {*known, "--no-tie-weights"}


def test_no_guess_leads_to_the_loss_of_a_run() -> None:
    for flag in ("--restor", "--restarts", "--re-start", "--reset-stream"):
        with pytest.raises(InputError) as raised:
            read_command_line(["data", flag])
        assert "--restart?" not in str(raised.value)
        assert "--reset-streams?" not in str(raised.value)


@pytest.mark.parametrize("more", [(), ("--bptt-chunks", "3"), ("--update-freq", "2")], ids=str)
def test_epochs_alone_are_the_length_of_the_schedule(corpus: str, tmp_path: Path, more: tuple[str, ...]) -> None:
    entries = ran(corpus, tmp_path / "run", "--max-epoch", "2", *more)
    rates = [entry["lr"] for entry in entries if entry["split"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 * rates[0]
    stopped = checkpoints.read(tmp_path / "run" / LAST)["progress"]["stopped"]
    assert stopped == "the end of epoch 2 (--max-epoch)"


def test_another_dropout_when_a_run_goes_on(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran(corpus, tmp_path / "run", "--max-update", "3")
    capsys.readouterr()
    ran(corpus, tmp_path / "run", "--max-update", "6", "--dropout", "0.1", "--weight-drop", "0.2")
    printed = capsys.readouterr()
    assert "--dropout 0.1 from now on, 0.4 so far" in printed.out + printed.err
    last = checkpoints.read(tmp_path / "run" / LAST)
    assert (last["progress"]["update"], last["config"]["model"]["dropout"]) == (6, 0.1)
    with pytest.raises(InputError, match="holds a run with d_hidden 16, the settings say 20"):
        ran(corpus, tmp_path / "run", "--max-update", "9", "--d-hidden", "20")


@pytest.mark.parametrize("model", [LSTM, XL], ids=["lstm", "xl"])
def test_a_new_run_from_weights_alone(corpus: str, tmp_path: Path, model: str) -> None:
    before = ran(corpus, tmp_path / "first", "--max-update", "40", model=model)
    weights = checkpoints.load_checkpoint(tmp_path / "first" / BEST)
    converted = tmp_path / "converted.pt"
    checkpoints.write(converted, checkpoints.weights_only_checkpoint(weights.model, weights.vocabulary))
    for source in (tmp_path / "first" / BEST, converted):
        folder = tmp_path / f"from-{source.name}"
        arguments = ("--finetune-from-model", str(source), "--dropout", "0", "--optimizer", "sgd")
        after = ran(corpus, folder, *arguments, "--lr", "1e-12", "--max-update", "1", model=model)
        best = min(entry["loss"] for entry in before if entry["split"] == "valid")
        last = next(entry for entry in reversed(after) if entry["split"] == "valid")
        assert (last["step"], last["loss"]) == (1, pytest.approx(best, abs=1e-6))
        # The same command goes on with its own run, not with those weights again.
        ran(corpus, folder, *arguments, "--lr", "0.1", "--max-update", "3", model=model)
        assert checkpoints.read(folder / LAST)["progress"]["update"] == 3
        assert not torch.equal(
            next(checkpoints.load_checkpoint(folder / LAST).model.parameters()), next(weights.model.parameters())
        )
    size = "--d-inner" if model == XL else "--d-hidden"
    with pytest.raises(InputError, match=f"found a model of other settings, expected these flags: {size} 16"):
        ran(corpus, tmp_path / "other", "--finetune-from-model", str(converted), size, "24", model=model)
    assert not (tmp_path / "other").exists()


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path, corpus: str, program: Program) -> None:
    ran(corpus, tmp_path / "first", "--max-update", "1")
    (tmp_path / "text").write_text("a b c\n" * 30)
    program("prepare", "--trainpref", "text", "--destdir", "data", "--nwordssrc", 40)
    with pytest.raises(InputError, match=r"found (another vocabulary|a model of other settings)"):
        ran(str(tmp_path / "data"), tmp_path / "run", "--finetune-from-model", str(tmp_path / "first" / LAST))


def test_a_preset_tests_where_there_is_something_to_test_on(
    tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("a b c d\n" * 50)
    program("prepare", "--trainpref", "text", "--destdir", "data")
    os.rename("data/train.bin", "data/dev.bin")
    os.rename("data/train.idx", "data/dev.idx")
    program("prepare", "--trainpref", "text", "--destdir", "data", "--srcdict", "data/dict.txt")
    entries = ran("data", tmp_path / "run", "--test", "--max-update", "2", "--valid-subset", "dev")
    printed = capsys.readouterr()
    assert "data: no test split, so --test has no effect" in printed.out + printed.err
    assert "test" not in json.loads((tmp_path / "run" / "results.json").read_text())
    assert [entry["step"] for entry in entries if entry["split"] == "valid"] == [2]


def job(corpus: str, save_dir: Path, *more: str) -> subprocess.Popen[str]:
    words = [corpus, *LSTM.split(), *RUN.split(), "--save-dir", str(save_dir), "--distributed-world-size", "2", *more]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "pytbptt.train", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )


def test_several_processes_without_torchrun(corpus: str, tmp_path: Path) -> None:
    whole = job(corpus, tmp_path / "run", "--max-update", "12")
    refused = job(corpus, tmp_path / "refused", "--reset-on", "no-symbol")
    _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors
    assert "starting 2 processes" in errors
    found = checkpoints.read(tmp_path / "run" / LAST)
    assert (found["loader"]["streams"], len(found["rng"]), found["progress"]["update"]) == (8, 2, 12)
    _, errors = refused.communicate(timeout=200)
    assert refused.returncode == 2
    assert errors.count("no-symbol") == 1, errors


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(corpus: str, tmp_path: Path, number: signal.Signals) -> None:
    starter = job(corpus, tmp_path / "run", "--max-update", "1000000", "--save-interval-updates", "1")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    starter.send_signal(number)
    _, errors = starter.communicate(timeout=200)  # until nobody holds its output: each of the three does
    assert starter.returncode == (0 if number == signal.SIGTERM else -number), errors
    assert checkpoints.read(tmp_path / "run" / LAST)["progress"]["update"] > 0


def test_as_many_processes_as_gpus(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setenv("WORLD_SIZE", "8")  # of several machines: torchrun's processes are more than the GPUs here
    train_program.launch_or_train(read_command_line([corpus, *LSTM.split(), "--distributed-world-size", "8"]))
    assert started.pop() == 1
    with pytest.raises(InputError, match="--distributed-world-size: found 4, but WORLD_SIZE says 8"):
        train_program.launch_or_train(read_command_line([corpus, *LSTM.split(), "--distributed-world-size", "4"]))
