"""Builds pytbptt._C out of csrc/sources.txt, or says why it could not; everything else is in pyproject.toml.

PYTBPTT_SKIP_CUDA=1     leaves the CUDA kernels out.
FORCE_CUDA=1            makes a missing CUDA toolkit fatal.
TORCH_CUDA_ARCH_LIST    the GPU architectures to compile for; the default below, cut to what nvcc knows.
MAX_JOBS                compilers at once; one per core and 2 GB of free memory by default.
CXX, CUDA_HOME          the compilers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path("csrc")  # setuptools wants sources relative to setup.py, and runs it from its own directory
DEFAULT_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a;10.0;12.0"
OPTIMISE = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def say(message: str) -> None:
    print(f"pytbptt: {message}", file=sys.stderr)


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def missing_for_cpp() -> str | None:
    """Why no extension can be built at all, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not there at build time (install it first, then pip install --no-build-isolation)"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found at build time ({compiler})"
    return None


def listed_sources() -> list[str]:
    return [line for line in (CSRC / "sources.txt").read_text().split("\n") if line and not line.startswith("#")]


def missing_for_cuda() -> str | None:
    """Why no CUDA kernel can be built, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if flag("PYTBPTT_SKIP_CUDA"):
        return "PYTBPTT_SKIP_CUDA was set at build time"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if CUDA_HOME is None or shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is None:
        return "no CUDA toolkit was found at build time (CUDA_HOME, nvcc)"
    if not has_cuda_headers(CUDA_HOME):
        # torch takes the folder above that of the nvcc on PATH, which may be a script that calls another one.
        found = f"{CUDA_HOME} has bin/nvcc and no include/cuda_runtime.h, so it is no CUDA toolkit"
        return f"{found}: set CUDA_HOME to {toolkit_behind(f'{CUDA_HOME}/bin/nvcc') or 'the folder of one'}"
    printed = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", printed)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "of no known release" if release is None else release[0]
        return f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, nvcc in {CUDA_HOME} is {found}"
    if not any(name.startswith("cuda/") for name in listed_sources()):
        return "this version of pytbptt has no CUDA kernels"
    return None


def has_cuda_headers(cuda_home: str) -> bool:
    """Whether CUDA's headers lie where compilers may look: here, in conda's layout, or by their own variables."""
    from torch.utils.cpp_extension import include_paths

    folders = [Path(cuda_home, "include"), *Path(cuda_home).glob("targets/*/include"), *include_paths("cuda")]
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        folders += os.environ.get(name, "").split(os.pathsep)
    return any(Path(folder, "cuda_runtime.h").exists() for folder in folders)


def toolkit_behind(nvcc: str) -> Path | None:
    """The toolkit that this nvcc runs in, which may be a script that calls another one, if that tells."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    top = re.search(r"^#\$ TOP=(.+)$", subprocess.run(command, capture_output=True, text=True).stderr, re.MULTILINE)
    toolkit = Path(top[1]).resolve() if top else None
    return toolkit if toolkit and Path(toolkit, "include", "cuda_runtime.h").exists() else None


def choose_architectures(nvcc: str) -> str:
    """The default list, less what this nvcc is too old or too new to compile for; asks no GPU."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    numbers = set(re.findall(r"compute_(\d+)", known))
    return ";".join(a for a in DEFAULT_ARCHITECTURES.split(";") if "".join(re.findall(r"\d", a)) in numbers)


def default_jobs() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    # Not what is free: files that the system keeps in memory fill that up, and give way to who needs it.
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    return cores if available is None else max(1, min(cores, int(available[1]) // 2**21))


def extension_and_command() -> tuple[list, dict]:
    import torch
    from torch.utils import cpp_extension

    why_no_cuda = missing_for_cuda()
    if why_no_cuda and flag("FORCE_CUDA"):
        raise SystemExit(f"pytbptt: FORCE_CUDA is set, but {why_no_cuda}")
    say(f"CUDA kernels left out: {why_no_cuda}" if why_no_cuda else f"CUDA kernels with {cpp_extension.CUDA_HOME}")

    sources = [str(CSRC / name) for name in listed_sources() if not (why_no_cuda and name.startswith("cuda/"))]
    cxx = [*OPTIMISE, f'-DPYTBPTT_WHY_NO_CUDA="{why_no_cuda or ""}"']
    include = [str(CSRC.resolve())]
    if why_no_cuda:
        extension = cpp_extension.CppExtension(
            "pytbptt._C", sources, include_dirs=include, extra_compile_args={"cxx": cxx}
        )
    else:
        nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or choose_architectures(nvcc)
        os.environ["TORCH_CUDA_ARCH_LIST"] = chosen  # if it were empty, torch would ask the GPUs it sees
        say(f"GPU architectures {chosen}")
        flags = {"cxx": [*cxx, "-DPYTBPTT_CUDA"], "nvcc": ["-O3", "-lineinfo", "-DPYTBPTT_CUDA"]}
        extension = cpp_extension.CUDAExtension("pytbptt._C", sources, include_dirs=include, extra_compile_args=flags)
    jobs = os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(default_jobs())
    say(f"C++ extension for torch {torch.__version__}: {len(sources)} sources, {jobs} at once (MAX_JOBS)")

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            super().run()
            write_record(self.inplace, self.build_lib, torch_version=torch.__version__)

    return [extension], {"build_ext": BuildExtension}


def write_record(
    inplace: bool, build_lib: str, *, torch_version: str | None = None, why_no_extension: str | None = None
) -> None:
    """Leaves build.json beside the package's modules: what pytbptt.extension must know before it loads _C."""
    package = Path("pytbptt") if inplace else Path(build_lib, "pytbptt")
    package.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch_version, "why_no_extension": why_no_extension}
    (package / "build.json").write_text(json.dumps(record) + "\n")


def no_extension_and_command(why: str) -> tuple[list, dict]:
    if flag("FORCE_CUDA"):
        raise SystemExit(f"pytbptt: FORCE_CUDA is set, but {why}")
    say(f"no compiled extension, the plain-PyTorch references will serve: {why}")

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            write_record(self.editable_mode, self.build_lib, why_no_extension=why)

    return [], {"build_py": BuildPython}


why_no_extension = missing_for_cpp()
extensions, commands = no_extension_and_command(why_no_extension) if why_no_extension else extension_and_command()
setup(ext_modules=extensions, cmdclass=commands)
