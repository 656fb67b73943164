"""A corpus that needs nothing but numpy: tokens drawn by Zipf's law."""

from pathlib import Path

import numpy as np

from pytbptt.data import Vocabulary, write_indexed


def write_zipf_corpus(folder: Path, words: int, tokens: int) -> None:
    """The training split of a folder of prepared data, if it is not there yet."""
    if (folder / "train.idx").exists():
        return
    weights = 1 / np.arange(1, words + 1)
    drawn = np.random.RandomState(0).choice(words, tokens, p=weights / weights.sum())
    write_indexed(folder / "train", [drawn.astype(np.int32)], np.int32, "fairseq")
    specials = len(Vocabulary.SPECIALS)
    Vocabulary([f"w{n}" for n in range(words - specials)], [1] * (words - specials)).save(folder)
