"""What `python -m pytbptt.score` does: the log-probability of every line or token of any text."""

import codecs
import json
import math
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

from pytbptt.checkpoint import load_model
from pytbptt.data import Vocabulary
from pytbptt.distributed import choose_device
from pytbptt.errors import InputError
from pytbptt.evaluation.evaluate import parse_overrides
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
    reset_on: str = "none"
    """Forget memory after a token: </s>, for lines that have nothing to do with each other; none: never."""
    model_overrides: str = "{}"
    """Settings of the model to change, as a Python dict, such as '{"mem_len":640}'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""


def list_log_probs(settings: ListingSettings) -> None:
    """Print the log-probabilities in nats, and their sum and the perplexity on the standard error.

    The text is read as one stream, its first token from end-of-sentence. To a model of words the end of a line is a
    token as well, unless it is one that never predicts it, as converted models of characters are.

    Raises:
        InputError: settings out of range, or a text or checkpoint that cannot be read.
    """
    if settings.tokens_per_sample < 0:
        raise InputError(f"--tokens-per-sample: found {settings.tokens_per_sample}, expected at least 0")
    overrides = parse_overrides(settings.model_overrides)
    model, vocabulary, run = load_model(Path(settings.path), choose_device(settings.device), overrides)
    if settings.reset_on != "none" and settings.reset_on not in vocabulary:
        raise InputError(f"--reset-on: found {settings.reset_on}, expected none or a symbol of the vocabulary")
    reset_on = None if settings.reset_on == "none" else vocabulary.index(settings.reset_on)
    ends_lines = float(model.softmax.biases[0].detach()[Vocabulary.EOS]) > NEVER
    lines = encode_lines(Path(settings.text), vocabulary, ends_lines)
    if settings.format == "tsv":
        heading = "line token log_prob" if settings.per == "token" else "line tokens log_prob perplexity"
        print(*heading.split(), sep="\t")
    total = 0.0
    listed = log_probs(model, lines, settings.tokens_per_sample or run["tokens_per_sample"], reset_on)
    for number, (ids, values) in enumerate(zip(lines, listed, strict=True), start=1):
        total += math.fsum(values)
        _print_line(number, [vocabulary.symbol(int(token)) for token in ids], values, settings)
    count = sum(len(ids) for ids in lines)
    result = f"log-probability {total:.4f}, perplexity {perplexity(-total / count):.2f}"
    print(f"{count} tokens in {len(lines)} lines: {result}", file=sys.stderr)


def encode_lines(path: Path, vocabulary: Vocabulary, ends_lines: bool = True) -> list[NDArray[np.int64]]:
    """The ids of every line of a file, its end included; of words, only where `ends_lines`.

    Raises:
        InputError: unreadable, empty, or not UTF-8 where the vocabulary is not of bytes.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected a text") from None
    end = b"\n"
    if vocabulary.kind != "bytes":
        text = text.removeprefix(codecs.BOM_UTF8)
    if vocabulary.kind == "words":
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text += b"\n" if text and not text.endswith(b"\n") else b""
        end = b"\n" if ends_lines else b""
    *whole, rest = text.split(b"\n")
    lines = []
    for number, line in enumerate([*(line + end for line in whole), *([rest] if rest else [])], start=1):
        try:
            lines.append(vocabulary.encode(line))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not any(len(line) for line in lines):
        raise InputError(f"{path}: found no text, expected some")
    return lines


def log_probs(model: Model, lines: list[NDArray[np.int64]], bptt: int, reset_on: int | None) -> Iterator[list[float]]:
    """The log-probability of every token, line by line, each given all before it as far as the model remembers.

    Args:
        model: in evaluation mode.
        lines: ids.
        bptt: tokens in one forward pass; more are read at once where that does not change the numbers.
        reset_on: after this id, memory is forgotten; None: never.

    Yields:
        For every line, as many numbers as it has ids; in nats.
    """
    device, length = next(model.parameters()).device, chunk_length(model, bptt, streams=1)
    targets = torch.from_numpy(np.concatenate(lines)).to(device)
    inputs = torch.cat([targets.new_tensor([Vocabulary.EOS]), targets[:-1]])
    ends = np.cumsum([len(line) for line in lines])
    memory, waiting, read, line = init_memory(model, 1), [], 0, 0
    with tqdm(total=len(targets), unit="token", unit_scale=True, disable=None) as bar:
        for tokens, scored in zip(torch.split(inputs, length), torch.split(targets, length), strict=True):
            with torch.no_grad():
                reset = None if reset_on is None else (tokens == reset_on).view(1, -1)
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
