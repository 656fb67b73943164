"""tests/dead_gpu.py, with a torch whose GPU is easily lost."""

import subprocess
import sys
from pathlib import Path

from tests.processes import outside_xdist

ROOT = Path(__file__).resolve().parent.parent
TORCH = """
class cuda:
    lost = False

    @staticmethod
    def is_available():
        return True

    @classmethod
    def synchronize(cls):
        if cls.lost:
            raise RuntimeError("an illegal memory access was encountered")
"""
TESTS = """
import torch

def test_one():
    assert not torch.cuda.lost

def test_one_that_loses_the_gpu():
    torch.cuda.lost = True
    raise RuntimeError("a reason")

def test_two():
    assert not torch.cuda.lost

def test_two_that_shows_later_what_it_has_lost():
    torch.cuda.lost = True

def test_three():
    assert not torch.cuda.lost
"""


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_with_it.py").write_text(tests)
    environment = {**outside_xdist(), "PYTHONPATH": f"{folder}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.dead_gpu",
        "-p",
        "no:cacheprovider",
        "-v",
        "test_with_it.py",
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_new_process_goes_on_where_the_gpu_was_lost(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("PASSED") == 4  # the fourth passed before its kernel's error was seen
    assert done.stdout.count("FAILED") == 1
    assert "a reason" in done.stdout
    assert "test_two_that_shows_later_what_it_has_lost lost the GPU: an illegal memory access" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("=")
    assert "1 passed, 4 deselected" in done.stdout


def test_the_last_test_may_lose_it(tmp_path: Path) -> None:
    done = run(tmp_path, "import torch\n\ndef test_it():\n    torch.cuda.lost = True\n")
    assert done.returncode == 1, done.stdout
    assert "1 passed" in done.stdout


def test_nothing_changes_with_a_gpu_that_lives(tmp_path: Path) -> None:
    done = run(tmp_path, "def test_it():\n    pass\n")
    assert done.returncode == 0, done.stdout
