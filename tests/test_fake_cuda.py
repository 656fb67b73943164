"""GPU tests and benchmarks pass on a fake CUDA device, so that errors in them are found without a GPU.

Tests that need nvcc (primitives, handshake) or a GPU's memory skip themselves. Loops of hundreds of launches make two,
and the largest sizes are left out.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_day import Stage, stages
from pytbptt.ops.extension import EXTENSION
from tests.common.fake_cuda import make_copy
from tests.common.subprocesses import env_without_xdist

ROOT = Path(__file__).resolve().parent.parent
ATTENTION, LSTM = "tests/ops/test_rel_attention_cuda.py", "tests/ops/test_lstm_cuda.py"
ERROR_BOUNDS = "test_error_within_baseline"

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)


@pytest.fixture(scope="module")
def project_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fake-cuda")
    make_copy(ROOT, target)
    return target


def run_python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=env_without_xdist()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_pytest(folder: Path, *arguments: str) -> str:
    # Benchmarks need the options of benchmarks/conftest.py.
    options = [] if any(word.startswith("benchmarks/") for word in arguments) else ["--noconftest"]
    return run_python(folder, "-m", "pytest", *options, "-p", "no:cacheprovider", "-q", *arguments)


def num_passed(output: str) -> int:
    match = re.search(r"(\d+) passed", output)
    return int(match[1]) if match else 0


def test_gpu_op_tests_pass_on_fake_cuda(project_copy: Path) -> None:
    smallest = [
        f"{ATTENTION}::{ERROR_BOUNDS}[(2, 5, 7, 2, 8, 12)-torch.float16]",
        f"{LSTM}::{ERROR_BOUNDS}[(5, 3, 41)-tf32]",
    ]
    assert num_passed(run_pytest(project_copy, "-m", "gpu", *smallest)) == 2
    others = run_pytest(project_copy, "-m", "gpu", ATTENTION, LSTM, "-k", f"not ({ERROR_BOUNDS} or compiles)")
    assert num_passed(others) >= 24


@pytest.mark.slow
def test_gpu_op_tests_pass_on_fake_cuda_large_sizes(project_copy: Path) -> None:
    chosen = f"compiles or ({ERROR_BOUNDS} and (41 or 8 or 96) and not (640 or 5000 or 1000 or 2048 or 1150 or 1024))"
    assert num_passed(run_pytest(project_copy, "-m", "gpu", ATTENTION, LSTM, "-k", chosen)) >= 20


@pytest.mark.slow
def test_cuda_graph_tests_pass_on_fake_cuda(project_copy: Path) -> None:
    assert num_passed(run_pytest(project_copy, "-m", "gpu", "tests/training/test_graphed_cuda.py")) >= 18


@pytest.mark.slow
def test_fp16_resume_tests_pass_on_fake_cuda(project_copy: Path) -> None:
    assert num_passed(run_pytest(project_copy, "-m", "gpu", "tests/training/test_resume_cuda.py")) == 2


@pytest.mark.slow
@pytest.mark.fault
def test_nccl_tests_pass_on_fake_cuda(project_copy: Path) -> None:
    assert num_passed(run_pytest(project_copy, "-m", "gpu", "tests/training/test_nccl_cuda.py")) >= 2


COLLECT = """
import json, sys, pytest

class NodeIds:
    def pytest_collection_finish(self, session):
        self.node_ids = [item.nodeid for item in session.items]

collected = []
for arguments in json.loads(sys.argv[1]):
    plugin = NodeIds()
    assert pytest.main([*arguments, "--collect-only"], plugins=[plugin]) == 0, arguments
    collected.append(plugin.node_ids)
print(json.dumps(collected))
"""


def collect_node_ids(folder: Path, arguments: list[list[str]]) -> list[list[str]]:
    """Node ids of the tests that pytest collects with each of these lists of arguments."""
    output = run_python(folder, "-c", COLLECT, json.dumps(arguments))
    node_ids: list[list[str]] = json.loads(output.splitlines()[-1])
    return node_ids


def pytest_arguments(stage: Stage) -> list[str]:
    return [word.replace("{output}", "/nowhere") for word in stage.command[stage.command.index("pytest") + 1 :]]


def test_session_stages_run_every_gpu_test_once(project_copy: Path) -> None:
    planned = [pytest_arguments(stage) for stage in stages(profile=False) if "gpu" in stage.command]
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    ]
    assert len(files) > 3
    *by_stage, all_node_ids = collect_node_ids(project_copy, [*planned, ["--noconftest", "-m", "gpu", *files]])
    assert all(by_stage)
    assert sorted(node_id for node_ids in by_stage for node_id in node_ids) == sorted(all_node_ids)


def test_session_benchmarks_are_collectable() -> None:
    planned = [
        pytest_arguments(stage)
        for stage in stages(profile=True)
        if any(word.startswith("benchmarks/") for word in stage.command)
    ]
    for node_ids in collect_node_ids(ROOT, planned):
        assert any("fused" in node_id for node_id in node_ids)


def test_benchmarks_run_on_fake_cuda(project_copy: Path) -> None:
    results = project_copy / "results.json"
    chosen = ["--size", "tiny", "--only", "fused,eager", "--device", "cpu", "--benchmark-max-time", "0.01"]
    files = [f"benchmarks/test_{name}.py" for name in ("rel_attention", "lstm", "rollouts", "training_step")]
    for graph in ([], ["--cuda-graph"]):
        printed = run_pytest(project_copy, *files, "--benchmark-only", *chosen, *graph, "--results", str(results))
        assert num_passed(printed) > 10
        assert '"launched_milliseconds"' in results.read_text()
        assert ("a CUDA graph's replay" in results.read_text()) == bool(graph)


SESSION = """
import sys
from pathlib import Path
from benchmarks.gpu_day import benchmark_stage, gpu_test_stage, run_stages, stages

planned = [stage for stage in stages(profile=False) if stage.required]
planned.append(gpu_test_stage("tests", 1, 300, "tests/ops/test_lstm_cuda.py", "-k", "empty"))
planned.append(benchmark_stage("times", 1, 300, "test_rel_attention.py", "--size", "tiny", "--only", "fused,eager"))
sys.exit(run_stages(planned, 20, Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("seed", range(3))
def test_interrupted_gpu_session_resumes_and_completes(project_copy: Path, tmp_path: Path, seed: int) -> None:
    generator, command = random.Random(seed), [sys.executable, "-c", SESSION, str(tmp_path / "day")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        session = subprocess.Popen(command, cwd=project_copy, env=env_without_xdist(), stdout=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.5, 12.0))
        session.send_signal(number)
        session.wait()
    done = subprocess.run(command, cwd=project_copy, env=env_without_xdist(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads((tmp_path / "day" / "day.json").read_text())["stages"]
    assert [outcome["status"] for outcome in outcomes.values()] == ["passed"] * 3
    rows = json.loads((tmp_path / "day" / "times.json").read_text())["results"]
    assert {row["name"] for row in rows} == {"fused", "eager"}
    assert "| times | passed |" in done.stdout
    assert "| rel_attention |" in (tmp_path / "day" / "summary.md").read_text()
