"""Starts a runner in its own process and talks to it; benchmarks/peers/worker.py is the other end."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from benchmarks import record
from benchmarks.peers.cases import Case
from pytbptt.errors import RunError


class Process:
    """Context manager of a process `python -m benchmarks.peers.MODULE` for a case."""

    def __init__(self, python: str, module: str, case: Case, environment: Mapping[str, str] | None = None) -> None:
        # -W ignore: transformers warns of features that were deprecated after its release.
        command = [python, "-W", "ignore", "-m", f"benchmarks.peers.{module}", json.dumps(dataclasses.asdict(case))]
        self.name = module
        self.process = subprocess.Popen(
            command,
            cwd=record.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.model_info = self._answer()

    def run(self, work: str, count: int, parts: bool = False) -> dict[str, Any]:
        """Runs `work` on `count` chunks; returns seconds, cpu_seconds, peak_bytes and, if asked, seconds by part."""
        assert self.process.stdin is not None
        request = {"work": work, "count": count, "parts": parts}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"the process of {self.name} ended with status {self.process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
