"""Checkpoints that are written while training goes on."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from pytbptt.checkpoint import BEST, LAST, kept, snapshot, write
from pytbptt.errors import InputError
from pytbptt.runtime.atomic import lock, remove_open

LOCK = ".lock"


class Saver:
    """Writes the checkpoints of a run, one after another, in a thread of its own.

    Args:
        save_dir: where they go.
        keep_last: how many former last checkpoints to keep, as checkpoint_UPDATE.pt.
    """

    def __init__(self, save_dir: Path, keep_last: int) -> None:
        self.save_dir, self.keep_last = save_dir, keep_last
        self.last_update: int | None = None
        """The update of the checkpoint_last.pt that is there, if it is known to be whole."""
        self._writer = ThreadPoolExecutor(1, "pytbptt-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, name: str, checkpoint: dict[str, Any]) -> None:
        """Copy the contents and return; they are written to the file `name` while the caller goes on.

        Waits for the checkpoint before, if that is still being written.

        Raises:
            RunError: the checkpoint before could not be written.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, name, snapshot(checkpoint))

    def check(self) -> None:
        """Raise RunError if a checkpoint has turned out not to be writable; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            RunError: it could not be written; what was there before is intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def remove_all(self) -> None:
        """Remove every checkpoint of the folder."""
        for path in (self.save_dir / LAST, self.save_dir / BEST, *kept(self.save_dir).values()):
            path.unlink(missing_ok=True)

    def goes_on_from(self, path: Path, update: int) -> None:
        """What the run goes on from. Kept checkpoints of later updates, if there are any, are no part of it."""
        self.last_update = update if path.name == LAST else None
        for other, file in kept(self.save_dir).items():
            if other > update:
                file.unlink()

    def close(self) -> None:
        """Finish what is being written; its failure is not reported any more."""
        self._writer.shutdown()

    def _write(self, name: str, checkpoint: dict[str, Any]) -> None:
        path, update = self.save_dir / name, checkpoint["progress"]["update"]
        if name == LAST and self.keep_last and self.last_update not in (None, update):
            _keep(path, path.with_name(f"checkpoint_{self.last_update}.pt"))
        write(path, checkpoint)
        if name == LAST:
            self.last_update = update
            for old in list(kept(self.save_dir).values())[self.keep_last :]:
                old.unlink(missing_ok=True)


def _keep(path: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except FileNotFoundError:  # someone has removed it: nothing to keep
        return
    except OSError:  # a file system without links: the old file goes away a moment before the new one comes
        os.replace(path, name)


@contextlib.contextmanager
def alone_in(save_dir: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the context lasts, or until this process dies.

    Raises:
        InputError: another run is writing there.
    """
    path = save_dir / LOCK
    with open(path, "a+", encoding="ascii") as file:
        if not _locked(file, path):
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
            if os.listdir(save_dir) == [LOCK]:  # nothing has begun, so nothing stays
                with contextlib.suppress(PermissionError):  # what ended the run is to be said
                    remove_open([path], file.close)
            raise


def _locked(file: IO[str], path: Path) -> bool:
    """Whether the lock is ours now, and on the file that others would find."""
    try:
        return lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
