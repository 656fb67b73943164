"""What the hot CUDA kernels are made of: python tests/cuda_report.py [--compare COMMIT] [--kernels REGEX].

Compiles the bfloat16 kernels (--sources for others) for --architectures and prints of each hot one its registers, bytes
spilled, how many of its blocks fit on a multiprocessor, and the instructions of its hot loop by kind, all that stand
there: what only dropout, masks or a tile at the memory's edge take is counted too. The hot loop is the shortest of
those that hold most of the kernel's matrix products. --compare prints another commit's beside them.

`make cuda-check` runs it with --check, which fails where a kernel takes more registers, or its hot loop two percent
more instructions, than tests/cuda_counts.json has of the same nvcc. --record writes that file: what grew is then in the
diff.

Needs nvcc, and nvdisasm on PATH or of the package nvidia-cuda-nvdisasm.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import cuda_check

COUNTS = Path(__file__).resolve().parent / "cuda_counts.json"
SOURCES = "csrc/*/cuda/instantiate/*_bfloat16.cu"
MORE = 1.02  # of a hot loop's instructions: the compiler's whims stay below
# Opcodes of sm_80 to sm_120 by what a reader wants to know; all others are integers, addresses and control.
KINDS = {
    "matrix": "HMMA HGMMA",
    "ldmatrix": "LDSM",
    "shared": "LDS STS",
    "copies": "LDGSTS",
    "global": "LDG STG RED REDG ATOM ATOMG LD ST",
    "exp2": "MUFU",
    "floats": "FFMA FADD FMUL FMNMX FSEL FSETP FSET F2FP F2F HADD2 HFMA2 HMUL2",
}
# Of a multiprocessor: bytes of shared memory, of which each block takes 1,024 more than it asks for, and threads.
LIMITS = {
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
    """Instructions of the hot loop by kind."""

    @property
    def instructions(self) -> int:
        return self.loop.total()


def disassembler() -> str:
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm"))
    found = shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)
    if found is None:
        raise SystemExit("found no nvdisasm, expected it on PATH or of pip install nvidia-cuda-nvdisasm")
    return found


def kind_of(instruction: str) -> str:
    opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]
    return next((kind for kind, opcodes in KINDS.items() if opcode in opcodes.split()), "integers")


def hot_loop(listing: list[str]) -> Counter[str]:
    """From the lines of a kernel as nvdisasm prints them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing:
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label is not None:
            labels[label[1]] = len(instructions)
        elif instruction is not None:
            instructions.append(instruction[1])
    kinds = [kind_of(instruction) for instruction in instructions]
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if target is not None and labels.get(target[1], end + 1) <= end:
            loops.append((labels[target[1]], end + 1))
    products = "matrix" if "matrix" in kinds else "floats"
    most = max((kinds[begin:end].count(products) for begin, end in loops), default=0)
    hot = [loop for loop in loops if kinds[loop[0] : loop[1]].count(products) * 2 > most]
    begin, end = min(hot, key=lambda loop: loop[1] - loop[0], default=(0, len(kinds)))
    return Counter(kinds[begin:end])


def kernels_of(root: Path, pattern: str, architecture: str) -> dict[str, Kernel]:
    """The hot kernels of a checkout, by name."""
    found = {}
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
            needs = {name: (registers, spilled) for name, registers, spilled in cuda_check.kernels(done.stderr)}
            command = [disassembler(), "-c", cubin]
            listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for part in re.split(r"^\.text\.", listed, flags=re.MULTILINE)[1:]:
                name = cuda_check.readable(part.partition(":")[0])
                loop = hot_loop(part.splitlines())
                # Of a kernel for other GPUs nothing is left here.
                if name.startswith(cuda_check.HOT) and loop["matrix"] + loop["floats"] > 0:
                    found[name] = Kernel(*needs[name], loop)
    return found


def blocks_that_fit(architecture: str, registers: int, shared: int, threads: int) -> str:
    """Of one kernel on a multiprocessor of each GPU that runs what is compiled for this architecture."""
    fit = []
    of_registers = 65536 // (-(-registers // 8) * 8 * threads)
    for capability, (kibibytes, max_threads) in LIMITS.get(architecture, {}).items():
        of_shared = kibibytes * 1024 // (shared + 1024)
        fit.append(f"{capability}: {min(of_registers, of_shared, max_threads // threads)}")
    return ", ".join(fit)


def print_report(found: dict[str, Kernel], other: dict[str, Kernel], architecture: str, asked: str) -> None:
    blocks = cuda_check.blocks()
    for name, kernel in sorted(found.items()):
        if re.search(asked, name) is None:
            continue
        fit = ""
        if name in blocks:
            fit = f"  blocks that fit  {blocks_that_fit(architecture, kernel.registers, *blocks[name])}"
        print(f"{architecture}  {name}\n  registers {kernel.registers}  spilled {kernel.spilled}{fit}")
        before = other.get(name)
        for kind in [*KINDS, "integers"]:
            was = f"  (was {before.loop[kind]})" if before is not None else ""
            print(f"    {kind:9} {kernel.loop[kind]:6}{was}")
        was = f"  (was {before.instructions}; registers {before.registers})" if before is not None else ""
        print(f"    in all    {kernel.instructions:6}{was}")


def release() -> str:
    return re.search(r"V(\d+\.\d+\.\d+)", cuda_check.nvcc_version())[1]


def check(found: dict[str, dict[str, Kernel]]) -> None:
    recorded = json.loads(COUNTS.read_text())
    if recorded["nvcc"] != release():
        print(f"counts are of nvcc {recorded['nvcc']}, found {release()}: nothing to compare")
        return
    grown = []
    for architecture, kernels in found.items():
        for name, kernel in kernels.items():
            if name not in recorded[architecture]:
                grown.append(f"{name} for {architecture}: not recorded")
                continue
            registers, instructions = recorded[architecture][name]
            if kernel.registers > registers:
                grown.append(f"{name} for {architecture}: {kernel.registers} registers, expected {registers}")
            if kernel.instructions > MORE * instructions:
                grown.append(
                    f"{name} for {architecture}: {kernel.instructions} instructions in its hot loop, "
                    f"expected {instructions}"
                )
    if grown:
        raise SystemExit("\n".join([*grown, "python tests/cuda_report.py --record, if that is worth it"]))
    print(f"no hot kernel has grown: {sum(map(len, found.values()))} compared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", metavar="COMMIT", help="print that commit's counts beside")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="print these alone")
    parser.add_argument("--architectures", default="sm_80,sm_90a", help="as nvcc names them (default %(default)s)")
    parser.add_argument("--sources", default=SOURCES, metavar="PATTERN", help="to compile (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail where a kernel has grown; print no report")
    parser.add_argument("--record", action="store_true", help="write the counts that --check compares with")
    arguments = parser.parse_args()
    architectures = arguments.architectures.split(",")
    found = {name: kernels_of(cuda_check.ROOT, arguments.sources, name) for name in architectures}
    if arguments.check:
        return check(found)
    if arguments.record:
        counts = {
            architecture: {name: [kernel.registers, kernel.instructions] for name, kernel in sorted(kernels.items())}
            for architecture, kernels in found.items()
        }
        COUNTS.write_text(json.dumps({"nvcc": release(), **counts}, indent=1) + "\n")
        return None
    others: dict[str, dict[str, Kernel]] = {name: {} for name in architectures}
    if arguments.compare:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "tree")
            git = ["git", "-C", str(cuda_check.ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(tree), arguments.compare], check=True)
            try:
                others = {name: kernels_of(tree, arguments.sources, name) for name in architectures}
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    for architecture in architectures:
        print_report(found[architecture], others[architecture], architecture, arguments.kernels)
    return None


if __name__ == "__main__":
    main()
