"""Measure and model memory and speed of an update by bptt and batch size."""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from pytbptt.data import IndexedTokens, load
from pytbptt.errors import OUT_OF_MEMORY, InputError, RunError
from pytbptt.training.config import TrainSettings
from pytbptt.training.metrics_log import peak_memory
from pytbptt.tuning.plan import Plan
from pytbptt.tuning.trial import Trial

GIB = 1 << 30
MEMORY_UPDATES = 2
"""Two updates, because the optimizer's state exists only from the second on."""
PROC_STATUS = Path("/proc/self/status")
FREE_MEMORY_FRACTION = 0.8
"""Default fraction of the free memory."""
MAX_COEFFICIENTS = 4
"""Maximum number of coefficients of the memory model."""
MIN_SECONDS, MIN_TIMED_UPDATES = 1.0, 3
"""Least time and number of updates to time at each point."""
MIN_SPEEDUP = 1.05
"""Minimum speed-up for the search to continue."""
KNEE_FRACTION = 0.9
"""The knee is the smallest update that reaches this fraction of the highest speed."""


@dataclass(frozen=True)
class MemoryPoint:
    """One measurement."""

    bptt: int
    batch_size: int
    peak: int | None
    """Bytes; None if it did not fit."""


@dataclass(frozen=True)
class MemoryModel:
    """peak = fixed + batch_size * (per_stream + bptt * (per_token + bptt * per_pair)), in bytes."""

    fixed: float
    per_stream: float
    per_token: float
    per_pair: float

    def peak(self, bptt: int, batch_size: int) -> float:
        """Bytes that training takes."""
        return self.fixed + batch_size * (self.per_stream + bptt * (self.per_token + bptt * self.per_pair))

    def largest_bptt(self, batch_size: int, limit: float) -> float:
        """Largest bptt that fits into `limit` bytes with this batch size; 0 if none does."""
        available = limit - self.fixed - batch_size * self.per_stream
        a, b = batch_size * self.per_pair, batch_size * self.per_token
        if available <= 0:
            return 0
        if a == 0:
            return available // b if b > 0 else math.inf
        return (math.sqrt(b * b + 4 * a * available) - b) // (2 * a)


@dataclass(frozen=True)
class MemoryResult:
    """The measured peaks, and the model fitted to them."""

    limit: float
    """Bytes."""
    model: MemoryModel
    fitted: tuple[MemoryPoint, ...]
    held_out: MemoryPoint
    """Measured, but not fitted."""
    held_out_error: float
    """(the model's peak - the measured one) / the measured one."""


def fit_memory_model(points: Sequence[MemoryPoint], quadratic: bool) -> MemoryModel:
    """Fit the memory model by non-negative least squares on the relative error.

    Args:
        points: measurements that fitted, more than the coefficients.
        quadratic: whether memory grows with bptt² per stream, as in the reference attention.
    """
    peaks = np.array([point.peak for point in points], dtype=np.float64)
    bptt = np.array([point.bptt for point in points], dtype=np.float64)
    batch = np.array([point.batch_size for point in points], dtype=np.float64)
    features = np.stack([np.ones_like(bptt), batch, batch * bptt, batch * bptt * bptt], axis=1) / peaks[:, None]
    used = [0, 1, 2, 3] if quadratic else [0, 1, 2]
    while True:
        solution, *_ = np.linalg.lstsq(features[:, used], np.ones_like(peaks), rcond=None)
        if (solution >= 0).all():
            break
        used.pop(int(solution.argmin()))
    coefficients = dict(zip(used, solution.tolist(), strict=True))
    return MemoryModel(*(coefficients.get(n, 0.0) for n in range(4)))


def points_to_measure(bptts: Sequence[int], largest_update: int) -> list[tuple[int, int]]:
    """(bptt, batch size) pairs to measure, sorted by size: several lengths, each with several batch sizes."""
    short, middle, long = bptts[len(bptts) // 4], bptts[len(bptts) // 2], bptts[-1]
    shapes = [(short, 16), (short, 4), (middle, 8), (middle, 2), (long, 16), (long, 4), (middle, 1)]
    points = {(bptt, max(1, largest_update // (divisor * bptt))) for bptt, divisor in shapes}
    return sorted(points, key=lambda point: point[0] * point[1])


def measure_memory(
    settings: TrainSettings,
    device: torch.device,
    plan: Plan,
    limit: float,
    quadratic: bool,
) -> MemoryResult:
    """Measure, fit, and check the fit with the largest update measured, which it has not seen.

    Args:
        limit: bytes that training may take.
        quadratic: as for `fit_memory_model`.

    Raises:
        RunError: too few sizes fit into memory to fit the model.
    """
    shapes = points_to_measure(plan.bptts, plan.largest_update)
    points = [measure_peak(settings, device, bptt, batch_size, limit) for bptt, batch_size in shapes]
    fitting = [point for point in points if point.peak is not None]
    if len(fitting) <= MAX_COEFFICIENTS:
        raise RunError(
            f"--memory-limit: found that {len(fitting)} of {len(shapes)} small updates fit into {limit / GIB:.2f} GiB, "
            f"expected more than {MAX_COEFFICIENTS}: raise the limit, or use a smaller model"
        )
    *fitted, held_out = fitting
    model = fit_memory_model(fitted, quadratic)
    error = model.peak(held_out.bptt, held_out.batch_size) / (held_out.peak or math.nan) - 1
    return MemoryResult(limit, model, tuple(fitted), held_out, error)


def default_memory_limit(device: torch.device) -> float:
    """Default memory limit in bytes: FREE_MEMORY_FRACTION times what is free now.

    Raises:
        InputError: the system does not report its free memory.
    """
    if device.type == "cuda":
        return FREE_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise InputError("--memory-limit: required, since this system does not report its free memory") from None
    return FREE_MEMORY_FRACTION * free


def check_measurable(device: torch.device) -> None:
    """Check that the peak memory of training can be measured on this device.

    Raises:
        InputError: no GPU, and a system that does not report the memory of a process.
    """
    if device.type == "cpu" and not PROC_STATUS.exists() and peak_memory() is None:
        raise InputError("advise: found no way to measure memory on this system, expected Linux, macOS or a GPU")


def measure_peak(
    settings: TrainSettings, device: torch.device, bptt: int, batch_size: int, limit: float
) -> MemoryPoint:
    """The peak of training with these sizes in a subprocess limited to `limit` bytes.

    On a GPU: the peak of what torch allocated there.

    Raises:
        RunError: the process failed for another reason.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = sender, settings, device, bptt, batch_size, limit
    process = context.Process(target=train_and_send_peak, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
    except EOFError:  # the process died without sending a result
        process.join()
        if process.exitcode != -9:
            raise RunError(
                f"measuring memory at --tokens-per-sample {bptt} --batch-size {batch_size}: the process ended with "
                f"status {process.exitcode}"
            ) from None
        peak = None  # SIGKILL, presumably by the kernel: out of memory
    process.join()
    return MemoryPoint(bptt, batch_size, peak)


def train_and_send_peak(
    sender: Connection,
    settings: TrainSettings,
    device: torch.device,
    bptt: int,
    batch_size: int,
    limit: float,
) -> None:
    """The subprocess of `measure_peak`: train, and send the peak in bytes, or None if the updates did not fit."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit / torch.cuda.get_device_properties(device).total_memory)
        )
    else:
        _set_memory_limit(limit)
    try:
        train = load(settings.data.data, "train")
        with Trial(settings, train, device, bptt=bptt, batch_size=batch_size, full_memory=True) as trial:
            for _ in range(MEMORY_UPDATES):
                trial.update()
            sender.send(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        sender.send(None)


def _set_memory_limit(limit: float) -> None:
    """On Linux, limit this process's data size so that its resident memory stays within `limit` bytes."""
    if sys.platform == "linux":
        import resource

        data_limit = _proc_status("VmData") + max(0, int(limit) - _proc_status("VmRSS"))
        resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes. On Linux ru_maxrss would include the parent's peak before exec."""
    peak = _proc_status("VmHWM") if PROC_STATUS.exists() else peak_memory()
    assert peak is not None  # by check_measurable
    return peak


def _proc_status(name: str) -> int:
    """A size of this process in bytes."""
    lines = PROC_STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@dataclass(frozen=True)
class SpeedPoint:
    """One measurement."""

    bptt: int
    batch_size: int
    tokens_per_second: float


def measure_speed(
    settings: TrainSettings, tokens: IndexedTokens, device: torch.device, bptt: int, batch_size: int
) -> SpeedPoint:
    """Tokens per second, averaged over the faster half of several updates with full memory, after one warm-up
    update."""
    with Trial(settings, tokens, device, bptt=bptt, batch_size=batch_size, full_memory=True) as trial:
        trial.update()
        times: list[float] = []
        while len(times) < MIN_TIMED_UPDATES or sum(times) < MIN_SECONDS:
            started = time.perf_counter()
            trial.update()  # it reads the gradient's norm, so the device has finished
            times.append(time.perf_counter() - started)
    faster = sorted(times)[: (len(times) + 1) // 2]
    return SpeedPoint(bptt, batch_size, bptt * batch_size * len(faster) / sum(faster))


def grid_search(
    plan: Plan, fits: Callable[[int, int], bool], measure: Callable[[int, int], SpeedPoint]
) -> list[SpeedPoint]:
    """Grid search over batch size and bptt with early stopping.

    For each batch size, ascending, bptt grows until an update is too large (for the plan or the memory) or two
    steps in a row gained nothing; batch sizes grow until two in a row were no faster at their best.

    Args:
        plan: the grid.
        fits: whether a (bptt, batch size) fits into memory.
        measure: measures the speed of a (bptt, batch size).
    """
    points: list[SpeedPoint] = []
    best: list[float] = []
    for batch_size in plan.batch_sizes:
        row: list[SpeedPoint] = []
        for bptt in plan.bptts:
            if bptt * batch_size > plan.largest_update or not fits(bptt, batch_size):
                break
            row.append(measure(bptt, batch_size))
            if _has_plateaued([point.tokens_per_second for point in row]):
                break
        points += row
        best += [max(point.tokens_per_second for point in row)] if row else []
        if _has_plateaued(best):
            break
    return points


def knee(points: Sequence[SpeedPoint]) -> SpeedPoint:
    """The smallest update whose speed is at least KNEE_FRACTION times the fastest; ties go to the faster.

    Among the points of one bptt that is the fewest streams.
    """
    fastest = max(point.tokens_per_second for point in points)
    fast = [point for point in points if point.tokens_per_second >= KNEE_FRACTION * fastest]
    return min(fast, key=lambda point: (point.bptt * point.batch_size, -point.tokens_per_second))


def _has_plateaued(speeds: Sequence[float]) -> bool:
    """Whether the last two steps together gained less than one MIN_SPEEDUP."""
    return len(speeds) > 2 and max(speeds[-2:]) < MIN_SPEEDUP * max(speeds[:-2])
