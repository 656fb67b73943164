"""Opens a split of prepared data, or of the built-in corpus."""

from pathlib import Path

from pytbptt.data.built_in_corpus import PYTHON_STDLIB, python_stdlib
from pytbptt.data.indexed import IndexedTokens
from pytbptt.data.text_format import TextFormat
from pytbptt.data.vocabulary import Vocabulary
from pytbptt.errors import InputError


def load(path: str | Path, split: str = "train") -> IndexedTokens:
    """Opens a split of a prepared corpus with its vocabulary.

    `path` is a directory with dict.txt and SPLIT.bin/.idx, as `python -m pytbptt.prepare` writes it, or the name
    of the built-in corpus, "python-stdlib", which is built under data-bin/ when first used.

    Raises:
        InputError: the directory, the split or the dictionary is missing, or a file is damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        if str(path) != PYTHON_STDLIB:
            raise InputError(
                f"{path}: found no such directory, expected one written by python -m pytbptt.prepare, or the name "
                f"{PYTHON_STDLIB}"
            )
        directory = python_stdlib()
    if not (directory / f"{split}.idx").exists():
        existing = ", ".join(sorted(file.stem for file in directory.glob("*.idx"))) or "none"
        raise InputError(f"{directory}: found splits: {existing}; expected {split} ({split}.idx and {split}.bin)")
    return IndexedTokens(directory / split, Vocabulary.load(directory), TextFormat.load(directory))
