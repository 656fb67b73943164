"""Read the vocabularies of other projects, and renumber their models' token ids.

pytbptt's ids 0 to 3 are <s> <pad> </s> <unk>. Other projects put them elsewhere or lack some: rows are permuted to put
them first, and missing ones get a row that is never predicted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.data import Vocabulary
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import MASKED_BIAS
from pytbptt.nn.language_model import LanguageModel

# Other projects' names for <s>, <pad>, </s> and <unk>; the first present is used. xxbos starts fastai's documents, so
# it maps to </s>, our document separator.
SPECIAL_TOKEN_ALIASES = (
    ("<s>", "xxeos"),
    ("<pad>", "xxpad"),
    ("<eos>", "<S>", "xxbos", "</s>"),
    ("<unk>", "<UNK>", "xxunk"),
)


def read_symbols(path: Path) -> tuple[list[str], list[str]]:
    """A vocabulary's symbols in the order of their ids, and the globals that were blocked in reading them.

    Known are TransfoXL's vocab.bin, vocab.pkl and vocab.txt, kimiyoung's cache.pt and vocabulary files,
    awd-lstm-lm's corpus.….data and fastai's itos.pkl; text is one symbol a line, before the first space.

    Raises:
        InputError: missing, or none of these.
    """
    if not path.is_file():
        raise InputError(f"--vocabulary: {path}: found no such file, expected the model's vocabulary")
    lines = _lines(path)
    if lines is not None:
        return [line.split()[0] for line in lines if line.strip()], []
    contents = safe_unpickle.read(path)
    symbols = _symbols(contents.value)
    if symbols is None:
        found = f" of {', '.join(contents.blocked_globals)}" if contents.blocked_globals else ""
        raise InputError(
            f"--vocabulary: {path}: found something else{found}, expected a list of symbols, idx2sym, idx2word or itos"
        )
    return symbols, contents.blocked_globals


def renumber(model: LanguageModel, symbols: Sequence[str]) -> tuple[LanguageModel, Vocabulary]:
    """The model with the ids of a vocabulary of ours, and that vocabulary.

    Args:
        model: its ids are indices into `symbols`.
        symbols: one for each of the model's types.

    Returns:
        The model, with the original's log-probabilities and probability 0 for the added specials; and the vocabulary.

    Raises:
        InputError: more or fewer symbols than types, or specials that are not among the most frequent.
    """
    if len(symbols) != model.config.vocab_size:
        found = f"{len(symbols)} symbols"
        raise InputError(
            f"--vocabulary: found {found}, expected {model.config.vocab_size}, one for each of the model's"
        )
    specials = [
        next((symbols.index(name) for name in names if name in symbols), None) for names in SPECIAL_TOKEN_ALIASES
    ]
    head_size = model.softmax.edges[1]
    outside_head = next((symbols[index] for index in specials if index is not None and index >= head_size), None)
    if outside_head is not None:
        raise InputError(
            f"--vocabulary: found {outside_head} outside the softmax's first cluster, expected it among the first "
            f"{head_size} ids"
        )
    added = specials.count(None)
    others = [index for index in range(len(symbols)) if index not in set(specials)]
    order = torch.tensor([-1 if index is None else index for index in [*specials, *others]])

    cutoffs = tuple(cutoff + added for cutoff in model.softmax.edges[1:-1])
    result = model.config.replace(vocab_size=len(order), cutoffs=cutoffs).build()
    # With div_val > 1 there is a table per cluster, and only the first changes.
    rows = order[: len(model.softmax.weights[0]) + added]
    state = model.state_dict()
    for name, fill_value in (
        ("embedding.weights.0", 0.0),
        ("softmax.weights.0", 0.0),
        ("softmax.biases.0", MASKED_BIAS),
    ):
        state[name] = _gather_rows(state[name], rows, fill_value)
    result.load_state_dict(state)
    return result, Vocabulary([_escape_symbol(symbols[index]) for index in others], [0] * len(others))


def _lines(path: Path) -> list[str] | None:
    """The lines of a text file; None if it is not text."""
    with open(path, "rb") as file:
        if b"\x00" in file.read(1 << 16):
            return None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return None


def _symbols(value: Any) -> list[str] | None:
    """The list of symbols of a pickled vocabulary or corpus; None if there is none."""
    if isinstance(value, list):
        return list(value) if value and all(isinstance(symbol, str) for symbol in value) else None
    found = value if isinstance(value, dict) else safe_unpickle.attributes(value)
    for name in ("idx2sym", "idx2word", "itos", "vocab", "dictionary"):
        if name in found:
            return _symbols(found[name])
    return None


def _gather_rows(table: Tensor, rows: Tensor, fill_value: float) -> Tensor:
    """The table's rows, and rows of `fill_value` for -1."""
    absent = (rows < 0).view(-1, *[1] * (table.dim() - 1))
    return torch.where(absent, fill_value, table[rows.clamp(min=0)])


def _escape_symbol(symbol: str) -> str:
    """A symbol escaped for dict.txt: written as <0xNN> bytes if it contains white space or equals a special."""
    if symbol and symbol.split() == [symbol] and symbol not in Vocabulary.SPECIALS:
        return symbol
    return "".join(f"<0x{value:02X}>" for value in symbol.encode()) or "<0x>"
