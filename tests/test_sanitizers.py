"""The C++ tests report no memory error, undefined behaviour or data race under sanitizers.

They run the kernels on std::thread, because ThreadSanitizer does not see OpenMP's synchronisation and reports false
races. It checks that tasks share no data and that lstm's barrier synchronises its threads.
"""

import subprocess
from pathlib import Path

import pytest

from tests.checks.cross_compile import TARGETS, build_and_test, compiler_command, missing_to_compile

HERE = TARGETS["here"]
MISSING = missing_to_compile(HERE)


def sanitizer_links(sanitizer: str, folder: Path) -> bool:
    """Whether the sanitizer's runtime is installed: distributions have separate packages for it."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [*compiler_command(HERE), f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "empty")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=f"no {MISSING}")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_sanitizer_reports(sanitizer, tmp_path):
    if not sanitizer_links(sanitizer, tmp_path):
        pytest.skip(f"{HERE.compiler[0]} has no runtime for -fsanitize={sanitizer}")
    build_and_test(HERE, tmp_path / "build", f"-DPYTBPTT_SANITIZE={sanitizer}")
