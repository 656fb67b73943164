"""Runs pytbptt's programs as subprocesses: a single one, or the ranks of a distributed job, as torchrun starts them.

They are forked from a server process that has imported everything, because imports take most of a short run's time.
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

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["tests.common.subprocesses", "pytbptt.training.run", "pytbptt.eval", "torch._dynamo", "matplotlib.pyplot"]
)


def env_without_xdist() -> dict[str, str]:
    """The environment for pytest in a subprocess: without xdist's variables, which disable pytest-benchmark, and with
    one thread, because two such subprocesses may run at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return {"OMP_NUM_THREADS": "1", **kept}


@dataclass
class Program:
    """A running `python -m pytbptt.NAME ARGUMENTS…`, with one thread."""

    arguments: Sequence[str]
    process: Any
    output_dir: Path

    def send(self, signal_number: signal.Signals) -> None:
        os.kill(self.process.pid, signal_number)

    def kill(self) -> None:
        """Kill it, wait for its end and discard its output."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.output_dir)

    def finish(self, timeout: float = 200) -> CompletedProcess[str]:
        """Wait for its end, or kill it after `timeout` seconds. To be called once."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        stdout, stderr = ((self.output_dir / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.output_dir)
        return CompletedProcess(self.arguments, self.process.exitcode, stdout, stderr)

    def wait_for_lines(self, path: Path, lines: int) -> None:
        """Wait until a file has this many lines, or the program has ended."""
        while self.process.is_alive():
            if path.exists() and len(path.read_text().splitlines()) >= lines:
                return
            time.sleep(0.001)


def start_program(
    name: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = resource.RLIM_INFINITY,
    folder: Path | None = None,
) -> Program:
    """Start a program.

    Args:
        environment: variables to set besides this process's.
        dtype: torch's default dtype, which the model's weights get.
        max_file_bytes: no file can grow beyond this size, as if the disk were full.
        folder: the working directory.
    """
    output_dir = Path(tempfile.mkdtemp(prefix="output-"))
    process = FORKSERVER.Process(
        target=_run, args=(name, arguments, environment or {}, dtype, max_file_bytes, folder or Path(), output_dir)
    )
    process.start()
    return Program(arguments, process, output_dir)


def start_ranks(
    name: str,
    arguments: Sequence[Sequence[str]],
    dtype: torch.dtype = torch.float32,
    folders: Sequence[Path] | None = None,
) -> list[Program]:
    """Start the ranks of one distributed job, each with its own arguments (and its own working directory)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments))}
    return [
        start_program(
            name,
            *rank_arguments,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            dtype=dtype,
            folder=folders[rank] if folders else None,
        )
        for rank, rank_arguments in enumerate(arguments)
    ]


def run_ranks(name: str, world_size: int, *arguments: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The standard output of each of `world_size` ranks; all must succeed."""
    ended = [program.finish() for program in start_ranks(name, [arguments] * world_size, dtype)]
    for process in ended:
        assert process.returncode == 0, process.stderr
    return [process.stdout for process in ended]


def _run(
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    dtype: torch.dtype,
    max_file_bytes: int,
    folder: Path,
    output_dir: Path,
) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    os.environ.update(environment)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output_dir / stream, os.O_CREAT | os.O_WRONLY), descriptor)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    sys.argv = [name, *arguments]
    runpy.run_module(f"pytbptt.{name}", run_name="__main__")
