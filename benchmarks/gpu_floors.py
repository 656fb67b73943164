"""The least time that a GPU could take for an op: its operations and bytes at rates that were measured on that GPU."""

from collections.abc import Callable

import torch

Rates = dict[str, float]
HAND_OVER_SECONDS = 7e-7
"""From one block of an LSTM to another, by a flag: 0.69 us on an H200, 20,000 rounds of the tests' ping-pong."""


def _fastest(run: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` runs in a row, the least of five."""
    best = float("inf")
    run()
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / times)
    return best


def rates(dtype: torch.dtype) -> Rates:
    """Per second: operations of one large product, and bytes read and written by a large copy."""
    n = 8192
    left, right = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    large = torch.empty(2, 2**30, device="cuda", dtype=torch.uint8)
    return {
        "operations": 2 * n**3 / _fastest(lambda: left @ right, 3),
        "memory_bytes": 2 * 2**30 / _fastest(lambda: large[0].copy_(large[1]), 3),
    }


def rel_attention(B: int, H: int, T: int, M: int, D: int, *, mode: str, rates: Rates) -> float:
    """Milliseconds in 16 bits. Forward: 3 products over what is visible; backward: the scores' 2 again and 6 more."""
    pairs = B * H * sum(M + i + 1 for i in range(T))
    chunk, memory, positions = B * T * H * D, B * M * H * D, (M + T) * H * D
    elements = 4 * chunk + 2 * memory + positions  # query, key, value, out; memory's key and value
    products = 3
    if mode != "forward":
        elements += 5 * chunk + 2 * memory + positions  # all read again, out and its gradient too
        elements += 3 * chunk + positions  # gradients
        products += 8
    return 1000 * max(products * 2 * pairs * D / rates["operations"], 2 * elements / rates["memory_bytes"])


def lstm(T: int, B: int, H: int, layers: int, *, mode: str, rates: Rates) -> float:
    """Milliseconds. A step takes the most of its product and of a hand-over.

    Outside of the steps there is the product with the inputs (as wide as H); backward, its two gradients and the
    recurrent weights'.
    """
    product = 8 * B * H * H / rates["operations"]
    step = max(product, HAND_OVER_SECONDS)
    seconds = T * step + T * product
    if mode != "forward":
        seconds += T * step + 3 * T * product
    return 1000 * layers * seconds
