"""Programs as processes of their own: alone, or several that form one job as torchrun would start them.

A server that has imported everything forks them. Importing would take most of their time.
"""

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.processes", "pytbptt.training.run", "pytbptt.eval", "torch._dynamo", "matplotlib.pyplot"]
)


def outside_xdist() -> dict[str, str]:
    """The environment of a pytest of its own: in one of xdist's processes pytest-benchmark would time nothing. With one
    thread, as two of these may run at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {"OMP_NUM_THREADS": "1", **kept}


@dataclass
class Program:
    """`python -m pytbptt.NAME ARGUMENTS…`, with one thread."""

    arguments: Sequence[str]
    process: Any
    printed: Path

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """At once, and wait until it is gone; what it printed goes too."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.printed)

    def finish(self, timeout: float = 200) -> CompletedProcess[str]:
        """Wait until it ends, once; it is killed when `timeout` has passed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        output, errors = ((self.printed / name).read_text() for name in ("output", "errors"))
        shutil.rmtree(self.printed)
        return CompletedProcess(self.arguments, self.process.exitcode, output, errors)

    def wait_for_lines(self, path: Path, lines: int) -> None:
        """Until a file has so many lines, or the program has ended."""
        while self.process.is_alive():
            if path.exists() and len(path.read_text().splitlines()) >= lines:
                return
            time.sleep(0.001)


def start(
    name: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    largest_file: int = resource.RLIM_INFINITY,
    folder: Path | None = None,
) -> Program:
    """Start a program; `dtype` is torch's default, which its weights take, and no file of it can grow beyond
    `largest_file` bytes, as if the disk were full; `folder` is where it runs."""
    printed = Path(tempfile.mkdtemp(prefix="printed-"))
    process = SERVER.Process(
        target=_run, args=(name, arguments, environment or {}, dtype, largest_file, folder or Path(), printed)
    )
    process.start()
    return Program(arguments, process, printed)


def start_job(
    name: str,
    arguments: Sequence[Sequence[str]],
    dtype: torch.dtype = torch.float32,
    folders: Sequence[Path] | None = None,
) -> list[Program]:
    """One program in several processes that find one another, each with arguments (and a folder) of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments))}
    return [
        start(
            name,
            *its_own,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            dtype=dtype,
            folder=folders[rank] if folders else None,
        )
        for rank, its_own in enumerate(arguments)
    ]


def run_job(name: str, count: int, *arguments: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """What each of `count` processes prints; all must succeed."""
    ended = [program.finish() for program in start_job(name, [arguments] * count, dtype)]
    for process in ended:
        assert process.returncode == 0, process.stderr
    return [process.stdout for process in ended]


def _run(
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    dtype: torch.dtype,
    largest_file: int,
    folder: Path,
    printed: Path,
) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.update(environment)
    for number, to in ((1, "output"), (2, "errors")):
        os.dup2(os.open(printed / to, os.O_CREAT | os.O_WRONLY), number)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    sys.argv = [name, *arguments]
    runpy.run_module(f"pytbptt.{name}", run_name="__main__")
