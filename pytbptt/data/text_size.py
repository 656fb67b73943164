"""Bytes, characters and words of the original text, so that results with different vocabularies can be compared."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytbptt.data.baselines import text_bytes
from pytbptt.errors import InputError
from pytbptt.runtime.atomic import atomic_write_bytes
from pytbptt.runtime.renamed import Renamed

if TYPE_CHECKING:
    from pytbptt.data.indexed import IndexedTokens

SIZE_SUFFIX = ".size.json"
MAX_EXPONENT = 700  # of e, in a float
ASCII_SPACES = np.array([chr(value).isspace() for value in range(128)])


@dataclass(frozen=True)
class TextSize:
    """The size of a split's text before tokenization, which prepare records beside it in SPLIT.size.json.

    The tokens of every vocabulary spell the same text, so that their loss per byte, per character or per word of it can
    be compared where the loss per token cannot.
    """

    tokens: int = 0
    """Tokens of the text."""
    bytes: int = 0
    """Bytes of UTF-8, line ends included."""
    characters: int = 0
    """Unicode characters, line ends included; 0: unknown."""
    words: int = 0
    """White-space-separated words; 0: unknown. With --bytes, a word longer than a 4 MiB block is counted once per
    block."""
    lines: int = 0
    """Line ends; word-level models predict one token for each."""
    unknown: int = 0
    """Tokens that are <unk>."""
    altered: bool = False
    """Whether the tokenizer is lossy (ignoring white space), for example lower-casing."""

    def __add__(self, other: TextSize) -> TextSize:
        names = [field.name for field in dataclasses.fields(self) if field.name != "altered"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return TextSize(**sums, altered=self.altered or other.altered)

    @property
    def incomparable_reason(self) -> str:
        """Why numbers of this text cannot be compared with those of another vocabulary; "" if they can."""
        if self.unknown:
            return f"{self.unknown:,} of {self.tokens:,} tokens are <unk>"
        return "the tokenizer does not give back the text that it was given" if self.altered else ""

    numbers, incomparable = Renamed("metrics"), Renamed("incomparable_reason")

    def metrics(self, loss: float) -> dict[str, Any]:
        """Convert a loss (nats per token) to bits_per_byte, bits_per_character and ppl_per_word, where known;
        "incomparable" gives the reason if they cannot be compared.

        A line's end counts as a word, which makes ppl_per_word the perplexity of a model of words.
        """
        nll = loss * self.tokens
        metrics: dict[str, Any] = {"bits_per_byte": nll / math.log(2) / self.bytes}
        if self.characters:
            metrics["bits_per_character"] = nll / math.log(2) / self.characters
        if self.words and (per_word := nll / (self.words + self.lines)) < MAX_EXPONENT:
            metrics["ppl_per_word"] = math.exp(per_word)
        return metrics | ({"incomparable": self.incomparable_reason} if self.incomparable_reason else {})

    def describe(self, loss: float) -> str:
        """`metrics` formatted as text."""
        metrics = self.metrics(loss)
        parts = [f"per byte: {metrics['bits_per_byte']:.4f} bits (of {self.bytes:,})"]
        if self.characters:
            parts.append(f"per character: {metrics['bits_per_character']:.4f} bits (of {self.characters:,})")
        if "ppl_per_word" in metrics:
            words = f"{self.words + self.lines:,}, line ends included"
            parts.append(f"per word: perplexity {metrics['ppl_per_word']:.6g} (of {words})")
        mark = (
            f"; not comparable with other vocabularies: {self.incomparable_reason}" if self.incomparable_reason else ""
        )
        return ", ".join(parts).capitalize() + mark

    def save(self, prefix: str | Path) -> None:
        """Write PREFIX.size.json, atomically."""
        atomic_write_bytes(Path(f"{prefix}{SIZE_SUFFIX}"), json.dumps(dataclasses.asdict(self)).encode() + b"\n")


def measure_text(data: bytes, final: bool = True) -> TextSize:
    """Count bytes, characters, words and lines (not tokens).

    Args:
        data: the text; invalid UTF-8 is counted as replacement characters.
        final: whether a last line without its end counts as a line.
    """
    # Count line ends on bytes, and skip decoding for pure ASCII, which is ten times as fast.
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data
    line_count = lines.count(b"\n") + (final and bool(data) and not lines.endswith(b"\n"))
    if data.isascii():
        spaces = ASCII_SPACES[np.frombuffer(data, dtype=np.uint8)]
        words = np.count_nonzero(spaces[:-1] > spaces[1:]) + (not spaces[:1].all())
        return TextSize(0, len(data), len(data), int(words), line_count)
    text = data.decode(errors="replace")
    return TextSize(0, len(data), len(text), len(text.split()), line_count)


def recorded_size(tokens: IndexedTokens) -> TextSize | None:
    """What prepare recorded of the text that a corpus was made of.

    Returns:
        None where it is not known: data of other programs, and from before it was recorded.

    Raises:
        InputError: not a valid .size.json.
    """
    path = Path(tokens.prefix + SIZE_SUFFIX)
    try:
        size = TextSize(**json.loads(path.read_text(encoding="utf-8")))
        return size if size.tokens == len(tokens) and size.bytes > 0 else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: found no size of a text ({error}), expected what prepare writes") from None


def text_size(tokens: IndexedTokens) -> TextSize | None:
    """`recorded_size`; without a record, byte corpora are counted by reading all of them."""
    size = recorded_size(tokens)
    if size is None and tokens.vocabulary.kind == "bytes" and (size_in_bytes := text_bytes(tokens)):
        return TextSize(len(tokens), size_in_bytes)
    return size
