"""The kernels and their C++ tests as other compilers, processors and systems have them, with what this machine offers.

    python -m tests.portable [TARGET ...]

A line for each of TARGETS, all by default: what compiled them, warnings being errors, and whether their tests ran; or
what was not found that it takes. zig is a clang with the libraries of every system (pip install ziglang), wine and qemu
run what is not of this machine. What only a Mac can run is compiled and linked. The status is 1 where something failed.
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

ROOT = Path(__file__).resolve().parent.parent
# cmake and ninja are where pip put them, beside the interpreter; Debian's wine64 is where no PATH leads.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/lib/wine"])


@dataclass(frozen=True)
class Target:
    """What the kernels are compiled for.

    Attributes:
        compiler: a command; "zig" stands for however zig is called here.
        options: cmake's further ones.
        runners: programs of which each can run what was compiled; none where this machine can; None: none can.
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
            "-DCMAKE_EXE_LINKER_FLAGS=-static",  # or qemu would look for aarch64's libraries
        ),
        ("qemu-aarch64", "qemu-aarch64-static"),
    ),
    "aarch64-macos": zig_target("aarch64-macos", "Darwin", "arm64"),
    "x86_64-macos": zig_target("x86_64-macos", "Darwin", "x86_64"),
    "x86_64-windows": zig_target("x86_64-windows-gnu", "Windows", "AMD64", ("wine64", "wine")),
}


class CommandFailedError(Exception):
    """The command, and the end of what it said."""


def run(*command: str) -> str:
    """The command's output.

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


def first_found(programs: tuple[str, ...]) -> str | None:
    return next((found for program in programs if (found := shutil.which(program, path=PATH))), None)


def compiler_command(target: Target) -> list[str] | None:
    """The target's compiler as it is called here; None where it is not found."""
    program, *arguments = target.compiler
    if found := shutil.which(program, path=PATH):
        return [found, *arguments]
    if program == "zig" and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", *arguments]
    return None


def missing_to_compile(target: Target) -> str | None:
    """What is not found here that compiling takes, or None."""
    needed = [name for name in ("cmake", "ninja") if shutil.which(name, path=PATH) is None]
    if compiler_command(target) is None:
        needed.append(target.compiler[0])
    return " and no ".join(needed) or None


def missing_to_run(target: Target) -> str | None:
    """What is not found here that running takes, or None."""
    if target.runners is None:
        return "Mac"
    return target.runners[0] if target.runners and first_found(target.runners) is None else None


def build_and_test(target: Target, folder: Path, *options: str) -> None:
    """Compile the kernels and their tests in a folder, and run these where that can be done here.

    Raises:
        CommandFailedError: a warning, an error, or a test that failed.
    """
    compiler, runner = compiler_command(target), first_found(target.runners or ())
    assert compiler is not None, missing_to_compile(target)
    options = (f"-DCMAKE_CXX_COMPILER={';'.join(compiler)}", *target.options, *options)
    if runner is not None:
        options += (f"-DCMAKE_CROSSCOMPILING_EMULATOR={runner}",)
    run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPYTBPTT_TORCH=OFF", *options)
    run("cmake", "--build", str(folder))
    if missing_to_run(target) is None:
        run("ctest", "--test-dir", str(folder), "--output-on-failure", "--no-tests=error")


def version(target: Target) -> str:
    """The target's compiler by its own words, less the address of its source."""
    compiler = compiler_command(target)
    assert compiler is not None, missing_to_compile(target)
    first_line = run(*compiler, "--version").splitlines()[0]
    return ("zig's " if target.compiler[0] == "zig" else "") + re.sub(r" \(https?:.*?\)", "", first_line)


def attempt(name: str) -> bool:
    """Say in one line what came of a target; False where something failed."""
    target, started = TARGETS[name], time.monotonic()
    if missing := missing_to_compile(target):
        print(f"{name:<15} not tried: no {missing}")
        return True
    by = f"by {version(target)}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            build_and_test(target, Path(folder))
    except CommandFailedError as error:
        print(f"{name:<15} FAILED {by}: {error}")
        return False
    missing = missing_to_run(target)
    runner = first_found(target.runners or ())
    ran = f"not run: no {missing}" if missing else "tests passed" + (f" under {Path(runner).name}" if runner else "")
    print(f"{name:<15} compiled and linked {by}; {ran} ({time.monotonic() - started:.0f} s)", flush=True)
    return True


def main() -> None:
    names = sys.argv[1:] or list(TARGETS)
    for name in names:
        if name not in TARGETS:
            raise SystemExit(f"python -m tests.portable: found {name}, expected targets of {', '.join(TARGETS)}")
    if not all([attempt(name) for name in names]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
