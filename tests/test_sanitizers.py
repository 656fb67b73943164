"""The C++ tests, which need no torch, under sanitizers: memory, undefined behaviour, data races between threads.

The kernels run on std::thread there, not on torch's pool: ThreadSanitizer sees every synchronisation of theirs, and
none of OpenMP's, which it would take for races. It shows that tasks share nothing and that lstm's barrier suffices.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which((os.environ.get("CXX") or "c++").split()[0])


def run(*command: str) -> str:
    """The command's output; its end in the error where it fails."""
    # cmake and ninja are where pip put them, beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}"
    return done.stdout


def sanitizer_links(sanitizer: str, folder: Path) -> bool:
    """Whether the compiler has the sanitizer's runtime, which distributions pack apart."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [str(COMPILER), f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (CXX, c++)")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizer, tmp_path):
    if not sanitizer_links(sanitizer, tmp_path):
        pytest.skip(f"{COMPILER} has no runtime for -fsanitize={sanitizer}")
    build = str(tmp_path / "build")
    options = ["-G", "Ninja", "-DPYTBPTT_TORCH=OFF", f"-DPYTBPTT_SANITIZE={sanitizer}"]
    run("cmake", "-S", str(ROOT), "-B", build, *options)
    run("cmake", "--build", build)
    output = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in output
