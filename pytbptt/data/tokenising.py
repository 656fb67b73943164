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
from pytbptt.data.text_format import Documents
from pytbptt.data.text_size import TextSize, measure
from pytbptt.data.vocabulary import Vocabulary

EOS = Vocabulary.EOS
# Splitting 64 KiB at a time keeps the strings in the processor's cache: half again as fast as 4 MiB.
SLICE = 1 << 16
BLANK_LINE_RUNS = re.compile(rb"(?:\A|(?<=\n))" + BLANK_LINES.pattern)


@dataclass
class Encoded:
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
    """Numbers words in the order in which they are first asked for."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


@dataclass
class _Worker:
    """What a worker process keeps from block to block."""

    documents: Documents
    vocabulary: Vocabulary | None
    numbers: _WordIds


_worker: _Worker


def initialise(documents: Documents, vocabulary: Vocabulary | None) -> None:
    """Initialise a worker process."""
    global _worker
    _worker = _Worker(documents, vocabulary, _WordIds(zip(Vocabulary.SPECIALS, range(4), strict=True)))


def encode_words(block: Block) -> Encoded:
    """Splits a block at white space as fairseq does, `</s>` after every line; a sequence is a line.

    Words get worker-local ids in order of appearance, so that one pass both counts and encodes; the caller maps them to
    global ids.
    """
    numbers = _worker.numbers
    known = len(numbers)
    raw_text = block.text()
    text = _universal_newlines(raw_text)
    if block.final and not text.endswith("\n"):
        text += "\n"
    tokens, lengths = [], []
    for piece in slices(text):
        ids, counted = _number_lines(piece, numbers)
        tokens.append(ids)
        lengths.append(counted)
    all_lengths = np.concatenate(lengths)
    complete = np.ones(len(all_lengths), dtype=np.bool_)
    if not text.endswith("\n"):  # a line longer than a block: the rest of it is the next block's
        complete[-1] = False
    ends = document_end_mask(_worker.documents, complete, complete & (all_lengths == 1), block.final)
    filled = all_lengths > 0
    line_count = int(complete.sum())
    size = TextSize(0, block.stop - block.start, len(raw_text), int(all_lengths.sum()) - line_count, line_count)
    new_words = tuple(islice(reversed(numbers), len(numbers) - known))[::-1]
    return Encoded(np.concatenate(tokens), all_lengths[filled], ends[filled], size, os.getpid(), new_words)


def encode_bytes(block: Block) -> Encoded:
    """Byte b becomes 4 + b; `</s>` ends every document. A sequence is a document, or a block's part of one."""
    block_bytes = block.read()
    pieces = split_documents(block_bytes, _worker.documents, block.final)
    data = np.frombuffer(b"".join([text for text, _ in pieces]), dtype=np.uint8)
    tokens = data.astype(np.uint16) + len(Vocabulary.SPECIALS)
    size = measure(block_bytes, block.final)
    return _with_separators(tokens, [len(text) for text, _ in pieces], [ended for _, ended in pieces], size)


def encode_pieces(block: Block) -> Encoded:
    """BPE; `</s>` ends every document. A sequence is a document, or a block's part of one.

    BPE models trained by prepare never merge across a newline, so splitting there does not change the tokens.
    """
    vocabulary = _worker.vocabulary
    assert vocabulary is not None
    data = block.text().encode()  # raises for invalid UTF-8, with its offset
    pieces = split_documents(data, _worker.documents, block.final)
    texts, owners = [], []
    for number, (document, _) in enumerate(pieces):
        for piece in slices(document.decode()):
            texts.append(piece)
            owners.append(number)
    ids = [
        np.array(encoding.ids, dtype=np.int64)
        for encoding in vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
    lengths = np.bincount(owners, weights=[len(part) for part in ids], minlength=len(pieces)).astype(np.int64)
    tokens = vocabulary.piece_ids[np.concatenate(ids)] if ids else np.empty(0, np.int64)
    size = measure_pieces(data, block.final, tokens, vocabulary)
    return _with_separators(tokens.astype(np.int32), lengths, [ended for _, ended in pieces], size)


def measure_pieces(data: bytes, final: bool, ids: NDArray[np.int64], vocabulary: Vocabulary) -> TextSize:
    """The size of BPE-encoded text, without token count; `altered` is tested on the first 64 KiB."""
    unknown = int(np.isin(ids, vocabulary.unknown_ids).sum())
    altered = not vocabulary.round_trips(data[:SLICE].decode(errors="ignore"))  # drop a truncated last character
    return dataclasses.replace(measure(data, final), unknown=unknown, altered=altered)


def split_documents(data: bytes, documents: Documents, final: bool) -> list[tuple[bytes, bool]]:
    """Splits a block into (text, whether its document ends here).

    `</s>` will stand for what separates documents: "line" drops every line's newline, "blank" drops the runs of
    lines with nothing but white space. Only the last text may belong to a document that the next block goes on
    with; where `final`, it ends.
    """
    if documents == "file":
        return [(data, final)]
    parts = data.split(b"\n") if documents == "line" else BLANK_LINE_RUNS.split(data)
    rest = parts.pop()
    if documents == "blank":
        parts = [part for part in parts if part]  # a file that begins with blank lines
    return [(part, True) for part in parts] + ([(rest, final)] if rest else [])


def _with_separators(tokens: NDArray[Any], lengths: Any, ended: list[bool], size: TextSize) -> Encoded:
    sizes, ends = np.asarray(lengths, dtype=np.int64), np.asarray(ended, dtype=np.bool_)
    tokens = np.insert(tokens, np.cumsum(sizes)[ends], EOS)
    return Encoded(tokens, sizes + ends, ends, size)


def _universal_newlines(text: str) -> str:
    """Normalise newlines as Python's text mode does; fairseq reads files that way."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def slices(text: str) -> Iterator[str]:
    """Cuts after the first newline past every 64 Ki characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + SLICE) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _number_lines(text: str, numbers: _WordIds) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Numbers of the words and line ends of `text`, and how many of them each line has."""
    words = text.replace("\n", " </s> ").split()
    tokens = np.fromiter(map(numbers.__getitem__, words), dtype=np.int32, count=len(words))
    lines = text.count("\n")
    ends = np.flatnonzero(tokens == EOS) + 1
    if len(ends) != lines:  # "</s>" is also a word of the text (and becomes the symbol, as in fairseq)
        ends = np.cumsum([len(line.split()) + 1 for line in text.split("\n")[:-1]], dtype=np.int64)
    if not text.endswith("\n"):
        ends = np.append(ends, len(tokens))
    return tokens, np.diff(ends, prepend=0)


def document_end_mask(
    documents: Documents, complete: NDArray[np.bool_], blank: NDArray[np.bool_], final: bool
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
