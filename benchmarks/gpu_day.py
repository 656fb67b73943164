"""Tests and benchmarks for a GPU that is available for minutes: python -m benchmarks.gpu_day --minutes 7 --output DIR.

Runs stages in order of priority, each in its own process with a timeout, and skips those that need more time than is
left. DIR gets a log of each stage, the results of the benchmarks, day.json (the outcome of every stage so far) and
summary.md. The same command resumes an interrupted session: stages that have finished are not repeated. Needs torch,
numpy, pytest and pytest-benchmark, and for some stages tyro and tqdm.
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
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL, and the minimum for the report
MAX_REPORT_SECONDS = 30
STAGE_VARIABLE = "PYTBPTT_GPU_DAY_STAGE"  # marks the processes of a stage, so that all of them can be killed


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    """{output} is replaced by the session's folder."""
    min_seconds: int
    """With less time left the stage is not started."""
    timeout: int
    """In seconds."""
    required: bool = False
    """It runs every time, and the session ends if it fails."""
    writes_results: bool = False
    """Without a file of results it has failed."""


@dataclass
class Outcome:
    status: str
    """passed, failed, interrupted, running, or not started."""
    seconds: float = 0.0
    timed_out: bool = False
    """By its own timeout, not the session's: other stages come first the next time."""


CHECK_GPU = """
import subprocess
import torch
from pytbptt.ops.extension import EXTENSION
if not torch.cuda.is_available():
    raise SystemExit("found no GPU that torch can use")
if not EXTENSION.supports("cuda"):
    raise SystemExit("found no CUDA kernels in the extension: build them with make gpu-build, or copy prebuilt ones")
from pytbptt.ops import backend, lstm
inputs = [torch.zeros(shape, device="cuda") for shape in ((1, 1, 32), (32, 8), (1, 8), (1, 8))]
try:
    with backend("fused"):
        lstm(*inputs)
    torch.cuda.synchronize()
except RuntimeError as error:  # the tests report any other error
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
    from pytbptt.info import describe_installation
    print("\\n".join(describe_installation()))
except ModuleNotFoundError as error:  # tests and benchmarks of the ops do not need these packages
    print(torch.cuda.get_device_name(), "torch", torch.__version__, error)
"""
ATTENTION, LSTM = "tests/ops/test_rel_attention_cuda.py", "tests/ops/test_lstm_cuda.py"
GRAPHED, RESUME, NCCL = (f"tests/training/test_{name}_cuda.py" for name in ("graphed", "resume", "nccl"))
DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32")


def _error_bound_tests(file: str, sizes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{file}::test_error_within_baseline[{size}-{dtype}]" for size in sizes for dtype in DTYPES)


ATTENTION_ERROR_TESTS = _error_bound_tests(ATTENTION, ("(3, 150, 150, 10, 41, 300)", "(2, 200, 130, 3, 64, 100)"))
LSTM_ERROR_TESTS = _error_bound_tests(LSTM, ("(35, 20, 650)", "(5, 3, 41)"))
PRIMITIVES = "handshake or primitives or wgmma"


def gpu_test_stage(name: str, min_seconds: int, timeout: int, *arguments: str) -> Stage:
    # --noconftest: tests/conftest.py needs packages that are not installed there. faulthandler shows which test hangs.
    log = ("-v", "-rs", "--tb=short", "-o", "faulthandler_timeout=60")
    plugins = ("--noconftest", "-p", "no:cacheprovider", "-p", "tests.common.restart_on_cuda_error")
    command = (sys.executable, "-m", "pytest", *plugins, *log, "-m", "gpu", *arguments)
    return Stage(name, command, min_seconds, timeout)


def benchmark_stage(name: str, min_seconds: int, timeout: int, file: str, *arguments: str) -> Stage:
    command = (sys.executable, "-m", "pytest", f"benchmarks/{file}", "-p", "no:cacheprovider", "-q", "--benchmark-only")
    chosen = ("--device", "cuda", "--benchmark-max-time", "0.3", "--results", f"{{output}}/{name}.json")
    return Stage(name, (*command, *chosen, *arguments), min_seconds, timeout, writes_results=True)


def stages(profile: bool) -> list[Stage]:
    """In order of priority."""
    bf16 = ("--dtype", "bfloat16")
    kernels = ("--clock-control", "none", "--kernel-name", "regex:rel_attention|lstm", "--launch-count", "12")
    once = ("-p", "no:cacheprovider", "--benchmark-disable", "--device", "cuda", *bf16, "--mode", "backward")
    ncu = ("ncu", *kernels, "--force-overwrite", "--export", "{output}/profile", sys.executable, "-m", "pytest")
    sizes = ("--size", "enwik8,zaremba-650", "--only", "fused")
    files = ("benchmarks/test_rel_attention.py", "benchmarks/test_lstm.py")
    profiled = [Stage("profile", (*ncu, *files, *once, *sizes), 30, 90)] if profile else []
    return [
        Stage("facts", (sys.executable, "-c", CHECK_GPU), 10, 60, required=True),
        gpu_test_stage("device-primitives", 15, 90, ATTENTION, "-k", PRIMITIVES),
        gpu_test_stage("attention-exact", 15, 90, *ATTENTION_ERROR_TESTS),
        gpu_test_stage("lstm-exact", 15, 90, *LSTM_ERROR_TESTS),
        benchmark_stage(
            "attention", 15, 60, "test_rel_attention.py", *bf16, "--without", "compiled_eager,flex_attention"
        ),
        benchmark_stage("lstm", 15, 60, "test_lstm.py", *bf16, "--without", "compiled_eager,eager,flashrnn"),
        benchmark_stage(
            "lstm-other-precisions", 10, 30, "test_lstm.py", "--dtype", "float16,tf32", "--size", "wide-1024",
            "--without", "compiled_eager,eager,flashrnn",
        ),
        *profiled,
        gpu_test_stage("captured-updates", 15, 120, GRAPHED),
        gpu_test_stage(
            "remaining-tests", 20, 240, ATTENTION, LSTM, RESUME, "-k", f"not ({PRIMITIVES})",
            *(word for node in (*ATTENTION_ERROR_TESTS, *LSTM_ERROR_TESTS) for word in ("--deselect", node)),
        ),
        benchmark_stage(
            "compiled-peers", 20, 150, "test_rel_attention.py", *bf16, "--mode", "backward",
            "--only", "fused,compiled_eager,flex_attention",
        ),
        benchmark_stage("training-steps", 20, 90, "test_training_step.py"),
        benchmark_stage("rollouts", 20, 90, "test_rollouts.py"),
        gpu_test_stage("nccl", 30, 150, NCCL),
    ]  # fmt: skip


class Session:
    """Runs stages and records their outcomes in the folder `output`."""

    def __init__(self, planned: list[Stage], output: Path) -> None:
        self.planned, self.output = planned, output
        output.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(output / "lock", os.O_WRONLY | os.O_CREAT)  # held until the session is closed
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"python -m benchmarks.gpu_day: {output}: found another session that runs there") from None
        self.record_path = output / "day.json"
        recorded = json.loads(self.record_path.read_text())["stages"] if self.record_path.exists() else {}
        self.outcomes = {stage.name: Outcome("not started") for stage in planned}
        for name, outcome in recorded.items():
            if name in self.outcomes:
                self.outcomes[name] = Outcome(**outcome)
        for name, outcome in self.outcomes.items():
            if outcome.status == "running":  # the session was killed
                self.outcomes[name] = Outcome("interrupted", outcome.seconds)
        _kill_stages(f"{output}:")  # of a killed session

    def close(self) -> None:
        os.close(self._lock)

    def run(self, deadline: float) -> int:
        """Runs the stages that have not finished, until `deadline` on the monotonic clock; returns the exit status."""
        for stage in sorted(self.planned, key=lambda stage: self.outcomes[stage.name].timed_out and not stage.required):
            left = deadline - time.monotonic() - 2 * GRACE_SECONDS
            finished = self.outcomes[stage.name].status in FINISHED and not stage.required
            if not finished and left >= max(1, stage.min_seconds):
                self._run(stage, min(stage.timeout, int(left)))
            if stage.required and self.outcomes[stage.name].status in ("failed", "interrupted"):
                return 2
        return int(any(outcome.status == "failed" for outcome in self.outcomes.values()))

    def _run(self, stage: Stage, timeout: int) -> None:
        print(f"{stage.name} …", end="", flush=True)
        self._keep_partial_results(stage)
        words = [word.replace("{output}", str(self.output)) for word in stage.command]
        # The program timeout kills the process group even if this process is killed before.
        command = ["timeout", f"--kill-after={GRACE_SECONDS}", str(timeout), *words]
        # Unbuffered, because a killed process does not flush its output.
        environment = {**os.environ, STAGE_VARIABLE: f"{self.output}:{stage.name}", "PYTHONUNBUFFERED": "1"}
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
                raise SystemExit(f"python -m benchmarks.gpu_day: found no program timeout ({error})") from None
        try:
            self._set_outcome(stage, Outcome("running"))
            status = process.wait()
            _kill_stages(environment[STAGE_VARIABLE])  # timeout waits only for its own child
        except BaseException:
            _kill_stages(environment[STAGE_VARIABLE])
            process.wait()
            self._set_outcome(stage, Outcome("interrupted", time.monotonic() - started))
            raise
        seconds = time.monotonic() - started
        timed_out = status in (124, 137) and seconds >= timeout - 1
        if timed_out or status < 0 or status in (129, 130, 137, 143):  # killed by a signal
            outcome = Outcome("interrupted", seconds, timed_out=timed_out and timeout == stage.timeout)
        elif status == 0 and (not stage.writes_results or (self.output / f"{stage.name}.json").exists()):
            outcome = Outcome("passed", seconds)
        else:
            outcome = Outcome("failed", seconds)
        self._set_outcome(stage, outcome)
        print(f" {self.outcomes[stage.name].status}, {seconds:.0f} s", flush=True)

    def _keep_partial_results(self, stage: Stage) -> None:
        results = self.output / f"{stage.name}.json"
        if results.exists():
            number = len(list(self.output.glob(f"{stage.name}.interrupted-*.json"))) + 1
            results.rename(self.output / f"{stage.name}.interrupted-{number}.json")

    def _set_outcome(self, stage: Stage, outcome: Outcome) -> None:
        self.outcomes[stage.name] = outcome
        contents = {"stages": {name: asdict(each) for name, each in self.outcomes.items()}}
        unfinished = self.record_path.with_name("day.json.unfinished")
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")
        unfinished.replace(self.record_path)

    def summary(self) -> str:
        """A table of the stages' outcomes with the last line of each log."""
        lines = ["| stage | | seconds | last line |", "| --- | --- | --- | --- |"]
        for name, outcome in self.outcomes.items():
            last_line = "" if outcome.status == "not started" else self.last_line(name)
            lines.append(f"| {name} | {outcome.status} | {outcome.seconds:.0f} | {last_line} |")
        return "\n".join([*lines, ""])

    def last_line(self, name: str) -> str:
        """The last line of a stage's log, escaped for a table."""
        log = self.output / f"{name}.log"
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last_line = next((line for line in reversed(lines) if line.strip()), "")
        return last_line.strip("= ").replace("|", "\\|")[:200]

    def tables(self, timeout: float) -> str:
        """The tables of all results, or how to make them if there is no time left."""
        files = [str(path) for path in sorted(self.output.glob("*.json")) if path != self.record_path]
        if not files:
            return ""
        command = [sys.executable, "-m", "benchmarks.report", "--print", *files]
        hint = f"to print the tables: python -m benchmarks.report --print {self.output}/*.json"
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"The report timed out; {hint}\n"
        return done.stdout if done.returncode == 0 else f"The report failed; {hint}\n\n{done.stderr}"


def _stage_processes(prefix: str) -> list[int]:
    """Processes in whose environment STAGE_VARIABLE has this prefix, even in another process group, as torchrun's."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes()
        except OSError:  # of another user, or it has ended
            continue
        if any(variable.startswith(f"{STAGE_VARIABLE}={prefix}".encode()) for variable in variables.split(b"\0")):
            processes.append(int(path.parent.name))
    return processes


def _kill_stages(prefix: str) -> None:
    """Sends SIGTERM to these processes, and SIGKILL to those left after GRACE_SECONDS."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline, signalled = time.monotonic() + GRACE_SECONDS, set[int]()
        while alive := _stage_processes(prefix):
            for process in set(alive) - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            signalled.update(alive)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stages(planned: list[Stage], minutes: float, output: Path) -> int:
    """Runs the stages and writes the summary; returns the exit status."""
    deadline = time.monotonic() + 60 * minutes
    session = Session(planned, output)
    with _interrupted_by_signals():
        try:
            status = session.run(deadline)
        except KeyboardInterrupt:
            status = 1
        try:
            summary = session.summary()
            print(summary, flush=True)
            (output / "summary.md").write_text(summary)
            tables = session.tables(min(MAX_REPORT_SECONDS, max(GRACE_SECONDS, deadline - time.monotonic())))
            print(tables)
            (output / "summary.md").write_text(f"{summary}\n{tables}")
        except KeyboardInterrupt:
            status = 1
        session.close()
    if status == 2:
        first = planned[0].name
        failed = session.outcomes[first].status == "failed"
        message = session.last_line(first) if failed else f"{first} took too long"
        print(f"python -m benchmarks.gpu_day: {message}", file=sys.stderr)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="time for all stages together")
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--profile", action="store_true", help="also profile the hot kernels with ncu")
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes: found {arguments.minutes}, expected more than 0")
    profile = arguments.profile and shutil.which("ncu") is not None
    if arguments.profile and not profile:
        print("--profile: found no ncu on PATH, so nothing is profiled", flush=True)
    sys.exit(run_stages(stages(profile), arguments.minutes, arguments.output.absolute()))


if __name__ == "__main__":
    main()
