"""Speed of loaders on memory-mapped tokens, in tokens per second, with the batch of fairseq's example."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytbptt.data import IndexedTokens, IndexedWriter, StreamLoader, Vocabulary, evaluation_chunks, write_indexed

BATCH_SIZE, BPTT = 60, 150
TYPES, TOKENS, DOCUMENT = 30_000, 20_000_000, 2_000
TARGET = 50e6  # tokens/s


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> IndexedTokens:
    """20 M uint16 tokens in documents of 2,000."""
    prefix = tmp_path_factory.mktemp("loader") / "train"
    ids = np.random.default_rng(1).integers(4, TYPES, TOKENS, dtype=np.uint16)
    write_indexed(prefix, np.split(ids, TOKENS // DOCUMENT), np.uint16)
    vocabulary = Vocabulary.from_counts({f"w{number}": 1 for number in range(TYPES - 4)})
    return IndexedTokens(prefix, vocabulary)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{"reset_on": "none"}, {"reset_on": "document"}, {"reset_on": "document", "rotate": True}],
    ids=["plain", "resets", "rotated"],
)
def test_chunks(benchmark: Any, corpus: IndexedTokens, options: dict[str, Any], prefetch: int) -> None:
    loader = StreamLoader(corpus, BATCH_SIZE, BPTT, prefetch=prefetch, **options)

    def epoch() -> None:
        for _ in loader:
            pass

    benchmark.pedantic(epoch, rounds=5, warmup_rounds=1)
    report(benchmark, loader.streams * loader.tokens_per_stream)


def test_evaluation_chunks(benchmark: Any, corpus: IndexedTokens) -> None:
    def score() -> None:
        for _ in evaluation_chunks(corpus, BATCH_SIZE, BPTT):
            pass

    benchmark.pedantic(score, rounds=3, warmup_rounds=1)
    report(benchmark, len(corpus))


def report(benchmark: Any, tokens: int) -> None:
    """Adds the median in tokens per second to the results, and prints it."""
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "batch_size": BATCH_SIZE,
        "bptt": BPTT,
        "dtype": "uint16",
        "median_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "target_tokens_per_second": TARGET,
    }
    print(f"\n{benchmark.name}: median {seconds:.3f} s, {tokens / seconds / 1e6:.0f} M tokens/s")


def test_opening(benchmark: Any, tmp_path: Path) -> None:
    """An index of a million lines, each of which is checked."""
    lines = 1_000_000
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add(np.zeros(25 * lines, np.uint16), np.full(lines, 25))
    benchmark.pedantic(lambda: IndexedTokens(tmp_path / "train"), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {"sequences": lines, "median_seconds": benchmark.stats.stats.median}
