"""LSTM layers, with and without weight drop: pytest benchmarks/test_lstm.py --benchmark-only --results FILE"""

from collections.abc import Callable

import pytest

from benchmarks.harness import Row
from benchmarks.ops.lstm import LSTM_LAYERS, WEIGHT_DROP


@pytest.mark.parametrize("row", LSTM_LAYERS.rows(), ids=str)
def test_lstm(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)


@pytest.mark.parametrize("row", WEIGHT_DROP.rows(), ids=str)
def test_lstm_with_weight_drop(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
