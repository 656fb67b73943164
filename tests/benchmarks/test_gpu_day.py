"""benchmarks.gpu_day: what it plans exists, and a day that is cut goes on where it was."""

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
from benchmarks.gpu_day import GRACE, Stage, spend, stages

ROOT = Path(__file__).resolve().parents[2]
# A stage says when it began and when it was through; a child of its own says that it lives.
STAGE = """
import subprocess, sys, time
name, folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", folder])
print("began", name, flush=True)
time.sleep(seconds)
child.kill()
child.wait()
with open(folder + "/finished", "a") as file:
    file.write(name + "\\n")
"""


def stage(name: str, folder: Path, seconds: float, limit: int = 600, least: int = 0, **options: bool) -> Stage:
    return Stage(name, (sys.executable, "-c", STAGE, name, str(folder), str(seconds)), least, limit, **options)


def statuses(folder: Path) -> dict[str, str]:
    return {name: one["status"] for name, one in json.loads((folder / "day.json").read_text())["stages"].items()}


def begun(folder: Path) -> int:
    """How many stages a day has begun so far."""
    return sum(log.read_text().count("began ") for log in folder.glob("*.log"))


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and int(path.parent.name) != os.getpid():
            found.append(line.replace("\0", " "))
    return found


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(4))
def test_a_day_that_is_killed_at_any_moment_goes_on_where_it_was(tmp_path: Path, seed: int) -> None:
    """By SIGKILL and SIGTERM in turn; every stage finishes once, and nothing is left running."""
    draw, names = random.Random(seed), [f"stage-{number}" for number in range(4)]
    script = tmp_path / "day.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.benchmarks.test_gpu_day import spend, stage\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"sys.exit(spend([stage(name, folder, 0.3) for name in {names}], 10, folder / 'day'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL)

    kills = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    for number in kills:
        before, deadline = begun(tmp_path / "day"), time.monotonic() + 120
        day = begin()
        while begun(tmp_path / "day") == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.6))
        day.send_signal(number)
        day.wait()
    assert begin().wait() == 0
    assert statuses(tmp_path / "day") == dict.fromkeys(names, "passed")
    finished = (tmp_path / "finished").read_text().split()
    assert sorted(set(finished)) == names
    assert len(finished) <= len(names) + len(kills)  # who is killed before it could note the end does that stage again
    assert all(f"began {name}" in (tmp_path / "day" / f"{name}.log").read_text() for name in names)
    assert not left_running(tmp_path)


def test_a_stage_past_its_limit_is_ended_and_begun_again_the_next_time(tmp_path: Path) -> None:
    day = tmp_path / "day"
    planned = [stage("endless", tmp_path, 600.0, limit=2), stage("short", tmp_path, 0.0)]
    assert spend(planned, 10, day) == 0
    assert statuses(day) == {"endless": "cut", "short": "passed"}
    assert not left_running(tmp_path)
    (day / "endless.json").write_text("{}")
    assert spend([stage("endless", tmp_path, 0.0), *planned[1:]], 10, day) == 0
    assert (tmp_path / "finished").read_text().split() == ["short", "endless"]
    assert (day / "endless.cut-1.json").read_text() == "{}"  # what it had measured is kept
    assert (day / "endless.log").read_text().count("began endless") == 2


def test_a_day_ends_in_time_whatever_a_stage_does(tmp_path: Path) -> None:
    stubborn = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    planned = [
        Stage("stubborn", (sys.executable, "-c", stubborn, str(tmp_path)), 1, 600),
        stage("short", tmp_path, 0.0, least=1),
    ]
    began = time.monotonic()
    assert spend(planned, (2 * GRACE + 4) / 60, tmp_path / "day") == 0
    assert time.monotonic() - began < 120
    assert statuses(tmp_path / "day") == {"stubborn": "cut", "short": "not begun"}
    assert not left_running(tmp_path)


def test_what_is_printed_before_a_cut_is_kept(tmp_path: Path) -> None:
    """Though the stage itself keeps it back, and is killed."""
    prints = "import os, signal, time; print('half of it'); os.kill(os.getpid(), signal.SIGKILL)"
    spend([Stage("prints", (sys.executable, "-c", prints), 0, 60)], 10, tmp_path / "day")
    assert "half of it" in (tmp_path / "day" / "prints.log").read_text()
    (row,) = (row for row in (tmp_path / "day" / "summary.md").read_text().splitlines() if "prints" in row)
    assert row.startswith("| prints | cut |")
    assert row.endswith("| half of it |")


def test_a_stage_without_time_for_it_makes_way_for_a_shorter_one(tmp_path: Path) -> None:
    planned = [stage("long", tmp_path, 0.0, least=300), stage("short", tmp_path, 0.0)]
    assert spend(planned, 2, tmp_path / "day") == 0
    assert statuses(tmp_path / "day") == {"long": "not begun", "short": "passed"}


def test_a_stage_that_fails_stops_no_other_unless_all_need_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = (sys.executable, "-c", "raise SystemExit('found no GPU')")
    short = stage("short", tmp_path, 0.0)
    assert spend([Stage("bad", failing, 0, 60), short], 10, tmp_path / "one") == 1
    assert statuses(tmp_path / "one") == {"bad": "failed", "short": "passed"}
    assert "| bad | failed |" in (tmp_path / "one" / "summary.md").read_text()
    assert spend([Stage("facts", failing, 0, 60, required=True), short], 10, tmp_path / "two") == 2
    assert statuses(tmp_path / "two") == {"facts": "failed", "short": "not begun"}
    assert "found no GPU" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_the_day_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--minutes", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["python -m benchmarks.gpu_day: found no GPU that torch can use"]


def test_stages_are_those_that_are_there(tmp_path: Path) -> None:
    planned = stages(profile=True)
    names = [one.name for one in planned]
    assert len(set(names)) == len(names)
    assert all(0 < one.least < one.limit for one in planned)
    for one in planned:
        for word in one.command:
            if word.startswith(("benchmarks/", "tests/")):
                assert (ROOT / word.partition("::")[0]).exists()
    assert gpu_day.ROOT == ROOT


def test_a_required_stage_is_run_each_time(tmp_path: Path) -> None:
    marker = tmp_path / "there"
    asks = (sys.executable, "-c", "import sys, pathlib; sys.exit(not pathlib.Path(sys.argv[1]).exists())", str(marker))
    planned = [Stage("facts", asks, 0, 60, required=True), stage("short", tmp_path, 0.0)]
    assert spend(planned, 10, tmp_path / "day") == 2
    marker.touch()
    assert spend(planned, 10, tmp_path / "day") == 0
    marker.unlink()
    assert spend(planned, 10, tmp_path / "day") == 2


def test_a_required_stage_that_takes_too_long_ends_the_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that answers nobody; the next time it is asked first again."""
    planned = [stage("facts", tmp_path, 600.0, limit=1, required=True), stage("short", tmp_path, 0.0)]
    for _ in range(2):
        assert spend(planned, 10, tmp_path / "day") == 2
        assert statuses(tmp_path / "day") == {"facts": "cut", "short": "not begun"}
    assert "facts took too long" in capsys.readouterr().err


def test_a_benchmark_that_measured_nothing_has_failed(tmp_path: Path) -> None:
    silent = Stage("silent", (sys.executable, "-c", "pass"), 0, 60, results=True)
    assert spend([silent], 10, tmp_path / "day") == 1
    assert statuses(tmp_path / "day") == {"silent": "failed"}


def test_a_stage_that_met_its_own_limit_goes_last_the_next_time(tmp_path: Path) -> None:
    day = tmp_path / "day"
    spend([stage("slow", tmp_path, 600.0, limit=2)], 10, day)
    spend([stage("slow", tmp_path, 0.0), stage("other", tmp_path, 0.0)], 10, day)
    assert (tmp_path / "finished").read_text().split() == ["other", "slow"]


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    """Even what has a session of its own, as torchrun's processes have."""
    code = (
        "import subprocess, sys; sleep = [sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]]\n"
        "for alone in (False, True): subprocess.Popen(sleep, start_new_session=alone)"
    )
    assert spend([Stage("leaves", (sys.executable, "-c", code, str(tmp_path)), 0, 60)], 10, tmp_path / "day") == 0
    assert not left_running(tmp_path)


def test_a_folder_has_one_day_at_a_time(tmp_path: Path) -> None:
    gpu_day.Day([], tmp_path).close()
    day = gpu_day.Day([], tmp_path)
    with pytest.raises(SystemExit, match="found another day"):
        gpu_day.Day([], tmp_path)
    day.close()
