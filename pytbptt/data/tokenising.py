"""Encoding of one block into token ids (words, bytes or BPE), run in worker processes."""

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytbptt.data.blocks import BLANK_LINES, Block
from pytbptt.data.text_format import DocumentUnit
from pytbptt.data.text_size import TextSize, measure_text
from pytbptt.data.vocabulary import Vocabulary

EOS = Vocabulary.EOS
# Splitting 64 KiB at a time keeps the strings in the processor's cache: half again as fast as 4 MiB.
SLICE_CHARS = 1 << 16
BLANK_LINE_RUNS = re.compile(rb"(?:\A|(?<=\n))" + BLANK_LINES.pattern)


@dataclass
class EncodedBlock:
    """An encoded block: token ids (k,), sequence lengths (n,), which sequences end a document, and the text's size
    without the number of tokens.

    For words, ids are local to the process `worker`; `new_words` are those that it met here for the first time.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    ends: NDArray[np.bool_]
    size: TextSize
    worker: int = 0
    new_words: tuple[str, ...] = ()


class _WordIds(dict[str, int]):
    """Assigns ids to words in the order of their first look-up."""

    def __missing__(self, word: str) -> int:
        word_id = self[word] = len(self)
        return word_id


@dataclass
class _Worker:
    """The state of a worker process, kept from block to block."""

    documents: DocumentUnit
    vocabulary: Vocabulary | None
    word_ids: _WordIds


_worker: _Worker


def init_worker(documents: DocumentUnit, vocabulary: Vocabulary | None) -> None:
    """Initialise a worker process."""
    global _worker
    _worker = _Worker(documents, vocabulary, _WordIds(zip(Vocabulary.SPECIALS, range(4), strict=True)))


def encode_words(block: Block) -> EncodedBlock:
    """Splits a block at white space as fairseq does, `</s>` after every line; a sequence is a line.

    Words get worker-local ids in order of appearance, so that one pass both counts and encodes; the caller maps them to
    global ids.
    """
    word_ids = _worker.word_ids
    known = len(word_ids)
    raw_text = block.text()
    text = _universal_newlines(raw_text)
    if block.is_last and not text.endswith("\n"):
        text += "\n"
    tokens, lengths = [], []
    for piece in slice_text(text):
        ids, line_lengths = _encode_lines(piece, word_ids)
        tokens.append(ids)
        lengths.append(line_lengths)
    all_lengths = np.concatenate(lengths)
    complete = np.ones(len(all_lengths), dtype=np.bool_)
    if not text.endswith("\n"):  # a line longer than a block: the rest of it is the next block's
        complete[-1] = False
    ends = document_end_mask(_worker.documents, complete, complete & (all_lengths == 1), block.is_last)
    nonempty = all_lengths > 0
    line_count = int(complete.sum())
    size = TextSize(0, block.stop - block.start, len(raw_text), int(all_lengths.sum()) - line_count, line_count)
    new_words = tuple(islice(reversed(word_ids), len(word_ids) - known))[::-1]
    return EncodedBlock(np.concatenate(tokens), all_lengths[nonempty], ends[nonempty], size, os.getpid(), new_words)


def encode_bytes(block: Block) -> EncodedBlock:
    """Byte b becomes 4 + b; `</s>` ends every document. A sequence is a document, or a block's part of one."""
    block_bytes = block.read()
    pieces = split_documents(block_bytes, _worker.documents, block.is_last)
    data = np.frombuffer(b"".join([text for text, _ in pieces]), dtype=np.uint8)
    tokens = data.astype(np.uint16) + len(Vocabulary.SPECIALS)
    size = measure_text(block_bytes, block.is_last)
    return _with_separators(tokens, [len(text) for text, _ in pieces], [ended for _, ended in pieces], size)


def encode_pieces(block: Block) -> EncodedBlock:
    """BPE; `</s>` ends every document. A sequence is a document, or a block's part of one.

    BPE models trained by prepare never merge across a newline, so splitting there does not change the tokens.
    """
    vocabulary = _worker.vocabulary
    assert vocabulary is not None
    data = block.text().encode()  # raises for invalid UTF-8, with its offset
    pieces = split_documents(data, _worker.documents, block.is_last)
    texts, document_indices = [], []
    for index, (document, _) in enumerate(pieces):
        for piece in slice_text(document.decode()):
            texts.append(piece)
            document_indices.append(index)
    ids = [
        np.array(encoding.ids, dtype=np.int64)
        for encoding in vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
    lengths = np.bincount(document_indices, weights=[len(part) for part in ids], minlength=len(pieces)).astype(np.int64)
    tokens = vocabulary.tokenizer_to_vocab_ids[np.concatenate(ids)] if ids else np.empty(0, np.int64)
    size = measure_pieces(data, block.is_last, tokens, vocabulary)
    return _with_separators(tokens.astype(np.int32), lengths, [ended for _, ended in pieces], size)


def measure_pieces(data: bytes, final: bool, ids: NDArray[np.int64], vocabulary: Vocabulary) -> TextSize:
    """The size of BPE-encoded text, without token count; `altered` is tested on the first 64 KiB."""
    unknown = int(np.isin(ids, vocabulary.unknown_ids).sum())
    altered = not vocabulary.round_trips(data[:SLICE_CHARS].decode(errors="ignore"))  # drop a truncated last character
    return dataclasses.replace(measure_text(data, final), unknown=unknown, altered=altered)


def split_documents(data: bytes, documents: DocumentUnit, final: bool) -> list[tuple[bytes, bool]]:
    """Splits a block into (text, whether its document ends here).

    `</s>` will stand for what separates documents: "line" drops every line's newline, "blank" drops the runs of
    lines with nothing but white space. Only the last text may belong to a document that continues in the next block; if
    `final`, it ends.
    """
    if documents == "file":
        return [(data, final)]
    parts = data.split(b"\n") if documents == "line" else BLANK_LINE_RUNS.split(data)
    rest = parts.pop()
    if documents == "blank":
        parts = [part for part in parts if part]  # a file that begins with blank lines
    return [(part, True) for part in parts] + ([(rest, final)] if rest else [])


def _with_separators(tokens: NDArray[Any], lengths: Any, ended: list[bool], size: TextSize) -> EncodedBlock:
    sizes, ends = np.asarray(lengths, dtype=np.int64), np.asarray(ended, dtype=np.bool_)
    tokens = np.insert(tokens, np.cumsum(sizes)[ends], EOS)
    return EncodedBlock(tokens, sizes + ends, ends, size)


def _universal_newlines(text: str) -> str:
    """Normalise newlines as Python's text mode does; fairseq reads files that way."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def slice_text(text: str) -> Iterator[str]:
    """Split a text after the first newline past every 64 Ki characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + SLICE_CHARS) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _encode_lines(text: str, word_ids: _WordIds) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids of the words and line ends of `text`, and the number of them in each line."""
    words = text.replace("\n", " </s> ").split()
    tokens = np.fromiter(map(word_ids.__getitem__, words), dtype=np.int32, count=len(words))
    lines = text.count("\n")
    ends = np.flatnonzero(tokens == EOS) + 1
    if len(ends) != lines:  # "</s>" is also a word of the text (and becomes the symbol, as in fairseq)
        ends = np.cumsum([len(line.split()) + 1 for line in text.split("\n")[:-1]], dtype=np.int64)
    if not text.endswith("\n"):
        ends = np.append(ends, len(tokens))
    return tokens, np.diff(ends, prepend=0)


def document_end_mask(
    documents: DocumentUnit, complete: NDArray[np.bool_], blank: NDArray[np.bool_], final: bool
) -> NDArray[np.bool_]:
    """Mask of lines that end a document: every line, the last line of each blank run, or the file's last line,
    depending on `documents`."""
    if documents == "line":
        ends = complete.copy()
    elif documents == "blank":
        ends = blank & ~np.append(blank[1:], False)
        ends[: int(np.argmin(blank))] = False  # blank lines that a file begins with belong to its first document
    else:
        ends = np.zeros(len(complete), dtype=np.bool_)
    if final:
        ends[-1] = True
    return ends
