"""Files that appear whole or not at all, or that one process writes, and the folders they are in."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from pytbptt.errors import InputError

# What a lock that another process has says, by flock and by lockf; whatever else it says, there is no lock to be had.
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning to the standard error, the same one only once in a process."""
    print(f"warning: {message}", file=sys.stderr)


def sync_directory(directory: Path) -> None:
    """Makes the renames done in `directory` survive a power cut, where that can be had: Windows opens no folder, and
    SMB shares, some FUSE mounts and folders that may not be listed refuse."""
    if sys.platform == "win32":
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # a failing or full disk, not a lack
            raise
        warn_once(
            f"{directory}: found a folder that cannot be flushed to the disk ({error.strerror}); going on: after a "
            "power cut, files written last may be missing"
        )


def lock(file: IO[Any], *, inherited: bool = True) -> bool:
    """Take the lock on an open file that one process can have, until the file is closed; False if another has it.

    Where the file system has no locks (Lustre without flock, NFS without its lock service) True, with a warning.

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
    except ImportError as error:
        _warn_of_no_lock(file, str(error))
    except OSError as error:
        if error.errno in TAKEN:
            return False
        _warn_of_no_lock(file, str(error.strerror))
    return True


def _warn_of_no_lock(file: IO[Any], reason: str) -> None:
    folder = os.path.dirname(os.path.abspath(file.name))
    warn_once(
        f"{folder}: found no locks there ({reason}); going on without: see to it that no other process writes there"
    )


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
    """A file to write what shall be at `path`: when the context ends well it takes its place, else it is removed.

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
    """`replacing` for a content that is at hand."""
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
