"""LSTMs over rollouts with resets: pytest benchmarks/test_rollouts.py --benchmark-only, or make bench-rollouts"""

from collections.abc import Callable

import pytest

from benchmarks.harness import Row
from benchmarks.ops.rollouts import ROLLOUTS


@pytest.mark.parametrize("row", ROLLOUTS.rows(), ids=str)
def test_rollouts(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
