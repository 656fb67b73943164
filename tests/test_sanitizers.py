"""The C++ tests, which need no torch, under sanitizers: memory, undefined behaviour and data races between threads.

The kernels run on std::thread there, not on torch's pool: ThreadSanitizer sees every synchronisation of theirs, and
none of OpenMP's, which it would take for races. It shows that tasks share nothing and that lstm's barrier suffices.
"""

import subprocess
from pathlib import Path

import pytest

from tests.portable import TARGETS, build_and_test, compiler_command, missing_to_compile

HERE = TARGETS["here"]
MISSING = missing_to_compile(HERE)


def sanitizer_links(sanitizer: str, folder: Path) -> bool:
    """Whether the compiler has the sanitizer's runtime, which distributions pack apart."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [*compiler_command(HERE), f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"no {MISSING}")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizer, tmp_path):
    if not sanitizer_links(sanitizer, tmp_path):
        pytest.skip(f"{HERE.compiler[0]} has no runtime for -fsanitize={sanitizer}")
    build_and_test(HERE, tmp_path / "build", f"-DPYTBPTT_SANITIZE={sanitizer}")
