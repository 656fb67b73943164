"""The tests marked gpu pass where a stand-in takes the GPU's place: what they ask for is not impossible.

Left out are those that need a compiler for the GPU at hand (wrappers, ping-pong), its memory, or its speed.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day import stages
from pytbptt.extension import EXTENSION
from tests.cuda_stand_in import make_copy

ROOT = Path(__file__).resolve().parent.parent
ATTENTION, LSTM = "tests/ops/test_rel_attention_cuda.py", "tests/ops/test_lstm_cuda.py"
EXACT = "test_as_exact_as_baseline"
NEEDS_A_GPU = "ping_pong or wrappers or ten_thousand or threads"

pytestmark = pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.why_absent}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stand-in")
    make_copy(ROOT, target)
    return target


def pytest_in(copy: Path, *arguments: str) -> str:
    alone = [] if any(word.startswith("benchmarks/") for word in arguments) else ["--noconftest"]
    command = [sys.executable, "-m", "pytest", *alone, "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(printed: str) -> int:
    found = re.search(r"(\d+) passed", printed)
    return int(found[1]) if found else 0


def test_both_ops(copy: Path) -> None:
    smallest = [f"{ATTENTION}::{EXACT}[(2, 5, 7, 2, 8, 12)-torch.float16]", f"{LSTM}::{EXACT}[(5, 3, 41)-tf32]"]
    assert passed(pytest_in(copy, "-m", "gpu", *smallest)) == 2
    others = pytest_in(copy, "-m", "gpu", ATTENTION, LSTM, "-k", f"not ({NEEDS_A_GPU} or {EXACT} or compiles)")
    assert passed(others) >= 20


@pytest.mark.slow
def test_both_ops_in_larger_sizes(copy: Path) -> None:
    chosen = f"compiles or ({EXACT} and (41 or 8 or 96) and not (640 or 5000 or 1000 or 2048 or 1150 or 1024))"
    assert passed(pytest_in(copy, "-m", "gpu", ATTENTION, LSTM, "-k", chosen)) >= 20


@pytest.mark.slow
def test_updates_and_evaluation_as_graphs(copy: Path) -> None:
    assert passed(pytest_in(copy, "-m", "gpu", "tests/training/test_graphed_cuda.py")) == 18


@pytest.mark.slow
@pytest.mark.fault
def test_a_job_of_one_process(copy: Path) -> None:
    assert passed(pytest_in(copy, "-m", "gpu", "tests/training/test_nccl_cuda.py")) == 2


def collected(copy: Path, *arguments: str) -> list[str]:
    printed = pytest_in(copy, "--collect-only", *(word for word in arguments if word != "-q"))
    return [line for line in printed.splitlines() if "::" in line]


def test_the_stages_of_a_gpu_day_run_every_gpu_test_once(copy: Path) -> None:
    found: list[str] = []
    for stage in stages(profile=False):
        if "gpu" in stage.command:
            chosen = collected(copy, *stage.command[stage.command.index("gpu") - 1 :])
            assert chosen, stage.name
            found += chosen
    assert len(found) == len(set(found))
    files = {node.partition("::")[0] for node in found}
    assert files == {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*_cuda.py")}
    assert sorted(found) == sorted(collected(copy, "-m", "gpu", *sorted(files)))


def test_the_benchmarks_of_a_gpu_day_are_there(tmp_path: Path) -> None:
    for stage in stages(profile=True):
        files = [word for word in stage.command if word.startswith("benchmarks/")]
        if files:
            options = stage.command[stage.command.index(files[-1]) + 1 :]
            nodes = collected(ROOT, *files, *(word.replace("{output}", str(tmp_path)) for word in options))
            assert any("fused" in node for node in nodes), stage.name


def test_a_benchmark_as_on_a_gpu(copy: Path) -> None:
    results = copy / "results.json"
    chosen = ["--size", "tiny", "--only", "fused,eager", "--device", "cpu", "--benchmark-max-time", "0.01"]
    files = [f"benchmarks/test_{name}.py" for name in ("rel_attention", "lstm", "rollouts", "training_step")]
    for graph in ([], ["--cuda-graph"]):
        printed = pytest_in(copy, *files, "--benchmark-only", *chosen, *graph, "--results", str(results))
        assert passed(printed) > 10
        assert '"launched_milliseconds"' in results.read_text()
        assert ("a CUDA graph's replay" in results.read_text()) == bool(graph)
