"""Stages for tests of benchmarks.gpu_day that need no GPU."""

import sys
from pathlib import Path

from benchmarks.gpu_day import Stage

# Prints when it starts, appends its name to the file `finished` at its end, and has a child process until then.
STAGE_PROGRAM = """
import subprocess, sys, time
name, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])
print("started", name, flush=True)
time.sleep(seconds)
child.kill()
child.wait()
with open(folder + "/finished", "a") as file:
    file.write(name + "\\n")
"""


def fake_stage(
    name: str, folder: Path, seconds: float, timeout: int = 600, min_seconds: int = 0, **options: bool
) -> Stage:
    command = (sys.executable, "-c", STAGE_PROGRAM, name, str(folder), str(seconds))
    return Stage(name, command, min_seconds, timeout, **options)
