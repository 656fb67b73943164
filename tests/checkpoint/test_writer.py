"""Checkpoints are saved in the background, old ones are removed, and one run at a time writes to a folder."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.checkpoint import BEST_CHECKPOINT, LAST_CHECKPOINT, writer
from pytbptt.checkpoint.writer import AsyncCheckpointWriter, run_lock
from pytbptt.errors import InputError, RunError


def checkpoint(update: int) -> dict[str, object]:
    return {
        **{key: None for key in checkpoints.REQUIRED_KEYS},
        "format": checkpoints.FORMAT_VERSION,
        "progress": {"update": update},
    }


def updates_in(folder: Path) -> dict[str, int]:
    return {path.name: checkpoints.read(path)["progress"]["update"] for path in folder.glob("*.pt")}


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_keep_last_limits_old_checkpoints(tmp_path: Path, keep_last: int) -> None:
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, keep_last)
    for update in (5, 10, 15, 20, 100):
        checkpoint_writer.save(BEST_CHECKPOINT if update == 15 else LAST_CHECKPOINT, checkpoint(update))
    checkpoint_writer.wait()
    older = {f"checkpoint_{update}.pt": update for update in [20, 10, 5][:keep_last]}
    assert updates_in(tmp_path) == {LAST_CHECKPOINT: 100, BEST_CHECKPOINT: 15, **older}
    assert checkpoint_writer.last_update == 100
    checkpoint_writer.remove_all()
    assert updates_in(tmp_path) == {}
    checkpoint_writer.close()


def test_resume_from_older_checkpoint_discards_newer(tmp_path: Path) -> None:
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, 2)
    for update in (5, 10, 15):
        checkpoint_writer.save(LAST_CHECKPOINT, checkpoint(update))
    checkpoint_writer.wait()
    checkpoint_writer.resume_from(tmp_path / "checkpoint_5.pt", 5)
    for update in (7, 9):
        checkpoint_writer.save(LAST_CHECKPOINT, checkpoint(update))
    checkpoint_writer.wait()
    assert updates_in(tmp_path) == {LAST_CHECKPOINT: 9, "checkpoint_7.pt": 7, "checkpoint_5.pt": 5}
    checkpoint_writer.close()


def test_kept_checkpoint_does_not_share_an_inode(tmp_path: Path) -> None:
    """Damage to the last checkpoint must not reach the one to fall back to."""
    checkpoint_writer = AsyncCheckpointWriter(tmp_path, 1)
    for update in (5, 10):
        checkpoint_writer.save(LAST_CHECKPOINT, checkpoint(update))
    checkpoint_writer.close()
    with open(tmp_path / LAST_CHECKPOINT, "r+b") as file:
        file.truncate(100)
    assert checkpoints.read(tmp_path / "checkpoint_5.pt")["progress"]["update"] == 5


def test_saving_is_asynchronous_and_uses_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def write_later(path: Path, content: dict[str, object]) -> None:
        assert may_write.wait(20)
        checkpoints.write(path, content)

    monkeypatch.setattr(writer, "write", write_later)
    checkpoint_writer, weight = AsyncCheckpointWriter(tmp_path, 1), torch.ones(3)
    checkpoint_writer.save(LAST_CHECKPOINT, {**checkpoint(1), "model": {"weight": weight}})
    weight.zero_()  # as the next update
    checkpoint_writer.raise_if_failed()
    may_write.set()
    checkpoint_writer.wait()
    assert checkpoints.read(tmp_path / LAST_CHECKPOINT)["model"]["weight"].tolist() == [1, 1, 1]
    checkpoint_writer.close()


def test_write_error_is_raised_once(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    checkpoint_writer = AsyncCheckpointWriter(folder, 0)
    checkpoint_writer.save(LAST_CHECKPOINT, checkpoint(1))
    with pytest.raises(RunError, match="could not save"):
        checkpoint_writer.wait()
    checkpoint_writer.raise_if_failed()
    folder.mkdir()
    checkpoint_writer.save(LAST_CHECKPOINT, checkpoint(2))
    checkpoint_writer.wait()
    assert updates_in(folder) == {LAST_CHECKPOINT: 2}
    checkpoint_writer.close()


def test_second_run_in_folder_is_refused(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from pytbptt.checkpoint.writer import run_lock
with run_lock(Path({str(tmp_path)!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(InputError, match=rf"another run writing there \(process {process.pid}\)"),
            run_lock(tmp_path),
        ):
            pass
        process.kill()
    with run_lock(tmp_path):  # the lock is released when its process ends
        assert (tmp_path / writer.LOCK).read_text() == str(os.getpid())
