"""What a program says where its installation does not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "pytbptt"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"torch": "1.0.0", "why_no_extension": null}', "pytbptt._C was built against torch 1.0.0, found torch "),
        ('{"torch":', "build.json: found no record of a build; rebuild it"),
        ("{}", "build.json: found no record of a build; rebuild it"),
    ],
)
def test_another_torch_or_a_damaged_record_is_one_line_in_a_program_and_an_error_in_python(
    tmp_path: Path, record: str, message: str
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "pytbptt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "pytbptt" / "build.json").write_text(record)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)

    program = run("-m", "pytbptt.info")
    assert (program.returncode, program.stdout, len(program.stderr.splitlines())) == (1, "", 1)
    assert program.stderr.startswith("python -m pytbptt.info: ")
    assert message in program.stderr
    imported = run("-c", "import pytbptt.ops")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].startswith("pytbptt.errors.RunError: ")


def test_info_says_where_the_chosen_backend_cannot_serve(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "pytbptt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "pytbptt" / "build.json").write_text('{"torch": "2.0.0", "why_no_extension": "no compiler"}')
    command = [sys.executable, "-m", "pytbptt.info"]
    for backend, says in (("fused", "none, for backend fused was chosen"), ("auto", "reference")):
        environment = {**os.environ, "PYTBPTT_BACKEND": backend}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        ending = f"{says}: pytbptt has no compiled extension: no compiler"
        assert f"rel_attention on cpu  {ending}" in done.stdout.splitlines()
        assert f"lstm on cpu           {ending}" in done.stdout.splitlines()
