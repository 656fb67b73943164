"""The CPU lstm with any number of threads that OpenMP grants, also if it changes between calls."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytbptt.ops.extension import EXTENSION

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)

# With OMP_DYNAMIC, GCC's libgomp grants fewer threads if getloadavg reports a busy machine.
FAKE_GETLOADAVG = """
#include <stdio.h>
#include <stdlib.h>
int getloadavg(double loads[], int count) {
  double load = 0;
  FILE* file = fopen(getenv("FAKE_LOAD"), "r");
  if (file != NULL) {
    if (fscanf(file, "%lf", &load) != 1) load = 0;
    fclose(file);
  }
  for (int i = 0; i < count; ++i) loads[i] = load;
  return count;
}
"""
PROGRAM = """
import os, sys
from pathlib import Path
import torch
from pytbptt.ops import lstm
torch.manual_seed(0)
T, B, H = 5, 9, 70
leaves = [torch.randn(*shape, requires_grad=True) for shape in ((T, B, 4 * H), (4 * H, H), (B, H), (B, H))]
def results():
    output, h_n, c_n = lstm(*leaves)
    return [output, h_n, c_n, *torch.autograd.grad([output, h_n, c_n], leaves, [output, h_n, c_n])]
threads = torch.get_num_threads()
torch.set_num_threads(1)
expected = results()
torch.set_num_threads(threads)
for load in sys.argv[1:]:
    Path(os.environ["FAKE_LOAD"]).write_text(load)
    for result, expected_result in zip(results(), expected, strict=True):
        torch.testing.assert_close(result, expected_result)
print("completed")
"""


def run(tmp_path: Path, loads: list[str], **environment: str) -> None:
    """Runs PROGRAM; a hang is a TimeoutExpired."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *loads],
        env={**os.environ, "FAKE_LOAD": str(tmp_path / "load"), **environment},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout) == (0, "completed\n"), process.stderr


@pytest.mark.parametrize(("threads", "limit"), [(5, 3), (4, 3), (7, 2), (5, 1), (16, 7), (3, 3)])
def test_no_deadlock_when_openmp_grants_fewer_threads(tmp_path: Path, threads: int, limit: int) -> None:
    run(tmp_path, ["0"], OMP_NUM_THREADS=str(threads), OMP_THREAD_LIMIT=str(limit))


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of getloadavg needs Linux")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_deadlock_with_omp_dynamic(tmp_path: Path) -> None:
    (tmp_path / "load.c").write_text(FAKE_GETLOADAVG)
    library = tmp_path / "load.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "load.c")], check=True)
    threads = str(max(2, len(os.sched_getaffinity(0))))
    run(tmp_path, ["0", "100", "1", "0"], OMP_NUM_THREADS=threads, OMP_DYNAMIC="true", LD_PRELOAD=str(library))


RSS_PROGRAM = """
import os
import torch
from pytbptt.ops import lstm

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

torch.set_num_threads(2)
def call(H):
    gates, weight_hh, state = torch.zeros(2, 2, 4 * H), torch.zeros(4 * H, H), torch.zeros(2, H)
    before = resident()
    with torch.no_grad():
        lstm(gates, weight_hh, state, state)
    return resident() - before

call(8)
print(call(512), call(2200))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_cached_workspace_is_bounded() -> None:
    """A workspace of 4 MiB (512 units) stays cached, one of 148 MiB (2,200 units) is freed."""
    process = subprocess.run([sys.executable, "-c", RSS_PROGRAM], capture_output=True, text=True, check=True)
    small, large = map(float, process.stdout.split())
    assert small < 64
    assert large < 64 + 8  # the bound of the cache, and memory that malloc keeps
