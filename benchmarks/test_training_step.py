"""Updates of whole models: pytest benchmarks/test_training_step.py --benchmark-only --results FILE"""

from collections.abc import Callable

import pytest

from benchmarks.harness import Row
from benchmarks.ops.training_step import AWD_LSTM, TRANSFORMER_XL


@pytest.mark.parametrize("row", [*TRANSFORMER_XL.rows(), *AWD_LSTM.rows()], ids=lambda row: f"{row.op}-{row}")
def test_training_step(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
