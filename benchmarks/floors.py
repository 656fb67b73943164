"""Roofline times of ops, from the rates of a large matrix product and copy in torch on the same device."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Rates = dict[str, float]
HANDSHAKE_SECONDS = {"cpu": 0.0, "cuda": 7e-7}
"""From one block of an LSTM kernel to another by a flag: 0.69 us on an H200 (20,000 rounds of the tests' handshake)."""


@dataclass(frozen=True)
class Work:
    """The minimum work of an op."""

    operations: float
    """Floating-point operations outside of the sequential steps."""
    elements: float
    """Elements read and written."""
    steps: int = 0
    """Sequential steps."""
    operations_per_step: float = 0.0


def seconds(work: Work, rates: Rates, itemsize: int) -> float:
    """The maximum of compute and memory time, plus the steps: each takes the time of its product or of a handshake."""
    step = max(work.operations_per_step / rates["operations"], rates["handshake_seconds"])
    parallel = max(work.operations / rates["operations"], itemsize * work.elements / rates["bytes"])
    return work.steps * step + parallel


@functools.cache
def rates(device: str, dtype: str) -> Rates:
    """Operations per second of a large product, and bytes per second read and written by a large copy.

    TF32 is used if it is enabled in torch; `dtype` is the key of the cache.
    """
    n, large, times = (8192, 2**30, 3) if device == "cuda" else (4096, 2**27, 1)
    element = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
    left, right = (torch.randn(n, n, device=device, dtype=element) for _ in range(2))
    source, target = torch.empty(2, large, device=device, dtype=torch.uint8)
    return {
        "operations": 2 * n**3 / _fastest(lambda: left @ right, times, device),
        "bytes": 2 * large / _fastest(lambda: target.copy_(source), times, device),
        "handshake_seconds": HANDSHAKE_SECONDS[device],
    }


def _fastest(run: Callable[[], object], times: int, device: str) -> float:
    """Seconds per run, by the fastest of ten series of `times` runs."""
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
    """Forward: 3 products over the visible keys. Backward: the 2 of the scores again, 4 for gradients, and 2 for the
    gradients of the chunk's keys and values; the memory is detached."""
    pairs = B * H * sum(M + i + 1 for i in range(T))
    chunk, memory, positions = B * T * H * D, B * M * H * D, (M + T) * H * D
    elements = 4 * chunk + 2 * memory + positions  # query, key, value, out; memory's key and value
    products = 3 * pairs
    if mode != "forward":
        elements += 5 * chunk + 2 * memory + positions  # inputs, out and its gradient
        elements += 3 * chunk + positions  # gradients
        products += 6 * pairs + 2 * (B * H * T * (T + 1) // 2)
    return Work(products * 2 * D, elements)


def lstm(T: int, B: int, I: int, H: int, layers: int = 1, *, mode: str) -> Work:
    """Forward: the recurrent product in each step, and outside of the steps the input product. Backward: as many steps
    again, and outside of them two gradients of the input product and that of the recurrent weights."""
    step = 8 * B * H * H
    inputs = 8 * T * B * H * (I + (layers - 1) * H)
    elements = T * B * (I + layers * H) + 4 * H * (I + H + (layers - 1) * 2 * H)
    if mode == "forward":
        return Work(inputs, elements, layers * T, step)
    return Work(3 * inputs + layers * T * step, 3 * elements, 2 * layers * T, step)
