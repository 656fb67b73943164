"""Writes token files in the memory-mapped indexed format (see `indexed.py`) piece by piece and atomically."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pytbptt.data.indexed import HEADER, MAGIC, VERSION, IndexFormat, check_index_format, dtype_code
from pytbptt.data.text_size import SIZE_SUFFIX
from pytbptt.errors import InputError
from pytbptt.runtime.atomic import fsync_directory, try_lock, unlink_and_close

COPY_SIZE = 1 << 20  # elements
MAX_SEQUENCE_LENGTH = 1 << 30  # tokens: a length is an int32


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; memory does not grow with the corpus.

    `add` and `end_document` append to temporary files; `finish` completes these and `publish` renames them,
    .bin before .idx, so that an .idx always matches the .bin beside it. As a context manager it does
    both at the end, or removes what it wrote if an exception passes.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, index_format: IndexFormat = "megatron") -> None:
        check_index_format(index_format)
        dtype_code(dtype)
        self.prefix, self.dtype, self.index_format = str(prefix), np.dtype(dtype), index_format
        self.tokens = self.sequences = self.documents = 0
        self._open_sequences = 0  # sequences of the document that has not ended yet
        self._temporary = {name: Path(f"{self.prefix}.{name}.tmp") for name in ("bin", "idx", "lengths", "documents")}
        self._files: dict[str, IO[bytes]] = {}
        try:
            for name in ("bin", "lengths", "documents"):
                self._files[name] = _open_locked(self._temporary[name])
            for file in self._files.values():
                file.truncate(0)  # truncate only once all are locked; another writer releases its .bin first
        except BaseException:
            self._close()
            raise
        self._files["documents"].write(np.zeros(1, "<i8").tobytes())

    def add(
        self, tokens: NDArray[Any], lengths: NDArray[Any] | None = None, ends: NDArray[np.bool_] | None = None
    ) -> None:
        """Appends tokens (k,) as sequences of `lengths` (n,), summing to k; without lengths as one sequence.

        `ends` (n,) marks the sequences that end their document.

        Raises:
            InputError: tokens that the dtype cannot hold.
        """
        if tokens.dtype != self.dtype:
            converted = tokens.astype(self.dtype)
            if not np.array_equal(converted, tokens):
                raise InputError(
                    f"{self.prefix}.bin: found ids from {tokens.min()} to {tokens.max()}, expected {self.dtype}"
                )
            tokens = converted
        if lengths is None:
            whole, rest = divmod(len(tokens), MAX_SEQUENCE_LENGTH)
            lengths = np.array([MAX_SEQUENCE_LENGTH] * whole + [rest] * (rest > 0 or whole == 0))
        self._files["bin"].write(tokens.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        self._files["lengths"].write(lengths.astype("<i4").tobytes())
        last = -1
        if ends is not None and ends.any():
            ending = np.flatnonzero(ends)
            last = int(ending[-1])
            self._files["documents"].write((ending + (self.sequences + 1)).astype("<i8").tobytes())
            self.documents += len(ending)
            self._open_sequences = 0
        self._open_sequences += len(lengths) - (last + 1)
        self.tokens += len(tokens)
        self.sequences += len(lengths)

    def end_document(self) -> None:
        """End the current document: all sequences since the last end_document, possibly none."""
        self._files["documents"].write(np.array([self.sequences], "<i8").tobytes())
        self.documents += 1
        self._open_sequences = 0

    def renumber(self, table: NDArray[Any], dtype: DTypeLike) -> None:
        """Replaces every token t written so far by `table[t]`; the file is of `dtype` from here on.

        Done in place, so `dtype` must not be wider than the current one.
        """
        old, self.dtype = self.dtype, np.dtype(dtype)
        if self.dtype.itemsize > old.itemsize:
            raise InputError(f"renumber: found {self.dtype}, expected nothing wider than {old}")
        file, table = self._files["bin"], table.astype(self.dtype.newbyteorder("<"))
        file.flush()
        for start in range(0, self.tokens, COPY_SIZE):
            file.seek(start * old.itemsize)
            ids = np.frombuffer(file.read(COPY_SIZE * old.itemsize), dtype=old.newbyteorder("<"))
            file.seek(start * self.dtype.itemsize)
            file.write(table[ids].tobytes())
        file.truncate(self.tokens * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)

    def finish(self) -> None:
        """Completes both files, on disk but still under temporary names."""
        if self._open_sequences:
            self.end_document()
        with open(self._temporary["idx"], "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, dtype_code(self.dtype), self.sequences))
            if self.index_format == "megatron":
                index.write(struct.pack("<Q", self.documents + 1))
            for lengths in _iter_arrays(self._files["lengths"], "<i4"):
                index.write(lengths.tobytes())
            position = 0
            for lengths in _iter_arrays(self._files["lengths"], "<i4"):
                ends = position + np.cumsum(lengths.astype("<i8") * self.dtype.itemsize)
                index.write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
                position = int(ends[-1])
            if self.index_format == "megatron":
                for documents in _iter_arrays(self._files["documents"], "<i8"):
                    index.write(documents.tobytes())
            index.flush()
            os.fsync(index.fileno())
        self._files["bin"].flush()
        os.fsync(self._files["bin"].fileno())

    def publish_bin(self) -> None:
        """Rename the finished .bin into place, after removing the .idx and .size.json of an earlier corpus."""
        for name in (".idx", SIZE_SUFFIX):
            Path(self.prefix + name).unlink(missing_ok=True)
        self._files.pop("bin").close()  # Windows cannot rename an open file
        os.replace(self._temporary.pop("bin"), self.prefix + ".bin")

    def publish_idx(self) -> None:
        """Rename the finished .idx into place, which completes the corpus."""
        os.replace(self._temporary.pop("idx"), self.prefix + ".idx")
        fsync_directory(Path(self.prefix).parent)
        self.discard()

    def publish(self) -> None:
        """Rename both finished files into place."""
        self.publish_bin()
        self.publish_idx()

    def discard(self) -> None:
        """Remove the remaining temporary files; does nothing after `publish`."""
        if self._files:
            unlink_and_close(self._temporary.values(), self._close)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self.finish()
                self.publish()
        finally:
            self.discard()


def write_indexed(
    prefix: str | Path,
    documents: Iterable[NDArray[Any] | Sequence[NDArray[Any]]],
    dtype: DTypeLike,
    index_format: IndexFormat = "megatron",
) -> None:
    """Writes a corpus: every document is an array of tokens, or a list of arrays (its sequences).

    No separators are added. The "fairseq" format stores sequences but not document boundaries.

    Raises:
        InputError: tokens that `dtype` cannot hold.
    """
    with IndexedWriter(prefix, dtype, index_format) as writer:
        for document in documents:
            for sequence in [document] if isinstance(document, np.ndarray) else document:
                writer.add(np.asarray(sequence))
            writer.end_document()


def _open_locked(path: Path) -> IO[bytes]:
    """Open a temporary file read-write without truncating it; raises if another process has locked it.

    The lock is a record lock: it dies with the process and is not inherited by the workers of preparation.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
    if not try_lock(file, inherited=False):
        file.close()
        raise InputError(f"{path}: found another process writing it, expected to be the only one")
    return file


def _iter_arrays(file: IO[bytes], dtype: str) -> Iterable[NDArray[Any]]:
    file.flush()
    file.seek(0)
    while data := file.read(COPY_SIZE * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype=dtype)
