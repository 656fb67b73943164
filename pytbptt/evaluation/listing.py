"""What `python -m pytbptt.score` does: the log-probability of every line or token of any text."""

import codecs
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from pytbptt.checkpoint import load_checkpoint
from pytbptt.data import Vocabulary
from pytbptt.data.text_format import AT_DOCUMENTS, BY_THE_DATA, NO_RESETS, Documents
from pytbptt.data.text_size import TextSize, measure
from pytbptt.data.tokenising import line_ends, size_of_pieces, split_documents
from pytbptt.distributed import choose_device
from pytbptt.errors import InputError
from pytbptt.evaluation.evaluate import chosen_format, parse_overrides
from pytbptt.evaluation.scoring import chunk_length, init_memory, perplexity
from pytbptt.nn.adaptive import NEVER
from pytbptt.nn.architectures import Model


@dataclass
class ListingSettings:
    text: tyro.conf.Positional[str]
    """A file: text in the form that the model was trained on, one sentence or paragraph a line."""
    path: str
    """The checkpoint."""
    per: Literal["line", "token"] = "line"
    """What to list."""
    format: Literal["tsv", "json"] = "tsv"
    """tsv: a table with a heading; json: one object for every line of the text."""
    tokens_per_sample: int = 0
    """Tokens in one forward pass; 0: as in training."""
    documents: Literal["auto", "file", "line", "blank"] = "auto"
    """What a document is, as prepare has it; auto: as in training."""
    reset_on: str = "auto"
    """Forget memory at: document, none, or after a token, such as </s>; auto: as in training."""
    model_overrides: str = "{}"
    """Settings of the model to change, as a Python dict, such as '{"mem_len":640}'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""


def list_log_probs(settings: ListingSettings) -> None:
    """Print the log-probabilities in nats, and their sum and the perplexity, of a token and of the text's bytes,
    characters and words, on the standard error.

    The text is read as one stream, its first token from end-of-sentence, in the tokens that prepare would make of it:
    </s> ends a line of words, and a document of bytes or BPE, unless the model is one that never predicts it, as
    converted models of characters are.

    Raises:
        InputError: settings out of range, or a text or checkpoint that cannot be read.
    """
    if settings.tokens_per_sample < 0:
        raise InputError(f"--tokens-per-sample: found {settings.tokens_per_sample}, expected at least 0")
    overrides = parse_overrides(settings.model_overrides)
    loaded = load_checkpoint(settings.path, choose_device(settings.device), overrides)
    model, vocabulary, run, _ = loaded
    text_format = chosen_format(loaded, settings.reset_on)
    documents = text_format.documents if settings.documents == "auto" else settings.documents
    has_ends = float(model.softmax.biases[0].detach()[Vocabulary.EOS]) > NEVER
    lines, ends, size = encode_lines(Path(settings.text), vocabulary, documents or "file", has_ends)
    resets = find_resets(lines, ends, text_format.reset_on, vocabulary)
    if settings.format == "tsv":
        heading = "line token log_prob" if settings.per == "token" else "line tokens log_prob perplexity"
        print(*heading.split(), sep="\t")
    total = 0.0
    listed = log_probs(model, lines, settings.tokens_per_sample or run["tokens_per_sample"], resets)
    for number, (ids, values) in enumerate(zip(lines, listed, strict=True), start=1):
        total += math.fsum(values)
        _print_line(number, [vocabulary.symbol(int(token)) for token in ids], values, settings)
    count = sum(len(ids) for ids in lines)
    result = f"log-probability {total:.4f}, perplexity {perplexity(-total / count):.2f}"
    print(f"{count} tokens in {len(lines)} lines: {result}\n{size.describe(-total / count)}", file=sys.stderr)


def encode_lines(
    path: Path, vocabulary: Vocabulary, documents: Documents = "file", has_ends: bool = True
) -> tuple[list[NDArray[np.int64]], list[bool], TextSize]:
    """The ids of every line of a file, which together are what prepare makes of it, whether a document ends there, and
    the size of the text.

    Args:
        path: the text.
        vocabulary: of the ids.
        documents: what a document is.
        has_ends: whether ``</s>`` ends lines of words and documents of bytes and BPE.

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
        return size + size_of_pieces(text.decode(), True, ids, vocabulary)
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
    model: Model, lines: list[NDArray[np.int64]], bptt: int, resets: NDArray[np.bool_] | None
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
    memory, waiting, read, line = init_memory(model, 1), [], 0, 0
    with tqdm(total=len(targets), unit="token", unit_scale=True, disable=None) as bar:
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


def _print_line(number: int, symbols: list[str], values: list[float], settings: ListingSettings) -> None:
    log_prob = math.fsum(values)
    per_token = perplexity(-log_prob / max(1, len(values)))
    if settings.format == "json":
        finite = per_token if math.isfinite(per_token) else None  # JSON has no infinity
        row = {"line": number, "tokens": len(symbols), "log_prob": log_prob, "perplexity": finite}
        each = {"symbols": symbols, "log_probs": values} if settings.per == "token" else {}
        print(json.dumps({**row, **each}, ensure_ascii=False))
    elif settings.per == "token":
        for symbol, value in zip(symbols, values, strict=True):
            print(number, symbol, f"{value:.6f}", sep="\t")
    else:
        print(number, len(symbols), f"{log_prob:.6f}", f"{per_token:.4f}", sep="\t")
