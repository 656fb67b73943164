"""Short runs that are interrupted in every way, and what must be the same at their end."""

from pathlib import Path
from typing import Any

import torch

from pytbptt.checkpoint import LAST
from pytbptt.training.metrics_log import METRICS, read_metrics

SETTINGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --bptt-variation awd --rotate",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0.2 --dropatt 0.1",
}
COMMON = (
    "--tokens-per-sample 8 --batch-size 4 --update-freq 2 --max-update 120 --lr 0.01 --log-interval 7 "
    "--save-interval-updates 5 --validate-interval-updates 20 --log-format json --seed 3 --device cpu"
)
TIMES = {"tokens_per_second", "peak_memory_bytes"}


def arguments(corpus: str, arch: str, save_dir: Path, *more: str) -> list[str]:
    return [corpus, *SETTINGS[arch].split(), *COMMON.split(), "--save-dir", str(save_dir), *more]


def outcome(save_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last checkpoint and the metrics of a run, without what differs from one folder or hour to the next."""
    checkpoint = torch.load(save_dir / LAST, weights_only=True)
    checkpoint["config"]["run"].pop("save_dir")
    entries = read_metrics(save_dir / METRICS)
    return checkpoint, [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]


def assert_same_run(found: Path, expected: Path) -> None:
    """To the bit: weights, optimizer, memory, random states, place in the data, metrics."""
    (one, metrics), (other, expected_metrics) = outcome(found), outcome(expected)
    assert_same(one, other)
    assert metrics == expected_metrics


def assert_same(found: Any, expected: Any, where: str = "checkpoint") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for n, (one, two) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, two, f"{where}[{n}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where
