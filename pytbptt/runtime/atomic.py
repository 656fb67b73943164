"""Atomic writes, file locks, and output folders."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from pytbptt.errors import InputError

LOCKED_ERRNOS = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""Errors of flock and lockf if another process holds the lock; any other error means that locks are not supported."""


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning to the standard error, the same one only once in a process."""
    print(f"warning: {message}", file=sys.stderr)


def fsync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power failure, where the system can: Windows cannot open folders, and SMB
    shares, some FUSE mounts and folders without read permission refuse."""
    if sys.platform == "win32":
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # a failing or full disk, not a missing feature
            raise
        warn_once(
            f"{directory}: cannot flush this folder to the disk ({error.strerror}); continuing: after a power failure, "
            "the files written last may be missing"
        )


def try_lock(file: IO[Any], *, inherited: bool = True) -> bool:
    """Take an exclusive lock on an open file until it is closed; False if another process holds it.

    True, with a warning, where the file system has no locks (Lustre without flock, NFS without its lock service).

    Args:
        inherited: whether forked child processes hold the lock too.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            position = file.tell()
            file.seek(1 << 30)  # a locked byte cannot be read, so lock one beyond the content
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            file.seek(position)
        else:
            import fcntl

            (fcntl.flock if inherited else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError as error:
        _warn_of_no_lock(file, str(error))
    except OSError as error:
        if error.errno in LOCKED_ERRNOS:
            return False
        _warn_of_no_lock(file, str(error.strerror))
    return True


def _warn_of_no_lock(file: IO[Any], reason: str) -> None:
    folder = os.path.dirname(os.path.abspath(file.name))
    warn_once(f"{folder}: cannot lock files here ({reason}); continuing: make sure that no other process writes here")


def unlink_and_close(paths: Collection[Path], close: Callable[[], None]) -> None:
    """Remove files that this process has open and locked (if they exist), and close them.

    They are removed before they are closed where the system allows it: once the lock is released, a file of that name
    may be another process's.
    """
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except PermissionError:  # Windows cannot remove an open file
        close()
        for path in paths:
            path.unlink(missing_ok=True)
    close()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Write `path` by way of a temporary file, which is flushed and renamed when the block ends, or removed if the
    block raises.

    Readers see either the old file or the new one, even if the process is killed in between.
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
    fsync_directory(path.parent)


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """`atomic_write` of one bytes object."""
    with atomic_write(path) as file:
        file.write(content)


@contextlib.contextmanager
def writable_folder(folder: Path, flag: str = "--save-dir") -> Iterator[None]:
    """Create a folder to write to, if it does not exist; if the block raises before writing anything, remove it again.

    Raises:
        InputError: it cannot be created or written to; names `flag`.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {folder}: found {error.strerror}, expected a folder to write to") from None
    try:
        if not os.access(folder, os.W_OK):
            raise InputError(f"{flag}: {folder}: found no permission to write, expected a writable folder")
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for parent in created:
                parent.rmdir()
        raise
