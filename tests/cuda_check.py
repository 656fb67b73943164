"""make cuda-check: compiles every CUDA source for sm_80 and sm_90a, warnings as errors, and lists what kernels need:
registers, bytes of shared memory, and bytes of registers spilled.

Before that, what of the CUDA kernels the host's compiler compiles, against torch and a toolkit without libraries.

Needs nvcc and no GPU. Fails where a kernel that runs through tiles or steps spills. Sources that passed before and have
not changed since, nor anything they include, are not compiled again.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PASSED = ROOT / "build" / "cuda-check"
ARCHITECTURES = ("sm_80", "sm_90a")
HOT = (
    "rel_attention_forward_kernel",
    "rel_attention_keys_kernel",
    "rel_attention_queries_kernel",
    "lstm_forward_kernel",
    "lstm_backward_kernel",
)
# Shared memory is given at the launch, so the compiler does not know it: a program prints what the hot kernels ask for.
SHARED = """
#include <cstdio>
#include "cuda/rel_attention_backward.cuh"
#include "cuda/rel_attention_forward.cuh"
using namespace pytbptt::cuda;
template <typename Kind, int PADDED>
void print(const char* kind) {
  std::printf("rel_attention_forward_kernel<%s, %d> %d\\n", kind, PADDED, ForwardMemory<Kind, PADDED>::bytes);
  std::printf("rel_attention_keys_kernel<%s, %d> %d\\n", kind, PADDED, BackwardMemory<Kind, PADDED>::bytes);
  std::printf("rel_attention_queries_kernel<%s, %d> %d\\n", kind, PADDED, BackwardMemory<Kind, PADDED>::bytes);
}
template <typename Kind>
void print_all(const char* kind) {
  print<Kind, 32>(kind), print<Kind, 48>(kind), print<Kind, 64>(kind), print<Kind, 96>(kind), print<Kind, 128>(kind);
}
int main() {
  print_all<half>("half"), print_all<bfloat16>("bfloat16"), print_all<float>("float"), print_all<Tf32>("Tf32");
}
"""
LIBRARIES = ("cublas", "cudnn", "cufft", "curand", "cusolver", "cusparse", "nccl", "nvml", "nvrtc")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", f"-I{CSRC}"]


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout


def compile_one(source: str, architecture: str) -> str:
    """What ptxas says of each kernel, from the last time if nothing changed."""
    headers = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh") and "cpu" not in path.parts]
    digest = hashlib.sha256(" ".join([*FLAGS, architecture, nvcc_version()]).encode())
    for path in [CSRC / source, *headers]:
        digest.update(path.read_bytes())
    passed = PASSED / f"{Path(source).stem}-{architecture}-{digest.hexdigest()[:16]}"
    if passed.exists():
        return passed.read_text()
    # (Not -arch, which keeps PTX as well and takes half as long again.)
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = ["nvcc", *FLAGS, target, "-c", str(CSRC / source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source} for {architecture}:\n{done.stderr}")
    for other in PASSED.glob(f"{Path(source).stem}-{architecture}-*"):
        other.unlink()
    unfinished = passed.with_name(f"unfinished-{passed.name}")
    unfinished.write_text(done.stderr)
    unfinished.rename(passed)
    return done.stderr


def compile_host_files(sources: list[str]) -> None:
    """Against the headers of torch and, of the toolkit, those of CUDA itself alone: many a CUDA_HOME has no others.

    torch's CPU wheel has ATen's and c10's headers for CUDA but one, which its build configures.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    toolkit = Path(os.environ.get("CUDA_HOME") or Path(nvcc_home()), "include")
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "toolkit")
        bare.mkdir()
        for header in toolkit.iterdir():
            if not header.name.startswith(LIBRARIES):
                (bare / header.name).symlink_to(header)
        macros = Path(folder, "configured", "c10", "cuda", "impl", "cuda_cmake_macros.h")
        macros.parent.mkdir(parents=True)
        macros.touch()
        include = [str(CSRC), *include_paths(), sysconfig.get_paths()["include"], str(bare), str(macros.parents[3])]
        command = ["g++", "-std=c++20", "-fsyntax-only", "-DPYTBPTT_CUDA", *(f"-I{path}" for path in include)]
        for source in sources:
            done = subprocess.run([*command, str(CSRC / source)], capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{source}, with torch {torch.__version__} and a bare toolkit:\n{done.stderr}")
            print(f"{source} compiles with torch {torch.__version__} and the toolkit's own headers alone")


def nvcc_home() -> str:
    """The toolkit's folder, as nvcc itself knows it: the nvcc on PATH may be a script elsewhere."""
    printed = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(\S+)", printed)
    if found is None:
        raise SystemExit("make cuda-check: nvcc does not say where it lies; set CUDA_HOME")
    return str(Path(found[1]).parent)


def shared_memory() -> dict[str, int]:
    """Bytes by the hot kernels' names; the host's compiler knows them as well, with the emulator for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shared")
        source = program.with_suffix(".cpp")
        source.write_text(SHARED)
        command = ["g++", "-std=c++20", f"-I{CSRC}", f"-I{ROOT / 'tests' / 'emulator'}", str(source)]
        subprocess.run([*command, "-o", str(program)], check=True)
        printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return {name: int(size) for name, _, size in (line.rpartition(" ") for line in printed.splitlines())}


def kernels(report: str) -> list[tuple[str, int, int]]:
    """Name, registers, and bytes of spills of each kernel in what ptxas -v says."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        name = subprocess.run(["c++filt", part.partition("'")[0]], capture_output=True, text=True).stdout
        short = re.sub(r"pytbptt::(cuda|device)::|void |\(.*", "", name.strip())
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        found.append((short, int(re.search(r"Used (\d+) registers", part)[1]), spills))
    return found


def main() -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("make cuda-check: no nvcc on PATH")
    PASSED.mkdir(parents=True, exist_ok=True)
    listed = (CSRC / "sources.txt").read_text().split("\n")
    compile_host_files([source for source in listed if source.startswith("cuda/") and source.endswith(".cpp")])
    jobs = [(source, architecture) for source in listed if source.endswith(".cu") for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))) as pool:
        reports = list(pool.map(lambda job: compile_one(*job), jobs))
    shared = shared_memory()
    spilling = []
    for (_, architecture), report in zip(jobs, reports, strict=True):
        for name, registers, spills in kernels(report):
            given = "by plan" if name.startswith("lstm") else f"{shared.get(name, 0):7}"
            needs = f"{registers:4} registers {given} bytes shared {spills:5} spilled"
            print(f"{architecture:7} {needs}  {name}")
            if spills and name.startswith(HOT):
                spilling.append(f"{name} for {architecture}")
    if spilling:
        sys.exit(f"make cuda-check: registers spill in {', '.join(spilling)}")


if __name__ == "__main__":
    main()
