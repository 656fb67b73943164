"""What a measurement was made on: its figures mean nothing without it."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pytbptt.extension import EXTENSION

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Machine, versions and commit, as every result here records them."""
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


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of this source tree, "+" behind it where files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
