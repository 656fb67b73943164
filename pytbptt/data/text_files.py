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


class SupportsRead(Protocol):
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
def open_text(path: Path, temp_dir: Path, *, binary: bool = False) -> Iterator[TextFile]:
    """Context manager: the text at `path`, or the standard input if that is "-".

    gzip, bzip2, xz and zstd are detected by their content, not by the file name. Compressed and piped text is written
    to a temporary file in `temp_dir` first, which is removed on exit.

    Args:
        path: a file, a pipe, or "-".
        temp_dir: directory for the temporary file.
        binary: accept any content, and keep a byte order mark; warn if it does not look like text.

    Raises:
        InputError: missing, unreadable, empty, damaged, an archive or UTF-16; zstd without the package zstandard.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    with contextlib.ExitStack() as stack:
        with _open(path) as stream:
            head = stream.peek(16)
            decompressor = next(
                (decompressor for magic, decompressor in COMPRESSIONS.items() if head.startswith(magic)), None
            )
            if decompressor or path == STANDARD_INPUT or not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                with tempfile.NamedTemporaryFile(dir=temp_dir, prefix=".", suffix=".text.tmp", delete=False) as file:
                    path = Path(file.name)
                    stack.callback(path.unlink)
                    _copy(_decompress(name, stream, decompressor) if decompressor else _iter_chunks(stream), file, name)
        yield _text_file(name, path, binary)


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


def _copy(chunks: Iterable[bytes], file: IO[bytes], name: str) -> None:
    with progress_bar(desc=f"reading {name}", unit="B", unit_scale=True, disable=None) as bar:
        for chunk in chunks:
            file.write(chunk)
            bar.update(len(chunk))


def _text_file(name: str, path: Path, binary: bool) -> TextFile:
    with open(path, "rb") as file:
        head = file.read(SNIFFED_BYTES)
        size = os.fstat(file.fileno()).st_size
    archive = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), "")
    if head.startswith(TAR[0], TAR[1]):
        archive = "a tar archive"
    start = 0 if binary or not head.startswith(codecs.BOM_UTF8) else len(codecs.BOM_UTF8)
    if size == start:
        raise InputError(f"{name}: found an empty file, expected text")
    if archive and not binary:
        raise InputError(f"{name}: found {archive}, expected text: unpack it first")
    if head.startswith(UTF_16) and not binary:
        raise InputError(f"{name}: found UTF-16, expected UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    if archive or b"\0" in head:
        found = archive or "zero bytes, which no text has"
        warn_once(f"{name}: found {found}; using its bytes as they are")
    return TextFile(name, path, start, size)


def _iter_chunks(stream: SupportsRead) -> Iterator[bytes]:
    while chunk := stream.read(READ_SIZE):
        yield chunk


def _decompress(name: str, stream: IO[bytes], decompressor: Callable[[IO[bytes]], Iterator[bytes]]) -> Iterator[bytes]:
    compression = decompressor.__name__.lstrip("_")
    print(f"{name}: unpacking {compression}")
    chunks = decompressor(stream)
    while True:
        try:
            chunk = next(chunks, None)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{name}: found damaged or incomplete {compression} data ({error}), expected a whole file"
            ) from None
        if chunk is None:
            return
        yield chunk


def _gzip(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream) as file:
        yield from _iter_chunks(file)


def _bzip2(stream: IO[bytes]) -> Iterator[bytes]:
    with bz2.BZ2File(stream) as file:
        yield from _iter_chunks(file)


def _xz(stream: IO[bytes]) -> Iterator[bytes]:
    with lzma.LZMAFile(stream) as file:
        yield from _iter_chunks(file)


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
            chunk = frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        yield chunk
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
