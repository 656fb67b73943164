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
