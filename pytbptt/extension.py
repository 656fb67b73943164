"""The compiled extension, if this installation has one: loaded once, after checking that it fits the torch at hand."""

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch

from pytbptt.build_record import build_command, read_build_record
from pytbptt.errors import RunError


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
    record = read_build_record()
    if record.why_no_extension is not None:
        return Extension(facts=None, why_absent=record.why_no_extension)
    # torch's C++ interface may change with any release, and a library that meets another one can crash while it
    # loads: hence a record that is read before. The part after + names a build of the same release.
    built, found = str(record.torch).partition("+")[0], torch.__version__.partition("+")[0]
    if built != found:
        raise RunError(
            f"pytbptt._C was built against torch {built}, found torch {found}; to build again: {build_command()}"
        )
    try:
        module = importlib.import_module("pytbptt._C")
    except ImportError as error:
        raise RunError(
            f"pytbptt._C does not load with torch {torch.__version__} ({error}); to build again: {build_command()}"
        ) from error
    return Extension(facts=module.build_facts(), why_absent=None)


try:
    EXTENSION = _load()
except RunError as error:
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or not program.name.startswith("pytbptt."):
        raise
    sys.exit(f"python -m {program.name}: {error}")
