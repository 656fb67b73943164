"""Builds and loads the kernels of tests/emulator/primitives.cpp for a GPU.

    python -m tests.common.gpu_primitives 9.0a

prebuilds the library for these architectures, for machines without nvcc: copy the file that it prints, under build/.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "emulator" / "primitives.cpp"


def prebuilt() -> Path:
    """The path of the prebuilt library; its name has a hash of the sources."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for path in sorted((ROOT / "csrc/common/cuda/device").iterdir()):
        digest.update(path.read_bytes())
    return ROOT / "build" / "gpu" / f"primitives-{digest.hexdigest()[:16]}.so"


def build(target: Path, *architecture_flags: str) -> None:
    flags = ["-std=c++17", *architecture_flags, "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "cu"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(target)], check=True)


def load(folder: Path) -> ctypes.CDLL | None:
    """Loads the prebuilt library, else builds one in `folder` for this machine's GPU; None without nvcc."""
    target = prebuilt()
    if not target.exists():
        if shutil.which("nvcc") is None:
            return None
        target = folder / "primitives.so"
        build(target, "-arch=native")
    library = ctypes.CDLL(str(target))
    library.run_primitive.restype = library.run_ping_pong.restype = ctypes.c_char_p
    return library


def main() -> None:
    # Arguments as in TORCH_CUDA_ARCH_LIST.
    numbers = [word.removesuffix("+PTX").replace(".", "") for word in re.split(r"[;, ]+", " ".join(sys.argv[1:]))]
    target = prebuilt()
    target.parent.mkdir(parents=True, exist_ok=True)
    for outdated in target.parent.glob("primitives-*.so"):
        outdated.unlink()
    build(target, *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers))
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
