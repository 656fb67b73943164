"""What a program says where its installation does not fit."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pytbptt

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pytbptt"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that has the package's Python, with no extension and no record of a build."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build.json")
    shutil.copytree(PACKAGE, tmp_path / "pytbptt", ignore=ignored)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, given = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)


def test_a_package_without_an_extension_says_so_once_on_import(copy: Path) -> None:
    use = "import pytbptt, torch; pytbptt.ops.lstm(*(torch.zeros(s) for s in ((2, 3, 8), (8, 2), (3, 2), (3, 2))))"
    for program in ("import pytbptt", "import pytbptt.ops", "from pytbptt import LSTM, ops", use):
        done = run(copy, "-c", program)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "Warning" in line]
        assert len(said) == 1, done.stderr
        assert said[0].startswith("<string>:1: RuntimeWarning: pytbptt has no compiled extension (it was never built")
        assert "--no-binary pytbptt pytbptt==" in said[0]
    chosen = run(copy, "-W", "error", "-c", use, PYTBPTT_BACKEND="reference")
    assert (chosen.returncode, chosen.stderr) == (0, "")


def test_the_command_that_builds_names_a_folder_where_the_source_is_there(copy: Path) -> None:
    (copy / "setup.py").touch()
    assert f" --editable {copy}\n" in run(copy, "-c", "import pytbptt").stderr


def test_subpackages_and_the_version_are_there_after_one_import() -> None:
    modules = ("checkpoint", "convert", "data", "errors", "memory", "nn", "ops", "truncation")
    names = ", ".join(f"pytbptt.{module}.__name__" for module in modules)
    program = f"import pytbptt; print({names}, pytbptt.__version__)"
    done = run(ROOT, "-W", "error", "-c", program, PYTBPTT_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    *found, version = done.stdout.split()
    assert found == [f"pytbptt.{module}" for module in modules]
    assert version == importlib.metadata.version("pytbptt")
    assert {*modules, "LSTM", "load"} <= set(dir(pytbptt))
    with pytest.raises(AttributeError, match="no attribute 'opps'"):
        pytbptt.opps  # noqa: B018


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"torch": "1.0.0", "why_no_extension": null}', "pytbptt._C was built against torch 1.0.0, found torch "),
        ('{"torch":', "build.json: found no record of a build; to build again: pip install "),
        ("{}", "build.json: found no record of a build; to build again: pip install "),
    ],
)
def test_another_torch_or_a_damaged_record_is_one_line_in_a_program_and_an_error_in_python(
    copy: Path, record: str, message: str
) -> None:
    (copy / "pytbptt" / "build.json").write_text(record)
    program = run(copy, "-m", "pytbptt.info")
    assert (program.returncode, program.stdout, len(program.stderr.splitlines())) == (1, "", 1)
    assert program.stderr.startswith("python -m pytbptt.info: ")
    assert message in program.stderr
    imported = run(copy, "-c", "import pytbptt.ops")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].startswith("pytbptt.errors.RunError: ")


def test_info_says_where_the_chosen_backend_cannot_serve(copy: Path) -> None:
    (copy / "pytbptt" / "build.json").write_text('{"torch": "2.0.0", "why_no_extension": "no compiler"}')
    for backend, says in (("fused", "none, for backend fused was chosen"), ("auto", "reference")):
        done = run(copy, "-m", "pytbptt.info", PYTBPTT_BACKEND=backend)
        assert done.returncode == 0
        assert done.stderr.count("pytbptt has no compiled extension (no compiler)") == 1
        ending = f"{says}: pytbptt has no compiled extension: no compiler"
        assert f"rel_attention on cpu     {ending}" in done.stdout.splitlines()
        assert f"lstm on cpu              {ending}" in done.stdout.splitlines()
