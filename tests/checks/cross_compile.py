"""Compiles the CPU kernels and their C++ tests with other compilers and for other systems, and runs what it can.

    python -m tests.checks.cross_compile [TARGET ...]

Prints a line for each of TARGETS (default: all): the compiler and whether the tests ran, or which tool is missing.
Warnings are errors. zig (pip install ziglang) is a clang with the libraries of every system; wine and qemu run programs
for other machines; what only a Mac can run is compiled and linked. The status is 1 if a target failed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# pip installs cmake and ninja beside the interpreter; Debian installs wine64 outside PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/lib/wine"])


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        compiler: a command; "zig" may be a program or the Python package ziglang.
        options: further options of cmake.
        runners: emulators, any of which runs the programs; empty: this machine runs them; None: nothing here does.
    """

    compiler: tuple[str, ...]
    options: tuple[str, ...] = ()
    runners: tuple[str, ...] | None = ()


def zig_target(name: str, system: str, processor: str, runners: tuple[str, ...] | None = None) -> Target:
    options = (f"-DCMAKE_SYSTEM_NAME={system}", f"-DCMAKE_SYSTEM_PROCESSOR={processor}")
    return Target(("zig", "c++", "-target", name), options, runners)


TARGETS = {
    "here": Target(tuple((os.environ.get("CXX") or "c++").split())),
    "clang": Target(("clang++",)),
    "aarch64-linux": Target(
        ("aarch64-linux-gnu-g++",),
        (
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",  # otherwise qemu needs aarch64's shared libraries
        ),
        ("qemu-aarch64", "qemu-aarch64-static"),
    ),
    "aarch64-macos": zig_target("aarch64-macos", "Darwin", "arm64"),
    "x86_64-macos": zig_target("x86_64-macos", "Darwin", "x86_64"),
    "x86_64-windows": zig_target("x86_64-windows-gnu", "Windows", "AMD64", ("wine64", "wine")),
}


class CommandFailedError(Exception):
    """Holds the command and the tail of its output."""


def run(*command: str) -> str:
    """Returns the command's output.

    Raises:
        CommandFailedError: its status is not 0.
    """
    done = subprocess.run(
        command,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": PATH, "WINEDEBUG": "-all"},
    )
    if done.returncode != 0:
        raise CommandFailedError(f"{' '.join(command)}\n{done.stdout[-8000:]}")
    return done.stdout


def find_program(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name, path=PATH))), None)


def compiler_command(target: Target) -> list[str] | None:
    """The target's compiler; None if it is not installed."""
    program, *arguments = target.compiler
    if path := shutil.which(program, path=PATH):
        return [path, *arguments]
    if program == "zig" and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", *arguments]
    return None


def missing_to_compile(target: Target) -> str | None:
    """Which tools for compiling are not installed, or None."""
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=PATH) is None]
    if compiler_command(target) is None:
        missing.append(target.compiler[0])
    return " and no ".join(missing) or None


def missing_to_run(target: Target) -> str | None:
    """What is missing to run the target's programs, or None."""
    if target.runners is None:
        return "Mac"
    return target.runners[0] if target.runners and find_program(target.runners) is None else None


def build_and_test(target: Target, folder: Path, *options: str) -> None:
    """Compiles the kernels and their tests in a folder, and runs the tests if this machine can.

    Raises:
        CommandFailedError: a compiler warning or error, or a failed test.
    """
    compiler, runner = compiler_command(target), find_program(target.runners or ())
    assert compiler is not None, missing_to_compile(target)
    options = (f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}", *target.options, *options)
    if runner is not None:
        options += (f"-DCMAKE_CROSSCOMPILING_EMULATOR={runner}",)
    run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPYTBPTT_TORCH=OFF", *options)
    run("cmake", "--build", str(folder))
    if missing_to_run(target) is None:
        run("ctest", "--test-dir", str(folder), "--output-on-failure", "--no-tests=error")


def version(target: Target) -> str:
    """The first line that the compiler prints of its version, without the URL of its source."""
    compiler = compiler_command(target)
    assert compiler is not None, missing_to_compile(target)
    first_line = run(*compiler, "--version").splitlines()[0]
    return ("zig's " if target.compiler[0] == "zig" else "") + re.sub(r" \(https?:.*?\)", "", first_line)


def try_target(name: str) -> bool:
    """Prints the outcome in one line; False if the target failed."""
    target, started = TARGETS[name], time.monotonic()
    if missing := missing_to_compile(target):
        print(f"{name:<15} skipped: no {missing}")
        return True
    by = f"by {version(target)}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            build_and_test(target, Path(folder))
    except CommandFailedError as error:
        print(f"{name:<15} FAILED {by}: {error}")
        return False
    missing = missing_to_run(target)
    runner = find_program(target.runners or ())
    tests = f"not run: no {missing}" if missing else "tests passed" + (f" under {Path(runner).name}" if runner else "")
    print(f"{name:<15} compiled and linked {by}; {tests} ({time.monotonic() - started:.0f} s)", flush=True)
    return True


def main() -> None:
    names = sys.argv[1:] or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            raise SystemExit(
                f"python -m tests.checks.cross_compile: found {name}, expected targets of {', '.join(TARGETS)}"
            )
    if not all([try_target(name) for name in names]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
