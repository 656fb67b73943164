"""rel_attention on the CPU: the fused op against eager, compiled eager, and SDPA with the position term as its mask.

    pytest benchmarks/test_rel_attention.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds \
        --benchmark-json=benchmarks/results/rel_attention.json

A group is one size, forward or with backward. `ratio` in the fused row's extra_info is the median of the better of
eager and SDPA over the fused median, all three timed in turn, round by round, so that another program's load falls on
each alike. `memory` is peak resident memory beyond the inputs, over the bytes of output and gradients.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pytbptt.extension import EXTENSION
from pytbptt.ops import backend, rel_attention

SIZES = [(4, 150, 150, 10, 41), (2, 512, 512, 8, 64), (1, 64, 640, 10, 41), (16, 128, 128, 4, 64)]  # B, T, M, H, D
DECODING = (1, 1, 640, 10, 41)
INTERLEAVED_ROUNDS = 15
Problem = dict[str, Tensor]
pytestmark = pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.why_absent}")


def make(B: int, T: int, M: int, H: int, D: int) -> Problem:
    """What a model trains with: the memory comes detached."""
    torch.manual_seed(0)
    problem = {name: torch.randn(B, T, H, D, requires_grad=True) for name in ("query", "key", "value")}
    problem["position"] = torch.randn(M + T, H, D, requires_grad=True)
    problem |= {name: torch.randn(H, D, requires_grad=True) for name in ("content_bias", "position_bias")}
    return problem | {name: torch.randn(B, M, H, D) for name in ("memory_key", "memory_value")}


def fused(problem: Problem) -> Tensor:
    with backend("fused"):
        return rel_attention(**problem)


def eager(problem: Problem) -> Tensor:
    with backend("reference"):
        return rel_attention(**problem)


_compiled = torch.compile(rel_attention, dynamic=False)


def compiled_eager(problem: Problem) -> Tensor:
    with backend("reference"):
        return _compiled(**problem)


def sdpa(problem: Problem) -> Tensor:
    """Stock PyTorch's best: flash attention, with the position term computed as a mask of every query and key."""
    query, D = problem["query"], problem["query"].shape[-1]
    key = torch.cat([problem["memory_key"], problem["key"]], dim=1)
    value = torch.cat([problem["memory_value"], problem["value"]], dim=1)
    B, T, H, _ = query.shape
    keys = key.shape[1]
    by_distance = torch.einsum("bihd,jhd->bhij", query + problem["position_bias"], problem["position"].flip(0))
    shifted = F.pad(by_distance, (1, 0)).view(B, H, keys + 1, T)[:, :, 1:].reshape(B, H, T, keys)
    future = torch.ones(T, keys, dtype=torch.bool).triu(keys - T + 1)
    mask = (shifted * D**-0.5).masked_fill(future, float("-inf"))
    content = (query + problem["content_bias"]).transpose(1, 2)
    return F.scaled_dot_product_attention(content, key.transpose(1, 2), value.transpose(1, 2), mask).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "compiled eager": compiled_eager,
    "sdpa": sdpa,
    "fused": fused,
}


def forward(name: str, problem: Problem) -> None:
    with torch.no_grad():
        IMPLEMENTATIONS[name](problem)


def forward_and_backward(name: str, problem: Problem) -> None:
    out = IMPLEMENTATIONS[name](problem)
    torch.autograd.grad(out, [t for t in problem.values() if t.requires_grad], torch.ones_like(out))


MODES = {"forward": forward, "forward+backward": forward_and_backward}


def interleaved_ratio(mode: str, problem: Problem, baselines: list[str]) -> float:
    """Median of the best baseline over the fused median."""
    names = [*baselines, "fused"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for measured in range(-2, INTERLEAVED_ROUNDS):
        for name in names:
            start = time.perf_counter()
            MODES[mode](name, problem)
            if measured >= 0:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return min(medians[name] for name in baselines) / medians["fused"]


def peak_memory(name: str, mode: str, size: tuple[int, ...]) -> float:
    """Peak resident bytes beyond the inputs, over the bytes of the results; in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_here, (name, mode, size))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def _peak_memory_here(name: str, mode: str, size: tuple[int, ...]) -> float:
    MODES[mode](name, make(1, 8, 8, 2, 16))  # libraries load and thread pools start before counting
    problem = make(*size)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    MODES[mode](name, problem)
    results = problem["query"].nbytes
    if mode == "forward+backward":
        results += sum(t.nbytes for t in problem.values() if t.requires_grad)
    return (_resident("VmHWM") - before) / results


@pytest.fixture(autouse=True)
def _facts(benchmark) -> None:  # type: ignore[no-untyped-def]
    assert EXTENSION.facts is not None
    benchmark.extra_info |= {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_isa": EXTENSION.facts["cpu_isa_in_use"],
    }


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chunk(benchmark, size: tuple[int, ...], mode: str, name: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{size} {mode}"
    problem = make(*size)
    benchmark.pedantic(MODES[mode], (name, problem), rounds=15, warmup_rounds=3)
    benchmark.extra_info["memory"] = round(peak_memory(name, mode, size), 2)
    if name == "fused":
        benchmark.extra_info["ratio"] = round(interleaved_ratio(mode, problem, ["eager", "sdpa"]), 2)


@pytest.mark.parametrize("name", ["eager", "compiled eager", "fused"])
def test_decoding(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{DECODING} one token"
    problem = make(*DECODING)
    benchmark.pedantic(forward, (name, problem), rounds=50, iterations=10, warmup_rounds=3)
    if name == "fused":
        benchmark.extra_info["ratio"] = round(interleaved_ratio("forward", problem, ["eager"]), 2)
