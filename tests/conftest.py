"""Fixtures of several test files: a small corpus, and the command-line programs."""

import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytbptt.data.preparation import PrepareSettings, prepare
from tests.common.cli import RunCli
from tests.common.fake_cuda_graph import fake_cuda_graphs  # noqa: F401 - a fixture

# One thread by default: tests are small and run in parallel. Set here, because with MKL torch limits OMP_NUM_THREADS to
# the number of cores.
torch.set_num_threads(int((os.environ.get("OMP_NUM_THREADS") or "1").partition(",")[0]))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of prepared data: a few thousand words, each of which depends on the one before."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"w{n}" for n in range(40)]
    generator = random.Random(0)
    for split, lines in (("train", 300), ("valid", 40), ("test", 40)):
        word = 0
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            for _ in range(lines):
                line = []
                for _ in range(generator.randint(3, 15)):
                    word = (word * 3 + generator.randint(1, 3)) % len(words)
                    line.append(words[word])
                file.write(" ".join(line) + "\n")
    prefixes = {f"{split}pref": str(folder / f"{split}.txt") for split in ("train", "valid", "test")}
    prepare(PrepareSettings(**prefixes, destdir=str(folder / "data-bin"), workers=1))
    return str(folder / "data-bin")


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs `python -m pytbptt.NAME ARGUMENTS…` in an empty folder, within this process to save the imports."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        # A test may have imported it, and runpy warns of that.
        monkeypatch.delitem(sys.modules, f"pytbptt.{name}", raising=False)
        status: object = 0
        try:
            runpy.run_module(f"pytbptt.{name}", run_name="__main__")
        except SystemExit as error:
            status = error.code
        output = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(str(status)), output.out, output.err)

    return run
