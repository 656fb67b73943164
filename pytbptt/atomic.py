"""Files that appear whole or not at all, or that one process writes, and the folders they are in."""

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from pytbptt.errors import InputError


def sync_directory(directory: Path) -> None:
    """Makes the renames done in ``directory`` survive a power cut, where a folder can be opened: not on Windows."""
    if sys.platform == "win32":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[Any], *, inherited: bool = True) -> bool:
    """Take the lock on an open file that one process can have, until the file is closed; False if another has it.

    Args:
        inherited: whether processes that this one forks have it too.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            place = file.tell()
            file.seek(1 << 30)  # the locked byte cannot be read: one that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(place)
        else:
            import fcntl

            (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_open(paths: Collection[Path], close: Callable[[], None]) -> None:
    """Remove files that this process may have open, those that are there, and close them.

    In this order where the system allows it: what is removed are then the files that are locked, and no other's.
    """
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except PermissionError:  # Windows keeps a file that is open
        close()
        for path in paths:
            path.unlink(missing_ok=True)
    close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write what shall be at ``path``: when the context ends well it takes its place, else it is removed.

    Readers see the old file or the new one, whatever happens in between.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """``replacing`` for a content that is at hand."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def folder_to_write(folder: Path, flag: str = "--save-dir") -> Iterator[None]:
    """A folder to write in, made unless it is there. Where the context ends by an error that came before anything was
    written, what was made for it is removed.

    Raises:
        InputError: by the flag that names it, if that is impossible.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {folder}: found {error.strerror}, expected a folder to write to") from None
    try:
        if not os.access(folder, os.W_OK):
            raise InputError(f"{flag}: {folder}: found it not writable, expected a folder to write to")
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for each in made:
                each.rmdir()
        raise
