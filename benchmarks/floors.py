"""What an op takes at the rates of torch's own large product and copy, measured on the same device."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Rates = dict[str, float]
HAND_OVER_SECONDS = {"cpu": 0.0, "cuda": 7e-7}
"""From one block of an LSTM to another, by a flag: 0.69 us on an H200, 20,000 rounds of the tests' ping-pong."""


@dataclass(frozen=True)
class Work:
    """What an op cannot do with less of."""

    operations: float
    """Floating-point operations of products that wait for nothing."""
    elements: float
    """Read and written."""
    steps: int = 0
    """One after the other."""
    operations_of_a_step: float = 0.0


def seconds(work: Work, rates: Rates, itemsize: int) -> float:
    """Of all products and of all bytes whichever takes longer; a step takes its product's time or, on a GPU, that of
    handing its result from block to block."""
    step = max(work.operations_of_a_step / rates["operations"], rates["hand_over_seconds"])
    together = max(work.operations / rates["operations"], itemsize * work.elements / rates["bytes"])
    return work.steps * step + together


@functools.cache
def rates(device: str, dtype: str) -> Rates:
    """Per second: operations of one large product, and bytes read and written by a large copy.

    Precision (TF32) is as it is set; `dtype` names it.
    """
    n, large, times = (8192, 2**30, 3) if device == "cuda" else (4096, 2**27, 1)
    element = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    left, right = (torch.randn(n, n, device=device, dtype=element) for _ in range(2))
    source, target = torch.empty(2, large, device=device, dtype=torch.uint8)
    return {
        "operations": 2 * n**3 / _fastest(lambda: left @ right, times, device),
        "bytes": 2 * large / _fastest(lambda: target.copy_(source), times, device),
        "hand_over_seconds": HAND_OVER_SECONDS[device],
    }


def _fastest(run: Callable[[], object], times: int, device: str) -> float:
    """Seconds of one of `times` runs in a row, the least of ten: others may use the machine meanwhile."""
    best = float("inf")
    run()
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(times):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / times)
    return best


def rel_attention(B: int, T: int, M: int, H: int, D: int, *, mode: str) -> Work:
    """Forward: 3 products over what is visible. Backward: the scores' 2 again, 4 more, and 2 for the gradients of the
    chunk's own keys and values; the memory comes detached."""
    pairs = B * H * sum(M + i + 1 for i in range(T))
    chunk, memory, positions = B * T * H * D, B * M * H * D, (M + T) * H * D
    elements = 4 * chunk + 2 * memory + positions  # query, key, value, out; memory's key and value
    products = 3 * pairs
    if mode != "forward":
        elements += 5 * chunk + 2 * memory + positions  # all read again, out and its gradient too
        elements += 3 * chunk + positions  # gradients
        products += 6 * pairs + 2 * (B * H * T * (T + 1) // 2)
    return Work(products * 2 * D, elements)


def lstm(T: int, B: int, I: int, H: int, layers: int = 1, *, mode: str) -> Work:
    """A step's product, and outside of the steps the one with the inputs; backward, its two gradients and the recurrent
    weights'."""
    step = 8 * B * H * H
    inputs = 8 * T * B * H * (I + (layers - 1) * H)
    elements = T * B * (I + layers * H) + 4 * H * (I + H + (layers - 1) * 2 * H)
    if mode == "forward":
        return Work(inputs, elements, layers * T, step)
    return Work(3 * inputs + layers * T * step, 3 * elements, 2 * layers * T, step)
