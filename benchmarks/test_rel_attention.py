"""rel_attention: pytest benchmarks/test_rel_attention.py --benchmark-only [--size 'sweep-*' --mode backward]"""

from collections.abc import Callable

import pytest

from benchmarks.harness import Row
from benchmarks.ops.rel_attention import REL_ATTENTION


@pytest.mark.parametrize("row", REL_ATTENTION.rows(), ids=str)
def test_rel_attention(row: Row, bench: Callable[[Row], None]) -> None:
    bench(row)
