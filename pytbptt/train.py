"""Train a model: python -m pytbptt.train [DATA] [--arch transformer_xl|awd_lstm] ...

Starts one process per GPU by itself, like fairseq-train; torchrun works too.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import FrameType

import torch

from pytbptt.data.preparation import available_cores
from pytbptt.errors import InputError
from pytbptt.runtime.cli import EXIT_USAGE_ERROR, run_with_parser
from pytbptt.training.config import TrainSettings, read_command_line
from pytbptt.training.run import train
from pytbptt.training.stopping import handle_signals

LAUNCHER_PIPE = "PYTBPTT_LAUNCHER_PIPE"
"""Environment variable with the file descriptor of a pipe to the launcher; EOF means that the launcher has died."""
GRACE_SECONDS = 60.0
"""Seconds to wait for the other processes after one has failed, before SIGTERM, and again before SIGKILL."""


def launch_or_train(settings: TrainSettings) -> None:
    """Run `train` in --distributed-world-size processes; by default one for each visible GPU.

    Raises:
        InputError: more processes than GPUs, a world size different from torchrun's, or as `train`.
    """
    requested = settings.distributed.distributed_world_size
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if requested not in (0, int(os.environ["WORLD_SIZE"])):
            found = f"found {requested}, but WORLD_SIZE says {os.environ['WORLD_SIZE']}"
            raise InputError(f"--distributed-world-size: {found}; expected the same")
        if launcher_pipe := os.environ.get(LAUNCHER_PIPE):
            threading.Thread(target=_exit_with_launcher, args=(int(launcher_pipe),), daemon=True).start()
        train(settings)
        if launcher_pipe:  # skip interpreter shutdown, where torch.distributed's threads can abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    elif (count := choose_world_size(settings)) == 1:
        train(settings)
    else:
        what = "one for each GPU" if not requested else "as --distributed-world-size says"
        print(f"starting {count} processes, {what}", file=sys.stderr)
        sys.exit(launch(count))


def choose_world_size(settings: TrainSettings) -> int:
    """How many processes to start: --distributed-world-size, or else one for each visible GPU."""
    requested, on_gpus = settings.distributed.distributed_world_size, settings.run.device != "cpu"
    gpus = torch.cuda.device_count() if on_gpus else 0
    if gpus and requested > gpus:
        raise InputError(
            f"--distributed-world-size: found {requested}, expected at most the {gpus} GPUs that can be seen"
        )
    return requested or max(1, gpus)


def launch(count: int) -> int:
    """Run this command in `count` processes of one group and return the exit status.

    Stop signals are forwarded to every process. If one fails, all are stopped; stderr of ranks > 0 is printed at the
    end, unless rank 0 reported a user error.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    shared_environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    shared_environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    command = [sys.executable, "-m", "pytbptt.train", *sys.argv[1:]]
    children: list[subprocess.Popen[bytes]] = []

    def forward_signal(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    with contextlib.ExitStack() as stack:
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        stack.callback(os.close, write_end)
        inherited: tuple[int, ...] = ()
        if sys.platform != "win32":  # Windows cannot inherit file descriptors by number
            inherited = (read_end,)
            shared_environment[LAUNCHER_PIPE] = str(read_end)
        stderr_files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        stack.enter_context(handle_signals(forward_signal))
        try:
            for rank in range(count):
                environment = {**shared_environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                errors = stderr_files[rank - 1] if rank else None
                # New session, so that Ctrl-C reaches only the launcher, which forwards it.
                child = subprocess.Popen(
                    command, env=environment, stderr=errors, start_new_session=True, pass_fds=inherited
                )
                children.append(child)
            _wait(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
        if children[0].returncode != EXIT_USAGE_ERROR:
            for child, errors in zip(children[1:], stderr_files, strict=True):
                if child.returncode:
                    errors.seek(0)
                    shutil.copyfileobj(errors, sys.stderr.buffer)
    status = next((child.returncode for child in children if child.returncode), 0)
    return status if status >= 0 else 128 - status


def _wait(children: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended. If one fails, the others get GRACE_SECONDS, then SIGTERM, then GRACE_SECONDS again."""
    failed_at = terminated_at = 0.0
    while any(child.poll() is None for child in children):
        now = time.monotonic()
        if not failed_at and any(child.returncode for child in children):
            failed_at = now
        if failed_at and not terminated_at and now - failed_at > GRACE_SECONDS:
            terminated_at = now
            for child in children:
                child.terminate()
        if terminated_at and now - terminated_at > GRACE_SECONDS:
            return
        time.sleep(0.1)


def _exit_with_launcher(launcher_pipe: int) -> None:
    """Exit when the launcher dies, even if it was killed with SIGKILL."""
    os.read(launcher_pipe, 1)  # nothing is ever written to it: this returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    run_with_parser("python -m pytbptt.train", read_command_line, launch_or_train)
