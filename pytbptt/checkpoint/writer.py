"""Writes checkpoints in a background thread while training continues."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from pytbptt.checkpoint import BEST_CHECKPOINT, LAST_CHECKPOINT, kept_checkpoints, snapshot, write
from pytbptt.errors import InputError
from pytbptt.runtime.atomic import try_lock, unlink_and_close

LOCK = ".lock"


class AsyncCheckpointWriter:
    """Writes the checkpoints of a run one after another in a background thread.

    Args:
        save_dir: the folder.
        keep_last: how many earlier last checkpoints to keep, as checkpoint_UPDATE.pt.
    """

    def __init__(self, save_dir: Path, keep_last: int) -> None:
        self.save_dir, self.keep_last = save_dir, keep_last
        self.last_update: int | None = None
        """The update of the folder's checkpoint_last.pt, if that is known to be undamaged."""
        self._writer = ThreadPoolExecutor(1, "pytbptt-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, name: str, checkpoint: dict[str, Any]) -> None:
        """Copy the contents, start writing them to the file `name`, and return.

        Waits for the previous checkpoint first, if it is still being written.

        Raises:
            RunError: the previous checkpoint could not be written.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, name, snapshot(checkpoint))

    def raise_if_failed(self) -> None:
        """Raise RunError if writing a checkpoint has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            RunError: it could not be written; the file that was there before is intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove_all(self) -> None:
        """Remove every checkpoint of the folder."""
        for path in (
            self.save_dir / LAST_CHECKPOINT,
            self.save_dir / BEST_CHECKPOINT,
            *kept_checkpoints(self.save_dir).values(),
        ):
            path.unlink(missing_ok=True)

    def resume_from(self, path: Path, update: int) -> None:
        """The run resumes from `path`, of the given update: removes kept checkpoints of later updates."""
        self.last_update = update if path.name == LAST_CHECKPOINT else None
        for kept_update, file in kept_checkpoints(self.save_dir).items():
            if kept_update > update:
                file.unlink()

    def close(self) -> None:
        """Finish writing; a failure is no longer reported."""
        self._writer.shutdown()

    def _write(self, name: str, checkpoint: dict[str, Any]) -> None:
        path, update = self.save_dir / name, checkpoint["progress"]["update"]
        if name == LAST_CHECKPOINT and self.keep_last and self.last_update not in (None, update):
            _rotate(path, path.with_name(f"checkpoint_{self.last_update}.pt"))
        write(path, checkpoint)
        if name == LAST_CHECKPOINT:
            self.last_update = update
            for old in list(kept_checkpoints(self.save_dir).values())[self.keep_last :]:
                old.unlink(missing_ok=True)


def _rotate(path: Path, kept_path: Path) -> None:
    """Keep the file at `path` as `kept_path`."""
    kept_path.unlink(missing_ok=True)
    try:
        os.link(path, kept_path)
    except FileNotFoundError:  # removed meanwhile: nothing to keep
        return
    except OSError:  # no hard links on this file system: for a moment there is no file at `path`
        os.replace(path, kept_path)


@contextlib.contextmanager
def run_lock(save_dir: Path) -> Iterator[None]:
    """Lock a folder against other runs for the block, or until this process dies.

    Raises:
        InputError: another run holds the lock.
    """
    path = save_dir / LOCK
    with open(path, "a+", encoding="ascii") as file:
        if not _acquire_lock(file, path):
            file.seek(0)
            raise InputError(
                f"{save_dir}: found another run writing there (process {file.read().strip() or 'unknown'}), "
                "expected to be the only one: stop it, or choose another --save-dir"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        except BaseException:
            if os.listdir(save_dir) == [LOCK]:  # the run failed before it wrote anything: leave no lock file behind
                with contextlib.suppress(PermissionError):  # the error that ended the run matters more
                    unlink_and_close([path], file.close)
            raise


def _acquire_lock(file: IO[str], path: Path) -> bool:
    """Try to lock the file; True if this process holds the lock and `path` still names that file."""
    try:
        return try_lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
