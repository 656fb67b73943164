"""Files of results, with the command, machine and commit of a measurement."""

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pytbptt.errors import InputError
from pytbptt.ops.extension import EXTENSION

ROOT = Path(__file__).resolve().parent.parent


def write(path: str | Path, kind: str, command: str, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes results, one per line. The file is replaced atomically.

    Args:
        path: relative to the repository's root.
        kind: the program that measured.
        machine: the result of `describe_machine` before the measurement.
    """
    contents = {"kind": kind, "command": command, "date": date.today().isoformat(), "machine": machine}
    lines = ",\n".join(f"    {json.dumps(result)}" for result in results)
    head = json.dumps(contents, indent=2).removesuffix("\n}")
    target = ROOT / path
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.write_text(f'{head},\n  "results": [\n{lines}\n  ]\n}}\n')
    unfinished.replace(target)


def write_program_results(path: str, program: str, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes the results of `python -m benchmarks.{program}` and prints the path."""
    write(path, program, " ".join([f"python -m benchmarks.{program}", *sys.argv[1:]]), machine, results)
    print(path)


KINDS = ("benchmarks", "peers", "end_to_end")
"""Kinds of files that tables and plots are made from."""


def read(path: str) -> dict[str, Any]:
    """Reads a file of one of KINDS.

    Raises:
        InputError: a missing file, one of another kind, or one without results.
    """
    try:
        contents = json.loads((ROOT / path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found no results ({error}), expected a file of benchmarks/results") from None
    kind = contents.get("kind") if isinstance(contents, dict) else None
    if kind not in KINDS:
        raise InputError(f"{path}: found results of kind {kind}, expected {' or '.join(KINDS)}")
    results = contents.get("results")
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise InputError(f"{path}: found no list of results, expected a file of benchmarks/results")
    return dict(contents)


def quartiles(values: list[float]) -> list[float]:
    """The first quartile, the median and the third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def malformed(path: str, error: Exception) -> InputError:
    """The error for a file of results with a missing entry or one of another type."""
    found = f"no {error}" if isinstance(error, KeyError) else f"a value of another type ({error})"
    return InputError(f"{path}: found {found}, expected a file of benchmarks/results")


def describe_machine() -> dict[str, Any]:
    """Hardware, load average, versions and commit."""
    facts = EXTENSION.facts
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "pytbptt": None if facts is None else facts["cpu_isa_in_use"],
        },
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def describe_gpu() -> dict[str, Any]:
    """The GPU and the versions of its driver and libraries."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    """PYTBPTT_COMMIT if it is set, else the commit of this source tree, with "+" if files differ from it."""
    if "PYTBPTT_COMMIT" in os.environ:
        return os.environ["PYTBPTT_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ":!benchmarks/results", ":!*.md") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
