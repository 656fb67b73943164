"""What is in a run's folder while it goes on, and who may write there."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint import BEST, LAST, writer
from pytbptt.checkpoint.writer import AsyncCheckpointWriter, run_lock
from pytbptt.errors import InputError, RunError


def checkpoint(update: int) -> dict[str, object]:
    return {**{key: None for key in checkpoints.KEYS}, "format": checkpoints.FORMAT, "progress": {"update": update}}


def updates_in(folder: Path) -> dict[str, int]:
    return {path.name: checkpoints.read(path)["progress"]["update"] for path in folder.glob("*.pt")}


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_so_many_former_checkpoints_are_kept_as_asked(tmp_path: Path, keep_last: int) -> None:
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, keep_last)
    for update in (5, 10, 15, 20, 100):
        checkpoint_writer.save(BEST if update == 15 else LAST, checkpoint(update))
    checkpoint_writer.wait()
    former = {f"checkpoint_{update}.pt": update for update in [20, 10, 5][:keep_last]}
    assert updates_in(tmp_path) == {LAST: 100, BEST: 15, **former}
    assert checkpoint_writer.last_update == 100
    checkpoint_writer.remove_all()
    assert updates_in(tmp_path) == {}
    checkpoint_writer.close()


def test_going_on_from_an_earlier_one_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, 2)
    for update in (5, 10, 15):
        checkpoint_writer.save(LAST, checkpoint(update))
    checkpoint_writer.wait()
    checkpoint_writer.resume_from(tmp_path / "checkpoint_5.pt", 5)
    for update in (7, 9):
        checkpoint_writer.save(LAST, checkpoint(update))
    checkpoint_writer.wait()
    assert updates_in(tmp_path) == {LAST: 9, "checkpoint_7.pt": 7, "checkpoint_5.pt": 5}
    checkpoint_writer.close()


def test_a_former_checkpoint_is_another_file(tmp_path: Path) -> None:
    """What damages the last one must not damage the one to fall back to."""
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, 1)
    for update in (5, 10):
        checkpoint_writer.save(LAST, checkpoint(update))
    checkpoint_writer.close()
    with open(tmp_path / LAST, "r+b") as file:
        file.truncate(100)
    assert checkpoints.read(tmp_path / "checkpoint_5.pt")["progress"]["update"] == 5


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def slow(path: Path, content: dict[str, object]) -> None:
        assert go_on.wait(20)
        checkpoints.write(path, content)

    monkeypatch.setattr(writer, "write", slow)
    checkpoint_writer, weight = AsyncCheckpointWriter(tmp_path, 1), torch.ones(3)
    checkpoint_writer.save(LAST, {**checkpoint(1), "model": {"weight": weight}})
    weight.zero_()  # the next update
    checkpoint_writer.check()
    go_on.set()
    checkpoint_writer.wait()
    assert checkpoints.read(tmp_path / LAST)["model"]["weight"].tolist() == [1, 1, 1]
    checkpoint_writer.close()


def test_a_checkpoint_that_could_not_be_written_is_reported_once(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    checkpoint_writer = AsyncCheckpointWriter(folder, 0)
    checkpoint_writer.save(LAST, checkpoint(1))
    with pytest.raises(RunError, match="could not save"):
        checkpoint_writer.wait()
    checkpoint_writer.check()
    folder.mkdir()
    checkpoint_writer.save(LAST, checkpoint(2))
    checkpoint_writer.wait()
    assert updates_in(folder) == {LAST: 2}
    checkpoint_writer.close()


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    hold = f"""
import sys
from pathlib import Path
from pytbptt.checkpoint.writer import run_lock
with run_lock(Path({str(tmp_path)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=rf"another run writing there \(process {other.pid}\)"), run_lock(tmp_path):
            pass
        other.kill()
    with run_lock(tmp_path):  # the lock dies with the process
        assert (tmp_path / writer.LOCK).read_text() == str(os.getpid())
