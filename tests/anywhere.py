"""make test-anywhere: the tests as other machines would run them, part by part, with the minutes of each.

    python -m tests.anywhere [PART ...]

Parts: `whole`, the suite as it is; those of PROCESSORS, the kernels' tests with what the libraries and the kernels
find of instruction sets and threads; `python3.X`, the ops, models and loader on another Python, in an environment of
its own under build/anywhere. All by default. The status is 1 where a part failed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pytbptt.ops.extension import EXTENSION
from tests.test_distribution import NOT_SOURCE, PARTS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("tests/ops", "tests/nn", "tests/emulator")
PROCESSORS = {
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
PYTHONS = ("python3.10", "python3.12", "python3.13")
OF_PYTHONS = ("tests/ops", "tests/nn", "tests/data", "tests/test_memory.py")
PYTEST = ("-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal")


def interpreter(name: str) -> str | None:
    """An interpreter that runs: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    version = name.removeprefix("python")
    for found in (shutil.which(name), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def on_another_python(name: str) -> bool:
    python = interpreter(name)
    if python is None:
        print(f"make test-anywhere: found no {name}, expected it on PATH or among pyenv's", file=sys.stderr)
        return False
    tree = ROOT / "build" / "anywhere" / name
    for part in PARTS:
        shutil.rmtree(tree / part, ignore_errors=True)
        shutil.copytree(ROOT / part, tree / part, ignore=NOT_SOURCE)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, tree)
    environment = {**os.environ, "PYTBPTT_SKIP_CUDA": "1"}  # PyPI's torch may be the CUDA build
    command = ["make", "--directory", str(tree), "test", f"PYTHON={python}", f"ARGS=-q {' '.join(OF_PYTHONS)}"]
    return subprocess.run(command, env=environment).returncode == 0


def instruction_sets() -> list[str]:
    """What the CPU kernels can be asked to use here."""
    facts = EXTENSION.facts
    return facts["cpu_isas"][: facts["cpu_isas"].index(facts["cpu_isa_in_use"]) + 1] if facts else []


def run(part: str) -> bool:
    if part in PYTHONS:
        return on_another_python(part)
    asked = PROCESSORS.get(part, {}).get("PYTBPTT_CPU_ISA")
    if asked and asked not in instruction_sets():
        print(f"left out: this machine's kernels are {', '.join(instruction_sets()) or 'none'}, not {asked}")
        return True
    tests = () if part == "whole" else KERNELS
    environment = {**os.environ, **PROCESSORS.get(part, {})}
    return subprocess.run([sys.executable, *PYTEST, *tests], cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    known = ("whole", *PROCESSORS, *PYTHONS)
    parts = sys.argv[1:] or known
    for part in parts:
        if part not in known:
            raise SystemExit(f"make test-anywhere: found {part}, expected parts of {', '.join(known)}")
    failed = []
    for part in parts:
        started = time.monotonic()
        print(f"== {part}", flush=True)
        passed = run(part)
        print(
            f"== {part}: {'passed' if passed else 'FAILED'}, {(time.monotonic() - started) / 60:.1f} minutes",
            flush=True,
        )
        failed += [] if passed else [part]
    if failed:
        raise SystemExit(f"make test-anywhere: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
