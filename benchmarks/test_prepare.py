"""How fast text becomes tokens: MB of text per second, reading, counting (or training the BPE) and encoding together.

Seconds on the clock and of processor time are both reported: on a busy machine only the second says what one core does.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from pytbptt.data import PrepareSettings, prepare

TARGET = 10.0  # MB/s of words for each core


def write_text(path: Path, megabytes: int) -> Path:
    """Lines of words whose frequencies fall as in English (Zipf's law), over 50,000 types."""
    draw = random.Random(1)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(50_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    paragraph = "".join(" ".join(draw.choices(words, weights, k=60)) + "\n" for _ in range(6_000))
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(paragraph)
    return path


@pytest.mark.parametrize(
    ("kind", "megabytes", "workers"),
    [({}, 32, 1), ({}, 32, 2), ({"bytes": True}, 32, 1), ({"bpe": 2000}, 4, 2)],
    ids=["words-1", "words-2", "bytes-1", "bpe-2"],
)
def test_prepare(benchmark: Any, tmp_path: Path, kind: dict[str, Any], megabytes: int, workers: int) -> None:
    text = write_text(tmp_path / "text", megabytes)
    processor: list[float] = []

    def once() -> None:
        before = os.times()
        prepare(PrepareSettings(trainpref=text, destdir=tmp_path / str(len(processor)), workers=workers, **kind))
        processor.append(sum(os.times()[:4]) - sum(before[:4]))

    benchmark.pedantic(once, rounds=3)
    seconds, size = benchmark.stats.stats.median, text.stat().st_size / 1e6
    of_processor = sorted(processor)[len(processor) // 2]
    benchmark.extra_info |= {
        "megabytes": size,
        "workers": workers,
        "median_seconds": seconds,
        "median_processor_seconds": of_processor,
        "megabytes_per_second": size / seconds,
        "megabytes_per_processor_second": size / of_processor,
        "target_words_megabytes_per_second_per_core": TARGET,
    }
    print(
        f"\n{benchmark.name}: median {seconds:.2f} s, {size / seconds:.1f} MB/s; "
        f"{size / of_processor:.1f} MB per second of processor time"
    )
