"""Open text files: plain, compressed, piped or with a byte order mark; reject archives and UTF-16."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import lzma
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Protocol

from pytbptt.errors import InputError
from pytbptt.runtime.atomic import warn_once
from pytbptt.runtime.extras import progress_bar

STANDARD_INPUT = Path("-")
READ_SIZE = 1 << 20  # bytes
SNIFFED_BYTES = 1 << 16  # bytes read to detect the file type
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!\x1a\x07": "a rar archive"}
TAR = (b"ustar", 257)  # and its offset
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins with the same


class Readable(Protocol):
    """Anything with read()."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""


@dataclass(frozen=True)
class TextFile:
    """A text: its `name` in messages, and the regular file at `path` that holds it, from `start` to `stop`."""

    name: str
    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.stop - self.start


@contextlib.contextmanager
def open_text(path: Path, folder: Path, *, as_bytes: bool = False) -> Iterator[TextFile]:
    """The text at `path`, "-" being the standard input, for as long as the context lasts.

    gzip, bzip2, xz and zstd are known by their content, whatever the file is called. What is compressed, or comes
    through a pipe, is written to a temporary file in `folder` first, which goes with the context.

    Args:
        path: a file, a pipe, or "-".
        folder: directory for the temporary file.
        as_bytes: accept any content, and keep a byte order mark; warn if it does not look like text.

    Raises:
        InputError: missing, unreadable, empty, damaged, an archive or UTF-16; zstd without the package zstandard.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    with contextlib.ExitStack() as stack:
        with _open(path) as stream:
            head = stream.peek(16)
            unpack = next((unpack for begins, unpack in COMPRESSIONS.items() if head.startswith(begins)), None)
            if unpack or path == STANDARD_INPUT or not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".text.tmp", delete=False) as file:
                    path = Path(file.name)
                    stack.callback(path.unlink)
                    _copy(_unpacked(name, stream, unpack) if unpack else _plain(stream), file, name)
        yield _text(name, path, as_bytes)


def _open(path: Path) -> BufferedReader:
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise InputError("standard input: found it closed, expected a text")
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if not path.exists():
        raise InputError(f"{path}: found no such file, expected a text file at exactly this path")
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise InputError(f"{path}: found something that is neither a regular file nor a pipe, expected a text file")
    try:
        return open(path, "rb")
    except PermissionError:
        raise InputError(f"{path}: found no permission to read, expected a readable file") from None


def _copy(pieces: Iterable[bytes], file: IO[bytes], name: str) -> None:
    with progress_bar(desc=f"reading {name}", unit="B", unit_scale=True, disable=None) as bar:
        for piece in pieces:
            file.write(piece)
            bar.update(len(piece))


def _text(name: str, path: Path, as_bytes: bool) -> TextFile:
    with open(path, "rb") as file:
        head = file.read(SNIFFED_BYTES)
        size = os.fstat(file.fileno()).st_size
    archive = next((kind for begins, kind in ARCHIVES.items() if head.startswith(begins)), "")
    if head.startswith(TAR[0], TAR[1]):
        archive = "a tar archive"
    start = 0 if as_bytes or not head.startswith(codecs.BOM_UTF8) else len(codecs.BOM_UTF8)
    if size == start:
        raise InputError(f"{name}: found an empty file, expected text")
    if archive and not as_bytes:
        raise InputError(f"{name}: found {archive}, expected text: unpack it first")
    if head.startswith(UTF_16) and not as_bytes:
        raise InputError(f"{name}: found UTF-16, expected UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    if archive or b"\0" in head:
        found = archive or "zero bytes, which no text has"
        warn_once(f"{name}: found {found}; using its bytes as they are")
    return TextFile(name, path, start, size)


def _plain(stream: Readable) -> Iterator[bytes]:
    while piece := stream.read(READ_SIZE):
        yield piece


def _unpacked(name: str, stream: IO[bytes], unpack: Callable[[IO[bytes]], Iterator[bytes]]) -> Iterator[bytes]:
    kind = unpack.__name__.lstrip("_")
    print(f"{name}: unpacking {kind}")
    pieces = unpack(stream)
    while True:
        try:
            piece = next(pieces, None)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{name}: found damaged or incomplete {kind} data ({error}), expected a whole file"
            ) from None
        if piece is None:
            return
        yield piece


def _gzip(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as file:
        yield from _plain(file)


def _bzip2(stream: IO[bytes]) -> Iterator[bytes]:
    with bz2.BZ2File(stream) as file:
        yield from _plain(file)


def _xz(stream: IO[bytes]) -> Iterator[bytes]:
    with lzma.LZMAFile(stream) as file:
        yield from _plain(file)


def _zstd(stream: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(
            "found zstd, expected the package zstandard to unpack it: pip install zstandard (the extra pytbptt[zstd])"
        ) from None
    frame: Any = None
    compressed = b""
    while compressed or (compressed := stream.read(READ_SIZE)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            piece = frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        yield piece
        compressed = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("its last frame does not end")


COMPRESSIONS: dict[bytes | tuple[bytes, ...], Callable[[IO[bytes]], Iterator[bytes]]] = {
    b"\x1f\x8b": _gzip,
    tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)): _bzip2,
    b"\xfd7zXZ\x00": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}
