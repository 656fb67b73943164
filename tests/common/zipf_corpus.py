"""A corpus of random tokens with Zipf's distribution; needs no package but numpy."""

from pathlib import Path

import numpy as np

from pytbptt.data import Vocabulary, write_indexed


def write_zipf_corpus(folder: Path, words: int, tokens: int) -> None:
    """Write a training split and its vocabulary, unless they exist."""
    if (folder / "train.idx").exists():
        return
    weights = 1 / np.arange(1, words + 1)
    ids = np.random.RandomState(0).choice(words, tokens, p=weights / weights.sum())
    write_indexed(folder / "train", [ids.astype(np.int32)], np.int32, "fairseq")
    specials = len(Vocabulary.SPECIALS)
    Vocabulary([f"w{n}" for n in range(words - specials)], [1] * (words - specials)).save(folder)
