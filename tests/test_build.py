"""setup.py chooses the extensions, and the build backend the torch to build with, from the environment.

Nothing is compiled.
"""

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
def run_setup(monkeypatch, capsys):
    """Runs setup.py with an environment; returns the extensions to build and its messages."""

    def run(**environment: str) -> tuple[list[Any], str]:
        for name in ("CXX", "CUDA_HOME", "FORCE_CUDA", "PYTBPTT_SKIP_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
            monkeypatch.setenv(name, environment.get(name, ""))
        monkeypatch.setenv("CXX", environment.get("CXX", "/bin/sh"))  # any program: it is not run
        setup_arguments: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: setup_arguments.update(arguments))
        monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext"])
        monkeypatch.chdir(ROOT)
        try:
            runpy.run_path("setup.py")
        finally:
            messages = capsys.readouterr().err
        return setup_arguments["ext_modules"], messages

    return run


@pytest.fixture
def fake_toolkit(tmp_path, monkeypatch):
    """A fake CUDA toolkit 13.0, and a torch that was built with CUDA 13.0."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(NVCC)
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def test_cpu_only_torch_builds_no_cuda_extension_and_says_why(run_setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (extension,), messages = run_setup(MAX_JOBS="3")
    assert f"warning: CUDA kernels left out: torch {torch.__version__} was built without CUDA" in messages
    assert f"compiling {len(extension.sources)} sources against torch {torch.__version__}, 3 at once" in messages
    assert all(Path(ROOT, source).exists() for source in extension.sources)


@pytest.mark.parametrize(
    ("gpus", "arch_list", "expected"),
    [
        ([], "", "8.0+PTX;8.6;8.9;9.0a;12.0"),
        ([(9, 0), (9, 0)], "", "9.0a"),
        ([(12, 0), (8, 6), (7, 5)], "", "8.6;12.0"),
        ([(7, 5)], "", "8.0+PTX;8.6;8.9;9.0a;12.0"),  # no kernels for this GPU
        ([(9, 0)], "8.0", "8.0"),
    ],
)
@pytest.mark.usefixtures("fake_toolkit")
def test_architectures_from_variable_or_local_gpus_or_all_supported(run_setup, monkeypatch, gpus, arch_list, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    (cpp, cuda), messages = run_setup(TORCH_CUDA_ARCH_LIST=arch_list)
    assert messages.splitlines()[0].endswith(f"for GPU architectures {expected}")
    assert f'-DPYTBPTT_ARCHITECTURES="{expected}"' in cuda.extra_compile_args["cxx"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected
    assert (cpp.name, cuda.name) == ("pytbptt._C", "pytbptt._cuda")
    listed = {line for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if not line.startswith("#")}
    assert {str(Path(source).relative_to("csrc")) for source in [*cpp.sources, *cuda.sources]} == listed
    assert all(("cuda/" in source) == (source in cuda.sources) for source in [*cpp.sources, *cuda.sources])


def test_sources_and_metadata_need_no_torch(monkeypatch):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.chdir(ROOT)
    for command in ("egg_info", "dist_info", "sdist"):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        runpy.run_path("setup.py")
    assert calls == [{}, {}, {}]
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    with pytest.raises(SystemExit, match=r"found no torch in .*, expected one to compile against: install torch first"):
        runpy.run_path("setup.py")


@pytest.fixture
def wrapper_script_home(fake_toolkit, monkeypatch):
    """A CUDA_HOME whose bin/nvcc is a script that calls the real nvcc."""
    parent = fake_toolkit / "usr"
    (parent / "bin").mkdir(parents=True)
    (parent / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {fake_toolkit}/bin/nvcc "$@"\n')
    (parent / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(parent))
    for name in ("CPATH", "CPLUS_INCLUDE_PATH", "CUDA_INC_PATH"):
        monkeypatch.delenv(name, raising=False)
    return parent


def test_nvcc_wrapper_script_resolves_to_real_toolkit(run_setup, fake_toolkit, wrapper_script_home):
    (_, cuda), messages = run_setup()
    assert f"CUDA kernels with {fake_toolkit} " in messages
    assert all(folder != str(wrapper_script_home / "include") for folder in cuda.include_dirs)


def test_cuda_home_without_headers_is_reported(run_setup, wrapper_script_home):
    (_,), messages = run_setup(CUDA_HOME=str(wrapper_script_home))
    left_out = next(line for line in messages.splitlines() if "CUDA kernels left out" in line)
    assert f"{wrapper_script_home} has bin/nvcc and no include/cuda_runtime.h" in left_out
    assert left_out.endswith("set CUDA_HOME to the folder of one")
    with pytest.raises(SystemExit, match=r"FORCE_CUDA is set, but .* no include/cuda_runtime\.h"):
        run_setup(FORCE_CUDA="1", CUDA_HOME=str(wrapper_script_home))


def test_unresolvable_nvcc_wrapper_skips_cuda(run_setup, fake_toolkit, wrapper_script_home):
    (fake_toolkit / "include" / "cuda_runtime.h").unlink()
    assert f"{wrapper_script_home} has bin/nvcc and no include/cuda_runtime.h" in (messages := run_setup()[1])
    assert messages.splitlines()[0].endswith("set CUDA_HOME to the folder of one")


@pytest.mark.parametrize("folder", ["targets/x86_64-linux/include", "elsewhere"])
def test_cuda_headers_in_targets_or_cplus_include_path_are_accepted(
    run_setup, wrapper_script_home, monkeypatch, folder
):
    """conda's toolkits have the headers in targets."""
    (wrapper_script_home / folder).mkdir(parents=True)
    (wrapper_script_home / folder / "cuda_runtime.h").touch()
    if folder == "elsewhere":
        monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(wrapper_script_home / folder))
    assert f"CUDA kernels with {wrapper_script_home}" in run_setup()[1]


def test_missing_compiler_builds_no_extension(run_setup):
    extensions, messages = run_setup(CXX="/nonexistent/c++")
    assert extensions == []
    assert "no C++ compiler was found at build time (/nonexistent/c++)" in messages


def test_missing_python_headers_build_no_extension(run_setup, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    extensions, messages = run_setup()
    assert extensions == []
    assert f"Python's headers were not found at build time ({tmp_path}/Python.h" in messages


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read only on Linux")
@pytest.mark.parametrize(("available", "jobs"), [(1 << 20, 1), (9 << 20, 4), (200 << 20, 16)])
def test_default_jobs_limited_by_available_memory(monkeypatch, available, jobs):
    """By MemAvailable, not MemFree: the page cache can be reclaimed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    default_jobs = runpy.run_path("setup.py")["default_jobs"]
    meminfo = f"MemTotal:       263000000 kB\nMemFree:          100000 kB\nMemAvailable:   {available} kB\n"
    monkeypatch.setattr(Path, "read_text", lambda _: meminfo)
    monkeypatch.setattr(os, "sysconf", lambda name: 100_000 if "PAGES" in name else 1024)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert default_jobs() == jobs


@pytest.mark.usefixtures("fake_toolkit")
def test_skip_cuda_variable_skips_cuda(run_setup):
    _, messages = run_setup(PYTBPTT_SKIP_CUDA="1")
    assert "CUDA kernels left out: PYTBPTT_SKIP_CUDA was set" in messages


def test_missing_toolkit_skips_cuda(run_setup, fake_toolkit):
    (fake_toolkit / "bin" / "nvcc").unlink()
    assert "CUDA kernels left out: no CUDA toolkit was found" in run_setup()[1]


@pytest.mark.usefixtures("fake_toolkit")
def test_toolkit_version_mismatch_skips_cuda(run_setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "was built with CUDA 12.8, nvcc in" in run_setup()[1]


@pytest.mark.parametrize("missing", ["compiler", "toolkit"])
def test_force_cuda_turns_missing_tools_into_errors(run_setup, fake_toolkit, missing):
    (fake_toolkit / "bin" / "nvcc").unlink()
    with pytest.raises(SystemExit, match="FORCE_CUDA is set, but no "):
        run_setup(FORCE_CUDA="1", **({"CXX": "/nonexistent/c++"} if missing == "compiler" else {}))


BUILD_BACKEND_PROGRAM = """
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


@pytest.mark.parametrize("installed", ["2.9.1", "2.10.0", "2.13.0+cpu", None])
def test_isolated_build_uses_the_installed_torch(tmp_path, installed):
    """Simulates pip's build isolation: PYTHONPATH, and the environment's packages removed from sys.path."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = tmp_path / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if installed is not None:
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").touch()
        (site / "torch" / "version.py").write_text(f"__version__ = {installed!r}\n")
        (site / f"torch-{installed}.dist-info").mkdir()
        (site / f"torch-{installed}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {installed}\n")
    (tmp_path / "isolated").mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for part in (*packages.glob("setuptools*"), *packages.glob("_distutils_hack")):
        (tmp_path / "isolated" / part.name).symlink_to(part)
    program = BUILD_BACKEND_PROGRAM.format(site=str(site), isolated=str(tmp_path / "isolated"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend"), "PYTHONNOUSERSITE": "1"}
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recent = installed is not None and installed != "2.9.1"
    assert done.stdout.splitlines()[-1] == repr([[] if recent else ["torch>=2.10"], installed if recent else None])
