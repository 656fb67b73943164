"""setuptools' build backend, and a torch to compile against.

Installers build in an environment of its own that has what is named here and nothing else. torch is gigabytes, and the
one that an index has today may be for another release of CUDA than the one that will run. So where the interpreter has
torch outside of that environment, as pip's does, the extension is compiled against that one; else torch is a
requirement. (The extension keeps to torch's stable interface: compiled against any release from 2.10 on, it runs with
all of them. CUDA kernels need a toolkit of the same major release as torch's.)
"""

import importlib.util
import json
import os
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - setuptools' own hooks, but for those below

OLDEST = (2, 10)
PROGRAM = """
import importlib.metadata, json, sys
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps([version, sys.path]))
"""


def path_with_torch() -> list[str]:
    """Where this interpreter imports from outside of an isolated environment, if it has a suitable torch."""
    # This is what pip isolates by.
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=outside, capture_output=True, text=True, check=True)
    version, path = json.loads(done.stdout)
    suitable = version is not None and tuple(map(int, version.split(".")[:2])) >= OLDEST
    return [folder for folder in path if folder] if suitable else []


if importlib.util.find_spec("torch") is None:
    # Behind all others: what the isolated environment has comes first.
    sys.path += [folder for folder in path_with_torch() if folder not in sys.path]


def _requirements() -> list[str]:
    return [] if importlib.util.find_spec("torch") else [f"torch>={OLDEST[0]}.{OLDEST[1]}"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requirements()]
