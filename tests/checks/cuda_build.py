"""make cuda-check: compiles every CUDA source for sm_80 and sm_90a with warnings as errors.

Prints each kernel's registers, bytes of shared memory and bytes of spilled registers. Fails if one of HOT_KERNELS
spills. Also compiles the ops' host files against a toolkit without the headers of cuBLAS, cuSPARSE and other libraries
that are separate packages, because many installations of CUDA lack them.

Needs nvcc and the headers of this interpreter's torch (a CPU build is enough), and no GPU. The compiler's output is
cached: sources are compiled again when they or any header changed.
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

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE_DIR = ROOT / "build" / "cuda-check"
ARCHITECTURES = ("sm_80", "sm_90a")
HOT_KERNELS = (
    "rel_attention_forward_warpgroup_kernel",
    "rel_attention_keys_warpgroup_kernel",
    "rel_attention_queries_warpgroup_kernel",
    "rel_attention_forward_kernel",
    "rel_attention_keys_kernel",
    "rel_attention_queries_kernel",
    "lstm_forward_kernel",
    "lstm_backward_kernel",
)
# ptxas does not know dynamic shared memory and block sizes. A small program prints those of rel_attention's kernels.
LAUNCH_PROBE_SOURCE = """
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
  if constexpr (has_warpgroup_kernel<Kind, PADDED>) {
    using Forward = WarpgroupForwardMemory<Kind, PADDED>;
    using Keys = WarpgroupKeysMemory<Kind, PADDED>;
    using Queries = WarpgroupQueriesMemory<Kind, PADDED>;
    one("forward_warpgroup", Forward::bytes, Forward::T::block_threads);
    one("keys_warpgroup", Keys::bytes, Keys::T::block_threads);
    one("queries_warpgroup", Queries::bytes, Queries::T::block_threads);
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
# Header prefixes of CUDA libraries that are not part of the core toolkit.
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


def cache_path(source: str, variant: str, *settings: str) -> Path:
    """The file for the compiler's output; its name has a hash of the source, all headers and the settings."""
    headers = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh") and "cpu" not in path.parts]
    digest = hashlib.sha256(" ".join(settings).encode())
    for path in [CSRC / source, *headers]:
        digest.update(path.read_bytes())
    return CACHE_DIR / f"{source.replace('/', '-')}-{variant}-{digest.hexdigest()[:16]}"


def compile_cached(command: list[str], cached: Path, **environment: str) -> str:
    """The compiler's output, from the cache if nothing changed."""
    if cached.exists():
        return cached.read_text()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    for outdated in CACHE_DIR.glob(f"{cached.name.rpartition('-')[0]}-*"):
        outdated.unlink()
    unfinished = cached.with_name(f"unfinished-{cached.name}")
    unfinished.write_text(done.stderr)
    unfinished.rename(cached)
    return done.stderr


def compile_kernels(source: str, architecture: str) -> str:
    """The output of ptxas -v."""
    # Not -arch: that also generates PTX and takes 1.5 times as long.
    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = ["nvcc", *FLAGS, target, "-c", str(CSRC / source), "-o", os.devnull]
    return compile_cached(command, cache_path(source, architecture, *FLAGS, architecture, nvcc_version()))


def toolkit_include() -> Path:
    """The include folder of the toolkit, as nvcc prints it: the nvcc on PATH may be a wrapper script."""
    command = ["nvcc", "--dryrun", "-x", "cu", os.devnull]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    for folder in re.findall(r'"?-I"?([^"\s]+)', "".join(re.findall(r"^#\$ INCLUDES=.*$", printed, re.MULTILINE))):
        if Path(folder, "cuda_runtime.h").exists():
            return Path(folder)
    raise SystemExit("make cuda-check: found no cuda_runtime.h in the folders that nvcc --dryrun includes")


def compile_host_files(sources: list[str]) -> None:
    """Fails if one needs a header that is not part of the core toolkit."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        message = f"found no torch in {sys.executable}, expected its headers (make install)"
        raise SystemExit(f"make cuda-check: {message}") from None
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
            # CPATH and the like are cleared: they may lead to the headers that must not be needed.
            compile_cached(command, cache_path(source, "host", *settings), CPATH="", CPLUS_INCLUDE_PATH="")
            print(f"host    compiles against CUDA's core headers  {source}")


def launch_configs() -> dict[str, tuple[int, int]]:
    """Bytes of shared memory and threads per block of rel_attention's hot kernels, by name.

    The probe is compiled with g++ against the emulator's headers.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "launch_probe")
        source = program.with_suffix(".cpp")
        source.write_text(LAUNCH_PROBE_SOURCE)
        command = ["g++", "-std=c++20", f"-I{CSRC}", f"-I{ROOT / 'tests' / 'emulator'}", str(source)]
        subprocess.run([*command, "-o", str(program)], check=True)
        printed = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    lines = (line.split(";") for line in printed.splitlines())
    return {name: (int(shared), int(threads)) for name, shared, threads in lines}


def demangle(name: str) -> str:
    """A kernel's name without namespaces, arguments and return type."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
    return re.sub(r"pytbptt::(cuda|device)::|void |\(.*", "", full.strip())


def parse_ptxas_output(output: str) -> list[tuple[str, int, int]]:
    """Name, registers and bytes of spills of each kernel, from the output of ptxas -v."""
    kernels = []
    for part in output.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        kernels.append((demangle(part.partition("'")[0]), int(re.search(r"Used (\d+) registers", part)[1]), spills))
    return kernels


def main() -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("make cuda-check: no nvcc on PATH")
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    sources = (CSRC / "sources.txt").read_text().split("\n")
    compile_host_files([name for name in sources if "/cuda/" in name and name.endswith(".cpp")])
    jobs = [(source, architecture) for source in sources if source.endswith(".cu") for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))) as pool:
        outputs = list(pool.map(lambda job: compile_kernels(*job), jobs))
    shared_bytes = {name: size for name, (size, _) in launch_configs().items()}
    spilling = []
    for (_, architecture), output in zip(jobs, outputs, strict=True):
        for name, registers, spills in parse_ptxas_output(output):
            # The shared memory of lstm's kernels depends on the sizes (csrc/lstm/cuda/plan.h).
            shared = "by plan" if name.startswith("lstm") else f"{shared_bytes.get(name, 0):7}"
            usage = f"{registers:4} registers {shared} bytes shared {spills:5} spilled"
            print(f"{architecture:7} {usage}  {name}")
            if spills and name.startswith(HOT_KERNELS):
                spilling.append(f"{name} for {architecture}")
    if spilling:
        sys.exit(f"make cuda-check: registers spill in {', '.join(spilling)}")


if __name__ == "__main__":
    main()
