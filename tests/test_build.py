"""What setup.py decides to build, from the environment, the compilers and torch that it finds; nothing is compiled."""

import os
import runpy
import sys
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
        for name in ("CXX", "FORCE_CUDA", "PYTBPTT_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
            monkeypatch.setenv(name, environment.get(name, ""))
        monkeypatch.setenv("CXX", environment.get("CXX", "/bin/sh"))  # any program: none is run
        given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", given.update)
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
    assert f"CUDA kernels left out: torch {torch.__version__} was built without CUDA" in printed
    assert "3 at once" in printed
    assert all(Path(ROOT, source).exists() for source in extension.sources)


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


def test_a_script_named_nvcc_is_no_toolkit(decide, toolkit, script):
    (extension,), printed = decide()
    assert not any(source.endswith(".cu") for source in extension.sources)
    left_out = next(line for line in printed.splitlines() if "CUDA kernels left out" in line)
    assert f"{script} has bin/nvcc and no include/cuda_runtime.h" in left_out
    assert left_out.endswith(f"set CUDA_HOME to {toolkit}")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA is set, but .* no include/cuda_runtime\.h"):
        decide(FORCE_CUDA="1")


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


def test_architectures_that_nvcc_knows(toolkit, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    choose = runpy.run_path("setup.py")["choose_architectures"]
    assert choose(str(toolkit / "bin" / "nvcc")) == "8.0+PTX;8.6;8.9;9.0a;12.0"
