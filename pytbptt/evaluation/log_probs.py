"""The log-probability of every token of any text, read as prepare reads it."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pytbptt.data import Vocabulary
from pytbptt.data.text_format import RESET_AT_DOCUMENTS, RESET_AUTO, RESET_NEVER, DocumentUnit
from pytbptt.data.text_size import TextSize, measure_text
from pytbptt.data.tokenising import document_end_mask, measure_pieces, split_documents
from pytbptt.errors import InputError
from pytbptt.evaluation.scoring import chunk_length
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.extras import progress_bar


def encode_lines(
    path: Path, vocabulary: Vocabulary, documents: DocumentUnit = "file", append_eos: bool = True
) -> tuple[list[NDArray[np.int64]], list[bool], TextSize]:
    """Encode a file line by line exactly as prepare would. Returns ids per line, whether each line ends a document, and
    the text's size.

    Args:
        path: the text.
        vocabulary: to encode with.
        documents: what counts as a document.
        append_eos: append `</s>` to lines (words) or documents (bytes and BPE).

    Raises:
        InputError: unreadable, empty, or not UTF-8 (unless the vocabulary is of bytes).
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected a text") from None
    words = vocabulary.kind == "words"
    if vocabulary.kind != "bytes":
        text = text.removeprefix(codecs.BOM_UTF8)
    raw_text = text
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
        ends = document_end_mask(documents, np.ones_like(blank), blank, final=True).tolist() if lines else []
        lines = lines if append_eos else [ids[:-1] for ids in lines]
    else:
        ends = [end for _, end in pieces]
        if append_eos:
            lines = [np.append(ids, Vocabulary.EOS) if end else ids for ids, end in zip(lines, ends, strict=True)]
    if not any(len(line) for line in lines):
        raise InputError(f"{path}: found no text, expected some")
    return lines, ends, _size(raw_text, np.concatenate(lines), vocabulary)


def _size(text: bytes, ids: NDArray[np.int64], vocabulary: Vocabulary) -> TextSize:
    """The text's size, counted as prepare does."""
    size = TextSize(len(ids))
    if vocabulary.kind == "bpe":
        return size + measure_pieces(text, True, ids, vocabulary)
    if vocabulary.kind == "words":
        size += TextSize(unknown=sum(word not in vocabulary for word in text.decode().split()))
    return size + measure_text(text)


def _lines(text: bytes) -> list[bytes]:
    """The lines of a text with their newlines; the last one may have none."""
    return re.findall(rb"[^\n]*\n|[^\n]+", text)


def _lines_of_documents(text: bytes, documents: DocumentUnit) -> Iterator[tuple[bytes, bool]]:
    """Lines of a byte or BPE text, and whether a document ends there; blank separator lines are yielded empty."""
    position = 0
    for document, _ in split_documents(text, documents, final=True):
        if documents == "blank":
            start = text.index(document, position)
            yield from [(b"", False)] * text.count(b"\n", position, start)
            position = start + len(document)
        *before, last = _lines(document) or [b""]
        yield from ((line, False) for line in before)
        yield last, True
    yield from [(b"", False)] * (text.count(b"\n", position) if documents == "blank" else 0)


def find_resets(
    lines: list[NDArray[np.int64]], ends: list[bool], reset_on: str, vocabulary: Vocabulary
) -> NDArray[np.bool_] | None:
    """Mask (N,) of input tokens at which memory is reset, where the inputs are </s> followed by the text; None: no
    resets.

    Raises:
        InputError: the reset symbol does not occur in the text.
    """
    if reset_on in (RESET_NEVER, RESET_AUTO):
        return None
    ids = np.concatenate(lines)
    resets = np.zeros(len(ids), dtype=np.bool_)
    if reset_on == RESET_AT_DOCUMENTS:
        starts = np.cumsum([len(line) for line in lines])[ends]
        resets[starts[starts < len(ids)]] = True
        return resets
    resets[1:] = ids[:-1] == vocabulary.index(reset_on)
    if not resets.any() and len(lines) > 1:
        raise InputError(
            f"--reset-on: found {reset_on}, which does not occur in the text, expected a symbol of it: with "
            "--documents line a newline is </s>, and in a byte vocabulary it is <0x0A>"
        )
    return resets


def log_probs(
    model: LanguageModel, lines: list[NDArray[np.int64]], bptt: int, resets: NDArray[np.bool_] | None
) -> Iterator[list[float]]:
    """Yield each line's token log-probabilities, conditioned on all preceding text within the model's memory.

    Args:
        model: in evaluation mode.
        lines: ids.
        bptt: tokens in one forward pass; more are read at once if that does not change the result.
        resets: as `find_resets` gives them.

    Yields:
        For every line, one number per id, in nats.
    """
    device, length = next(model.parameters()).device, chunk_length(model, bptt, streams=1)
    targets = torch.from_numpy(np.concatenate(lines)).to(device)
    inputs = torch.cat([targets.new_tensor([Vocabulary.EOS]), targets[:-1]])
    ends = np.cumsum([len(line) for line in lines])
    memory, pending, yielded, line = model.init_evaluation_memory(1), [], 0, 0
    with progress_bar(total=len(targets), unit="token", unit_scale=True, disable=None) as bar:
        for start in range(0, len(inputs), length):
            tokens, chunk_targets = inputs[start : start + length], targets[start : start + length]
            reset = None
            if resets is not None:
                reset = torch.from_numpy(resets[start : start + length]).to(device).view(1, -1)
            with torch.no_grad():
                output, memory = model(tokens.view(1, -1), memory, reset=reset)
                nll, _ = model.softmax.nll(output, chunk_targets.view(1, -1), reduction="none")
            pending += (-nll[0]).tolist()
            bar.update(len(tokens))
            while line < len(lines) and ends[line] <= yielded + len(pending):
                count = len(lines[line])
                yield pending[:count]
                pending, yielded, line = pending[count:], yielded + count, line + 1
