"""What several test files need: a small corpus, and programs run as a user runs them."""

import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pytbptt.data.preparation import PrepareSettings, prepare

# What the tests compute is small, and two of them may run at once. With MKL, torch takes no more threads from the
# variable than there are cores.
torch.set_num_threads(int((os.environ.get("OMP_NUM_THREADS") or "1").partition(",")[0]))

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of prepared data: a few thousand words in which each word says much about the next."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"w{n}" for n in range(40)]
    draw = random.Random(0)
    for split, lines in (("train", 300), ("valid", 40), ("test", 40)):
        word = 0
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            for _ in range(lines):
                line = []
                for _ in range(draw.randint(3, 15)):
                    word = (word * 3 + draw.randint(1, 3)) % len(words)
                    line.append(words[word])
                file.write(" ".join(line) + "\n")
    prefixes = {f"{split}pref": str(folder / f"{split}.txt") for split in ("train", "valid", "test")}
    prepare(PrepareSettings(**prefixes, destdir=str(folder / "data-bin"), workers=1))
    return str(folder / "data-bin")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """`python -m pytbptt.NAME ARGUMENTS…` in an empty folder; in this process, which spares the time to import."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, f"pytbptt.{name}", raising=False)  # a test may have imported what it offers
        status: object = 0
        try:
            runpy.run_module(f"pytbptt.{name}", run_name="__main__")
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(str(status)), printed.out, printed.err)

    return run
