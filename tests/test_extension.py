"""Messages for a missing, broken or mismatched extension and for missing packages."""

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
def package_copy(tmp_path: Path) -> Path:
    """A folder with the package's Python files, but without an extension and the record of its build."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build.json")
    shutil.copytree(PACKAGE, tmp_path / "pytbptt", ignore=ignored)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_missing_extension_warns_once_on_import(package_copy: Path) -> None:
    use = "import pytbptt, torch; pytbptt.ops.lstm(*(torch.zeros(s) for s in ((2, 3, 8), (8, 2), (3, 2), (3, 2))))"
    for program in ("import pytbptt", "import pytbptt.ops", "from pytbptt import LSTM, ops", use):
        done = run(package_copy, "-c", program)
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
        assert len(warnings) == 1, done.stderr
        assert warnings[0].startswith(
            "<string>:1: RuntimeWarning: pytbptt has no compiled extension (it has not been built"
        )
        assert "--no-binary pytbptt pytbptt==" in warnings[0]
    chosen = run(package_copy, "-W", "error", "-c", use, PYTBPTT_BACKEND="reference")
    assert (chosen.returncode, chosen.stderr) == (0, "")


def test_build_command_names_the_source_folder_if_there_is_one(package_copy: Path) -> None:
    (package_copy / "setup.py").touch()
    assert f" --editable {package_copy}\n" in run(package_copy, "-c", "import pytbptt").stderr


def test_subpackages_and_version_are_available_after_import() -> None:
    modules = ("checkpoint", "convert", "data", "errors", "memory", "nn", "ops", "truncation")
    names = ", ".join(f"pytbptt.{module}.__name__" for module in modules)
    program = f"import pytbptt; print({names}, pytbptt.__version__)"
    done = run(ROOT, "-W", "error", "-c", program, PYTBPTT_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    *names_of_modules, version = done.stdout.split()
    assert names_of_modules == [f"pytbptt.{module}" for module in modules]
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
def test_broken_extension_or_build_record_is_a_one_line_error(package_copy: Path, record: str, message: str) -> None:
    (package_copy / "pytbptt" / "build.json").write_text(record)
    (package_copy / "pytbptt" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    program = run(package_copy, "-m", "pytbptt.info")
    assert (program.returncode, program.stdout, len(program.stderr.splitlines())) == (1, "", 1)
    assert program.stderr.startswith("python -m pytbptt.info: ")
    assert message in program.stderr
    imported = run(package_copy, "-c", "import pytbptt.ops")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1].startswith("pytbptt.errors.RunError: ")


def test_info_reports_unavailable_backend(package_copy: Path) -> None:
    (package_copy / "pytbptt" / "build.json").write_text(
        '{"why_no_extension": "no compiler", "why_no_cuda": "no compiler"}'
    )
    for backend, kernels in (("fused", "none, for backend fused was chosen"), ("auto", "reference")):
        done = run(package_copy, "-m", "pytbptt.info", PYTBPTT_BACKEND=backend)
        assert done.returncode == 0
        assert done.stderr.count("pytbptt has no compiled extension (no compiler)") == 1
        status = f"{kernels}: pytbptt has no compiled extension: no compiler"
        assert f"rel_attention on cpu     {status}" in done.stdout.splitlines()
        assert f"lstm on cpu              {status}" in done.stdout.splitlines()


OLD_TORCH_PROGRAM = """
import torch
torch.__version__ = "2.9.1+cpu"
import pytbptt.ops
"""


def test_too_old_torch_is_an_error(package_copy: Path) -> None:
    (package_copy / "pytbptt" / "build.json").write_text('{"why_no_extension": null, "why_no_cuda": null}')
    done = run(package_copy, "-c", OLD_TORCH_PROGRAM)
    expected = "pytbptt.errors.RunError: pytbptt: found torch 2.9.1+cpu, expected 2.10 or later"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, expected)


FAKE_GPU_PROGRAM = """
import torch
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: {gpus}
import pytbptt.ops, pytbptt.info
print(*pytbptt.info.describe_installation(), sep="\\n")
"""


@pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}")
@pytest.mark.parametrize("why", ["no CUDA toolkit was found at build time", None])
def test_missing_cuda_kernels_are_reported_on_import_and_by_info(package_copy: Path, why: str | None) -> None:
    """Because they were not built, or because they do not load with the installed torch."""
    (library,) = PACKAGE.glob("_C.*")
    shutil.copy(library, package_copy / "pytbptt")
    (package_copy / "pytbptt" / "build.json").write_text(json.dumps({"why_no_extension": None, "why_no_cuda": why}))
    if why is None:
        (package_copy / "pytbptt" / f"_cuda{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    reason = why or "pytbptt._cuda does not load with torch"
    # info queries every GPU, and here is none.
    program = FAKE_GPU_PROGRAM.format(gpus=1).replace("print(", "torch.cuda.device_count = lambda: 0\nprint(")
    done = run(package_copy, "-c", program)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1, done.stderr
    assert f"RuntimeWarning: pytbptt has no CUDA kernels ({reason}" in warnings[0]
    assert "falls back to the reference" in warnings[0]
    assert "to build them: pip install" in warnings[0]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CUDA kernels"))
    assert line.startswith(f"CUDA kernels  none: {reason}")
    assert "to build them: pip install" in line
    assert run(package_copy, "-W", "error", "-c", FAKE_GPU_PROGRAM.format(gpus=0)).returncode == 0
    assert run(package_copy, "-W", "error", "-c", program, PYTBPTT_BACKEND="reference").returncode == 0


@pytest.mark.skipif(EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm to list a library's symbols")
def test_extension_links_only_stable_abi_symbols() -> None:
    """Symbols of torch's C++ ABI may change with any release."""
    for library in (*PACKAGE.glob("_C.*.so"), *PACKAGE.glob("_cuda.*.so")):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
        undefined = {line.split()[-1].partition("@")[0] for line in symbols.stdout.splitlines()}
        assert {"torch_library_impl", "aoti_torch_empty_strided"} <= undefined
        assert not [name for name in undefined if re.match(r"_ZN?K?\w*(2at|3c10|5torch|5caffe2)", name)]


HIDE_CLI_PACKAGES = (
    "import sys; sys.modules.update(dict.fromkeys(('tyro', 'tqdm', 'matplotlib', 'tokenizers', 'tomli')))\n"
)


def test_library_needs_only_torch_and_numpy(tmp_path: Path) -> None:
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
    done = run(
        tmp_path, "-W", "error", "-c", HIDE_CLI_PACKAGES + program, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["train", "convert"])
def test_missing_tyro_names_cli_extra(tmp_path: Path, program: str) -> None:
    code = f"import runpy; sys.argv = ['x']; runpy.run_module('pytbptt.{program}', run_name='__main__')"
    done = run(tmp_path, "-c", HIDE_CLI_PACKAGES + code, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference")
    assert done.returncode == 2, done.stderr
    expected = "package tyro is not installed: pip install 'pytbptt[cli]'"
    assert done.stderr.splitlines()[-1] == f"python -m pytbptt.{program}: {expected}"
    assert len(done.stderr.splitlines()) == 1


def test_missing_matplotlib_or_tokenizers_names_cli_extra(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b\n")
    (tmp_path / "metrics.jsonl").write_text("")
    for code, package in (
        ("prepare(PrepareSettings(trainpref='text', bpe=300, workers=1))", "tokenizers"),
        ("plot_runs([pathlib.Path('.')], pathlib.Path('x.png'))", "matplotlib"),
    ):
        imports = "import pathlib\nfrom pytbptt.data import *\nfrom pytbptt.training.plotting import plot_runs\n"
        done = run(
            tmp_path, "-c", HIDE_CLI_PACKAGES + imports + code, PYTHONPATH=str(ROOT), PYTBPTT_BACKEND="reference"
        )
        assert done.stderr.splitlines()[-1].endswith(f"package {package} is not installed: pip install 'pytbptt[cli]'")
