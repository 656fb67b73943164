"""The compiled extension, if this installation has one: loaded once, and what cannot be is told."""

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from pytbptt.errors import RunError
from pytbptt.runtime.build_record import build_command, read_build_record

OLDEST_TORCH = (2, 10)
"""The extension knows torch's stable interface alone, as it is there from this release on."""


@dataclass(frozen=True)
class Extension:
    """What was built and loaded.

    Attributes:
        facts: `_C.build_facts()`, which are the torch whose headers it was compiled with, the compiler, instruction
            sets; why_no_cuda, None where there are CUDA kernels, and then the cuda_architectures that they were
            compiled for, as in TORCH_CUDA_ARCH_LIST, and the release of the cuda_toolkit. None without an extension.
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
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        expected = ".".join(map(str, OLDEST_TORCH))
        raise RunError(f"pytbptt: found torch {torch.__version__}, expected {expected} or later")
    try:
        module = importlib.import_module("pytbptt._C")
    except ImportError as error:
        raise RunError(
            f"pytbptt._C does not load with torch {torch.__version__} ({error}); to build again: {build_command()}"
        ) from error
    module.set_threads_run_together("parallel backend: OpenMP" in torch.__config__.parallel_info())
    return Extension(facts=module.build_facts() | _load_cuda(record.why_no_cuda), why_absent=None)


def _load_cuda(why_not_built: str | None) -> dict[str, Any]:
    """What `facts` says of CUDA. Where there is a GPU, a lack of kernels for it warns."""
    why = why_not_built
    if why is None:
        try:
            module = importlib.import_module("pytbptt._cuda")
        except ImportError as error:  # torch was changed to a build without CUDA, or of another major release
            why = f"pytbptt._cuda does not load with torch {torch.__version__} ({error})"
        else:
            toolkit = "{}.{}".format(*module.toolkit)
            return {"why_no_cuda": None, "cuda_architectures": module.architectures, "cuda_toolkit": toolkit}
    if torch.version.cuda and os.environ.get("PYTBPTT_BACKEND") != "reference" and torch.cuda.device_count():
        warnings.warn(
            f"pytbptt has no CUDA kernels ({why}): on GPUs it falls back to the reference in plain PyTorch, which is "
            f"slower and takes more memory; to build them: {build_command()}",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"why_no_cuda": why}


try:
    EXTENSION = _load()
except RunError as error:
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or not program.name.startswith("pytbptt."):
        raise
    sys.exit(f"python -m {program.name}: {error}")
