"""The log-probability of every token of any text, read as prepare reads it."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pytbptt.data import Vocabulary
from pytbptt.data.text_format import AT_DOCUMENTS, BY_THE_DATA, NO_RESETS, Documents
from pytbptt.data.text_size import TextSize, measure
from pytbptt.data.tokenising import line_ends, size_of_pieces, split_documents
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import chunk_length
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.extras import progress_bar


def encode_lines(
    path: Path, vocabulary: Vocabulary, documents: Documents = "file", has_ends: bool = True
) -> tuple[list[NDArray[np.int64]], list[bool], TextSize]:
    """The ids of every line of a file, which together are what prepare makes of it, whether a document ends there, and
    the size of the text.

    Args:
        path: the text.
        vocabulary: of the ids.
        documents: what a document is.
        has_ends: whether `</s>` ends lines of words and documents of bytes and BPE.

    Raises:
        InputError: unreadable, empty, or not UTF-8 where the vocabulary is not of bytes.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected a text") from None
    words = vocabulary.kind == "words"
    if vocabulary.kind != "bytes":
        text = text.removeprefix(codecs.BOM_UTF8)
    as_it_is = text
    if words:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text += b"\n" if text and not text.endswith(b"\n") else b""
    pieces = [(line, False) for line in _lines(text)] if words else list(_lines_of_documents(text, documents))
    lines = []
    for number, (piece, _) in enumerate(pieces, start=1):
        try:
            lines.append(vocabulary.encode(piece))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if words:
        blank = np.array([len(ids) == 1 for ids in lines], dtype=np.bool_)
        ends = line_ends(documents, np.ones_like(blank), blank, final=True).tolist() if lines else []
        lines = lines if has_ends else [ids[:-1] for ids in lines]
    else:
        ends = [end for _, end in pieces]
        if has_ends:
            lines = [np.append(ids, Vocabulary.EOS) if end else ids for ids, end in zip(lines, ends, strict=True)]
    if not any(len(line) for line in lines):
        raise InputError(f"{path}: found no text, expected some")
    return lines, ends, _size(as_it_is, np.concatenate(lines), vocabulary)


def _size(text: bytes, ids: NDArray[np.int64], vocabulary: Vocabulary) -> TextSize:
    """As prepare counts it."""
    size = TextSize(len(ids))
    if vocabulary.kind == "bpe":
        return size + size_of_pieces(text, True, ids, vocabulary)
    if vocabulary.kind == "words":
        size += TextSize(unknown=sum(word not in vocabulary for word in text.decode().split()))
    return size + measure(text)


def _lines(text: bytes) -> list[bytes]:
    """The lines of a text with their newlines; the last one may have none."""
    return re.findall(rb"[^\n]*\n|[^\n]+", text)


def _lines_of_documents(text: bytes, documents: Documents) -> Iterator[tuple[bytes, bool]]:
    """Every line of bytes or BPE as prepare reads it, and whether its document ends there; lines that prepare leaves
    out between documents are empty."""
    place = 0
    for document, _ in split_documents(text, documents, final=True):
        if documents == "blank":
            start = text.index(document, place)
            yield from [(b"", False)] * text.count(b"\n", place, start)
            place = start + len(document)
        *before, last = _lines(document) or [b""]
        yield from ((line, False) for line in before)
        yield last, True
    yield from [(b"", False)] * (text.count(b"\n", place) if documents == "blank" else 0)


def find_resets(
    lines: list[NDArray[np.int64]], ends: list[bool], reset_on: str, vocabulary: Vocabulary
) -> NDArray[np.bool_] | None:
    """Before which token of a text (N,), led by end-of-sentence, memory is forgotten; None: before none.

    Raises:
        InputError: a symbol that this text has nowhere.
    """
    if reset_on in (NO_RESETS, BY_THE_DATA):
        return None
    ids = np.concatenate(lines)
    resets = np.zeros(len(ids), dtype=np.bool_)
    if reset_on == AT_DOCUMENTS:
        starts = np.cumsum([len(line) for line in lines])[ends]
        resets[starts[starts < len(ids)]] = True
        return resets
    resets[1:] = ids[:-1] == vocabulary.index(reset_on)
    if not resets.any() and len(lines) > 1:
        raise InputError(
            f"--reset-on: found {reset_on}, which is nowhere within the text, expected one of its symbols: "
            "--documents line puts </s> in the place of every newline, and of bytes <0x0A> is a newline"
        )
    return resets


def log_probs(
    model: LanguageModel, lines: list[NDArray[np.int64]], bptt: int, resets: NDArray[np.bool_] | None
) -> Iterator[list[float]]:
    """The log-probability of every token, line by line, each given all before it as far as the model remembers.

    Args:
        model: in evaluation mode.
        lines: ids.
        bptt: tokens in one forward pass; more are read at once where that does not change the numbers.
        resets: as `find_resets` gives them.

    Yields:
        For every line, as many numbers as it has ids; in nats.
    """
    device, length = next(model.parameters()).device, chunk_length(model, bptt, streams=1)
    targets = torch.from_numpy(np.concatenate(lines)).to(device)
    inputs = torch.cat([targets.new_tensor([Vocabulary.EOS]), targets[:-1]])
    ends = np.cumsum([len(line) for line in lines])
    memory, waiting, read, line = model.init_evaluation_memory(1), [], 0, 0
    with progress_bar(total=len(targets), unit="token", unit_scale=True, disable=None) as bar:
        for start in range(0, len(inputs), length):
            tokens, scored = inputs[start : start + length], targets[start : start + length]
            reset = None
            if resets is not None:
                reset = torch.from_numpy(resets[start : start + length]).to(device).view(1, -1)
            with torch.no_grad():
                output, memory = model(tokens.view(1, -1), memory, reset=reset)
                nll, _ = model.softmax.nll(output, scored.view(1, -1), reduction="none")
            waiting += (-nll[0]).tolist()
            bar.update(len(tokens))
            while line < len(lines) and ends[line] <= read + len(waiting):
                count = len(lines[line])
                yield waiting[:count]
                waiting, read, line = waiting[count:], read + count, line + 1
