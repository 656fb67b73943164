"""pytbptt runs on Windows and macOS as tests/common/fake_platform.py emulates them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulation needs Linux")
ROOT = Path(__file__).resolve().parent.parent
MODEL = "--d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 8 --tokens-per-sample 8 --batch-size 4"
TRAIN = f"train data {MODEL} --save-dir run --log-interval 1 --log-format json --device cpu --keep-last 1"
PROGRAMS = f"""\
prepare --only-source --trainpref train.txt --validpref valid.txt --destdir data --workers 2
train no/such/data --save-dir refused
{TRAIN} --max-update 3
{TRAIN} --max-update 6
eval data --path run/checkpoint_last.pt --gen-subset valid --device cpu
generate --path run/checkpoint_best.pt --prompt w1 --length 5 --device cpu
score valid.txt --path run/checkpoint_last.pt --device cpu
plot run --output run.png
info run/checkpoint_last.pt
"""


def run(system: str, folder: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "SYSTEM": system,
        "PYTHONPATH": str(ROOT),
        "PYTBPTT_BACKEND": "reference",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-X", "warn_default_encoding", *options, "-m", "tests.common.fake_platform"]
    return subprocess.run(command, cwd=folder, env=environment, input=lines, capture_output=True, text=True)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_module_can_be_imported(system: str, tmp_path: Path) -> None:
    done = run(system, tmp_path, "", "-W", "error")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run_programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs PROGRAMS on an emulated system in a new folder."""

    def run_in_new_folder(system: str) -> Path:
        folder = tmp_path_factory.mktemp(system)
        line = " ".join(f"w{n * n % 23}" for n in range(20)) + "\n"
        (folder / "train.txt").write_text(
            line * 80_000, encoding="utf-8"
        )  # more than one block, so that both workers read
        (folder / "valid.txt").write_text(line * 3, encoding="utf-8")
        done = run(system, folder, PROGRAMS)
        statuses = [text for text in done.stderr.splitlines() if ": status " in text]
        names = [text.split()[0] for text in PROGRAMS.splitlines()]
        expected = [f"{name}: status {2 if n == 1 else 0}" for n, name in enumerate(names)]
        assert (done.returncode, statuses) == (0, expected), done.stderr
        return folder

    return run_in_new_folder


@pytest.fixture(scope="module")
def linux_folder(run_programs: Callable[[str], Path]) -> Path:
    return run_programs("linux")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_programs_write_same_files_and_losses_as_linux(
    system: str, linux_folder: Path, run_programs: Callable[[str], Path]
) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*")}

    def losses(folder: Path) -> list[tuple[str, int, float]]:
        entries = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [(entry["split"], entry["step"], entry["loss"]) for entry in entries]

    folder = run_programs(system)
    assert files(folder) == files(linux_folder)
    for path in (linux_folder / "data").iterdir():
        assert (folder / "data" / path.name).read_bytes() == path.read_bytes()
    assert losses(folder) == losses(linux_folder)
    assert len(losses(folder)) >= 6
