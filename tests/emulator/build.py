"""Builds csrc's CUDA kernels with the emulator into shared libraries, each once for as long as no source changes.

PYTBPTT_SANITIZE=address    under that sanitizer, whose runtime the interpreter must have been started with.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SANITIZER = os.environ.get("PYTBPTT_SANITIZE", "")
BUILT = ROOT / "build" / f"emulator{SANITIZER}"
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
FLAGS += [f"-fsanitize={SANITIZER}"] if SANITIZER else []


def compiler() -> str:
    """The C++ compiler; skips the test where there is none, or where the emulator cannot run."""
    name = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(name) is None:
        pytest.skip(f"no C++ compiler ({name})")
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the emulator's fibres are written for Linux on x86-64")
    return name


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cpp") and "cpu" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_source(source: str, name: str, *flags: str, link: tuple[Path, ...] = ()) -> Path:
    target = BUILT / _sources_hash() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for other in BUILT.iterdir():
            if other != target.parent:
                shutil.rmtree(other, ignore_errors=True)  # tests run side by side, and another may be at it
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [compiler(), *FLAGS, *flags, str(HERE / source), *map(str, link), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        unfinished.rename(target)
    return target


@functools.cache
def load_ops(source: str) -> None:
    """A source of this folder that registers ops with torch."""
    folder = Path(torch.__file__).parent
    flags = ["-shared", "-fvisibility=hidden", f"-isystem{folder / 'include'}", f"-L{folder / 'lib'}"]
    flags += ["-Wl,--no-as-needed", "-ltorch_cpu"]
    torch.ops.load_library(compile_source(source, Path(source).stem + ".so", *flags))


@functools.cache
def library(source: str, *definitions: str, edit: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    """A source of this folder and the emulator, as a shared library of its own.

    Args:
        definitions: macros, as NAME=VALUE.
        edit: a file of csrc by its path there, a text that stands there once, and the text to build with instead.
    """
    compiler()
    runtime = compile_source("emulator.cpp", "emulator.o", "-c")
    name = "-".join([Path(source).stem, *(d.partition("=")[2] for d in definitions)])
    flags = ["-shared", *(f"-D{d}" for d in definitions)]
    if edit is None:
        return ctypes.CDLL(str(compile_source(source, name + ".so", *flags, link=(runtime,))))
    file, found, instead = edit
    name += "-" + hashlib.sha256("\0".join(edit).encode()).hexdigest()[:8]
    text = (ROOT / "csrc" / file).read_text()
    assert text.count(found) == 1, f"{file} has {text.count(found)} times: {found}"
    edited = runtime.parent / name / file
    edited.parent.mkdir(parents=True, exist_ok=True)
    unfinished = edited.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text.replace(found, instead))
    unfinished.rename(edited)  # another process's compiler may be reading the one that is there
    flags = [f"-iquote{runtime.parent / name}", "-O0", *flags]  # searched before any other folder
    return ctypes.CDLL(str(compile_source(source, name + ".so", *flags, link=(runtime,))))
