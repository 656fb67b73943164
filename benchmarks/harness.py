"""Times the implementations of an op, on CPUs and GPUs.

An `Op` is a computation with its sizes and implementations. A *group* is one op, size, device, dtype and mode; its
*rows* are the implementations. They are timed in turn, one run each per round, so that other load on the machine slows
all of them alike. conftest.py runs the rows as tests of pytest-benchmark.
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
    "tf32": torch.float32,  # with TF32 products allowed
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WARM_UP = {"cpu": 2, "cuda": 5}
MAX_ROUNDS = 100
MAX_CLOCK_RATE = 2e9  # cycles per second
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
    """Whether it is timed without --size."""


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
    """A computation and its implementations.

    All of them return the same results, except `bounds`, which do less work and are lower bounds of the time.
    """

    module: str
    """The module whose OPS has this op by its name."""
    name: str
    sizes: Mapping[str, Size]
    make: Callable[..., Problem]
    """Makes random inputs from (device=, dtype=, **shape)."""
    implementations: Mapping[str, Implementation]
    leaves: Callable[[Problem], list[Tensor]] = lambda problem: []
    """Tensors whose gradients are computed in mode "backward", which times forward and backward together."""
    work: Callable[..., floors.Work] | None = None
    """The minimum work of (mode=, **shape), for the floor."""
    facts: Callable[[Row, Size], dict[str, Any]] = lambda row, size: {}
    """Further entries of a row's result."""
    bounds: tuple[str, ...] = ()
    gpu_only: tuple[str, ...] = ()
    """Implementations that do not run on a CPU."""
    compiled: tuple[str, ...] = ()
    """Implementations with torch.compile, whose memory on a CPU is not measured: the compiler's would dominate."""
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("float32",), "cuda": ("bfloat16", "float16")}
    )
    """The dtypes by device that are timed without --dtype."""

    def rows(self) -> list[Row]:
        """All rows, by group."""
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
        """The function to time. It returns all results, so that all of them are computed."""
        implementation = partial(self.implementations[row.name], problem)
        if row.mode == "forward":
            return partial(_forward, implementation)
        if row.mode == "backward":
            return partial(_forward_and_backward, implementation, self.leaves(problem))
        return lambda: [implementation()]  # mode "update"

    def floor(self, row: Row) -> float | None:
        """The roofline time in seconds; see floors.py."""
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


def _forward_and_backward(implementation: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = implementation()
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return [out, *(gradient for gradient in gradients if gradient is not None)]


@dataclass
class Measurement:
    """Of one row."""

    seconds: list[float] = field(default_factory=list)
    """Time on the device in each round."""
    launched_seconds: list[float] = field(default_factory=list)
    """On a GPU: wall-clock time from the call to the end of the work, including launches."""
    timed: str | None = None
    """On a GPU: how. Launches fall between the events if the GPU's queue was full or the host synchronised."""
    peak_bytes: int | None = None
    """Peak memory beyond what was allocated before the run."""
    result_bytes: int = 0
    floor: float | None = None
    """Roofline time in seconds; see floors.py."""
    error: str | None = None
    """Why there are no times."""


def measure(rows: list[Row], min_rounds: int, seconds: float, cuda_graph: bool) -> dict[str, Measurement]:
    """Times all rows of a group.

    Args:
        min_rounds: for each row.
        seconds: for each row, after which no further round starts.
        cuda_graph: time the replay of a CUDA graph instead of launches.
    """
    first, op = rows[0], find(rows[0])
    on_gpu = first.device == "cuda"
    measurements = {row.name: Measurement() for row in rows}
    runs: dict[str, Run] = {}
    torch.compiler.reset()  # torch.compile falls back to eager after too many recompilations of a function
    with _precision(first.dtype):
        try:
            floor = op.floor(first)  # first, because an implementation may end with a CUDA error
            problem = op.problem(first)
        except Exception as error:  # such as out of memory; other groups may run
            return {row.name: Measurement(error=_reason(error)) for row in rows}
        for row in rows:
            measurement, replayed = measurements[row.name], cuda_graph and row.mode != "update"
            with _record_error(measurement):
                run = op.run(row, problem)
                for _ in range(WARM_UP[row.device]):
                    results = run()
                measurement.floor, measurement.result_bytes = floor, sum(result.nbytes for result in results)
                del results
                if on_gpu or row.name not in op.compiled:
                    measurement.peak_bytes = _peak_on_gpu(run) if on_gpu else peak_on_cpu(row)
                if on_gpu:
                    measurement.timed = "a CUDA graph's replay" if replayed else "events behind a busy queue"
                runs[row.name] = _capture(run) if replayed else run
        deadline, rounds = time.perf_counter() + seconds * len(runs), 0
        while runs and (rounds < min_rounds or (time.perf_counter() < deadline and rounds < MAX_ROUNDS)):
            rounds += 1
            for name, run in list(runs.items()):
                measurement = measurements[name]
                with _record_error(measurement):
                    if on_gpu:
                        device_seconds, launched_seconds, includes_launches = time_on_gpu(run)
                        measurement.launched_seconds.append(launched_seconds)
                        if includes_launches and measurement.timed == "events behind a busy queue":
                            measurement.timed = "events, launches between them"
                    else:
                        device_seconds = time_on_cpu(run)
                    measurement.seconds.append(device_seconds)
                if measurement.error:
                    del runs[name]
    return measurements


def _reason(error: Exception) -> str:
    """The type and the first two lines of the message: the first one of torch.compile does not name the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


@contextlib.contextmanager
def _record_error(measurement: Measurement) -> Iterator[None]:
    """Any error of an implementation becomes part of the results, and the others are still timed."""
    try:
        yield
    except Exception as error:
        measurement.error = _reason(error)


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
    """Times a run twice.

    Returns:
        seconds between two events, recorded while another kernel keeps the GPU busy until everything is launched;
        seconds from the call on an idle GPU to the end of the work;
        whether the GPU reached the first event before everything was launched.
    """
    started = time.perf_counter()
    run()
    launch_seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    total_seconds = time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * launch_seconds + 1e-4) * MAX_CLOCK_RATE))
    start.record()
    run()
    end.record()
    includes_launches = start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, total_seconds, includes_launches


def _capture(run: Run) -> Callable[[], object]:
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
    """Peak memory of a run, measured in a new process; None if /proc does not report it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted(name for name in sys.modules if name.startswith("benchmarks.ops.")))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_process, row).result()


def _peak_in_process(row: Row) -> int:
    op = find(row)
    small = {name: min(size, 16) for name, size in op.sizes[row.size].shape.items()}
    op.run(row, op.make(device="cpu", dtype=DTYPES[row.dtype], **small))()  # loads libraries and starts thread pools
    run = op.run(row, op.problem(row))
    before = _memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return _memory_status("VmHWM") - before


def _memory_status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{name} is not in /proc/self/status")


def as_result(row: Row, measurement: Measurement) -> dict[str, Any]:
    """A row's entry in a file of results."""
    op = find(row)
    size = op.sizes[row.size]
    result = {"op": row.op, "size": row.size, "shape": dict(size.shape), "device": row.device, "dtype": row.dtype}
    result |= {"mode": row.mode, "name": row.name}
    if row.name in op.bounds:
        result["bound"] = True
    if measurement.error:
        return result | {"cannot": measurement.error}
    first, median, third = record.quartiles(measurement.seconds)
    result |= {"milliseconds": _rounded(1e3 * median), "quartiles": [_rounded(1e3 * first), _rounded(1e3 * third)]}
    result["rounds"] = len(measurement.seconds)
    if row.device == "cuda":
        result["launched_milliseconds"] = _rounded(1e3 * statistics.median(measurement.launched_seconds))
        result["timed"] = measurement.timed
    result["peak_bytes"] = measurement.peak_bytes
    if row.mode != "update":
        result["result_bytes"] = measurement.result_bytes
    if measurement.floor is not None:
        result["floor_milliseconds"] = _rounded(1e3 * measurement.floor)
    return result | op.facts(row, size)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
