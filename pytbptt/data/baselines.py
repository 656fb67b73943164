"""Baselines for byte-level models, in bits per byte: gzip, xz and a bigram model."""

import lzma
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pytbptt.data.indexed import IndexedTokens
from pytbptt.data.vocabulary import Vocabulary
from pytbptt.errors import InputError

READ_SIZE = 1 << 22  # tokens
GZIP_FORMAT = 31  # zlib's code for its largest window inside a gzip header
FIRST_BYTE = len(Vocabulary.SPECIALS)


def text_bytes(tokens: IndexedTokens) -> int:
    """Number of text bytes in a byte corpus, excluding separators that prepare added."""
    return sum(len(text) for text in _texts(tokens))


def compressed_bits_per_byte(tokens: IndexedTokens) -> dict[str, float]:
    """Bits per byte that "gzip -9" and "xz -9" need for the text of a corpus of bytes."""
    gzip, xz = zlib.compressobj(9, zlib.DEFLATED, GZIP_FORMAT), lzma.LZMACompressor(preset=9)
    size, gzip_size, xz_size = 0, 0, 0
    for text in _texts(tokens):
        size += len(text)
        gzip_size += len(gzip.compress(text))
        xz_size += len(xz.compress(text))
    gzip_size += len(gzip.flush())
    xz_size += len(xz.flush())
    _require_text(tokens, size)
    return {"gzip -9": 8 * gzip_size / size, "xz -9": 8 * xz_size / size}


def order1_bits_per_byte(train: IndexedTokens, test: IndexedTokens) -> float:
    """Bits per byte of a bigram model of bytes on `test`; a baseline.

    It predicts every token (separators too, as a model must) from the one before, with the frequencies of `train`,
    add-one smoothed over the 256 bytes and `</s>`; the first token is predicted from `</s>`.
    """
    counts = _bigram_counts(train) + 1.0
    probability = counts / counts.sum(axis=1, keepdims=True)
    size = text_bytes(test)
    _require_text(test, size)
    return float(-(_bigram_counts(test) * np.log2(probability)).sum() / size)


def _bigram_counts(tokens: IndexedTokens) -> NDArray[np.float64]:
    """How often each of 257 symbols (</s> is 0, byte b is 1 + b) follows each (257, 257), the first one </s>."""
    _require_byte_vocabulary(tokens)
    counts, previous = np.zeros(257 * 257, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for start in range(0, len(tokens), READ_SIZE):
        ids = tokens[start : start + READ_SIZE].astype(np.int64)
        tokens.check_ids(ids, start)
        symbols = np.concatenate([previous, np.clip(ids - FIRST_BYTE + 1, 0, 256)])
        counts += np.bincount(257 * symbols[:-1] + symbols[1:], minlength=257 * 257)
        previous = symbols[-1:]
    return counts.reshape(257, 257).astype(np.float64)


def _texts(tokens: IndexedTokens) -> Iterator[bytes]:
    """Yields the text. `</s>` is dropped if documents are files, and becomes a newline if it replaced one."""
    _require_byte_vocabulary(tokens)
    eos_is_newline = tokens.text_format.documents in ("line", "blank")
    for start in range(0, len(tokens), READ_SIZE):
        ids = tokens[start : start + READ_SIZE].astype(np.int64)
        values = np.where(ids == Vocabulary.EOS, ord("\n"), ids - FIRST_BYTE) if eos_is_newline else ids - FIRST_BYTE
        yield values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes()


def _require_byte_vocabulary(tokens: IndexedTokens) -> None:
    if tokens.vocabulary.kind != "bytes":
        raise InputError(f"{tokens.prefix}: found a vocabulary of {tokens.vocabulary.kind}, expected one of bytes")


def _require_text(tokens: IndexedTokens, size: int) -> None:
    if size == 0:
        raise InputError(f"{tokens.bin_path}: found separators only, expected text")
