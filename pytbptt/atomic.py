"""Files that appear whole or not at all, and the folders they are in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pytbptt.errors import InputError


def sync_directory(directory: Path) -> None:
    """Makes the renames done in ``directory`` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def make_folder(folder: Path, flag: str = "--save-dir") -> None:
    """Make a folder to write in, unless it is there.

    Raises:
        InputError: by the flag that names it, if that is impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"{flag}: {folder}: not writable")
