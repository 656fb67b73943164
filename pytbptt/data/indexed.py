"""Reads token files in the memory-mapped indexed format (magic MMIDIDX) of fairseq and Megatron-LM.

PREFIX.bin is the tokens one after another. PREFIX.idx is, little-endian: the magic (9 bytes), version 1 (uint64), a
code for the tokens' dtype (uint8) and n, the number of sequences (uint64); in Megatron's dialect d, the number of
document entries (uint64); then n lengths in tokens (int32), n offsets in bytes (int64), in Megatron's dialect d
sequence numbers at which documents begin, the last one being n (int64), and perhaps n modes (int8, not used here).
"""

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pytbptt.data.text_format import RESET_AT_DOCUMENTS, RESET_AUTO, RESET_NEVER, TextFormat
from pytbptt.data.vocabulary import DICTIONARY, Vocabulary
from pytbptt.errors import InputError, RunError
from pytbptt.runtime.renamed import Renamed

IndexFormat = Literal["megatron", "fairseq"]

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"  # fairseq's lazy and cached data sets
VERSION = 1
HEADER = struct.Struct("<9sQBQ")  # magic, version, dtype code, n: common to both dialects (26 bytes)
# fairseq's codes 9 and 10 are unknown to Megatron; 6 and 7 are floats, in neither case tokens.
DTYPES = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        8: "uint16",
        9: "uint32",
        10: "uint64",
    }.items()
}
CHECK_SIZE = 1 << 20  # sequences checked at a time
# A fingerprint hashes this many evenly spaced samples of the .bin, of this many bytes each.
FINGERPRINT_SAMPLES, FINGERPRINT_SAMPLE_BYTES = 16, 1 << 14


class Runs(NamedTuple):
    """Maps corpus ranges into a batch (B, T): tokens starts[k] … starts[k] + lengths[k] go to row rows[k], from column
    columns[k]. All four are (K,) int64."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The dtype that fairseq and Megatron write: uint16 up to 65,499 types, int32 above."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def dtype_code(dtype: DTypeLike) -> int:
    """The format's code for an integer dtype; InputError for any other."""
    for code, known in DTYPES.items():
        if known == np.dtype(dtype):
            return code
    raise InputError(f"dtype: found {np.dtype(dtype)}, expected an integer type")


class IndexedTokens:
    """A corpus on disk: `len(tokens)` tokens, `tokens[a:b]` an array of some of them, in the file's dtype.

    Opened by memory map, so nothing is read before it is used.

    Raises:
        InputError: a missing, truncated or inconsistent .bin or .idx, or a wrong magic, version or dtype; the message
            names the file.
    """

    def __init__(
        self, prefix: str | Path, vocabulary: Vocabulary | None = None, text_format: TextFormat | None = None
    ) -> None:
        self.prefix = str(prefix)
        self._text_format = TextFormat() if text_format is None else text_format
        self.bin_path = Path(self.prefix + ".bin")
        self.idx_path = Path(self.prefix + ".idx")
        self._vocabulary = vocabulary
        self._limit = np.iinfo(np.int64).max if vocabulary is None else len(vocabulary)
        idx_size, bin_size = _size(self.idx_path), _size(self.bin_path)
        self._read_header(idx_size)
        self.dtype = DTYPES[self._code]
        self._check_sequences()
        if bin_size != self._bytes:
            raise InputError(f"{self.bin_path}: found {bin_size} bytes, expected {self._bytes} by {self.idx_path.name}")
        if bin_size == 0:
            raise InputError(f"{self.bin_path}: found no tokens, expected at least one")
        self._file = open(self.bin_path, "rb")  # noqa: SIM115 - must stay open while the memory map is used
        self._tokens = np.asarray(np.memmap(self._file, dtype=self.dtype, mode="r"))
        self._known_size_and_mtime = self._size_and_mtime()
        self._fingerprint = self._compute_fingerprint()

    def _read_header(self, idx_size: int) -> None:
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size + 8)
        if header.startswith(LEGACY_MAGIC):
            raise InputError(
                f"{self.idx_path}: found fairseq's older index (--dataset-impl lazy or cached), expected mmap: prepare "
                "the text again, by python -m pytbptt.prepare or by fairseq-preprocess --dataset-impl mmap"
            )
        if len(header) < HEADER.size:
            raise InputError(f"{self.idx_path}: found {idx_size} bytes, expected at least {HEADER.size}: truncated")
        magic, version, code, n = HEADER.unpack_from(header)
        if magic != MAGIC:
            raise InputError(f"{self.idx_path}: found magic {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise InputError(f"{self.idx_path}: found version {version}, expected {VERSION}")
        if code not in DTYPES:
            raise InputError(f"{self.idx_path}: found dtype code {code}, expected one of {sorted(DTYPES)} (integers)")
        self._code, self._sequences = code, n
        fairseq = HEADER.size + 12 * n
        candidates = {fairseq: (HEADER.size, 0)}
        if len(header) == HEADER.size + 8:
            (d,) = struct.unpack_from("<Q", header, HEADER.size)
            if d >= 1:  # in fairseq's dialect these eight bytes are lengths
                candidates[fairseq + 8 + 8 * d] = (HEADER.size + 8, d)
                candidates[fairseq + 8 + 8 * d + n] = (HEADER.size + 8, d)
        if idx_size not in candidates:
            raise InputError(
                f"{self.idx_path}: found {idx_size} bytes, expected {fairseq} (fairseq) or "
                f"{fairseq + 8}+8d (+{n} with modes; Megatron, d document entries) for {n} sequences"
            )
        self._start, self._document_entries = candidates[idx_size]
        self.has_document_index = self._document_entries > 0

    def _array(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.asarray(np.memmap(self.idx_path, dtype=dtype, mode="r", offset=offset, shape=(count,)))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every sequence (n,): what a sequence is (line, sentence, document) depends on the program that
        wrote the file."""
        return self._array("<i4", self._start, self._sequences)

    def _pointers(self) -> NDArray[np.int64]:
        return self._array("<i8", self._start + 4 * self._sequences, self._sequences)

    def _check_sequences(self) -> None:
        lengths, pointers, position = self.lengths, self._pointers(), 0
        for start in range(0, self._sequences, CHECK_SIZE):
            sizes = lengths[start : start + CHECK_SIZE].astype(np.int64)
            if sizes.min() < 0:
                index = start + int(np.argmax(sizes < 0))
                raise InputError(
                    f"{self.idx_path}: found a length of {lengths[index]} at sequence {index}, expected 0+"
                )
            ends = position + np.cumsum(sizes * self.dtype.itemsize)
            expected = np.concatenate([[position], ends[:-1]])
            found = pointers[start : start + CHECK_SIZE]
            if not np.array_equal(found, expected):
                at = int(np.argmax(found != expected))
                raise InputError(
                    f"{self.idx_path}: found sequence {start + at} at byte {found[at]}, expected {expected[at]} "
                    "by the lengths before it"
                )
            position = int(ends[-1])
        self._bytes = position

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """The token at which every document starts, strictly increasing from 0 (documents,).

        A file without a document index is one document. Documents without tokens are left out.
        """
        if not self.has_document_index:
            return np.zeros(1, dtype=np.int64)
        offset = self._start + 12 * self._sequences
        entries = self._array("<i8", offset, self._document_entries).astype(np.int64)
        if entries[0] != 0 or entries[-1] > self._sequences or (np.diff(entries) < 0).any():
            raise InputError(
                f"{self.idx_path}: found document entries from {entries[0]} to {entries[-1]}, expected them to rise "
                f"from 0 to at most {self._sequences}"
            )
        pointers = np.append(self._pointers(), self._bytes)
        starts: NDArray[np.int64] = np.unique(pointers[entries] // self.dtype.itemsize).astype(np.int64)
        return starts[starts < len(self)]

    @property
    def text_format(self) -> TextFormat:
        """The text format, with reset_on "auto" resolved to "document" if the index has documents, else "none"."""
        if self._text_format.reset_on != RESET_AUTO:
            return self._text_format
        return self._text_format.with_reset_on(RESET_AT_DOCUMENTS if self.has_document_index else RESET_NEVER)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the corpus was opened with; InputError if there was none."""
        if self._vocabulary is None:
            raise InputError(f"{self.prefix}: found no vocabulary, expected one ({DICTIONARY} in the data's directory)")
        return self._vocabulary

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[index]

    def __array__(self, dtype: DTypeLike = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._tokens, dtype=dtype) if copy else np.asarray(self._tokens, dtype=dtype)

    def __repr__(self) -> str:
        return f"IndexedTokens({self.prefix!r}, {len(self)} tokens)"

    def read(self, runs: Runs, out: NDArray[Any]) -> None:
        """Copies the given runs into `out` (B, T), an array of the corpus's dtype; other elements are unchanged.

        Raises:
            InputError: `out` then holds an id outside the vocabulary.
            RunError: the file changed since it was opened. (Reading a memory map of a truncated file would crash.)
        """
        if (size_and_mtime := self._size_and_mtime()) != self._known_size_and_mtime:
            if size_and_mtime[0] != self._bytes or self._compute_fingerprint() != self._fingerprint:
                raise RunError(f"{self.bin_path}: found it changed since it was opened, expected it unchanged")
            self._known_size_and_mtime = size_and_mtime  # only the mtime changed
        for start, length, row, column in zip(*(part.tolist() for part in runs), strict=True):
            out[row, column : column + length] = self._tokens[start : start + length]
        if not self._valid(out):
            for start, length, row, column in zip(*(part.tolist() for part in runs), strict=True):
                self.check_ids(out[row, column : column + length], start)

    check = Renamed("check_ids")

    def check_ids(self, ids: NDArray[Any], start: int) -> None:
        """Raises for ids (k,) outside the vocabulary, or negative if there is none; `start` is the position of the
        first id, for the message.

        Raises:
            InputError: names the first of them.
        """
        if self._valid(ids):
            return
        wrong = int(np.argmax((ids < 0) | (ids >= self._limit)))
        expected = "0 or more" if self._vocabulary is None else f"0 to {self._limit - 1}"
        raise InputError(f"{self.bin_path}: found id {ids[wrong]} at token {start + wrong}, expected {expected}")

    def _valid(self, ids: NDArray[Any]) -> bool:
        return bool(ids.max(initial=0) < self._limit and (ids.dtype.kind == "u" or ids.min(initial=0) >= 0))

    def _size_and_mtime(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())  # of the mapped file, even if the path now names another one
        return status.st_size, status.st_mtime_ns

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell corpora apart, from their sizes, header and samples of their tokens.

        Computed when the corpus was opened.
        """
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._bytes} {_size(self.idx_path)} ".encode())
        with open(self.idx_path, "rb") as file:
            digest.update(file.read(HEADER.size + 8))
        last, content = max(0, self._bytes - FINGERPRINT_SAMPLE_BYTES), self._tokens.view(np.uint8)
        for number in range(FINGERPRINT_SAMPLES):
            start = last * number // (FINGERPRINT_SAMPLES - 1)
            digest.update(content[start : start + FINGERPRINT_SAMPLE_BYTES].tobytes())
        return digest.hexdigest()[:16]


def check_index_format(index_format: str) -> None:
    """Checks the name of an index format.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    if index_format not in get_args(IndexFormat):
        raise InputError(f"index_format: found {index_format!r}, expected one of {', '.join(get_args(IndexFormat))}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected an indexed corpus") from None
