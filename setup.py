"""Builds pytbptt._C and, with a CUDA toolkit, pytbptt._cuda out of csrc/sources.txt; everything else is in
pyproject.toml.

PYTBPTT_SKIP_CUDA=1     leaves the CUDA kernels out.
FORCE_CUDA=1            makes it an error where they would be left out.
TORCH_CUDA_ARCH_LIST    the GPU architectures to compile for; those of the GPUs at hand by default, and without any the
                        list below, cut to what nvcc knows.
MAX_JOBS                compilers at once; one per core and 2 GB of free memory by default.
CXX, CUDA_HOME          the compilers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path("csrc")  # setuptools wants sources relative to setup.py, and runs it from its own directory
COMPILE = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
ALL_ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a;10.0;12.0"
OPTIMISE = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def log(message: str) -> None:
    print(f"pytbptt: {message}", file=sys.stderr)


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def missing_for_cpp() -> str | None:
    """Why no extension can be built at all, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise SystemExit(
            f"pytbptt: found no torch in {sys.executable}, expected one to compile against: install torch first, or "
            "leave --no-build-isolation out"
        ) from None
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found at build time ({compiler})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's headers were not found at build time ({header}: Linux distributions pack them as python3-dev)"
    return None


def listed_sources(cuda: bool) -> list[str]:
    lines = (CSRC / "sources.txt").read_text(encoding="utf-8").splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    return [str(CSRC / name) for name in names if ("cuda" in Path(name).parts) == cuda]


def missing_for_cuda() -> str | None:
    """Why no CUDA kernel can be built, or None."""
    import torch

    if flag("PYTBPTT_SKIP_CUDA"):
        return "PYTBPTT_SKIP_CUDA was set at build time"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    cuda_home = find_toolkit()
    if cuda_home is None or shutil.which("nvcc", path=f"{cuda_home}/bin") is None:
        return "no CUDA toolkit was found at build time (CUDA_HOME, nvcc)"
    if not has_cuda_headers(cuda_home):
        found = f"{cuda_home} has bin/nvcc and no include/cuda_runtime.h, so it is no CUDA toolkit"
        return f"{found}: set CUDA_HOME to the folder of one"
    printed = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", printed)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "of no known release" if release is None else release[0]
        return f"torch {torch.__version__} was built with CUDA {torch.version.cuda}, nvcc in {cuda_home} is {found}"
    return None


def find_toolkit() -> str | None:
    """CUDA_HOME, or what torch guesses, which is the folder above the nvcc on PATH. Where that nvcc is a script that
    calls another one, the toolkit is the other one's."""
    from torch.utils import cpp_extension

    guess = None if os.environ.get("CUDA_HOME") else cpp_extension.CUDA_HOME
    script = guess and Path(guess, "bin/nvcc").exists() and not has_cuda_headers(guess)
    if script and (toolkit := toolkit_behind(f"{guess}/bin/nvcc")):
        cpp_extension.CUDA_HOME = str(toolkit)
    return cpp_extension.CUDA_HOME


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


def architectures_at_hand() -> str:
    """Of the GPUs that torch sees here and the kernels support, as TORCH_CUDA_ARCH_LIST has them."""
    import torch

    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}{'a' * (major == 9)}" for major, minor in sorted(found) if major >= 8)


def all_architectures(nvcc: str) -> str:
    """Less what this nvcc is too old or too new to compile for."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    numbers = set(re.findall(r"compute_(\d+)", known))
    return ";".join(a for a in ALL_ARCHITECTURES.split(";") if "".join(re.findall(r"\d", a)) in numbers)


def default_jobs() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    # Not what is free: files that the system keeps in memory fill that up, and give way to who needs it.
    available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    return cores if available is None else max(1, min(cores, int(available[1]) // 2**21))


def extensions_and_command() -> tuple[list, dict]:
    import torch
    from torch.utils import cpp_extension

    why_no_cuda = missing_for_cuda()
    if why_no_cuda and flag("FORCE_CUDA"):
        raise SystemExit(f"pytbptt: FORCE_CUDA is set, but {why_no_cuda}")
    include = [str(CSRC.resolve())]
    cpp = cpp_extension.CppExtension(
        "pytbptt._C", listed_sources(cuda=False), include_dirs=include, extra_compile_args={"cxx": OPTIMISE}
    )
    cpp.libraries = ["torch_cpu"]
    extensions = [cpp]
    if why_no_cuda:
        log(f"warning: CUDA kernels left out: {why_no_cuda}")
    else:
        nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures_at_hand() or all_architectures(nvcc)
        os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
        log(f"CUDA kernels with {cpp_extension.CUDA_HOME} for GPU architectures {chosen}")
        cxx = [*OPTIMISE, "-DUSE_CUDA", f'-DPYTBPTT_ARCHITECTURES="{chosen}"']
        cuda = cpp_extension.CUDAExtension(
            "pytbptt._cuda",
            listed_sources(cuda=True),
            include_dirs=include,
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-lineinfo"]},
        )
        cuda.libraries = ["torch_cpu", "torch_cuda", "cudart"]
        extensions.append(cuda)
    jobs = os.environ["MAX_JOBS"] = os.environ.get("MAX_JOBS") or str(default_jobs())
    sources = sum(len(extension.sources) for extension in extensions)
    log(f"compiling {sources} sources against torch {torch.__version__}, {jobs} at once (MAX_JOBS)")

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            began = time.monotonic()
            super().run()
            minutes, seconds = divmod(round(time.monotonic() - began), 60)
            log(f"compiled in {minutes} min {seconds} s")
            write_record(self.inplace, self.build_lib, why_no_cuda=why_no_cuda)

    return extensions, {"build_ext": BuildExtension}


def write_record(
    inplace: bool, build_lib: str, *, why_no_extension: str | None = None, why_no_cuda: str | None = None
) -> None:
    """Leaves build.json beside the package's modules: what was left out, and why. No earlier build of that stays."""
    package = Path("pytbptt") if inplace else Path(build_lib, "pytbptt")
    package.mkdir(parents=True, exist_ok=True)
    for module, why in (("_C", why_no_extension), ("_cuda", why_no_cuda)):
        for suffix in EXTENSION_SUFFIXES if why else ():
            (package / f"{module}{suffix}").unlink(missing_ok=True)
    record = {"why_no_extension": why_no_extension, "why_no_cuda": why_no_cuda}
    (package / "build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def no_extension_and_command(why: str) -> tuple[list, dict]:
    if flag("FORCE_CUDA"):
        raise SystemExit(f"pytbptt: FORCE_CUDA is set, but {why}")
    log(f"warning: no compiled extension, falling back to the references in plain PyTorch: {why}")

    class BuildPython(build_py):
        def run(self) -> None:
            super().run()
            write_record(self.editable_mode, self.build_lib, why_no_extension=why, why_no_cuda=why)

    return [], {"build_py": BuildPython}


if COMPILE.isdisjoint(sys.argv):
    setup()  # a source distribution, or metadata: torch need not be there
else:
    why_no_extension = missing_for_cpp()
    extensions, commands = no_extension_and_command(why_no_extension) if why_no_extension else extensions_and_command()
    setup(ext_modules=extensions, cmdclass=commands)
