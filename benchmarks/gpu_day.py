"""Tests and benchmarks on a GPU that is there for minutes: python -m benchmarks.gpu_day --minutes 7 --output DIR.

Runs stages in the order of what they are worth, each a process of its own under a time limit, and leaves out those for
which too little time is left. DIR holds a log of each, its results where it has any, day.json (what became of each, as
it comes) and summary.md. The same command goes on where a day was cut: what has finished is not repeated, what was cut
is. Measures nothing itself, and needs torch, numpy, pytest and pytest-benchmark, and for some stages tyro and tqdm.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
FINISHED = ("passed", "failed")
GRACE = 5  # seconds that a stage has for its end, and at least the tables of results
TABLES = 30  # seconds that these have at most
MARK = "PYTBPTT_GPU_DAY_STAGE"  # in the environment of a stage's processes, by which they are found again


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    """{output} stands for the day's folder."""
    least: int
    """Seconds; with fewer left it says nothing and is not begun."""
    limit: int
    """Seconds after which it is ended."""
    required: bool = False
    """Whether it is run each time, and the day ends where it fails."""
    results: bool = False
    """Whether it measures something: without results it has failed."""


@dataclass
class Outcome:
    status: str
    """passed, failed, cut, running, or not begun."""
    seconds: float = 0.0
    at_limit: bool = False
    """Whether its own limit cut it: others go first the next time."""


FACTS = """
import subprocess
import torch
from pytbptt.ops.extension import EXTENSION
if not torch.cuda.is_available():
    raise SystemExit("found no GPU that torch can use")
if not EXTENSION.supports("cuda"):
    raise SystemExit("found no CUDA kernels in the extension: build them with make gpu-build, or bring them")
from pytbptt.ops import backend, lstm
inputs = [torch.zeros(shape, device="cuda") for shape in ((1, 1, 32), (32, 8), (1, 8), (1, 8))]
try:
    with backend("fused"):
        lstm(*inputs)
    torch.cuda.synchronize()
except RuntimeError as error:  # any other is for the tests to tell
    if "cannot be used" in str(error):
        raise SystemExit(str(error))
    if "no kernel image" in str(error) or "invalid device function" in str(error):
        found = "%s of %d.%d" % (torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
        raise SystemExit("found no CUDA kernels for %s in the extension: build them for it" % found)
try:
    subprocess.run(["nvidia-smi"])
except OSError as error:
    print(error)
try:
    from pytbptt.info import installation
    print("\\n".join(installation()))
except ModuleNotFoundError as error:  # tests and benchmarks of the ops go without
    print(torch.cuda.get_device_name(), "torch", torch.__version__, error)
"""
ATTENTION, LSTM = "tests/ops/test_rel_attention_cuda.py", "tests/ops/test_lstm_cuda.py"
GRAPHED, RESUME, NCCL = (f"tests/training/test_{name}_cuda.py" for name in ("graphed", "resume", "nccl"))
DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32")


def _exact(file: str, sizes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{file}::test_as_exact_as_baseline[{size}-{dtype}]" for size in sizes for dtype in DTYPES)


EXACT_ATTENTION = _exact(ATTENTION, ("(3, 150, 150, 10, 41, 300)", "(2, 200, 130, 3, 64, 100)"))
EXACT_LSTM = _exact(LSTM, ("(35, 20, 650)", "(5, 3, 41)"))
FIRST = "ping_pong or wrappers or warpgroup_products"


def stage_of_tests(name: str, least: int, limit: int, *arguments: str) -> Stage:
    # Without tests/conftest.py, which asks for more packages than a bare machine has; the log tells which test hung.
    log = ("-v", "-rs", "--tb=short", "-o", "faulthandler_timeout=60")
    plugins = ("--noconftest", "-p", "no:cacheprovider", "-p", "tests.dead_gpu")
    command = (sys.executable, "-m", "pytest", *plugins, *log, "-m", "gpu", *arguments)
    return Stage(name, command, least, limit)


def stage_of_benchmarks(name: str, least: int, limit: int, file: str, *arguments: str) -> Stage:
    command = (sys.executable, "-m", "pytest", f"benchmarks/{file}", "-p", "no:cacheprovider", "-q", "--benchmark-only")
    chosen = ("--device", "cuda", "--benchmark-max-time", "0.3", "--results", f"{{output}}/{name}.json")
    return Stage(name, (*command, *chosen, *arguments), least, limit, results=True)


def stages(profile: bool) -> list[Stage]:
    """All, those that say most first."""
    bf16 = ("--dtype", "bfloat16")
    hot = ("--clock-control", "none", "--kernel-name", "regex:rel_attention|lstm", "--launch-count", "12")
    once = ("-p", "no:cacheprovider", "--benchmark-disable", "--device", "cuda", *bf16, "--mode", "backward")
    ncu = ("ncu", *hot, "--force-overwrite", "--export", "{output}/profile", sys.executable, "-m", "pytest")
    sizes = ("--size", "enwik8,zaremba-650", "--only", "fused")
    files = ("benchmarks/test_rel_attention.py", "benchmarks/test_lstm.py")
    profiled = [Stage("profile", (*ncu, *files, *once, *sizes), 30, 90)] if profile else []
    return [
        Stage("facts", (sys.executable, "-c", FACTS), 10, 60, required=True),
        stage_of_tests("wrappers", 15, 90, ATTENTION, "-k", FIRST),
        stage_of_tests("attention-exact", 15, 90, *EXACT_ATTENTION),
        stage_of_tests("lstm-exact", 15, 90, *EXACT_LSTM),
        stage_of_benchmarks(
            "attention", 15, 60, "test_rel_attention.py", *bf16, "--without", "compiled_eager,flex_attention"
        ),
        stage_of_benchmarks("lstm", 15, 60, "test_lstm.py", *bf16, "--without", "compiled_eager,eager,flashrnn"),
        stage_of_benchmarks(
            "lstm-other-precisions", 10, 30, "test_lstm.py", "--dtype", "float16,tf32", "--size", "wide-1024",
            "--without", "compiled_eager,eager,flashrnn",
        ),
        *profiled,
        stage_of_tests("captured-updates", 15, 120, GRAPHED),
        stage_of_tests(
            "remaining-tests", 20, 240, ATTENTION, LSTM, RESUME, "-k", f"not ({FIRST})",
            *(word for node in (*EXACT_ATTENTION, *EXACT_LSTM) for word in ("--deselect", node)),
        ),
        stage_of_benchmarks(
            "compiled-peers", 20, 150, "test_rel_attention.py", *bf16, "--mode", "backward",
            "--only", "fused,compiled_eager,flex_attention",
        ),
        stage_of_benchmarks("training-steps", 20, 90, "test_training_step.py"),
        stage_of_benchmarks("rollouts", 20, 90, "test_rollouts.py"),
        stage_of_tests("nccl", 30, 150, NCCL),
    ]  # fmt: skip


class Day:
    """Runs stages, and remembers in `output` what became of them."""

    def __init__(self, planned: list[Stage], output: Path) -> None:
        self.planned, self.output = planned, output
        output.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(output / "lock", os.O_WRONLY | os.O_CREAT)  # held until the day ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"python -m benchmarks.gpu_day: {output}: found another day that runs there") from None
        self.record = output / "day.json"
        known = json.loads(self.record.read_text())["stages"] if self.record.exists() else {}
        self.outcomes = {stage.name: Outcome("not begun") for stage in planned}
        for name, outcome in known.items():
            if name in self.outcomes:
                self.outcomes[name] = Outcome(**outcome)
        for name, outcome in self.outcomes.items():
            if outcome.status == "running":  # the day was killed
                self.outcomes[name] = Outcome("cut", outcome.seconds)
        _end(f"{output}:")  # and a stage of it may be there still

    def close(self) -> None:
        os.close(self._lock)

    def run(self, deadline: float) -> int:
        """Run what has not finished, until `deadline` on the monotonic clock; the exit status."""
        for stage in sorted(self.planned, key=lambda stage: self.outcomes[stage.name].at_limit and not stage.required):
            left = deadline - time.monotonic() - 2 * GRACE
            finished = self.outcomes[stage.name].status in FINISHED and not stage.required
            if not finished and left >= max(1, stage.least):
                self._run(stage, min(stage.limit, int(left)))
            if stage.required and self.outcomes[stage.name].status in ("failed", "cut"):
                return 2
        return int(any(outcome.status == "failed" for outcome in self.outcomes.values()))

    def _run(self, stage: Stage, limit: int) -> None:
        print(f"{stage.name} …", end="", flush=True)
        self._keep_what_a_cut_left(stage)
        # timeout ends the whole group, even if this process is killed in between.
        words = [word.replace("{output}", str(self.output)) for word in stage.command]
        command = ["timeout", f"--kill-after={GRACE}", str(limit), *words]
        # What a killed process had not written would be lost.
        environment = {**os.environ, MARK: f"{self.output}:{stage.name}", "PYTHONUNBUFFERED": "1"}
        started = time.monotonic()
        with open(self.output / f"{stage.name}.log", "ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise SystemExit(f"python -m benchmarks.gpu_day: found no timeout to run ({error})") from None
        try:
            self._note(stage, Outcome("running"))
            status = process.wait()
            _end(environment[MARK])  # timeout waits for nobody but its own child
        except BaseException:
            _end(environment[MARK])
            process.wait()
            self._note(stage, Outcome("cut", time.monotonic() - started))
            raise
        seconds = time.monotonic() - started
        at_limit = status in (124, 137) and seconds >= limit - 1
        if at_limit or status < 0 or status in (129, 130, 137, 143):  # ended from outside
            outcome = Outcome("cut", seconds, at_limit=at_limit and limit == stage.limit)
        elif status == 0 and (not stage.results or (self.output / f"{stage.name}.json").exists()):
            outcome = Outcome("passed", seconds)
        else:
            outcome = Outcome("failed", seconds)
        self._note(stage, outcome)
        print(f" {self.outcomes[stage.name].status}, {seconds:.0f} s", flush=True)

    def _keep_what_a_cut_left(self, stage: Stage) -> None:
        results = self.output / f"{stage.name}.json"
        if results.exists():
            number = len(list(self.output.glob(f"{stage.name}.cut-*.json"))) + 1
            results.rename(self.output / f"{stage.name}.cut-{number}.json")

    def _note(self, stage: Stage, outcome: Outcome) -> None:
        self.outcomes[stage.name] = outcome
        contents = {"stages": {name: asdict(one) for name, one in self.outcomes.items()}}
        unfinished = self.record.with_name("day.json.unfinished")
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")
        unfinished.replace(self.record)

    def summary(self) -> str:
        """What became of each stage, and the last that it said."""
        lines = ["| stage | | seconds | last line |", "| --- | --- | --- | --- |"]
        for name, outcome in self.outcomes.items():
            said = "" if outcome.status == "not begun" else self.last_line(name)
            lines.append(f"| {name} | {outcome.status} | {outcome.seconds:.0f} | {said} |")
        return "\n".join([*lines, ""])

    def last_line(self, name: str) -> str:
        """Of a stage's log, as a table can hold it."""
        log = self.output / f"{name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        said = next((line for line in reversed(lines) if line.strip()), "")
        return said.strip("= ").replace("|", "\\|")[:200]

    def tables(self, seconds: float) -> str:
        """Of what was measured, as far as so many seconds go."""
        files = [str(path) for path in sorted(self.output.glob("*.json")) if path != self.record]
        if not files:
            return ""
        command = [sys.executable, "-m", "benchmarks.report", "--print", *files]
        by_hand = f"to make its tables: python -m benchmarks.report --print {self.output}/*.json"
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"No time was left for the report; {by_hand}\n"
        return done.stdout if done.returncode == 0 else f"The report failed; {by_hand}\n\n{done.stderr}"


def _processes(mark: str) -> list[int]:
    """Processes of the stages whose mark begins so, in whatever session they are, such as torchrun's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes()
        except OSError:  # another user's, or one that has ended
            continue
        if any(variable.startswith(f"{MARK}={mark}".encode()) for variable in variables.split(b"\0")):
            found.append(int(path.parent.name))
    return found


def _end(mark: str) -> None:
    """End these processes, by force where they do not end in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end, told = time.monotonic() + GRACE, set[int]()
        while living := _processes(mark):
            for process in set(living) - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            told.update(living)
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and a lost terminal end the day as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def spend(planned: list[Stage], minutes: float, output: Path) -> int:
    """Run the stages and write the summary; the exit status."""
    deadline = time.monotonic() + 60 * minutes
    day = Day(planned, output)
    with _interrupted_by_signals():
        try:
            status = day.run(deadline)
        except KeyboardInterrupt:
            status = 1
        try:
            summary = day.summary()
            print(summary, flush=True)
            (output / "summary.md").write_text(summary)
            tables = day.tables(min(TABLES, max(GRACE, deadline - time.monotonic())))
            print(tables)
            (output / "summary.md").write_text(f"{summary}\n{tables}")
        except KeyboardInterrupt:
            status = 1
        day.close()
    if status == 2:
        first = planned[0].name
        said = day.last_line(first) if day.outcomes[first].status == "failed" else f"{first} took too long"
        print(f"python -m benchmarks.gpu_day: {said}", file=sys.stderr)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="of the GPU, for all stages together")
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--profile", action="store_true", help="also profile the hot kernels with ncu")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: found {arguments.minutes}, expected more than 0")
    profile = arguments.profile and shutil.which("ncu") is not None
    if arguments.profile and not profile:
        print("--profile: found no ncu on PATH: nothing is profiled", flush=True)
    sys.exit(spend(stages(profile), arguments.minutes, arguments.output.absolute()))


if __name__ == "__main__":
    main()
