"""Emulates Windows or macOS for pytbptt's modules on Linux, by hiding what Python does not have there.

    SYSTEM=win32|darwin|linux python -X warn_default_encoding -m tests.common.fake_platform [< LINES]

Each line NAME ARGUMENTS… runs `python -m pytbptt.NAME ARGUMENTS…` and prints its status to standard error. Without
input, imports every module of pytbptt. Processes are started by spawn. On Windows renaming or removing an open file
fails. Opening a text file without an encoding is an error, because Windows' default is not UTF-8. Other packages are
not affected.
"""

import builtins
import errno
import fcntl
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import shlex
import signal
import sys
import warnings
from types import ModuleType
from typing import Any

# Attributes that pytbptt might use and that exist only on Linux, or only on Unix.
MISSING_ATTRIBUTES = {
    "darwin": {
        "os": "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate memfd_create O_DIRECT O_TMPFILE",
        "signal": "SIGPWR SIGSTKFLT SIGPOLL SIGRTMIN SIGRTMAX sigtimedwait sigwaitinfo",
        "mmap": "MAP_POPULATE MADV_HUGEPAGE",
    },
    "win32": {
        "os": "O_CLOEXEC O_DIRECTORY O_DSYNC O_NONBLOCK O_SYNC fork forkpty getloadavg getpgid getpriority getuid kill "
        "killpg mkfifo nice pread pwrite sendfile setpgid setsid statvfs sync sysconf uname wait waitpid",
        "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIGXFSZ alarm pause "
        "pthread_kill pthread_sigmask setitimer siginterrupt sigwait",
        "mmap": "MADV_DONTNEED MADV_RANDOM MADV_SEQUENTIAL MAP_POPULATE MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
    },
}
MISSING_ATTRIBUTES["win32"] = {
    name: f"{MISSING_ATTRIBUTES['darwin'][name]} {names}" for name, names in MISSING_ATTRIBUTES["win32"].items()
}
MISSING_MODULES = {"darwin": (), "win32": ("curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog")}


class ModuleProxy(ModuleType):
    """A module in which some attributes are missing and others replaced."""

    def __init__(self, module: ModuleType, missing: str, **replaced: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self._module, self._missing = module, missing.split()

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def is_open(path: Any) -> bool:
    """Whether this process has the file, or any file in the folder, open or mapped."""
    path = os.path.realpath(path)
    in_use = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        in_use |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}
    return any(name == path or name.startswith(f"{path}/") for name in in_use)


def fail_on_open_files(name: str) -> None:
    """Makes os.NAME fail for files that are open, as on Windows."""
    original = getattr(os, name)

    def function(*paths: Any, **options: Any) -> Any:
        for path in paths:
            if "dir_fd" not in options and is_open(path):
                raise PermissionError(errno.EACCES, "the file is open", str(path))
        return original(*paths, **options)

    setattr(os, name, function)


def open_without_directories(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
    """os.open as on Windows, where it fails for directories."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "the path is a directory", str(path))
    return os.open(path, flags, mode, **options)


def locking(descriptor: int, mode: int, count: int) -> None:
    """msvcrt.locking for LK_NBLCK."""
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)


def emulate_platform(system: str) -> None:
    """Changes what pytbptt's modules import from now on."""
    multiprocessing.set_start_method("spawn", force=True)
    missing, replaced = MISSING_ATTRIBUTES[system], {}
    replaced["sys"] = ModuleProxy(sys, "", platform=system)
    replaced["signal"] = ModuleProxy(signal, missing["signal"])
    replaced["mmap"] = ModuleProxy(importlib.import_module("mmap"), missing["mmap"])
    replaced["os"] = ModuleProxy(os, missing["os"])
    if system == "win32":
        replaced["os"] = ModuleProxy(os, missing["os"], open=open_without_directories, name="nt", O_BINARY=0)
        replaced["msvcrt"] = ModuleProxy(ModuleType("msvcrt"), "", LK_NBLCK=2, locking=locking)
        for name in ("remove", "rename", "replace", "rmdir", "unlink"):
            fail_on_open_files(name)
    original_import = builtins.__import__

    def import_for_system(name: str, globals: Any = None, *rest: Any, **options: Any) -> Any:
        if ((globals or {}).get("__package__") or "").partition(".")[0] == "pytbptt":
            if name in MISSING_MODULES[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in replaced:
                return replaced[name]
        return original_import(name, globals, *rest, **options)

    builtins.__import__ = import_for_system
    if sys.flags.warn_default_encoding:
        warnings.filterwarnings("error", category=EncodingWarning, module="pytbptt")


def run_program(line: str) -> None:
    sys.argv = shlex.split(line)
    status: object = 0
    try:
        runpy.run_module(f"pytbptt.{sys.argv[0]}", run_name="__main__")
    except SystemExit as end:
        status = end.code
    print(f"{sys.argv[0]}: status {status}", file=sys.stderr, flush=True)


def import_all_modules() -> None:
    import pytbptt

    for module in pkgutil.walk_packages(pytbptt.__path__, "pytbptt."):
        if module.name not in ("pytbptt._C", "pytbptt._cuda"):
            importlib.import_module(module.name)


# At import, because spawned processes import this module before they run anything.
if os.environ["SYSTEM"] != "linux":
    emulate_platform(os.environ["SYSTEM"])

if __name__ == "__main__":
    lines = sys.stdin.read().splitlines()
    for line in lines:
        run_program(line)
    if not lines:
        import_all_modules()
