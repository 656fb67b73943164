"""What a program says where its installation does not fit."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import pytbptt
from pytbptt.ops.extension import EXTENSION

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
        assert said[0].startswith(
            "<string>:1: RuntimeWarning: pytbptt has no compiled extension (it has not been built"
        )
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
        ('{"why_no_extension": null, "why_no_cuda": null}', "pytbptt._C does not load with torch "),
        ('{"why_no_extension":', "build.json: found no record of a build; to build again: pip install "),
        ("{}", "build.json: found no record of a build; to build again: pip install "),
    ],
)
def test_a_damaged_extension_or_record_is_one_line_in_a_program_and_an_error_in_python(
    copy: Path, record: str, message: str
) -> None:
    (copy / "pytbptt" / "build.json").write_text(record)
    (copy / "pytbptt" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    program = run(copy, "-m", "pytbptt.info")
    assert (program.returncode, program.stdout, len(program.stderr.splitlines())) == (1, "", 1)
    assert program.stderr.startswith("python -m pytbptt.info: ")
    assert message in program.stderr
    imported = run(copy, "-c", "import pytbptt.ops")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].startswith("pytbptt.errors.RunError: ")


def test_info_says_where_the_chosen_backend_cannot_serve(copy: Path) -> None:
    (copy / "pytbptt" / "build.json").write_text('{"why_no_extension": "no compiler", "why_no_cuda": "no compiler"}')
    for backend, says in (("fused", "none, for backend fused was chosen"), ("auto", "reference")):
        done = run(copy, "-m", "pytbptt.info", PYTBPTT_BACKEND=backend)
        assert done.returncode == 0
        assert done.stderr.count("pytbptt has no compiled extension (no compiler)") == 1
        ending = f"{says}: pytbptt has no compiled extension: no compiler"
        assert f"rel_attention on cpu     {ending}" in done.stdout.splitlines()
        assert f"lstm on cpu              {ending}" in done.stdout.splitlines()


OLDER = """
import torch
torch.__version__ = "2.9.1+cpu"
import pytbptt.ops
"""


def test_a_torch_that_is_too_old_is_an_error(copy: Path) -> None:
    (copy / "pytbptt" / "build.json").write_text('{"why_no_extension": null, "why_no_cuda": null}')
    done = run(copy, "-c", OLDER)
    expected = "pytbptt.errors.RunError: pytbptt: found torch 2.9.1+cpu, expected 2.10 or later"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, expected)


WITH_A_GPU = """
import torch
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: {gpus}
import pytbptt.ops, pytbptt.info
print(*pytbptt.info.installation(), sep="\\n")
"""


@pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}")
@pytest.mark.parametrize("why", ["no CUDA toolkit was found at build time", None])
def test_a_gpu_without_kernels_is_said_on_import_and_by_info(copy: Path, why: str | None) -> None:
    """They were left out, or are of a build that does not load with the torch that is here now."""
    (library,) = PACKAGE.glob("_C.*")
    shutil.copy(library, copy / "pytbptt")
    (copy / "pytbptt" / "build.json").write_text(json.dumps({"why_no_extension": None, "why_no_cuda": why}))
    if why is None:
        (copy / "pytbptt" / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    reason = why or "pytbptt._cuda does not load with torch"
    # device_count is asked for once more by info, which then looks at each GPU: there is none.
    program = WITH_A_GPU.format(gpus=1).replace("print(", "torch.cuda.device_count = lambda: 0\nprint(")
    done = run(copy, "-c", program)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(said) == 1, done.stderr
    assert f"RuntimeWarning: pytbptt has no CUDA kernels ({reason}" in said[0]
    assert "falls back to the reference" in said[0]
    assert "to build them: pip install" in said[0]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CUDA kernels"))
    assert line.startswith(f"CUDA kernels  none: {reason}")
    assert "to build them: pip install" in line
    assert run(copy, "-W", "error", "-c", WITH_A_GPU.format(gpus=0)).returncode == 0
    assert run(copy, "-W", "error", "-c", program, PYTBPTT_BACKEND="reference").returncode == 0


@pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list a library's symbols")
def test_of_torch_the_extension_needs_the_stable_interface_alone() -> None:
    """Functions of C that torch promises to keep; what is C++ may change with any release."""
    for library in (*PACKAGE.glob("_C.*.so"), *PACKAGE.glob("_cuda.*.so")):
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
        needed = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
        assert {"torch_library_impl", "aoti_torch_empty_strided"} <= needed
        assert not [name for name in needed if re.match(r"_ZN?K?\w*(2at|3c10|5torch|5caffe2)", name)]


WITHOUT = "import sys; sys.modules.update(dict.fromkeys(('tyro', 'tqdm', 'matplotlib', 'tokenizers', 'tomli')))\n"


def test_the_library_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    """Ops, modules, loaders, preparation, the update step and conversion work without what the programs need."""
    (tmp_path / "text").write_text("a b\nb a\n" * 20)
    program = """
import torch
import pytbptt, pytbptt.ops, pytbptt.nn, pytbptt.convert
from pytbptt.data import PrepareSettings, prepare
prepare(PrepareSettings(trainpref="text", destdir="data", workers=1))
tokens = pytbptt.load("data")
model = pytbptt.AWDLSTM(pytbptt.AWDLSTMConfig(len(tokens.vocabulary), d_embed=4, d_hidden=4, n_layer=1))
step = pytbptt.TruncatedBPTT(torch.nn.LSTM(2, 2), None, lambda output, target: output.sum())
for chunk in pytbptt.StreamLoader(tokens, 2, 8):
    model.loss(chunk.tokens, chunk.targets, None)
"""
    done = run(tmp_path, "-W", "error", "-c", WITHOUT + program, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["train", "convert"])
def test_the_command_line_is_asked_for_by_name(tmp_path: Path, program: str) -> None:
    code = f"import runpy; sys.argv = ['x']; runpy.run_module('pytbptt.{program}', run_name='__main__')"
    done = run(tmp_path, "-c", WITHOUT + code, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference")
    assert done.returncode == 2, done.stderr
    expected = "package tyro is not installed: pip install 'pytbptt[cli]'"
    assert done.stderr.splitlines()[-1] == f"python -m pytbptt.{program}: {expected}"
    assert len(done.stderr.splitlines()) == 1


def test_pictures_and_tokenizers_are_asked_for_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b\n")
    (tmp_path / "metrics.jsonl").write_text("")
    for code, package in (
        ("prepare(PrepareSettings(trainpref='text', bpe=300, workers=1))", "tokenizers"),
        ("plot_runs([pathlib.Path('.')], pathlib.Path('x.png'))", "matplotlib"),
    ):
        imports = "import pathlib\nfrom pytbptt.data import *\nfrom pytbptt.training.plotting import plot_runs\n"
        done = run(tmp_path, "-c", WITHOUT + imports + code, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference")
        assert done.stderr.splitlines()[-1].endswith(f"package {package} is not installed: pip install 'pytbptt[cli]'")
