"""make test-anywhere: the tests with other instruction sets, thread counts and versions of Python.

    python -m tests.checks.platform_matrix [PART ...]

Parts: `whole`, the full suite; those of ENVIRONMENTS, the kernels' tests with an instruction set or a thread count that
libraries and kernels are limited to; `python3.X`, PYTHON_TESTS on that Python, in a copy of the source with its own
environment under build/anywhere. Default: all. Prints the minutes of each. The status is 1 if a part failed.
"""

import os
import subprocess
import sys
import time

from pytbptt.ops.extension import EXTENSION
from tests.common.find_python import find_python
from tests.common.source_tree import ROOT, copy_source_tree

KERNEL_TESTS = ("tests/ops", "tests/nn", "tests/emulator")
ENVIRONMENTS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PYTBPTT_CPU_ISA": "avx2",
    },
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "PYTBPTT_CPU_ISA": "baseline"},
    "1-thread": {"OMP_NUM_THREADS": "1"},
    "5-threads": {"OMP_NUM_THREADS": "5"},
    "16-threads": {"OMP_NUM_THREADS": "16"},
}
PYTHON_VERSIONS = ("python3.10", "python3.12", "python3.13")
PYTHON_TESTS = ("tests/ops", "tests/nn", "tests/data", "tests/test_memory.py")
PYTEST = ("-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal")


def run_on_python(name: str) -> bool:
    python = find_python(name)
    if python is None:
        print(f"make test-anywhere: found no {name}, expected it on PATH or among pyenv's", file=sys.stderr)
        return False
    tree = ROOT / "build" / "anywhere" / name
    copy_source_tree(tree)
    environment = {**os.environ, "PYTBPTT_SKIP_CUDA": "1"}  # PyPI's torch may be the CUDA build
    command = ["make", "--directory", str(tree), "test", f"PYTHON={python}", f"ARGS=-q {' '.join(PYTHON_TESTS)}"]
    return subprocess.run(command, env=environment).returncode == 0


def supported_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use here."""
    facts = EXTENSION.facts
    return facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa_in_use"]) + 1] if facts else []


def run_part(part: str) -> bool:
    if part in PYTHON_VERSIONS:
        return run_on_python(part)
    isa = ENVIRONMENTS.get(part, {}).get("PYTBPTT_CPU_ISA")
    if isa and isa not in supported_isas():
        print(f"skipped: this CPU supports {', '.join(supported_isas()) or 'no kernels'}, not {isa}")
        return True
    tests = () if part == "whole" else KERNEL_TESTS
    environment = {**os.environ, **ENVIRONMENTS.get(part, {})}
    return subprocess.run([sys.executable, *PYTEST, *tests], cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    known = ("whole", *ENVIRONMENTS, *PYTHON_VERSIONS)
    parts = sys.argv[1:] or known
    for part in parts:
        if part not in known:
            raise SystemExit(f"make test-anywhere: found {part}, expected parts of {', '.join(known)}")
    failed = []
    for part in parts:
        started = time.monotonic()
        print(f"== {part}", flush=True)
        passed = run_part(part)
        minutes = (time.monotonic() - started) / 60
        print(f"== {part}: {'passed' if passed else 'FAILED'}, {minutes:.1f} minutes", flush=True)
        failed += [] if passed else [part]
    if failed:
        raise SystemExit(f"make test-anywhere: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
