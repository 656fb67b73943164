"""Time and memory of rel_attention, forward and backward, as the chunk and the memory grow: fused, eager and SDPA.

The implementations are those of test_rel_attention.py; they and the
sizes take turns, so that a busy machine slows all alike.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from benchmarks.test_rel_attention import MODES, make, peak_memory
from pytbptt.command import run
from pytbptt.errors import InputError

B, H, D = 1, 8, 64
MODE = "forward+backward"
NAMES = ("fused", "eager", "sdpa")
CHUNK, MEMORY = 128, 512
CHUNKS = (32, 64, 128, 256, 512, 1024)
MEMORIES = (0, 128, 256, 512, 1024, 2048)


@dataclass
class SweepSettings:
    rounds: int = 9
    """Turns of every implementation at every size."""
    output: str = "benchmarks/results/sweep.json"
    """Where the results go, seen from the repository's root."""


def measure(sizes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Median seconds, and peak memory over the bytes of output and gradients, for every (T, M) and implementation."""
    problems = {size: make(B, *size, H, D) for size in sizes}
    seconds: dict[tuple[int, int], dict[str, list[float]]] = {size: {name: [] for name in NAMES} for size in sizes}
    for turn in range(-1, rounds):
        for size, problem in problems.items():
            for name in NAMES:
                started = time.perf_counter()
                MODES[MODE](name, problem)
                if turn >= 0:
                    seconds[size][name].append(time.perf_counter() - started)
    results = []
    for (T, M), taken in seconds.items():
        for name in NAMES:
            ratio = statistics.median(other / fused for fused, other in zip(taken["fused"], taken[name], strict=True))
            result = {
                "name": name,
                "T": T,
                "M": M,
                "median_seconds": statistics.median(taken[name]),
                "ratio_to_fused": ratio,
                "memory": peak_memory(name, MODE, (B, T, M, H, D)),
            }
            results.append(result)
            print(
                f"T {T:5} M {M:5} {name:<6} {result['median_seconds'] * 1e3:8.1f} ms, {ratio:5.2f} times fused; "
                f"peak memory {result['memory']:5.1f} times output and gradients"
            )
    return results


def sweep(settings: SweepSettings) -> None:
    if settings.rounds < 1:
        raise InputError(f"--rounds: found {settings.rounds}, expected at least 1")
    machine = record.describe()
    sizes = [(T, MEMORY) for T in CHUNKS] + [(CHUNK, M) for M in MEMORIES if M != MEMORY]
    results = measure(sizes, settings.rounds)
    sizes_of_all = {"B": B, "H": H, "D": D, "mode": MODE, "T_where_M_grows": CHUNK, "M_where_T_grows": MEMORY}
    record.write(settings.output, "sweep", machine | {"sizes": sizes_of_all}, results)


if __name__ == "__main__":
    run("python -m benchmarks.sweep", SweepSettings, sweep, __doc__)
