"""The process of a runner: reads requests as JSON lines and answers with times."""

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


class Runner(Protocol):
    """A model and its memory."""

    def parameters(self) -> int:
        """The number of the model's parameters."""

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        """Reads `count` chunks; `work` is one of the case's names."""

    def ranges(self) -> Sequence[Range]:
        """The functions of each part of the model."""


def serve(make: Callable[[Case], Runner]) -> None:
    """Answers requests until standard input ends. The case, as JSON, is the only argument of the program.

    The first line of output describes the model. A request is a line {"work": …, "count": …, "parts": false}, and its
    answer a line {"seconds": …, "cpu_seconds": …, "peak_bytes": …}, with "parts": {…} if the request asks for them.
    Each kind of work has its own stream of tokens, so that its tokens do not depend on other requests.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error
    case = Case(**json.loads(sys.argv[1]))
    torch.manual_seed(SEED)
    runner = make(case)
    streams: dict[str, TokenStream] = {}
    marked = False
    versions = {name: _version(name) for name in ("torch", "transformers", "numpy")}
    model_info = {"parameters": runner.parameters(), "versions": versions, "threads": torch.get_num_threads()}
    print(json.dumps(model_info), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work, count = request["work"], request["count"]
        stream = streams.setdefault(work, TokenStream(case))
        if request["parts"] and not marked:
            mark([*runner.ranges(), (TokenStream, "next", "data")])
            marked = True
        parts = None
        started, cpu_started = time.perf_counter(), time.process_time()
        if request["parts"]:
            parts = seconds_by_part(functools.partial(runner.run, work, stream, count))
        else:
            runner.run(work, stream, count)
            if case.device == "cuda":
                torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": _peak_bytes(case.device)}
        print(json.dumps(answer if parts is None else {**answer, "parts": parts}), file=answers, flush=True)


def _peak_bytes(device: str) -> int:
    """Peak memory of this process so far, on the GPU or on the host."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
