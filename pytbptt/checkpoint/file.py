"""Checkpoint files: written atomically, verified by a checksum, and loaded without running code from them.

A file is torch.save's output followed by FOOTER_MAGIC and a SHA-256 of everything before it. torch.load ignores the
trailer; without it a flipped bit would go unnoticed.
"""

import hashlib
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from pytbptt.checkpoint.contents import FORMAT_VERSION, REQUIRED_KEYS
from pytbptt.errors import InputError, RunError
from pytbptt.runtime.atomic import atomic_write

FOOTER_MAGIC = b"pytbptt\x00"


def write(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Save atomically: whatever happens, `path` is the old file or the whole new one.

    Raises:
        RunError: the disk is full or the folder cannot be written; the file that was there before is intact.
    """
    try:
        with atomic_write(path) as file:
            hashing = _HashingWriter(file)
            torch.save(dict(checkpoint), typing.cast(IO[bytes], hashing))
            file.write(FOOTER_MAGIC + hashing.digest.digest())
    except (OSError, RuntimeError) as error:
        # torch's zip writer raises a RuntimeError of its own, with the OSError as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        previous = f"; the previous checkpoint is intact: {path}" if path.exists() else ""
        raise RunError(f"could not save {path}: {reason}{previous}") from None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU.

    Raises:
        InputError: the file is missing, truncated or corrupt, contains code (which is never run), or is not a
            checkpoint of pytbptt.
    """
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a checkpoint of python -m pytbptt.train")
    if not _verify_checksum(path):
        raise InputError(
            f"{path}: found no valid checksum, expected one: truncated, corrupt, or not pytbptt's checkpoint"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost any type, depending on the file
        code = re.search(r"global:? ([\w.]+)", str(error), re.IGNORECASE)
        found = f"found code in the checkpoint ({code[1]})" if code else "found something else"
        raise InputError(f"{path}: {found}, expected tensors and values: refused") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= REQUIRED_KEYS:
        found = f"keys {sorted(checkpoint)}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise InputError(f"{path}: not a checkpoint of pytbptt: found {found}, expected {sorted(REQUIRED_KEYS)}")
    if checkpoint["format"] != FORMAT_VERSION:
        raise InputError(f"{path}: found checkpoint format {checkpoint['format']}, expected {FORMAT_VERSION}")
    return checkpoint


class _HashingWriter:
    """Writes to a file and hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _verify_checksum(path: Path) -> bool:
    """Whether the file ends with FOOTER_MAGIC and the SHA-256 of everything before it."""
    digest, length = hashlib.sha256(), len(FOOTER_MAGIC) + hashlib.sha256().digest_size
    remaining = path.stat().st_size - length
    with open(path, "rb") as file:
        while remaining > 0:
            block = file.read(min(remaining, 1 << 20))
            if not block:
                return False
            digest.update(block)
            remaining -= len(block)
        return file.read() == FOOTER_MAGIC + digest.digest()
