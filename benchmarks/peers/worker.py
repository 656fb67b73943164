"""The process of one side: reads what to run, a JSON object a line, and answers with how long it took."""

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import torch

from benchmarks.peers.cases import SEED, Case, TokenStream
from benchmarks.peers.parts import Range, mark, seconds_by_part


class Side(Protocol):
    """A model and its memory, ready to read chunks."""

    def parameters(self) -> int:
        """How many weights the model has."""

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        """Read `count` chunks, doing what a case names."""

    def ranges(self) -> Sequence[Range]:
        """What belongs to which part of the time."""


def serve(make: Callable[[Case], Side]) -> None:
    """Answer on standard output until standard input ends; the case, as JSON, is the only argument.

    The first line says what was made; then a line {"seconds": …, "processor_seconds": …, "peak_bytes": …} answers every
    line {"work": …, "count": …, "parts": false}, with "parts": {…} in it if they were asked for. Each piece of work has
    a stream of tokens of its own, so that what one side reads does not depend on what else it ran.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    case = Case(**json.loads(sys.argv[1]))
    torch.manual_seed(SEED)
    side = make(case)
    streams: dict[str, TokenStream] = {}
    marked = False
    versions = {name: _version(name) for name in ("torch", "transformers", "numpy")}
    made = {"parameters": side.parameters(), "versions": versions, "threads": torch.get_num_threads()}
    print(json.dumps(made), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work, count = request["work"], request["count"]
        stream = streams.setdefault(work, TokenStream(case))
        if request["parts"] and not marked:
            mark([*side.ranges(), (TokenStream, "next", "data")])
            marked = True
        parts = None
        started, processor_started = time.perf_counter(), time.process_time()
        if request["parts"]:
            parts = seconds_by_part(functools.partial(side.run, work, stream, count))
        else:
            side.run(work, stream, count)
            if case.device == "cuda":
                torch.cuda.synchronize()
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
        answer = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": _peak_bytes(case.device)}
        print(json.dumps(answer if parts is None else {**answer, "parts": parts}), file=answers, flush=True)


def _peak_bytes(device: str) -> int:
    """The most that this process has held so far, of the GPU's memory or of the machine's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
