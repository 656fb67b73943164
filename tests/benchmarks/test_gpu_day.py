"""benchmarks.gpu_day keeps to its time limits and resumes an interrupted session."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import GRACE_SECONDS, Stage, run_stages, stages
from tests.common.fake_stages import fake_stage

ROOT = Path(__file__).resolve().parents[2]


def stage_statuses(folder: Path) -> dict[str, str]:
    outcomes = json.loads((folder / "day.json").read_text())["stages"]
    return {name: outcome["status"] for name, outcome in outcomes.items()}


def count_started(folder: Path) -> int:
    return sum(log.read_text().count("started ") for log in folder.glob("*.log"))


def leaked_processes(folder: Path) -> list[str]:
    """Command lines of other processes that contain the folder's path."""
    command_lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and int(path.parent.name) != os.getpid():
            command_lines.append(line.replace("\0", " "))
    return command_lines


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(4))
def test_killed_session_resumes_without_repeating_finished_stages(tmp_path: Path, seed: int) -> None:
    generator, names = random.Random(seed), [f"stage-{number}" for number in range(4)]
    script = tmp_path / "day.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from benchmarks.gpu_day import run_stages\nfrom tests.common.fake_stages import fake_stage\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"sys.exit(run_stages([fake_stage(name, folder, 0.3) for name in {names}], 10, folder / 'day'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL)

    kills = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    for number in kills:
        before, deadline = count_started(tmp_path / "day"), time.monotonic() + 120
        session = start()
        while count_started(tmp_path / "day") == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.6))
        session.send_signal(number)
        session.wait()
    assert start().wait() == 0
    assert stage_statuses(tmp_path / "day") == dict.fromkeys(names, "passed")
    finished = (tmp_path / "finished").read_text().split()
    assert sorted(set(finished)) == names
    assert len(finished) <= len(names) + len(kills)  # it repeats a stage whose end was not recorded
    assert all(f"started {name}" in (tmp_path / "day" / f"{name}.log").read_text() for name in names)
    assert not leaked_processes(tmp_path)


def test_stage_timeout_kills_and_reschedules(tmp_path: Path) -> None:
    folder = tmp_path / "day"
    planned = [fake_stage("endless", tmp_path, 600.0, timeout=2), fake_stage("short", tmp_path, 0.0)]
    assert run_stages(planned, 10, folder) == 0
    assert stage_statuses(folder) == {"endless": "interrupted", "short": "passed"}
    assert not leaked_processes(tmp_path)
    (folder / "endless.json").write_text("{}")
    assert run_stages([fake_stage("endless", tmp_path, 0.0), *planned[1:]], 10, folder) == 0
    assert (tmp_path / "finished").read_text().split() == ["short", "endless"]
    assert (folder / "endless.interrupted-1.json").read_text() == "{}"  # partial results are kept
    assert (folder / "endless.log").read_text().count("started endless") == 2


def test_session_deadline_kills_unresponsive_stage(tmp_path: Path) -> None:
    ignores_sigterm = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    planned = [
        Stage("unresponsive", (sys.executable, "-c", ignores_sigterm, str(tmp_path)), 1, 600),
        fake_stage("short", tmp_path, 0.0, min_seconds=1),
    ]
    started = time.monotonic()
    assert run_stages(planned, (2 * GRACE_SECONDS + 4) / 60, tmp_path / "day") == 0
    assert time.monotonic() - started < 120
    assert stage_statuses(tmp_path / "day") == {"unresponsive": "interrupted", "short": "not started"}
    assert not leaked_processes(tmp_path)


def test_log_of_killed_stage_is_kept(tmp_path: Path) -> None:
    """The stage does not flush its output before it is killed."""
    prints = "import os, signal, time; print('partial output'); os.kill(os.getpid(), signal.SIGKILL)"
    run_stages([Stage("prints", (sys.executable, "-c", prints), 0, 60)], 10, tmp_path / "day")
    assert "partial output" in (tmp_path / "day" / "prints.log").read_text()
    (row,) = (row for row in (tmp_path / "day" / "summary.md").read_text().splitlines() if "prints" in row)
    assert row.startswith("| prints | interrupted |")
    assert row.endswith("| partial output |")


def test_stage_longer_than_remaining_time_is_skipped(tmp_path: Path) -> None:
    planned = [fake_stage("long", tmp_path, 0.0, min_seconds=300), fake_stage("short", tmp_path, 0.0)]
    assert run_stages(planned, 2, tmp_path / "day") == 0
    assert stage_statuses(tmp_path / "day") == {"long": "not started", "short": "passed"}


def test_only_required_stage_failure_aborts_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = (sys.executable, "-c", "raise SystemExit('found no GPU')")
    short = fake_stage("short", tmp_path, 0.0)
    assert run_stages([Stage("bad", failing, 0, 60), short], 10, tmp_path / "one") == 1
    assert stage_statuses(tmp_path / "one") == {"bad": "failed", "short": "passed"}
    assert "| bad | failed |" in (tmp_path / "one" / "summary.md").read_text()
    assert run_stages([Stage("facts", failing, 0, 60, required=True), short], 10, tmp_path / "two") == 2
    assert stage_statuses(tmp_path / "two") == {"facts": "failed", "short": "not started"}
    assert "found no GPU" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_the_session_fails_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--minutes", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["python -m benchmarks.gpu_day: found no GPU that torch can use"]


def test_planned_stages_refer_to_existing_files(tmp_path: Path) -> None:
    planned = stages(profile=True)
    names = [stage.name for stage in planned]
    assert len(set(names)) == len(names)
    assert all(0 < stage.min_seconds < stage.timeout for stage in planned)
    for stage in planned:
        for word in stage.command:
            if word.startswith(("benchmarks/", "tests/")):
                assert (ROOT / word.partition("::")[0]).exists()
    assert gpu_day.ROOT == ROOT


def test_required_stage_runs_in_every_session(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    check = (sys.executable, "-c", "import sys, pathlib; sys.exit(not pathlib.Path(sys.argv[1]).exists())", str(marker))
    planned = [Stage("facts", check, 0, 60, required=True), fake_stage("short", tmp_path, 0.0)]
    assert run_stages(planned, 10, tmp_path / "day") == 2
    marker.touch()
    assert run_stages(planned, 10, tmp_path / "day") == 0
    marker.unlink()
    assert run_stages(planned, 10, tmp_path / "day") == 2


def test_timeout_of_required_stage_ends_the_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with a GPU that hangs. The next session starts with that stage again."""
    planned = [fake_stage("facts", tmp_path, 600.0, timeout=1, required=True), fake_stage("short", tmp_path, 0.0)]
    for _ in range(2):
        assert run_stages(planned, 10, tmp_path / "day") == 2
        assert stage_statuses(tmp_path / "day") == {"facts": "interrupted", "short": "not started"}
    assert "facts took too long" in capsys.readouterr().err


def test_benchmark_without_results_counts_as_failed(tmp_path: Path) -> None:
    planned = [Stage("silent", (sys.executable, "-c", "pass"), 0, 60, writes_results=True)]
    assert run_stages(planned, 10, tmp_path / "day") == 1
    assert stage_statuses(tmp_path / "day") == {"silent": "failed"}


def test_timed_out_stage_is_rescheduled_last(tmp_path: Path) -> None:
    folder = tmp_path / "day"
    run_stages([fake_stage("slow", tmp_path, 600.0, timeout=2)], 10, folder)
    run_stages([fake_stage("slow", tmp_path, 0.0), fake_stage("other", tmp_path, 0.0)], 10, folder)
    assert (tmp_path / "finished").read_text().split() == ["other", "slow"]


def test_leaked_child_processes_are_killed(tmp_path: Path) -> None:
    """Also in a process group of their own, as torchrun's processes are."""
    code = (
        "import subprocess, sys; sleep = [sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]]\n"
        "for new_session in (False, True): subprocess.Popen(sleep, start_new_session=new_session)"
    )
    assert run_stages([Stage("leaves", (sys.executable, "-c", code, str(tmp_path)), 0, 60)], 10, tmp_path / "day") == 0
    assert not leaked_processes(tmp_path)


def test_output_folder_is_locked(tmp_path: Path) -> None:
    gpu_day.Session([], tmp_path).close()
    session = gpu_day.Session([], tmp_path)
    with pytest.raises(SystemExit, match="found another session"):
        gpu_day.Session([], tmp_path)
    session.close()
