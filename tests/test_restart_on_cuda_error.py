"""tests/common/restart_on_cuda_error.py runs the remaining tests in a new process; torch is a fake here."""

import subprocess
import sys
from pathlib import Path

from tests.common.subprocesses import env_without_xdist

ROOT = Path(__file__).resolve().parent.parent
TORCH = """
class cuda:
    failed = False

    @staticmethod
    def is_available():
        return True

    @classmethod
    def synchronize(cls):
        if cls.failed:
            raise RuntimeError("an illegal memory access was encountered")
"""
TESTS = """
import torch

def test_before():
    assert not torch.cuda.failed

def test_that_fails_with_a_cuda_error():
    torch.cuda.failed = True
    raise RuntimeError("a reason")

def test_between():
    assert not torch.cuda.failed

def test_that_passes_before_its_cuda_error_is_seen():
    torch.cuda.failed = True

def test_after():
    assert not torch.cuda.failed
"""


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_with_fake_torch.py").write_text(tests)
    environment = {**env_without_xdist(), "PYTHONPATH": f"{folder}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.common.restart_on_cuda_error",
        "-p",
        "no:cacheprovider",
        "-v",
        "test_with_fake_torch.py",
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_restarts_after_cuda_error(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("PASSED") == 4  # kernels fail asynchronously: the fourth test passes too
    assert done.stdout.count("FAILED") == 1
    assert "a reason" in done.stdout
    assert "test_that_passes_before_its_cuda_error_is_seen: an illegal memory access" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("=")
    assert "1 passed, 4 deselected" in done.stdout


def test_cuda_error_in_last_test_fails_session(tmp_path: Path) -> None:
    done = run(tmp_path, "import torch\n\ndef test_it():\n    torch.cuda.failed = True\n")
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout


def test_no_restart_without_cuda_error(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_it():\n    pass\n")
    assert done.returncode == 0, done.stdout
