"""What setup.py decides to build, from the environment, compilers, GPUs and torch that it finds, and which torch the
build backend takes; nothing is compiled."""

import os
import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.48" ;;
--dryrun) echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
--list-gpu-arch) for n in 75 80 86 87 89 90 110 120; do echo "compute_$n"; done ;;
esac
"""


@pytest.fixture
def decide(monkeypatch, capsys):
    """Runs setup.py with an environment; returns what it would build and what it printed."""

    def run(**environment: str) -> tuple[list[Any], str]:
        for name in ("CXX", "CUDA_HOME", "FORCE_CUDA", "PYTBPTT_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
            monkeypatch.setenv(name, environment.get(name, ""))
        monkeypatch.setenv("CXX", environment.get("CXX", "/bin/sh"))  # any program: none is run
        given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
        monkeypatch.chdir(ROOT)
        try:
            runpy.run_path("setup.py")
        finally:
            printed = capsys.readouterr().err
        return given["ext_modules"], printed

    return run


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit 13.0, as far as setup.py asks it, and a torch that fits."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def test_torch_without_cuda(decide, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (extension,), printed = decide(MAX_JOBS="3")
    assert f"warning: CUDA kernels left out: torch {torch.__version__} was built without CUDA" in printed
    assert f"compiling {len(extension.sources)} sources against torch {torch.__version__}, 3 at once" in printed
    assert all(Path(ROOT, source).exists() for source in extension.sources)


@pytest.mark.parametrize(
    ("gpus", "given", "built"),
    [
        ([], "", "8.0+PTX;8.6;8.9;9.0a;12.0"),
        ([(9, 0), (9, 0)], "", "9.0a"),
        ([(12, 0), (8, 6), (7, 5)], "", "8.6;12.0"),
        ([(7, 5)], "", "8.0+PTX;8.6;8.9;9.0a;12.0"),  # none that the kernels serve
        ([(9, 0)], "8.0", "8.0"),
    ],
)
@pytest.mark.usefixtures("toolkit")
def test_architectures_are_those_that_are_asked_for_or_at_hand_or_all(decide, monkeypatch, gpus, given, built):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    (cpp, cuda), printed = decide(TORCH_CUDA_ARCH_LIST=given)
    assert printed.splitlines()[0].endswith(f"for GPU architectures {built}")
    assert f'-DPYTBPTT_ARCHITECTURES="{built}"' in cuda.extra_compile_args["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == built
    assert (cpp.name, cuda.name) == ("pytbptt._C", "pytbptt._cuda")
    listed = {line for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if not line.startswith("#")}
    assert {str(Path(source).relative_to("csrc")) for source in [*cpp.sources, *cuda.sources]} == listed
    assert all(("cuda/" in source) == (source in cuda.sources) for source in [*cpp.sources, *cuda.sources])


def test_sources_and_metadata_need_no_torch(monkeypatch):
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.append(arguments))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.chdir(ROOT)
    for command in ("egg_info", "dist_info", "sdist"):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        runpy.run_path("setup.py")
    assert given == [{}, {}, {}]
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit, match=r"found no torch in .*, expected one to compile against: install torch first"):
        runpy.run_path("setup.py")


@pytest.fixture
def script(toolkit, monkeypatch):
    """The folder that torch takes for the toolkit where a script in its bin is the nvcc on PATH."""
    parent = toolkit / "usr"
    (parent / "bin").mkdir(parents=True)
    (parent / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    (parent / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(parent))
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "CUDA_INC_PATH"):
        monkeypatch.delenv(name, raising=False)
    return parent


def test_where_nvcc_is_a_script_the_toolkit_is_that_of_what_it_calls(decide, toolkit, script):
    (_, cuda), printed = decide()
    assert f"CUDA kernels with {toolkit} " in printed
    assert all(folder != str(script / "include") for folder in cuda.include_dirs)


def test_a_folder_that_is_no_toolkit_is_told(decide, script):
    (_,), printed = decide(CUDA_HOME=str(script))
    left_out = next(line for line in printed.splitlines() if "CUDA kernels left out" in line)
    assert f"{script} has bin/nvcc and no include/cuda_runtime.h" in left_out
    assert left_out.endswith("set CUDA_HOME to the folder of one")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA is set, but .* no include/cuda_runtime\.h"):
        decide(FORCE_CUDA="1", CUDA_HOME=str(script))


def test_a_script_that_does_not_tell_its_toolkit(decide, toolkit, script):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert f"{script} has bin/nvcc and no include/cuda_runtime.h" in (printed := decide()[1])
    assert printed.splitlines()[0].endswith("set CUDA_HOME to the folder of one")


@pytest.mark.parametrize("place", ["targets/x86_64-linux/include", "elsewhere"])
def test_headers_that_the_compiler_finds_elsewhere(decide, script, monkeypatch, place):
    """As in conda's toolkits, or by the compiler's own variable."""
    (script / place).mkdir(parents=True)
    (script / place / "cuda_runtime.h").touch()
    if place == "elsewhere":
        monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(script / place))
    assert f"CUDA kernels with {script}" in decide()[1]


def test_no_compiler(decide):
    extensions, printed = decide(CXX="/nonexistent/c++")
    assert extensions == []
    assert "no C++ compiler was found at build time (/nonexistent/c++)" in printed


def test_no_headers_of_python(decide, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    extensions, printed = decide()
    assert extensions == []
    assert f"Python's headers were not found at build time ({tmp_path}/Python.h" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="memory is asked for on Linux alone")
@pytest.mark.parametrize(("available", "jobs"), [(1 << 20, 1), (9 << 20, 4), (200 << 20, 16)])
def test_jobs_fit_memory_that_can_be_had(monkeypatch, available, jobs):
    """A machine that has read many files has little memory free, and nearly all of it to be had."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    choose = runpy.run_path("setup.py")["default_jobs"]
    meminfo = f"MemTotal:       263000000 kB\nMemFree:          100000 kB\nMemAvailable:   {available} kB\n"
    monkeypatch.setattr(Path, "read_text", lambda _: meminfo)
    monkeypatch.setattr(os, "sysconf", lambda name: 100_000 if "PAGES" in name else 1024)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert choose() == jobs


@pytest.mark.usefixtures("toolkit")
def test_left_out_on_request(decide):
    _, printed = decide(PYTBPTT_SKIP_CUDA="1")
    assert "CUDA kernels left out: PYTBPTT_SKIP_CUDA was set" in printed


def test_no_toolkit(decide, toolkit):
    (toolkit / "bin" / "nvcc").unlink()
    assert "CUDA kernels left out: no CUDA toolkit was found" in decide()[1]


@pytest.mark.usefixtures("toolkit")
def test_toolkit_of_another_release(decide, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "was built with CUDA 12.8, nvcc in" in decide()[1]


@pytest.mark.parametrize("missing", ["compiler", "toolkit"])
def test_force_makes_it_fatal(decide, toolkit, missing):
    (toolkit / "bin" / "nvcc").unlink()
    with pytest.raises(SystemExit, match="FORCE_CUDA is set, but no "):
        decide(FORCE_CUDA="1", **({"CXX": "/nonexistent/c++"} if missing == "compiler" else {}))


BACKEND = """
import sys
sys.path.remove({site!r})
sys.path.append({isolated!r})
from pytbptt_build import get_requires_for_build_editable, get_requires_for_build_wheel
required = get_requires_for_build_wheel()
assert get_requires_for_build_editable() == required
try:
    from torch.version import __version__ as torch
except ImportError:
    torch = None
print([required, torch])
"""


@pytest.mark.parametrize("outside", ["2.9.1", "2.10.0", "2.13.0+cpu", None])
def test_an_isolated_build_takes_the_torch_that_is_outside(tmp_path, outside):
    """As pip isolates: by PYTHONPATH, and by taking the interpreter's own packages off the path."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = tmp_path / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if outside is not None:
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").touch()
        (site / "torch" / "version.py").write_text(f"__version__ = {outside!r}\n")
        (site / f"torch-{outside}.dist-info").mkdir()
        (site / f"torch-{outside}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {outside}\n")
    (tmp_path / "isolated").mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for part in (*packages.glob("setuptools*"), *packages.glob("_distutils_hack")):
        (tmp_path / "isolated" / part.name).symlink_to(part)
    program = BACKEND.format(site=str(site), isolated=str(tmp_path / "isolated"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend"), "PYTHONNOUSERSITE": "1"}
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    serves = outside is not None and outside != "2.9.1"
    assert done.stdout.splitlines()[-1] == repr([[] if serves else ["torch>=2.10"], outside if serves else None])
