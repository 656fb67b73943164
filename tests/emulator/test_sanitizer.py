"""The emulator and its kernels are clean under AddressSanitizer, which also checks local arrays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import ROOT, compiler

# All compute types with all options, forward and backward, keys split among blocks, small and large head sizes.
CASES = "single_option or all_options and (140 or 600) or head_size and (8-0 or 128-0) or injected_faults"


def library_path(name: str) -> str | None:
    """Path of a library of the compiler's, None if it has none."""
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


@pytest.mark.slow
@pytest.mark.matrix
def test_clean_under_address_sanitizer() -> None:
    libraries = [library_path("libasan.so"), library_path("libstdc++.so.6")]
    if libraries[0] is None:
        pytest.skip("the compiler has no runtime for -fsanitize=address")
    environment = os.environ | {
        "PYTBPTT_SANITIZE": "address",
        "LD_PRELOAD": ":".join(filter(None, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter leaks
        "OMP_NUM_THREADS": "1",
    }
    tests = [f"tests/emulator/{name}.py" for name in ("test_emulator", "test_rel_attention")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", CASES, *tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
