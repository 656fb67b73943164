"""The one harness of the ops' benchmarks, on CPUs and GPUs: what is compared, how it is timed, what a row holds.

An `Op` is a computation with its sizes and implementations. A *group* is one op, size, device, dtype and mode; its
*rows* are the implementations, which take turns round by round, so that whatever else the machine does slows all alike.
conftest.py runs them as tests of pytest-benchmark.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import floors, record

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # products round their operands to TF32; otherwise float32's are exact
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WARM_UP = {"cpu": 2, "cuda": 5}
MOST_ROUNDS = 100
MOST_CYCLES_PER_SECOND = 2e9
Problem = Any
Implementation = Callable[[Problem], Tensor]
Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Size:
    shape: Mapping[str, int]
    """The op's sizes by name, such as B, T, M, H, D."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    modes: tuple[str, ...] = ("forward", "backward")
    default: bool = True
    """Whether it is measured unless --size names others."""


@dataclass(frozen=True)
class Row:
    """One implementation of one group."""

    module: str
    op: str
    size: str
    device: str
    dtype: str
    mode: str
    name: str

    def __str__(self) -> str:
        return f"{self.device}-{self.dtype}-{self.size}-{self.mode}-{self.name}"

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        return self.op, self.size, self.device, self.dtype, self.mode


@dataclass(frozen=True)
class Op:
    """A computation and everything that computes it. Implementations of one problem give the same numbers, except the
    `bounds`, which do less work and show what could be reached."""

    module: str
    """Where it is defined, under the name `name` in that module's OPS."""
    name: str
    sizes: Mapping[str, Size]
    make: Callable[..., Problem]
    """A problem of (device=, dtype=, **shape), drawn on the device."""
    implementations: Mapping[str, Implementation]
    wanted: Callable[[Problem], list[Tensor]] = lambda problem: []
    """What gradients are taken for in mode "backward", which is forward and backward together."""
    work: Callable[..., floors.Work] | None = None
    """What (mode=, **shape) cannot do with less of."""
    facts: Callable[[Row, Size], dict[str, Any]] = lambda row, size: {}
    """What else belongs beside a row's times."""
    bounds: tuple[str, ...] = ()
    gpu_only: tuple[str, ...] = ()
    """Implementations that no CPU has."""
    compiled: tuple[str, ...] = ()
    """Implementations by torch.compile: what a process of their own takes on a CPU is the compiler's memory."""
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("float32",), "cuda": ("bfloat16", "float16")}
    )
    """What is measured unless --dtype names others."""

    def rows(self) -> list[Row]:
        """All that can be asked for, the rows of a group behind one another."""
        return [
            Row(self.module, self.name, label, device, dtype, mode, name)
            for device, dtype, (label, size) in itertools.product(("cpu", "cuda"), DTYPES, self.sizes.items())
            if device in size.devices and not (device == "cpu" and dtype == "tf32")
            for mode, name in itertools.product(size.modes, self.implementations)
            if device == "cuda" or name not in self.gpu_only
        ]

    def problem(self, row: Row) -> Problem:
        torch.manual_seed(0)
        return self.make(device=row.device, dtype=DTYPES[row.dtype], **self.sizes[row.size].shape)

    def run(self, row: Row, problem: Problem) -> Run:
        """What is timed: it gives the results, all of which must be made."""
        implementation = partial(self.implementations[row.name], problem)
        if row.mode == "forward":
            return partial(_forward, implementation)
        if row.mode == "backward":
            return partial(_forward_and_backward, implementation, self.wanted(problem))
        return lambda: [implementation()]  # a whole update

    def floor(self, row: Row) -> float | None:
        """Seconds at the rates of torch's own large product and copy."""
        if self.work is None:
            return None
        work = self.work(mode=row.mode, **self.sizes[row.size].shape)
        with _precision(row.dtype):
            rates = floors.rates(row.device, row.dtype)
        return floors.seconds(work, rates, DTYPES[row.dtype].itemsize)


def find(row: Row) -> Op:
    ops: Mapping[str, Op] = importlib.import_module(row.module).OPS
    return ops[row.op]


def _forward(implementation: Callable[[], Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [implementation()]


def _forward_and_backward(implementation: Callable[[], Tensor], wanted: list[Tensor]) -> list[Tensor]:
    out = implementation()
    gradients = torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
    return [out, *(gradient for gradient in gradients if gradient is not None)]


@dataclass
class Measured:
    """Of one row."""

    seconds: list[float] = field(default_factory=list)
    """Of the device, one a round."""
    launched_seconds: list[float] = field(default_factory=list)
    """On a GPU: from the call to the end of the work, launches and all."""
    timed: str | None = None
    """On a GPU: how. It waits for launches between the events where its queue was full, or the host waited for it."""
    peak_bytes: int | None = None
    """Memory beyond what was there, at most."""
    result_bytes: int = 0
    floor: float | None = None
    """Seconds; see floors.py."""
    cannot: str | None = None
    """Why there are no figures."""


def measure(rows: list[Row], least_rounds: int, seconds: float, cuda_graph: bool) -> dict[str, Measured]:
    """All rows of a group.

    Args:
        least_rounds: of each row.
        seconds: for each row; further rounds follow until they are over.
        cuda_graph: time the replay of a CUDA graph, not launches.
    """
    first, op = rows[0], find(rows[0])
    on_gpu = first.device == "cuda"
    found = {row.name: Measured() for row in rows}
    runs: dict[str, Run] = {}
    torch.compiler.reset()  # torch gives up compiling a function that it has compiled for too many sizes
    with _precision(first.dtype):
        try:
            floor = op.floor(first)  # before any row, which may lose the GPU
            problem = op.problem(first)
        except Exception as error:  # out of memory, say: the other groups go on
            return {row.name: Measured(cannot=_reason(error)) for row in rows}
        for row in rows:
            one, replayed = found[row.name], cuda_graph and row.mode != "update"
            with _cannot(one):
                run = op.run(row, problem)
                for _ in range(WARM_UP[row.device]):
                    results = run()
                one.floor, one.result_bytes = floor, sum(result.nbytes for result in results)
                del results
                if on_gpu or row.name not in op.compiled:
                    one.peak_bytes = _peak_on_gpu(run) if on_gpu else peak_on_cpu(row)
                if on_gpu:
                    one.timed = "a CUDA graph's replay" if replayed else "events behind a busy queue"
                runs[row.name] = _captured(run) if replayed else run
        end, round_ = time.perf_counter() + seconds * len(runs), 0
        while runs and (round_ < least_rounds or (time.perf_counter() < end and round_ < MOST_ROUNDS)):
            round_ += 1
            for name, run in list(runs.items()):
                one = found[name]
                with _cannot(one):
                    if on_gpu:
                        busy, launched, waited = time_on_gpu(run)
                        one.launched_seconds.append(launched)
                        if waited and one.timed == "events behind a busy queue":
                            one.timed = "events, launches between them"
                    else:
                        busy = time_on_cpu(run)
                    one.seconds.append(busy)
                if one.cannot:
                    del runs[name]
    return found


def _reason(error: Exception) -> str:
    """Its type and the first two lines of its text: torch.compile's first names no cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


@contextlib.contextmanager
def _cannot(measured: Measured) -> Iterator[None]:
    """An implementation that fails is part of the result, whatever it raises, and the others go on."""
    try:
        yield
    except Exception as error:
        measured.cannot = _reason(error)


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def time_on_cpu(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def time_on_gpu(run: Callable[[], object]) -> tuple[float, float, bool]:
    """Seconds between two events behind work that keeps the GPU busy until all is launched, and from a call on an idle
    GPU to the end of the work; and whether the GPU had begun before all was launched."""
    started = time.perf_counter()
    run()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * launched + 1e-4) * MOST_CYCLES_PER_SECOND))
    start.record()
    run()
    end.record()
    begun = start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, whole, begun


def _captured(run: Run) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _peak_on_gpu(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(row: Row) -> int | None:
    """In a process of its own, whose memory holds nothing of other runs; None where /proc does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("benchmarks.test_")))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, row).result()


def _peak_here(row: Row) -> int:
    op = find(row)
    small = {name: min(size, 16) for name, size in op.sizes[row.size].shape.items()}
    op.run(row, op.make(device="cpu", dtype=DTYPES[row.dtype], **small))()  # libraries load, thread pools start
    run = op.run(row, op.problem(row))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")


def as_result(row: Row, measured: Measured) -> dict[str, Any]:
    """A row as results files hold it."""
    op = find(row)
    size = op.sizes[row.size]
    result = {"op": row.op, "size": row.size, "shape": dict(size.shape), "device": row.device, "dtype": row.dtype}
    result |= {"mode": row.mode, "name": row.name}
    if row.name in op.bounds:
        result["bound"] = True
    if measured.cannot:
        return result | {"cannot": measured.cannot}
    first, median, third = record.quartiles(measured.seconds)
    result |= {"milliseconds": _rounded(1e3 * median), "quartiles": [_rounded(1e3 * first), _rounded(1e3 * third)]}
    result["rounds"] = len(measured.seconds)
    if row.device == "cuda":
        result["launched_milliseconds"] = _rounded(1e3 * statistics.median(measured.launched_seconds))
        result["timed"] = measured.timed
    result["peak_bytes"] = measured.peak_bytes
    if row.mode != "update":
        result["result_bytes"] = measured.result_bytes
    if measured.floor is not None:
        result["floor_milliseconds"] = _rounded(1e3 * measured.floor)
    return result | op.facts(row, size)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
