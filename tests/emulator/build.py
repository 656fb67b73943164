"""Compiles csrc's CUDA kernels with the emulator into shared libraries, cached by a hash of the sources.

PYTBPTT_SANITIZE=address    compiles with this sanitizer; its runtime must be preloaded into the interpreter.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SANITIZER = os.environ.get("PYTBPTT_SANITIZE", "")
BUILD_DIR = ROOT / "build" / f"emulator{SANITIZER}"
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
FLAGS += [f"-fsanitize={SANITIZER}"] if SANITIZER else []


class SourcePatch(NamedTuple):
    """Replaces `old`, which must occur once, by `new` in a file of csrc."""

    file: str
    old: str
    new: str


def compiler() -> str:
    """The C++ compiler; skips the test where there is none, or where the emulator cannot run."""
    name = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(name) is None:
        pytest.skip(f"no C++ compiler ({name})")
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the emulator's fibers are written for Linux on x86-64")
    return name


@functools.cache
def sources_hash() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp") and "cpu" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_source(source: str, name: str, *flags: str, link: tuple[Path, ...] = ()) -> Path:
    target = BUILD_DIR / sources_hash() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in BUILD_DIR.iterdir():
            if other != target.parent:
                shutil.rmtree(other, ignore_errors=True)  # another pytest-xdist worker may be deleting it too
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [compiler(), *FLAGS, *flags, str(HERE / source), *map(str, link), "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        unfinished.rename(target)
    return target


@functools.cache
def load_ops(source: str) -> None:
    """Loads a source of this folder that registers ops with torch."""
    folder = Path(torch.__file__).parent
    flags = ["-shared", "-fvisibility=hidden", f"-isystem{folder / 'include'}", f"-L{folder / 'lib'}"]
    flags += ["-Wl,--no-as-needed", "-ltorch_cpu"]
    torch.ops.load_library(compile_source(source, Path(source).stem + ".so", *flags))


def compile_library(source: str, *definitions: str, source_patch: SourcePatch | None = None) -> Path:
    """A shared library of one source of this folder and the emulator, with `definitions` (NAME=VALUE) as macros."""
    compiler()
    emulator = compile_source("emulator.cpp", "emulator.o", "-c")
    name = "-".join([Path(source).stem, *(d.partition("=")[2] for d in definitions)])
    flags = ["-shared", *(f"-D{d}" for d in definitions)]
    if source_patch is not None:
        name += "-" + hashlib.sha256("\0".join(source_patch).encode()).hexdigest()[:8]
        patched = emulator.parent / name
        write_patched(source_patch, patched)
        flags = [f"-iquote{patched}", "-O0", *flags]  # searched before any other folder
    return compile_source(source, name + ".so", *flags, link=(emulator,))


def write_patched(patch: SourcePatch, folder: Path) -> None:
    text = (ROOT / "csrc" / patch.file).read_text()
    assert text.count(patch.old) == 1, f"{patch.file} contains {text.count(patch.old)} times: {patch.old}"
    target = folder / patch.file
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text.replace(patch.old, patch.new))
    unfinished.rename(target)  # atomic: another process may be compiling the file


@functools.cache
def build_library(source: str, *definitions: str, source_patch: SourcePatch | None = None) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_library(source, *definitions, source_patch=source_patch)))
