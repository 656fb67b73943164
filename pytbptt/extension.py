"""The compiled extension, if this installation has one: loaded once, after checking that it fits the torch at hand."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytbptt.errors import RunError

_REBUILD = "rebuild it against this torch: pip install --no-build-isolation --force-reinstall --no-deps pytbptt"


@dataclass(frozen=True)
class Extension:
    """What was built and loaded.

    Attributes:
        facts: what `_C.build_facts()` says: torch, compiler, instruction sets, why CUDA is absent; None without _C.
        why_absent: why there is no extension; None where there is one.
    """

    facts: dict[str, Any] | None
    why_absent: str | None

    def serves(self, device_type: str) -> bool:
        """Whether kernels for this type of device were built."""
        if self.facts is None:
            return False
        return device_type == "cpu" or (device_type == "cuda" and self.facts["why_no_cuda"] is None)


def _load() -> Extension:
    record_path = Path(__file__).with_name("build.json")
    if not record_path.exists():
        reason = "it was never built in this source tree (pip install --no-build-isolation -e .)"
        return Extension(facts=None, why_absent=reason)
    try:
        record = json.loads(record_path.read_text())
        why_absent, built_against = record["why_no_extension"], record["torch"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{record_path}: found no record of a build; {_REBUILD}") from None
    if why_absent is not None:
        return Extension(facts=None, why_absent=why_absent)
    # torch's C++ interface may change with any release, and a library that meets another one can crash while it
    # loads: hence a record that is read before. The part after + names a build of the same release.
    built, found = built_against.partition("+")[0], torch.__version__.partition("+")[0]
    if built != found:
        raise RunError(f"pytbptt._C was built against torch {built}, found torch {found}; {_REBUILD}")
    try:
        module = importlib.import_module("pytbptt._C")
    except ImportError as error:
        raise RunError(f"pytbptt._C does not load with torch {torch.__version__} ({error}); {_REBUILD}") from error
    return Extension(facts=module.build_facts(), why_absent=None)


try:
    EXTENSION = _load()
except RunError as error:
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or not program.name.startswith("pytbptt."):
        raise
    sys.exit(f"python -m {program.name}: {error}")
