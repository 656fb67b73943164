"""fairseq's dictionary: four special symbols, then those of dict.txt, over words, bytes or BPE pieces."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pytbptt.errors import InputError
from pytbptt.runtime.atomic import atomic_write_bytes
from pytbptt.runtime.extras import import_extra
from pytbptt.runtime.renamed import Renamed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["words", "bytes", "bpe"]
Text = str | bytes  # named here, for inside the class `bytes` is its constructor

DICTIONARY = "dict.txt"
TOKENIZER = "tokenizer.json"
OVERWRITE = "#fairseq:overwrite"
PADDING_FACTOR = 8  # pad the vocabulary to a multiple of 8 for tensor cores, with "madeupword" symbols, as fairseq does
PADDING_SYMBOL = re.compile(r"madeupword\d{4}")
BYTE_SYMBOLS = tuple(f"<0x{value:02X}>" for value in range(256))


class Decoder(Protocol):
    """Incremental detokenizer; buffers incomplete characters."""

    def add(self, token: int) -> str:
        """Returns the text that `token` completes, perhaps none."""

    def flush(self) -> str:
        """Returns the buffered text, U+FFFD for bytes that never became a character."""


class Vocabulary:
    """Symbols and their ids. Ids 0 to 3 are `<s> <pad> </s> <unk>`; the symbols of dict.txt follow in its order.

    `symbols` and `counts` leave the four specials out, as dict.txt does. `tokenizer` is the JSON of a
    `tokenizers.Tokenizer` whose pieces are the symbols; it makes `kind` "bpe". Symbols `<0x00>` … `<0xFF>`
    make it "bytes", anything else is "words".
    """

    BOS, PAD, EOS, UNK = 0, 1, 2, 3
    SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

    def __init__(self, symbols: Sequence[str], counts: Sequence[int], tokenizer: str | None = None) -> None:
        if len(symbols) != len(counts):
            raise InputError(f"vocabulary: found {len(counts)} counts, expected one for each of {len(symbols)} symbols")
        self._symbols = [*self.SPECIALS, *symbols]
        self._counts = list(counts)
        self._tokenizer_json = tokenizer
        # For duplicates (marked #fairseq:overwrite) the last one wins, as in fairseq.
        self._ids = {symbol: token for token, symbol in enumerate(self._symbols)}
        self.kind: Kind = "words"
        if tokenizer is not None:
            self.kind = "bpe"
        elif tuple(symbols[:256]) == BYTE_SYMBOLS and all(symbol.startswith("madeupword") for symbol in symbols[256:]):
            self.kind = "bytes"

    # -- construction

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], threshold: int = -1, nwords: int = -1) -> Vocabulary:
        """Orders the words of a corpus as fairseq does: by falling count, then by symbol.

        Words rarer than `threshold` are left out; `nwords` > 0 bounds the vocabulary, its four specials
        included (the padding to a multiple of 8 comes on top).
        """
        words = sorted((word for word in counts if word not in cls.SPECIALS), key=lambda word: (-counts[word], word))
        if nwords > 0:
            words = words[: max(0, nwords - len(cls.SPECIALS))]
        words = [word for word in words if counts[word] >= threshold]
        return cls._padded(words, [counts[word] for word in words])

    @classmethod
    def bytes(cls) -> Vocabulary:
        """The 256 bytes: byte b has id 4 + b, and 264 types in all."""
        return cls._padded(list(BYTE_SYMBOLS), [0] * len(BYTE_SYMBOLS))

    @classmethod
    def from_tokenizer(cls, tokenizer: str) -> Vocabulary:
        """The pieces of a `tokenizers` tokenizer (its JSON), in the order of its ids, from 4 on.

        Pieces with a special's name, such as `</s>`, map to that special.

        Raises:
            InputError: a piece that dict.txt cannot hold.
        """
        pieces = _parse_tokenizer(tokenizer, "tokenizer").get_vocab()
        symbols = sorted((piece for piece in pieces if piece not in cls.SPECIALS), key=pieces.__getitem__)
        for symbol in symbols:
            if not symbol or "\n" in symbol:
                found = f"the piece {symbol!r} (id {pieces[symbol]})"
                raise InputError(f"tokenizer: found {found}, expected pieces that a line of {DICTIONARY} can hold")
        return cls._padded(symbols, [0] * len(symbols), tokenizer)

    @classmethod
    def load_tokenizer(cls, path: Path) -> Vocabulary:
        """`from_tokenizer` for a file such as tokenizer.json.

        Raises:
            InputError: not a tokenizer file.
        """
        try:
            return cls.from_tokenizer(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: {reason}; expected the JSON of the tokenizers package") from None

    @classmethod
    def _padded(cls, symbols: list[str], counts: list[int], tokenizer: str | None = None) -> Vocabulary:
        existing, number = set(symbols), 0
        while (len(cls.SPECIALS) + len(symbols)) % PADDING_FACTOR:
            symbol = f"madeupword{number:04d}"
            number += 1
            if symbol not in existing:
                symbols, counts = [*symbols, symbol], [*counts, 0]
        return cls(symbols, counts, tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Reads dict.txt (`path`, or the one in the directory `path`) and the tokenizer.json beside it, if any.

        Raises:
            InputError: a missing file, or a line that is not "symbol count", with its number.
        """
        path = Path(path)
        if path.is_dir():
            path = path / DICTIONARY
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: found no readable file ({error.strerror}), expected a dictionary") from None
        symbols, counts = _parse_dictionary(content, path)
        tokenizer_path = path.with_name(TOKENIZER)
        if not tokenizer_path.exists():
            return cls(symbols, counts)
        tokenizer = tokenizer_path.read_text(encoding="utf-8")
        _parse_tokenizer(tokenizer, str(tokenizer_path))
        return cls(symbols, counts, tokenizer)

    def save(self, directory: str | Path) -> None:
        """Writes dict.txt, and tokenizer.json for BPE, each atomically and dict.txt last."""
        directory = Path(directory)
        if self._tokenizer_json is not None:
            atomic_write_bytes(directory / TOKENIZER, self._tokenizer_json.encode())
        else:
            # A leftover tokenizer.json would turn this vocabulary into BPE.
            (directory / TOKENIZER).unlink(missing_ok=True)
        seen = set(self.SPECIALS)
        lines = []
        for symbol, count in zip(self._symbols[len(self.SPECIALS) :], self._counts, strict=True):
            lines.append(f"{symbol} {count} {OVERWRITE}\n" if symbol in seen else f"{symbol} {count}\n")
            seen.add(symbol)
        atomic_write_bytes(directory / DICTIONARY, "".join(lines).encode())

    def state_dict(self) -> dict[str, str]:
        """All fields as strings, which `torch.load(weights_only=True)` accepts."""
        return {
            "symbols": "\n".join(self._symbols[len(self.SPECIALS) :]),
            "counts": " ".join(map(str, self._counts)),
            "tokenizer": self._tokenizer_json or "",
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `state_dict`."""
        symbols = state["symbols"].split("\n") if state["symbols"] else []
        return cls(symbols, [int(count) for count in state["counts"].split()], state["tokenizer"] or None)

    # -- symbols and ids

    def __len__(self) -> int:
        return len(self._symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.state_dict() == other.state_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} types, kind={self.kind!r})"

    def index(self, symbol: str) -> int:
        """The id of `symbol`, or that of `<unk>`."""
        return self._ids.get(symbol, self.UNK)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._ids

    def symbol(self, token: int) -> str:
        """The symbol of an id; InputError for an id that the vocabulary does not have."""
        if not 0 <= token < len(self._symbols):
            raise InputError(f"token id: found {token}, expected 0 to {len(self._symbols) - 1}")
        return self._symbols[token]

    @cached_property
    def non_text_ids(self) -> list[int]:
        """Ids that never occur in text: `<s>`, `<pad>` and the madeupword padding."""
        made_up = [
            len(self.SPECIALS) + index
            for index, (symbol, count) in enumerate(zip(self._symbols[len(self.SPECIALS) :], self._counts, strict=True))
            if count == 0 and PADDING_SYMBOL.fullmatch(symbol)
        ]
        return [self.BOS, self.PAD, *made_up]

    @cached_property
    def unknown_ids(self) -> list[int]:
        """Ids of unknown tokens: `<unk>` and the tokenizer's own unk token."""
        if self._tokenizer_json is None:
            return [self.UNK]
        model = json.loads(self._tokenizer_json)["model"]
        piece = model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
        return sorted({self.UNK, self.index(piece or self.SPECIALS[self.UNK])})

    def fingerprint(self) -> str:
        """A 16-digit hash that identifies the symbols, their order and the tokenizer."""
        content = json.dumps([self._symbols, self._tokenizer_json])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    # -- text and ids

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The BPE tokenizer; only where `kind` is "bpe"."""
        if self._tokenizer_json is None:
            raise InputError(f"vocabulary: found kind {self.kind}, expected bpe")
        return _parse_tokenizer(self._tokenizer_json, TOKENIZER)

    @cached_property
    def tokenizer_to_vocab_ids(self) -> NDArray[np.int64]:
        """For every id of the BPE tokenizer, the id here."""
        pieces = self.tokenizer.get_vocab()
        ids = np.full(max(pieces.values()) + 1, self.UNK, dtype=np.int64)
        ids[list(pieces.values())] = [self.index(piece) for piece in pieces]
        return ids

    def encode(self, text: Text) -> NDArray[np.int64]:
        """Token ids (tokens,) of a text, without appending EOS. At word level, a newline becomes `</s>`.

        Raises:
            InputError: bytes that are not UTF-8, unless the vocabulary is of bytes.
        """
        if self.kind == "bytes":
            # Undo surrogateescape, which Python applies to invalid UTF-8 on the command line.
            data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            return np.frombuffer(data, dtype=np.uint8).astype(np.int64) + len(self.SPECIALS)
        if not isinstance(text, str):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"text: found a byte at {error.start} that is not UTF-8, expected UTF-8") from None
        text = text.encode("utf-8", "replace").decode()  # a command line's stray bytes come as lone surrogates
        if self.kind == "bpe":
            return self.tokenizer_to_vocab_ids[self.tokenizer.encode(text, add_special_tokens=False).ids]
        words = text.replace("\n", f" {self.SPECIALS[self.EOS]} ").split()
        return np.array([self.index(word) for word in words], dtype=np.int64)

    never_targets, piece_ids, restores = (
        Renamed("non_text_ids"),
        Renamed("tokenizer_to_vocab_ids"),
        Renamed("round_trips"),
    )

    def round_trips(self, text: str) -> bool:
        """Whether the pieces of a BPE give a text back as it was, white space aside."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return "".join(decoded.split()) == "".join(text.split())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: what `decoder` streams, in one piece."""
        decoder = self.decoder()
        return "".join([decoder.add(int(token)) for token in ids]) + decoder.flush()

    def decoder(self) -> Decoder:
        """A fresh `Decoder`. `</s>` becomes a newline; words are separated by spaces; bytes and BPE pieces are
        joined and held back until they are whole characters, and the other specials give no text."""
        if self.kind == "words":
            return _WordDecoder(self)
        return _ByteDecoder(self) if self.kind == "bytes" else _PieceDecoder(self)


class _WordDecoder:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._at_line_start = True

    def add(self, token: int) -> str:
        if token == Vocabulary.EOS:
            self._at_line_start = True
            return "\n"
        symbol = self._vocabulary.symbol(token)
        text = symbol if self._at_line_start else " " + symbol
        self._at_line_start = False
        return text

    def flush(self) -> str:
        return ""


class _ByteDecoder:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        value = token - len(Vocabulary.SPECIALS)
        if 0 <= value < 256:
            return self._decoder.decode(bytes((value,)))
        self._vocabulary.symbol(token)  # raises for an id beyond the vocabulary
        return self.flush() + ("\n" if token == Vocabulary.EOS else "")

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _PieceDecoder:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pieces = {int(token): piece for piece, token in enumerate(vocabulary.tokenizer_to_vocab_ids)}
        self._reset()

    def _reset(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=False)
        self._pending_ids: list[int] = []

    def add(self, token: int) -> str:
        piece = self._pieces.get(token) if token >= len(Vocabulary.SPECIALS) else None
        if piece is None:
            self._vocabulary.symbol(token)  # raises for an id beyond the vocabulary
            return self.flush() + ("\n" if token == Vocabulary.EOS else "")
        text: str | None = self._stream.step(self._vocabulary.tokenizer, piece)
        self._pending_ids = [] if text else [*self._pending_ids, piece]
        return text or ""

    def flush(self) -> str:
        text: str = (
            self._vocabulary.tokenizer.decode(self._pending_ids, skip_special_tokens=False) if self._pending_ids else ""
        )
        self._reset()
        return text


def _parse_tokenizer(content: str, name: str) -> Tokenizer:
    # Imported here: only BPE needs it, and it takes as long to load as everything else in this package.
    tokenizer_type = import_extra("tokenizers").Tokenizer
    try:
        return cast("Tokenizer", tokenizer_type.from_str(content))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{name}: found no tokenizer ({error}), expected the JSON of the tokenizers package") from None


def _parse_dictionary(content: bytes, path: Path) -> tuple[list[str], list[int]]:
    try:
        text = content.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line_number}: found a byte that is not UTF-8, expected 'symbol count'"
        ) from None
    symbols: list[str] = []
    counts: list[int] = []
    seen = set(Vocabulary.SPECIALS)
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    for line_number, line in enumerate(lines, start=1):
        fields = line.rstrip().rsplit(" ", 1)
        overwrite = fields[-1] == OVERWRITE
        if overwrite:
            fields = fields[0].rsplit(" ", 1)
        try:
            symbol, count = fields[0], int(fields[1])
        except (IndexError, ValueError):
            raise InputError(f"{path}, line {line_number}: found {line!r}, expected 'symbol count'") from None
        if symbol in seen and not overwrite:
            raise InputError(
                f"{path}, line {line_number}: found {symbol!r} a second time, expected every symbol once "
                f"(or {OVERWRITE} after its count)"
            )
        seen.add(symbol)
        symbols.append(symbol)
        counts.append(count)
    if not symbols:
        raise InputError(f"{path}: found no symbols, expected 'symbol count' lines")
    return symbols, counts
