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
from pytbptt.data.text_format import Documents
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
    """Print the log-probabilities in nats, and their sum and the perplexity on the standard error.

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
    lines, ends = encode_lines(Path(settings.text), vocabulary, documents or "file", has_ends)
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
    print(f"{count} tokens in {len(lines)} lines: {result}", file=sys.stderr)


def encode_lines(
    path: Path, vocabulary: Vocabulary, documents: Documents = "file", has_ends: bool = True
) -> tuple[list[NDArray[np.int64]], list[bool]]:
    """The ids of every line of a file, which together are what prepare makes of it, and whether a document ends there.

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
    if words:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text += b"\n" if text and not text.endswith(b"\n") else b""
    pieces = text.splitlines(keepends=True) if words else re.findall(rb"[^\n]*\n|[^\n]+", text)
    blank = [not piece.strip(b" \t\r\f\v\n") and piece.endswith(b"\n") for piece in pieces]
    ends = _document_ends(blank, documents, words)
    lines = []
    for number, piece in enumerate(pieces):
        if not words and ((documents == "line" and piece.endswith(b"\n")) or (documents == "blank" and blank[number])):
            piece = piece[:0] if documents == "blank" else piece[:-1]
        if words and not has_ends:
            piece = piece[:-1]
        try:
            ids = vocabulary.encode(piece)
        except InputError as error:
            raise InputError(f"{path}, line {number + 1}: {error}") from None
        lines.append(np.append(ids, Vocabulary.EOS) if has_ends and not words and ends[number] else ids)
    if not any(len(line) for line in lines):
        raise InputError(f"{path}: found no text, expected some")
    return lines, ends


def _document_ends(blank: list[bool], documents: Documents, words: bool) -> list[bool]:
    """Which lines end a document, in prepare's way, by which of them are blank.

    Between documents of words, the last of some blank lines is the end. Of bytes and BPE, which leave them out, it is
    the first of them. Those that a file begins with end none.
    """
    if documents != "blank":
        return [documents == "line" or number == len(blank) - 1 for number in range(len(blank))]
    ends, any_text = [], False
    for number, is_blank in enumerate(blank):
        last = number == len(blank) - 1
        if words:
            ends.append(last or (is_blank and any_text and not blank[number + 1]))
        else:
            ends.append((is_blank and any_text and not blank[number - 1]) or (last and not is_blank))
        any_text |= not is_blank
    return ends


def find_resets(
    lines: list[NDArray[np.int64]], ends: list[bool], reset_on: str, vocabulary: Vocabulary
) -> NDArray[np.bool_] | None:
    """Before which token of a text (N,), led by end-of-sentence, memory is forgotten; None: before none.

    Raises:
        InputError: a symbol that this text has nowhere.
    """
    ids = np.concatenate(lines)
    inputs = np.concatenate([[Vocabulary.EOS], ids[:-1]])
    if reset_on in ("none", "auto"):
        return None
    if reset_on != "document":
        symbol = vocabulary.index(reset_on)
        if symbol not in ids[:-1] and len(lines) > 1:
            raise InputError(
                f"--reset-on: found {reset_on}, which is nowhere within the text, expected one of its symbols: "
                "--documents line puts </s> in the place of every newline, and of bytes <0x0A> is a newline"
            )
        return np.asarray(inputs == symbol)
    resets = np.zeros(len(ids), dtype=np.bool_)
    starts = np.cumsum([len(line) for line in lines])[ends]
    resets[starts[starts < len(ids)]] = True
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
