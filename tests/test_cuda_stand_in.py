"""The tests marked gpu pass where a stand-in takes the GPU's place: what they ask for is not impossible.

Those that need a compiler for the GPU at hand (wrappers, ping-pong) or its memory skip themselves; of hundreds of
launches two are made; the largest sizes are left out.
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
from tests.cuda_stand_in import make_copy
from tests.processes import outside_xdist

ROOT = Path(__file__).resolve().parent.parent
ATTENTION, LSTM = "tests/ops/test_rel_attention_cuda.py", "tests/ops/test_lstm_cuda.py"
EXACT = "test_as_exact_as_baseline"

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stand-in")
    make_copy(ROOT, target)
    return target


def python_in(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=outside_xdist())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_in(folder: Path, *arguments: str) -> str:
    alone = [] if any(word.startswith("benchmarks/") for word in arguments) else ["--noconftest"]
    return python_in(folder, "-m", "pytest", *alone, "-p", "no:cacheprovider", "-q", *arguments)


def passed(printed: str) -> int:
    found = re.search(r"(\d+) passed", printed)
    return int(found[1]) if found else 0


def test_both_ops(copy: Path) -> None:
    smallest = [f"{ATTENTION}::{EXACT}[(2, 5, 7, 2, 8, 12)-torch.float16]", f"{LSTM}::{EXACT}[(5, 3, 41)-tf32]"]
    assert passed(pytest_in(copy, "-m", "gpu", *smallest)) == 2
    others = pytest_in(copy, "-m", "gpu", ATTENTION, LSTM, "-k", f"not ({EXACT} or compiles)")
    assert passed(others) >= 24


@pytest.mark.slow
def test_both_ops_in_larger_sizes(copy: Path) -> None:
    chosen = f"compiles or ({EXACT} and (41 or 8 or 96) and not (640 or 5000 or 1000 or 2048 or 1150 or 1024))"
    assert passed(pytest_in(copy, "-m", "gpu", ATTENTION, LSTM, "-k", chosen)) >= 20


@pytest.mark.slow
def test_updates_and_evaluation_as_graphs(copy: Path) -> None:
    assert passed(pytest_in(copy, "-m", "gpu", "tests/training/test_graphed_cuda.py")) >= 18


@pytest.mark.slow
def test_runs_in_float16_that_go_on(copy: Path) -> None:
    assert passed(pytest_in(copy, "-m", "gpu", "tests/training/test_resume_cuda.py")) == 2


@pytest.mark.slow
@pytest.mark.fault
def test_a_job_of_one_process(copy: Path) -> None:
    assert passed(pytest_in(copy, "-m", "gpu", "tests/training/test_nccl_cuda.py")) >= 2


COLLECT = """
import json, sys, pytest

class Collected:
    def pytest_collection_finish(self, session):
        self.nodes = [item.nodeid for item in session.items]

nodes = []
for arguments in json.loads(sys.argv[1]):
    collected = Collected()
    assert pytest.main([*arguments, "--collect-only"], plugins=[collected]) == 0, arguments
    nodes.append(collected.nodes)
print(json.dumps(nodes))
"""


def collected(folder: Path, arguments: list[list[str]]) -> list[list[str]]:
    """The tests that pytest would run with each of these."""
    printed = python_in(folder, "-c", COLLECT, json.dumps(arguments))
    found: list[list[str]] = json.loads(printed.splitlines()[-1])
    return found


def arguments_of(stage: Stage) -> list[str]:
    """What it gives to pytest."""
    return [word.replace("{output}", "/nowhere") for word in stage.command[stage.command.index("pytest") + 1 :]]


def test_the_stages_of_a_gpu_day_run_every_gpu_test_once(copy: Path) -> None:
    planned = [arguments_of(stage) for stage in stages(profile=False) if "gpu" in stage.command]
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path != Path(__file__)
    ]
    assert len(files) > 3
    *by_stage, everything = collected(copy, [*planned, ["--noconftest", "-m", "gpu", *files]])
    assert all(by_stage)
    assert sorted(node for nodes in by_stage for node in nodes) == sorted(everything)


def test_the_benchmarks_of_a_gpu_day_are_there() -> None:
    planned = [
        arguments_of(stage)
        for stage in stages(profile=True)
        if any(word.startswith("benchmarks/") for word in stage.command)
    ]
    for nodes in collected(ROOT, planned):
        assert any("fused" in node for node in nodes)


def test_a_benchmark_as_on_a_gpu(copy: Path) -> None:
    results = copy / "results.json"
    chosen = ["--size", "tiny", "--only", "fused,eager", "--device", "cpu", "--benchmark-max-time", "0.01"]
    files = [f"benchmarks/test_{name}.py" for name in ("rel_attention", "lstm", "rollouts", "training_step")]
    for graph in ([], ["--cuda-graph"]):
        printed = pytest_in(copy, *files, "--benchmark-only", *chosen, *graph, "--results", str(results))
        assert passed(printed) > 10
        assert '"launched_milliseconds"' in results.read_text()
        assert ("a CUDA graph's replay" in results.read_text()) == bool(graph)


DAY = """
import sys
from pathlib import Path
from benchmarks.gpu_day import stage_of_benchmarks, stage_of_tests, spend, stages

planned = [stage for stage in stages(profile=False) if stage.required]
planned.append(stage_of_tests("tests", 1, 300, "tests/ops/test_lstm_cuda.py", "-k", "nothing_to_do"))
planned.append(stage_of_benchmarks("times", 1, 300, "test_rel_attention.py", "--size", "tiny", "--only", "fused,eager"))
sys.exit(spend(planned, 20, Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_day_that_is_cut_anywhere_goes_on_to_its_end(copy: Path, tmp_path: Path, seed: int) -> None:
    draw, command = random.Random(seed), [sys.executable, "-c", DAY, str(tmp_path / "day")]
    for number in (signal.SIGTERM, signal.SIGKILL):
        day = subprocess.Popen(command, cwd=copy, env=outside_xdist(), stdout=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.5, 12.0))
        day.send_signal(number)
        day.wait()
    done = subprocess.run(command, cwd=copy, env=outside_xdist(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "day" / "day.json").read_text())["stages"]
    assert [one["status"] for one in found.values()] == ["passed"] * 3
    rows = json.loads((tmp_path / "day" / "times.json").read_text())["results"]
    assert {row["name"] for row in rows} == {"fused", "eager"}
    assert "| times | passed |" in done.stdout
    assert "| rel_attention |" in (tmp_path / "day" / "summary.md").read_text()
