"""The kernels of tests/emulator/wrappers.cpp for a GPU.

    python -m tests.gpu_wrappers 9.0a

builds them for machines with such GPUs and without nvcc: bring what it writes, under build/.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "emulator" / "wrappers.cpp"


def prebuilt() -> Path:
    """Where a build of these sources lies, by a name that one of others does not have."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for path in sorted((ROOT / "csrc/common/cuda/device").iterdir()):
        digest.update(path.read_bytes())
    return ROOT / "build" / "gpu" / f"wrappers-{digest.hexdigest()[:16]}.so"


def build(target: Path, *architecture: str) -> None:
    """By nvcc, for what its flags name."""
    flags = ["-std=c++17", *architecture, "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}", "-x", "cu"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(target)], check=True)


def load(folder: Path) -> ctypes.CDLL | None:
    """What was built before, else what nvcc builds into `folder` for the GPU at hand; None without either."""
    target = prebuilt()
    if not target.exists():
        if shutil.which("nvcc") is None:
            return None
        target = folder / "wrappers.so"
        build(target, "-arch=native")
    library = ctypes.CDLL(str(target))
    library.use_wrapper.restype = library.play_ping_pong.restype = ctypes.c_char_p
    return library


def main() -> None:
    """Architectures as in TORCH_CUDA_ARCH_LIST."""
    numbers = [word.removesuffix("+PTX").replace(".", "") for word in re.split(r"[;, ]+", " ".join(sys.argv[1:]))]
    target = prebuilt()
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in target.parent.glob("wrappers-*.so"):
        other.unlink()
    build(target, *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers))
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
