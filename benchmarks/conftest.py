"""The harness's options, and its rows as tests of pytest-benchmark."""

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
    "--size": ("size", "sizes by name, * for any: enwik8,long or 'sweep-*' (default: those that the tables show)"),
    "--dtype": ("dtype", "float32, tf32, bfloat16, float16 (default: float32 on a CPU, both of 16 bits on a GPU)"),
    "--mode": ("mode", "forward, backward (which includes forward), update (default: all)"),
    "--only": ("name", "implementations to time"),
    "--without": ("name", "implementations to leave out"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pytbptt's benchmarks")
    group.addoption(
        "--device",
        choices=("cpu", "cuda", "both"),
        help="what the ops run on (default: cuda where torch sees a GPU, else cpu)",
    )
    for option, (_, text) in OPTIONS.items():
        group.addoption(option, type=_listed, metavar="A,B", help=text)
    group.addoption("--cuda-graph", action="store_true", help="on a GPU, time the replay of a CUDA graph, not launches")
    group.addoption("--results", metavar="FILE", help="file for the rows, written as they come; see benchmarks.report")


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


@dataclass
class Session:
    """What this session has measured."""

    measured: dict[harness.Row, harness.Measured] = field(default_factory=dict)
    results: dict[harness.Row, dict[str, Any]] = field(default_factory=dict)
    """As files hold them."""
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
    asked = {option: config.getoption(option.lstrip("-")) for option in OPTIONS}
    for option, patterns in asked.items():
        known = sorted({getattr(row, OPTIONS[option][0]) for row in rows})
        for pattern in patterns or ():
            if rows and not any(fnmatchcase(name, pattern) for name in known):
                raise pytest.UsageError(f"{option}: found {pattern}, expected some of {', '.join(known)}")

    def chosen(row: harness.Row) -> bool:
        def among(option: str) -> bool:
            return any(fnmatchcase(getattr(row, OPTIONS[option][0]), pattern) for pattern in asked[option])

        op = harness.find(row)
        return (
            device in (row.device, "both")
            and (among("--size") if asked["--size"] else op.sizes[row.size].default)
            and (among("--dtype") if asked["--dtype"] else row.dtype in op.dtypes[row.device])
            and (not asked["--mode"] or among("--mode"))
            and (not asked["--only"] or among("--only"))
            and (not asked["--without"] or not among("--without"))
        )

    left_out = [item for item in items if (row := _row(item)) and not chosen(row)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]
    for item in items:
        if row := _row(item):
            shape = ", ".join(f"{name} {size}" for name, size in harness.find(row).sizes[row.size].shape.items())
            group = f"{row.op}, {row.size} ({shape}), {row.device}, {row.dtype}, {row.mode}"
            item.add_marker(pytest.mark.benchmark(group=group, timer=CLOCK))


class _Clock:
    """What pytest-benchmark reads while it is told of rounds that were timed before, in turn with other rows."""

    __name__ = "timed in turn"
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = _Clock()


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[harness.Row], None]:
    """Time a row, its whole group at the first of them; skip it with the reason where it cannot be timed."""
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
        if row not in state.measured:
            _measure_group(request.session, row)
        measured = state.measured[row]
        if measured.cannot:
            pytest.skip(measured.cannot)
        rounds = iter(measured.seconds)

        def replay() -> None:
            CLOCK.now += next(rounds)

        benchmark.pedantic(replay, rounds=len(measured.seconds))
        benchmark.extra_info |= state.results[row]

    return time


def _measure_group(session: pytest.Session, row: harness.Row) -> None:
    """Time the rows of a row's group that pytest has chosen, and write what this session has measured."""
    config = session.config
    state = config.stash[SESSION]
    chosen = [other for item in session.items if (other := _row(item))]
    if not state.machine:
        on_gpu = any(other.device == "cuda" for other in chosen)
        state.machine = record.describe() | (record.describe_gpu() if on_gpu else {})
    rows = [other for other in chosen if other.group == row.group]
    measured = harness.measure(
        rows,
        least_rounds=config.getoption("benchmark_min_rounds"),
        seconds=float(config.getoption("benchmark_max_time")),
        cuda_graph=config.getoption("cuda_graph") and row.device == "cuda",
    )
    for other in rows:
        state.measured[other] = measured[other.name]
        state.results[other] = harness.as_result(other, measured[other.name])
    if path := config.getoption("results"):
        command = shlex.join(["python", "-m", "pytest", *map(str, config.invocation_params.args)])
        record.write(Path(path).absolute(), "benchmarks", command, state.machine, list(state.results.values()))
    if any(one.cannot for one in measured.values()):
        _leave_a_dead_gpu(row)


def _leave_a_dead_gpu(row: harness.Row) -> None:
    """After an illegal access or a trap nothing runs on the GPU in this process any more."""
    if row.device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"{row}: {str(error).splitlines()[0]}", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The tables that the pages would have: ratios, floors, goals, memory."""
    results = list(config.stash[SESSION].results.values())
    for table in (report.LEGEND, *report.tables(results)) if results else ():
        terminalreporter.write_line(f"{table}\n")
