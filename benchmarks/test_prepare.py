"""Speed of preparation in MB of text per second: reading, counting words (or training the BPE) and encoding.

Wall-clock and CPU time are reported: on a busy machine only CPU time shows the speed of one core.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from pytbptt.data import PrepareSettings, prepare

TARGET = 10.0  # MB/s of word tokenization per core


def write_text(path: Path, megabytes: int) -> Path:
    """Lines of random words by Zipf's law, from a vocabulary of 50,000."""
    generator = random.Random(1)
    letters = "etaoinshrdlu"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(50_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    paragraph = "".join(" ".join(generator.choices(words, weights, k=60)) + "\n" for _ in range(6_000))
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
    cpu_seconds: list[float] = []

    def run() -> None:
        before = os.times()
        prepare(PrepareSettings(trainpref=text, destdir=tmp_path / str(len(cpu_seconds)), workers=workers, **kind))
        cpu_seconds.append(sum(os.times()[:4]) - sum(before[:4]))

    benchmark.pedantic(run, rounds=3)
    seconds, size = benchmark.stats.stats.median, text.stat().st_size / 1e6
    median_cpu_seconds = sorted(cpu_seconds)[len(cpu_seconds) // 2]
    benchmark.extra_info |= {
        "megabytes": size,
        "workers": workers,
        "median_seconds": seconds,
        "median_processor_seconds": median_cpu_seconds,
        "megabytes_per_second": size / seconds,
        "megabytes_per_processor_second": size / median_cpu_seconds,
        "target_words_megabytes_per_second_per_core": TARGET,
    }
    print(
        f"\n{benchmark.name}: median {seconds:.2f} s, {size / seconds:.1f} MB/s; "
        f"{size / median_cpu_seconds:.1f} MB per second of CPU time"
    )
