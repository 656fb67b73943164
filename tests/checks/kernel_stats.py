"""Registers and instruction counts of the hot CUDA kernels.

    python -m tests.checks.kernel_stats [--compare COMMIT] [--kernels REGEX]

Compiles the bfloat16 kernels (or --sources) for --architectures and prints for each hot kernel its registers, bytes
spilled, occupancy in blocks per multiprocessor, and the instructions of its hot loop by opcode class. The counts are
static: they include rarely executed branches, such as those for dropout, masks or a partial tile. The hot loop is the
shortest loop with more than half as many MMA instructions as the loop with the most. --compare prints the counts of
another commit beside them.

`make cuda-check` runs it with --check: it fails if a kernel uses more registers, or its hot loop two percent more
instructions, than tests/checks/kernel_stats.json records for the same release of nvcc. --record writes that file, so
that an accepted growth is in the diff.

Needs nvcc, and nvdisasm on PATH or from the package nvidia-cuda-nvdisasm.
"""

import argparse
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.checks import cuda_build

COUNTS = Path(__file__).resolve().parent / "kernel_stats.json"
SOURCES = "csrc/*/cuda/instantiate/*_bfloat16.cu"
MAX_INSTRUCTION_GROWTH = 1.02
# Opcodes of sm_80 to sm_120; all others count as "integers": integer arithmetic, addresses and control flow.
OPCODE_CLASSES = {
    "matrix": "HMMA HGMMA",
    "ldmatrix": "LDSM",
    "shared": "LDS STS",
    "copies": "LDGSTS",
    "global": "LDG STG RED REDG ATOM ATOMG LD ST",
    "exp2": "MUFU",
    "floats": "FFMA FADD FMUL FMNMX FSEL FSETP FSET F2FP F2F HADD2 HFMA2 HMUL2",
}
# By compute capability: KiB of shared memory and threads of a multiprocessor.
SM_LIMITS = {
    "sm_80": {"8.0": (164, 2048), "8.6": (100, 1536), "8.9": (100, 1536)},
    "sm_90a": {"9.0": (228, 2048)},
    "sm_100": {"10.0": (228, 2048)},
    "sm_120": {"12.0": (100, 1536)},
}


@dataclass(frozen=True)
class Kernel:
    registers: int
    spilled: int
    loop: Counter[str]
    """Instructions of the hot loop by opcode class."""

    @property
    def instructions(self) -> int:
        return self.loop.total()


def find_nvdisasm() -> str:
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm"))
    path = shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)
    if path is None:
        raise SystemExit("found no nvdisasm, expected it on PATH or from pip install nvidia-cuda-nvdisasm")
    return path


def opcode_class(instruction: str) -> str:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]
    return next((name for name, opcodes in OPCODE_CLASSES.items() if opcode in opcodes.split()), "integers")


def hot_loop(listing: list[str]) -> Counter[str]:
    """Opcode classes in the hot loop of a kernel, from the lines that nvdisasm prints."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing:
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label is not None:
            labels[label[1]] = len(instructions)
        elif instruction is not None:
            instructions.append(instruction[1])
    classes = [opcode_class(instruction) for instruction in instructions]
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if target is not None and labels.get(target[1], end + 1) <= end:
            loops.append((labels[target[1]], end + 1))
    products = "matrix" if "matrix" in classes else "floats"
    most = max((classes[start:end].count(products) for start, end in loops), default=0)
    hot = [loop for loop in loops if classes[loop[0] : loop[1]].count(products) * 2 > most]
    start, end = min(hot, key=lambda loop: loop[1] - loop[0], default=(0, len(classes)))
    return Counter(classes[start:end])


def compile_hot_kernels(root: Path, pattern: str, architecture: str) -> dict[str, Kernel]:
    """The hot kernels of a checkout, by name."""
    kernels = {}
    sources = sorted(root.glob(pattern))
    if not sources:
        raise SystemExit(f"found no {pattern} in {root}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
        for source in sources:
            flags = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-I{root / 'csrc'}", target, "-cubin", "-o", cubin]
            done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            usage = {name: counts for name, *counts in cuda_build.parse_ptxas_output(done.stderr)}
            command = [find_nvdisasm(), "-c", cubin]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for part in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
                name = cuda_build.demangle(part.partition(":")[0])
                loop = hot_loop(part.splitlines())
                # Kernels for other architectures have an empty body.
                if name.startswith(cuda_build.HOT_KERNELS) and loop["matrix"] + loop["floats"] > 0:
                    kernels[name] = Kernel(*usage[name], loop)
    return kernels


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> str:
    """Blocks per multiprocessor for each compute capability that runs code for this architecture."""
    blocks = []
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)  # registers are allocated in units of 8 per thread
    for capability, (kibibytes, max_threads) in SM_LIMITS.get(architecture, {}).items():
        by_shared = kibibytes * 1024 // (shared + 1024)  # CUDA reserves 1,024 bytes per block
        blocks.append(f"{capability}: {min(by_registers, by_shared, max_threads // threads)}")
    return ", ".join(blocks)


def print_report(kernels: dict[str, Kernel], previous: dict[str, Kernel], architecture: str, pattern: str) -> None:
    configs = cuda_build.launch_configs()
    for name, kernel in sorted(kernels.items()):
        if re.search(pattern, name) is None:
            continue
        blocks = ""
        if name in configs:
            blocks = f"  blocks per multiprocessor  {occupancy(architecture, kernel.registers, *configs[name])}"
        print(f"{architecture}  {name}\n  registers {kernel.registers}  spilled {kernel.spilled}{blocks}")
        before = previous.get(name)
        for opcode in [*OPCODE_CLASSES, "integers"]:
            was = f"  (was {before.loop[opcode]})" if before is not None else ""
            print(f"    {opcode:9} {kernel.loop[opcode]:6}{was}")
        was = f"  (was {before.instructions}; registers {before.registers})" if before is not None else ""
        print(f"    total     {kernel.instructions:6}{was}")


def nvcc_release() -> str:
    return re.search(r"V(\d+\.\d+\.\d+)", cuda_build.nvcc_version())[1]


def check(kernels: dict[str, dict[str, Kernel]]) -> None:
    """Compares kernels by architecture and name with the recorded counts.

    Raises:
        SystemExit: a kernel has grown or is not recorded.
    """
    recorded = json.loads(COUNTS.read_text())
    if recorded["nvcc"] != nvcc_release():
        print(f"{COUNTS.name} is for nvcc {recorded['nvcc']}, found {nvcc_release()}: nothing to compare")
        return
    grown = []
    for architecture, by_name in kernels.items():
        for name, kernel in by_name.items():
            if name not in recorded[architecture]:
                grown.append(f"{name} for {architecture}: not recorded")
                continue
            registers, instructions = recorded[architecture][name]
            if kernel.registers > registers:
                grown.append(f"{name} for {architecture}: {kernel.registers} registers, expected {registers}")
            if kernel.instructions > MAX_INSTRUCTION_GROWTH * instructions:
                grown.append(
                    f"{name} for {architecture}: {kernel.instructions} instructions in its hot loop, "
                    f"expected {instructions}"
                )
    if grown:
        raise SystemExit("\n".join([*grown, "to accept the growth: python -m tests.checks.kernel_stats --record"]))
    print(f"no hot kernel has grown: {sum(map(len, kernels.values()))} compared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", metavar="COMMIT", help="also print the counts of that commit")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="print only these kernels")
    parser.add_argument("--architectures", default="sm_80,sm_90a", help="comma-separated (default %(default)s)")
    parser.add_argument("--sources", default=SOURCES, metavar="PATTERN", help="files to compile (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail if a kernel has grown; print no report")
    parser.add_argument("--record", action="store_true", help="write the counts for --check")
    arguments = parser.parse_args()
    architectures = arguments.architectures.split(",")
    kernels = {name: compile_hot_kernels(cuda_build.ROOT, arguments.sources, name) for name in architectures}
    if arguments.check:
        return check(kernels)
    if arguments.record:
        counts = {
            architecture: {name: [kernel.registers, kernel.instructions] for name, kernel in sorted(by_name.items())}
            for architecture, by_name in kernels.items()
        }
        COUNTS.write_text(json.dumps({"nvcc": nvcc_release(), **counts}, indent=1) + "\n")
        return None
    previous: dict[str, dict[str, Kernel]] = {name: {} for name in architectures}
    if arguments.compare:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "tree")
            git = ["git", "-C", str(cuda_build.ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(tree), arguments.compare], check=True)
            try:
                previous = {name: compile_hot_kernels(tree, arguments.sources, name) for name in architectures}
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    for architecture in architectures:
        print_report(kernels[architecture], previous[architecture], architecture, arguments.kernels)
    return None


if __name__ == "__main__":
    main()
