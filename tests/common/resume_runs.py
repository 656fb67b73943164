"""Short training runs for tests of resuming, and the comparison of two runs, which must be bitwise equal."""

from pathlib import Path
from typing import Any

import torch

from pytbptt.checkpoint import LAST_CHECKPOINT
from pytbptt.training.metrics_log import METRICS_FILE, read_metrics

MODEL_FLAGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --bptt-variation awd --rotate",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0.2 --dropatt 0.1",
}
COMMON_FLAGS = (
    "--tokens-per-sample 8 --batch-size 4 --update-freq 2 --max-update 120 --lr 0.01 --log-interval 7 "
    "--save-interval-updates 5 --validate-interval-updates 20 --log-format json --seed 3 --device cpu"
)
MEASUREMENTS = {"tokens_per_second", "peak_memory_bytes"}


def train_arguments(corpus: str, arch: str, save_dir: Path, *flags: str) -> list[str]:
    return [corpus, *MODEL_FLAGS[arch].split(), *COMMON_FLAGS.split(), "--save-dir", str(save_dir), *flags]


def load_run(save_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's last checkpoint and metrics, without its folder's name, speed and memory use."""
    checkpoint = torch.load(save_dir / LAST_CHECKPOINT, weights_only=True)
    checkpoint["config"]["run"].pop("save_dir")
    entries = read_metrics(save_dir / METRICS_FILE)
    return checkpoint, [{key: value for key, value in entry.items() if key not in MEASUREMENTS} for entry in entries]


def assert_runs_equal(actual: Path, expected: Path) -> None:
    """Bitwise: weights, optimizer, memory, random states, position in the data, metrics."""
    (checkpoint, metrics), (expected_checkpoint, expected_metrics) = load_run(actual), load_run(expected)
    assert_equal(checkpoint, expected_checkpoint)
    assert metrics == expected_metrics


def assert_equal(actual: Any, expected: Any, name: str = "checkpoint") -> None:
    """torch.equal for tensors in nested containers; `name` is reported if they differ."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_equal(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), name
        for n, (item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(item, expected_item, f"{name}[{n}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), name
    else:
        assert actual == expected, name
