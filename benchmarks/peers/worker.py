"""The process of one side: reads what to run, a JSON object a line, and answers with how long it took."""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import torch

from benchmarks.peers.cases import CASES, SEED, Case, TokenStream


class Side(Protocol):
    """A model and its memory, ready to read chunks."""

    def parameters(self) -> int:
        """How many weights the model has."""

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        """Read `count` chunks, doing what a case names."""


def serve(make: Callable[[Case], Side]) -> None:
    """Answer on standard output until standard input ends; the case's name is the only argument.

    The first line says what was made; then a line {"seconds": …, "processor_seconds": …} answers every line
    {"work": …, "count": …}. Each piece of work has a stream of tokens of its own, so that what one side reads does not
    depend on what else it ran.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    case = CASES[sys.argv[1]]
    torch.manual_seed(SEED)
    side = make(case)
    streams: dict[str, TokenStream] = {}
    versions = {name: _version(name) for name in ("torch", "transformers", "numpy")}
    made = {"parameters": side.parameters(), "versions": versions, "threads": torch.get_num_threads()}
    print(json.dumps(made), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        stream = streams.setdefault(request["work"], TokenStream(case))
        started, processor_started = time.perf_counter(), time.process_time()
        side.run(request["work"], stream, request["count"])
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
        print(json.dumps({"seconds": seconds, "processor_seconds": processor_seconds}), file=answers, flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
