"""Looks up other versions of Python on this machine."""

import os
import shutil
import subprocess
from pathlib import Path


def find_python(name: str) -> str | None:
    """An interpreter such as python3.12 that runs, on PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    version = name.removeprefix("python")
    for path in (shutil.which(name), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))):
        # pyenv's shims are on PATH for versions that are not installed too, and fail when they are run.
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None
