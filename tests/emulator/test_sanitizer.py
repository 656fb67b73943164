"""The emulator and the kernels on it under AddressSanitizer: it sees what the emulator does not check, such as an index
past an array that is meant to lie in registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import ROOT, compiler

# Every kind of arithmetic with every option, forward and backward, keys split among blocks, wide and narrow rows.
CASES = "each_option_alone or test_options and (140 or 600) or head_size and (8-0 or 128-0) or planted_bugs"


def runtime(name: str) -> str | None:
    """The path of a library that comes with the compiler, None where it has none."""
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


@pytest.mark.slow
@pytest.mark.matrix
def test_clean_under_address_sanitizer() -> None:
    libraries = [runtime("libasan.so"), runtime("libstdc++.so.6")]
    if libraries[0] is None:
        pytest.skip("the compiler has no runtime for -fsanitize=address")
    environment = os.environ | {
        "PYTBPTT_SANITIZE": "address",
        "LD_PRELOAD": ":".join(filter(None, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "OMP_NUM_THREADS": "1",
    }
    tests = [f"tests/emulator/{name}.py" for name in ("test_emulator", "test_rel_attention")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", CASES, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
