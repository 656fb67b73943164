"""Linux standing in for Windows or macOS as far as pytbptt's own modules see it: what Python lacks there is missing.

    SYSTEM=win32|darwin|linux python -X warn_default_encoding -m tests.other_systems [< LINES]

Each line NAME ARGUMENTS… runs `python -m pytbptt.NAME ARGUMENTS…`, and its status is printed to the standard error;
without any, every module is imported. Neither system forks processes. On Windows no file that is open is renamed or
removed, and text is in UTF-8 only where a program says so: not to say it is an error in both. Libraries see Linux.
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

# What pytbptt could have a use for, of all that Python has on Linux alone, and on Unix alone.
LACKING = {
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
LACKING["win32"] = {name: f"{LACKING['darwin'][name]} {more}" for name, more in LACKING["win32"].items()}
MODULES_LACKING = {"darwin": (), "win32": ("curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog")}


class StandIn(ModuleType):
    """A module without some of its attributes, and with others instead."""

    def __init__(self, module: ModuleType, lacking: str, **instead: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(instead)
        self._module, self._lacking = module, lacking.split()

    def __getattr__(self, name: str) -> Any:
        if name in self._lacking:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def is_open_here(path: Any) -> bool:
    """Whether this process has a file open or mapped, or one in a folder."""
    found = os.path.realpath(path)
    in_use = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        in_use |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")}
    return any(name == found or name.startswith(f"{found}/") for name in in_use)


def refuse_open_files(name: str) -> None:
    """Make os.NAME fail for files that are open, as it does on Windows."""
    really = getattr(os, name)

    def function(*paths: Any, **more: Any) -> Any:
        for path in paths:
            if "dir_fd" not in more and is_open_here(path):
                raise PermissionError(errno.EACCES, "it is open", str(path))
        return really(*paths, **more)

    setattr(os, name, function)


def open_no_folder(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
    """os.open, which on Windows opens no folders."""
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "it is a folder", str(path))
    return os.open(path, flags, mode, **more)


def locking(descriptor: int, mode: int, count: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)


def stand_in_for(system: str) -> None:
    """From now on pytbptt's modules import what the system has."""
    multiprocessing.set_start_method("spawn", force=True)
    lacking, instead = LACKING[system], {}
    instead["sys"] = StandIn(sys, "", platform=system)
    instead["signal"] = StandIn(signal, lacking["signal"])
    instead["mmap"] = StandIn(importlib.import_module("mmap"), lacking["mmap"])
    instead["os"] = StandIn(os, lacking["os"])
    if system == "win32":
        instead["os"] = StandIn(os, lacking["os"], open=open_no_folder, name="nt", O_BINARY=0)
        instead["msvcrt"] = StandIn(ModuleType("msvcrt"), "", LK_NBLCK=2, locking=locking)
        for name in ("remove", "rename", "replace", "rmdir", "unlink"):
            refuse_open_files(name)
    real_import = builtins.__import__

    def import_for_system(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        if ((globals or {}).get("__package__") or "").partition(".")[0] == "pytbptt":
            if name in MODULES_LACKING[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in instead:
                return instead[name]
        return real_import(name, globals, *rest, **named)

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


def import_everything() -> None:
    import pytbptt

    for found in pkgutil.walk_packages(pytbptt.__path__, "pytbptt."):
        if found.name not in ("pytbptt._C", "pytbptt._cuda"):
            importlib.import_module(found.name)


# DistributedContext that are spawned import this module, too, before they do anything.
if os.environ["SYSTEM"] != "linux":
    stand_in_for(os.environ["SYSTEM"])

if __name__ == "__main__":
    lines = sys.stdin.read().splitlines()
    for line in lines:
        run_program(line)
    if not lines:
        import_everything()
