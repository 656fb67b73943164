"""make cuda-check: compiles every CUDA source for sm_80 and sm_90a, warnings as errors, and lists what kernels need:
registers, bytes of shared memory, and bytes of registers spilled. Compiles both ops' host files against a bare toolkit,
without the headers of cuBLAS, cuSPARSE and the like, which many a CUDA_HOME lacks.

Needs nvcc, the headers of this interpreter's torch (of any build, CPU ones included), and no GPU. Fails where a kernel
that runs through tiles or steps spills. Sources that passed before and have not changed since, nor anything they
include, are not compiled again.
"""

import functools
import hashlib
import os
import re
import shlex
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
    "rel_attention_forward_warpgroup_kernel",
    "rel_attention_keys_warpgroup_kernel",
    "rel_attention_queries_warpgroup_kernel",
    "rel_attention_forward_kernel",
    "rel_attention_keys_kernel",
    "rel_attention_queries_kernel",
    "lstm_forward_kernel",
    "lstm_backward_kernel",
)
# Shared memory and threads are given at the launch, so the compiler does not know them: a program prints what the hot
# kernels of attention ask for.
BLOCKS = """
#include <cstdio>
#include "rel_attention/cuda/backward.cuh"
#include "rel_attention/cuda/forward.cuh"
using namespace pytbptt::cuda;
template <typename Kind, int PADDED>
void print(const char* kind) {
  const auto one = [&](const char* name, int bytes, int threads) {
    std::printf("rel_attention_%s_kernel<%s, %d>;%d;%d\\n", name, kind, PADDED, bytes, threads);
  };
  one("forward", ForwardMemory<Kind, PADDED>::bytes, Tile<Kind, PADDED>::threads);
  one("keys", BackwardMemory<Kind, PADDED>::bytes, Tile<Kind, PADDED, true>::threads);
  one("queries", BackwardMemory<Kind, PADDED>::bytes, Tile<Kind, PADDED, true>::threads);
  if constexpr (for_warpgroups<Kind, PADDED>) {
    using Forward = WarpgroupForwardMemory<Kind, PADDED>;
    using Keys = WarpgroupKeysMemory<Kind, PADDED>;
    using Queries = WarpgroupQueriesMemory<Kind, PADDED>;
    one("forward_warpgroup", Forward::bytes, Forward::T::all_threads);
    one("keys_warpgroup", Keys::bytes, Keys::T::all_threads);
    one("queries_warpgroup", Queries::bytes, Queries::T::all_threads);
  }
}
template <typename Kind>
void print_all(const char* kind) {
  print<Kind, 32>(kind), print<Kind, 48>(kind), print<Kind, 64>(kind), print<Kind, 96>(kind), print<Kind, 128>(kind);
}
int main() {
  print_all<half>("half"), print_all<bfloat16>("bfloat16"), print_all<float>("float"), print_all<Tf32>("Tf32");
}
"""
# How the headers of libraries begin that are packages of their own beside CUDA's core.
LIBRARIES = (
    "cublas",
    "cudnn",
    "cufft",
    "cufile",
    "curand",
    "cusolver",
    "cusparse",
    "nccl",
    "npp",
    "nvJitLink",
    "nvrtc",
)
HOST_FLAGS = ["-std=c++17", "-DUSE_CUDA", '-DPYTBPTT_ARCHITECTURES=""']
HOST_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v", f"-I{CSRC}"]


@functools.cache
def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout


def report_path(source: str, variant: str, *settings: str) -> Path:
    """Where the compiler's report lies if this source, as it is now, passed before."""
    headers = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh") and "cpu" not in path.parts]
    digest = hashlib.sha256(" ".join(settings).encode())
    for path in [CSRC / source, *headers]:
        digest.update(path.read_bytes())
    return PASSED / f"{source.replace('/', '-')}-{variant}-{digest.hexdigest()[:16]}"


def compile_one(command: list[str], report: Path, **environment: str) -> str:
    """What the compiler says, from the last time if nothing changed."""
    if report.exists():
        return report.read_text()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    for other in PASSED.glob(f"{report.name.rpartition('-')[0]}-*"):
        other.unlink()
    unfinished = report.with_name(f"unfinished-{report.name}")
    unfinished.write_text(done.stderr)
    unfinished.rename(report)
    return done.stderr


def compile_kernels(source: str, architecture: str) -> str:
    """What ptxas says of each kernel."""
    # (Not -arch, which keeps PTX as well and takes half as long again.)
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = ["nvcc", *FLAGS, target, "-c", str(CSRC / source), "-o", os.devnull]
    return compile_one(command, report_path(source, architecture, *FLAGS, architecture, nvcc_version()))


def toolkit_include() -> Path:
    """The include folder that nvcc itself uses, which may be a script that calls another one."""
    command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    for folder in re.findall(r'"?-I"?([^"\s]+)', "".join(re.findall(r"^#\$ INCLUDES=.*$", printed, re.MULTILINE))):
        if Path(folder, "cuda_runtime.h").exists():
            return Path(folder)
    raise SystemExit("make cuda-check: found no cuda_runtime.h in the folders that nvcc --dryrun includes")


def compile_host_files(sources: list[str]) -> None:
    """Fails where one needs more of a toolkit than CUDA's core."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        found = f"found no torch in {sys.executable}"
        raise SystemExit(f"make cuda-check: {found}, expected its headers (make install)") from None
    compiler = (os.environ.get("CXX") or "c++").split()
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    settings = [*HOST_FLAGS, *LIBRARIES, version, nvcc_version(), torch.__version__]
    with tempfile.TemporaryDirectory() as bare:
        for header in toolkit_include().iterdir():
            if not header.name.startswith(LIBRARIES):
                Path(bare, header.name).symlink_to(header)
        folders = [*include_paths(), bare, sysconfig.get_path("include")]
        system = [part for path in folders for part in ("-isystem", path)]
        for source in sources:
            command = [*compiler, *HOST_FLAGS, *system, "-fsyntax-only", str(CSRC / source)]
            # Those variables may name a folder that has what the toolkit lacks.
            compile_one(command, report_path(source, "host", *settings), CPATH="", CPLUS_INCLUDE_PATH="")
            print(f"host    compiles against CUDA's core headers  {source}")


def blocks() -> dict[str, tuple[int, int]]:
    """Bytes of shared memory and threads of a block by the hot kernels' names; the host's compiler knows them as well,
    with the emulator for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "blocks")
        source = program.with_suffix(".cpp")
        source.write_text(BLOCKS)
        command = ["g++", "-std=c++20", f"-I{CSRC}", f"-I{ROOT / 'tests' / 'emulator'}", str(source)]
        subprocess.run([*command, "-o", str(program)], check=True)
        printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    lines = (line.split(";") for line in printed.splitlines())
    return {name: (int(shared), int(threads)) for name, shared, threads in lines}


def readable(name: str) -> str:
    """A kernel's name, of its name in the object file."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
    return re.sub(r"pytbptt::(cuda|device)::|void |\(.*", "", full.strip())


def kernels(report: str) -> list[tuple[str, int, int]]:
    """Name, registers, and bytes of spills of each kernel in what ptxas -v says."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        found.append((readable(part.partition("'")[0]), int(re.search(r"Used (\d+) registers", part)[1]), spills))
    return found


def main() -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("make cuda-check: no nvcc on PATH")
    PASSED.mkdir(parents=True, exist_ok=True)
    listed = (CSRC / "sources.txt").read_text().split("\n")
    compile_host_files([name for name in listed if "/cuda/" in name and name.endswith(".cpp")])
    jobs = [(source, architecture) for source in listed if source.endswith(".cu") for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))) as pool:
        reports = list(pool.map(lambda job: compile_kernels(*job), jobs))
    shared = {name: size for name, (size, _) in blocks().items()}
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
