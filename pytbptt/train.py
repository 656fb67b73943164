"""Train a model: python -m pytbptt.train [DATA] [--arch transformer_xl|awd_lstm] ...

One process for each GPU, also without torchrun: as fairseq-train starts them.
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
from pytbptt.runtime.cli import USER_MISTAKE, run_with
from pytbptt.training.config import TrainSettings, read_command_line
from pytbptt.training.run import train
from pytbptt.training.stopping import handle_signals

STARTER = "PYTBPTT_STARTER"
"""The variable that names the end of a pipe whose other end the process holds that started this one."""
GRACE = 60.0
"""Seconds that the others have to end by themselves when one has failed, and again when they were told to."""


def train_on_all(settings: TrainSettings) -> None:
    """`train` in as many processes as --distributed-world-size says; by default one for each GPU that can be seen.

    Raises:
        InputError: more processes than GPUs, or others than torchrun started; and as `train`.
    """
    asked = settings.distributed.distributed_world_size
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        if asked not in (0, int(os.environ["WORLD_SIZE"])):
            found = f"found {asked}, but WORLD_SIZE says {os.environ['WORLD_SIZE']}"
            raise InputError(f"--distributed-world-size: {found}; expected the same")
        if starter := os.environ.get(STARTER):
            threading.Thread(target=_end_with, args=(int(starter),), daemon=True).start()
        train(settings)
        if starter:  # without Python's own end, in which threads of torch.distributed have been seen to abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    elif (count := world_size(settings)) == 1:
        train(settings)
    else:
        what = "one for each GPU" if not asked else "as --distributed-world-size says"
        print(f"starting {count} processes, {what}", file=sys.stderr)
        sys.exit(launch(count))


def world_size(settings: TrainSettings) -> int:
    """How many processes to start where nobody else has started them."""
    asked, on_gpus = settings.distributed.distributed_world_size, settings.run.device != "cpu"
    gpus = torch.cuda.device_count() if on_gpus else 0
    if gpus and asked > gpus:
        raise InputError(f"--distributed-world-size: found {asked}, expected at most the {gpus} GPUs that can be seen")
    return asked or max(1, gpus)


def launch(count: int) -> int:
    """This very command in `count` processes that find one another; the exit status.

    A signal that stops a run goes to each of them once. Where one fails, so do all; what others than the first have to
    say of it is printed at the end, unless the first has said it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    command = [sys.executable, "-m", "pytbptt.train", *sys.argv[1:]]
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    with contextlib.ExitStack() as stack:
        alive, held = os.pipe()
        stack.callback(os.close, alive)
        stack.callback(os.close, held)
        inherited: tuple[int, ...] = ()
        if sys.platform != "win32":  # where files are not inherited by their numbers
            inherited = (alive,)
            common[STARTER] = str(alive)
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        stack.enter_context(handle_signals(forward))
        try:
            for rank in range(count):
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                errors = said[rank - 1] if rank else None
                # In a session of its own: a terminal's Ctrl-C goes to this process, which hands it on.
                child = subprocess.Popen(
                    command, env=environment, stderr=errors, start_new_session=True, pass_fds=inherited
                )
                children.append(child)
            _wait(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
        if children[0].returncode != USER_MISTAKE:
            for child, errors in zip(children[1:], said, strict=True):
                if child.returncode:
                    errors.seek(0)
                    shutil.copyfileobj(errors, sys.stderr.buffer)
    status = next((child.returncode for child in children if child.returncode), 0)
    return status if status >= 0 else 128 - status


def _wait(children: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; when one has failed, the others are given GRACE, then told to stop, then killed."""
    failed_at = told_at = 0.0
    while any(child.poll() is None for child in children):
        now = time.monotonic()
        if not failed_at and any(child.returncode for child in children):
            failed_at = now
        if failed_at and not told_at and now - failed_at > GRACE:
            told_at = now
            for child in children:
                child.terminate()
        if told_at and now - told_at > GRACE:
            return
        time.sleep(0.1)


def _end_with(starter: int) -> None:
    """End this process with the one that started it, which can have been killed outright."""
    os.read(starter, 1)  # which nobody writes to: it returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    run_with("python -m pytbptt.train", read_command_line, train_on_all)
