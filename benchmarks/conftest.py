"""Command-line options of the benchmarks, and the fixture that times a row of harness.py with pytest-benchmark."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, record, report
from pytbptt.ops.extension import EXTENSION

OPTIONS = {  # option: (attribute of a row, help)
    "--size": ("size", "sizes by name, * for any: enwik8,long or 'sweep-*' (default: those in the tables)"),
    "--dtype": ("dtype", "float32, tf32, bfloat16, float16 (default: float32 on a CPU, bfloat16 and float16 on a GPU)"),
    "--mode": ("mode", "forward, backward (which includes forward), update (default: all)"),
    "--only": ("name", "implementations to time"),
    "--without": ("name", "implementations to leave out"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pytbptt's benchmarks")
    group.addoption(
        "--device",
        choices=("cpu", "cuda", "both"),
        help="default: cuda if torch finds a GPU, else cpu",
    )
    for option, (_, text) in OPTIONS.items():
        group.addoption(option, type=_split, metavar="A,B", help=text)
    group.addoption(
        "--cuda-graph", action="store_true", help="on a GPU, time the replay of a CUDA graph instead of launches"
    )
    group.addoption(
        "--results", metavar="FILE", help="file for the rows, updated after every group; see benchmarks.report"
    )


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


@dataclass
class Session:
    measurements: dict[harness.Row, harness.Measurement] = field(default_factory=dict)
    results: dict[harness.Row, dict[str, Any]] = field(default_factory=dict)
    """Entries for a file of results."""
    machine: dict[str, Any] = field(default_factory=dict)


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session()


def _row(item: pytest.Item) -> harness.Row | None:
    callspec = getattr(item, "callspec", None)
    row = callspec.params.get("row") if callspec else None
    return row if isinstance(row, harness.Row) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rows = [row for item in items if (row := _row(item))]
    device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    selected = {option: config.getoption(option.lstrip("-")) for option in OPTIONS}
    for option, patterns in selected.items():
        known = sorted({getattr(row, OPTIONS[option][0]) for row in rows})
        for pattern in patterns or ():
            if rows and not any(fnmatchcase(name, pattern) for name in known):
                raise pytest.UsageError(f"{option}: found {pattern}, expected some of {', '.join(known)}")

    def chosen(row: harness.Row) -> bool:
        def matches(option: str) -> bool:
            return any(fnmatchcase(getattr(row, OPTIONS[option][0]), pattern) for pattern in selected[option])

        op = harness.find(row)
        return (
            device in (row.device, "both")
            and (matches("--size") if selected["--size"] else op.sizes[row.size].default)
            and (matches("--dtype") if selected["--dtype"] else row.dtype in op.dtypes[row.device])
            and (not selected["--mode"] or matches("--mode"))
            and (not selected["--only"] or matches("--only"))
            and (not selected["--without"] or not matches("--without"))
        )

    deselected = {item for item in items if (row := _row(item)) and not chosen(row)}
    config.hook.pytest_deselected(items=[item for item in items if item in deselected])
    items[:] = [item for item in items if item not in deselected]
    for item in items:
        if row := _row(item):
            shape = ", ".join(f"{name} {size}" for name, size in harness.find(row).sizes[row.size].shape.items())
            group = f"{row.op}, {row.size} ({shape}), {row.device}, {row.dtype}, {row.mode}"
            item.add_marker(pytest.mark.benchmark(group=group, timer=CLOCK))


class _Clock:
    """The timer of pytest-benchmark. It replays times that the harness has measured, row by row in turn."""

    __name__ = "timed in turn"
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = _Clock()


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[harness.Row], None]:
    """Times a row: the first row of a group times the whole group. A row that fails is skipped with the reason."""
    config = request.config

    def time(row: harness.Row) -> None:
        if row.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use")
        if EXTENSION.facts is None:
            pytest.skip(f"no compiled extension: {EXTENSION.unavailable_reason}")
        if benchmark.disabled:
            op = harness.find(row)
            benchmark(op.run(row, op.problem(row)))
            return
        state = config.stash[SESSION]
        if row not in state.measurements:
            _measure_group(request.session, row)
        measurement = state.measurements[row]
        if measurement.error:
            pytest.skip(measurement.error)
        rounds = iter(measurement.seconds)

        def replay() -> None:
            CLOCK.now += next(rounds)

        benchmark.pedantic(replay, rounds=len(measurement.seconds))
        benchmark.extra_info |= state.results[row]

    return time


def _measure_group(session: pytest.Session, row: harness.Row) -> None:
    """Times all selected rows of a row's group, and writes the results of the session so far."""
    config = session.config
    state = config.stash[SESSION]
    selected = [other for item in session.items if (other := _row(item))]
    if not state.machine:
        on_gpu = any(other.device == "cuda" for other in selected)
        state.machine = record.describe_machine() | (record.describe_gpu() if on_gpu else {})
    rows = [other for other in selected if other.group == row.group]
    measurements = harness.measure(
        rows,
        min_rounds=config.getoption("benchmark_min_rounds"),
        seconds=float(config.getoption("benchmark_max_time")),
        cuda_graph=config.getoption("cuda_graph") and row.device == "cuda",
    )
    for other in rows:
        state.measurements[other] = measurements[other.name]
        state.results[other] = harness.as_result(other, measurements[other.name])
    if path := config.getoption("results"):
        command = shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)])
        record.write(Path(path).absolute(), "benchmarks", command, state.machine, list(state.results.values()))
    if any(measurement.error for measurement in measurements.values()):
        _exit_after_cuda_error(row)


def _exit_after_cuda_error(row: harness.Row) -> None:
    """After an illegal memory access or a trap every further CUDA call of this process fails."""
    if row.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{row}: {str(error).splitlines()[0]}", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the same tables as the documentation has."""
    results = list(config.stash[SESSION].results.values())
    for table in (report.LEGEND, *report.tables(results)) if results else ():
        terminalreporter.write_line(f"{table}\n")
