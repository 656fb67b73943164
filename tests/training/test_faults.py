"""What goes wrong on real machines, tried for real: nothing is lost, and one line says what happened."""

import os
import random
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from pytbptt.checkpoint import LAST, read
from pytbptt.checkpoint.writer import LOCK
from pytbptt.errors import InputError, RunError
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS, read_metrics
from pytbptt.training.run import train
from pytbptt.training.trainer import Trainer
from tests.processes import start
from tests.training.resumable import arguments, assert_same_run

pytestmark = pytest.mark.fault


def held_by(save_dir: Path, process: int | None) -> bool:
    """Whether the process is the one that writes in the folder."""
    return (save_dir / LOCK).exists() and (save_dir / LOCK).read_text() == str(process)


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["awd_lstm", "transformer_xl"])
def test_kills_at_random_moments_change_nothing(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], arch: str, kills: int
) -> None:
    """During saves as well: every second update saves. The first kill comes when there is something to lose, and the
    others within as long as that took, and half as long again: on a busy machine everything does.
    """
    draw, killed = random.Random(kills), tmp_path / "killed"
    often = ("--save-interval-updates", "2")
    words = arguments(corpus, arch, killed, *often)
    long = 0.0
    for _ in range(kills):
        program = start("train", *words)
        while program.process.is_alive() and not held_by(killed, program.process.pid):
            time.sleep(0.001)
        began = time.monotonic()
        if not long:
            while program.process.is_alive() and not ((killed / METRICS).exists() and read_metrics(killed / METRICS)):
                time.sleep(0.01)
            long = time.monotonic() - began
        else:
            program.process.join(draw.uniform(0.0, 1.5 * long))
        program.kill()
    train(read_command_line(words))
    assert_same_run(killed, alone(arch, *often))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(read_command_line(arguments(corpus, "awd_lstm", folder, "--max-update", "10")))
    limit = (folder / LAST).stat().st_size // 2
    ended = start("train", *arguments(corpus, "awd_lstm", folder), largest_file=limit).finish()
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"python -m pytbptt.train: could not save {folder / LAST}: File too large; the previous checkpoint is intact: "
        f"{folder / LAST}"
    )
    assert torch.load(folder / LAST, weights_only=True)["progress"]["update"] == 10


def test_a_folder_that_may_not_be_written_is_said_before_training(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # who may write everywhere; what others would be told
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="no permission to write"):
        train(read_command_line(arguments(corpus, "awd_lstm", tmp_path)))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_last_checkpoint_costs_only_the_updates_since_the_one_before(
    corpus: str, tmp_path: Path, alone: Callable[..., Path], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, constant = tmp_path / "run", ("--lr-scheduler", "constant")  # whatever --max-update is
    train(read_command_line(arguments(corpus, "transformer_xl", folder, *constant, "--max-update", "33")))
    content = bytearray((folder / LAST).read_bytes())
    if damage == "truncated":
        del content[-len(content) // 3 :]
    else:
        content[len(content) // 3] ^= 1
    (folder / LAST).write_bytes(content)
    capsys.readouterr()
    train(read_command_line(arguments(corpus, "transformer_xl", folder, *constant)))
    said = capsys.readouterr().err
    assert f"falling back to {folder / 'checkpoint_30.pt'}" in said
    assert f"resuming from update 30 in {folder}" in said
    assert_same_run(folder, alone("transformer_xl", *constant))


def test_data_that_are_touched_under_a_run_do_not_stop_it(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = Trainer.updates

    def touch_after_three(trainer: Trainer):  # type: ignore[no-untyped-def]
        chunks = updates(trainer)
        yield from islice(chunks, 3)
        os.utime(data / "train.bin", (1, 1))
        yield from chunks

    data = tmp_path / "data-bin"
    shutil.copytree(corpus, data)
    monkeypatch.setattr(Trainer, "updates", touch_after_three)
    train(read_command_line(arguments(str(data), "awd_lstm", tmp_path / "run", "--max-update", "6")))
    assert read(tmp_path / "run" / LAST)["progress"]["update"] == 6


def test_data_that_change_under_a_run_stop_it(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data-bin"
    data.mkdir()
    for path in Path(corpus).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    updates = Trainer.updates

    def truncate_after_three(trainer: Trainer):  # type: ignore[no-untyped-def]
        chunks = updates(trainer)
        yield from islice(chunks, 3)
        os.truncate(data / "train.bin", 100)
        yield from chunks

    monkeypatch.setattr(Trainer, "updates", truncate_after_three)
    words = arguments(str(data), "awd_lstm", tmp_path / "run", "--max-epoch", "5")
    with pytest.raises(RunError, match=r"train\.bin: the file changed while it was in use"):
        train(read_command_line(words))


def test_what_does_not_fit_names_what_would(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "update", out_of_memory)
    with pytest.raises(RunError) as raised:
        train(read_command_line(arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size", "9")))
    assert str(raised.value) == (
        "out of memory: --batch-size 9 x --tokens-per-sample 8 did not fit: --batch-size 3 --update-freq 6 computes "
        "the same with 1/3 of the activations; the last checkpoint is intact"
    )
