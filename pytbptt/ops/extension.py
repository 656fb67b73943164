"""Load the compiled extension, if it was built, and report why parts are missing."""

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
"""The extension uses only torch's stable ABI, available from this release."""


@dataclass(frozen=True)
class Extension:
    """The compiled extension: what was built and loaded.

    Attributes:
        facts: `_C.build_facts()`: torch version, compiler, instruction sets; why_no_cuda, or cuda_architectures (as in
            TORCH_CUDA_ARCH_LIST) and cuda_toolkit. None without an extension.
        unavailable_reason: why there is no extension; None if there is one.
    """

    facts: dict[str, Any] | None
    unavailable_reason: str | None

    def supports(self, device_type: str) -> bool:
        """Whether kernels for this type of device were built."""
        if self.facts is None:
            return False
        return device_type == "cpu" or (device_type == "cuda" and self.facts["why_no_cuda"] is None)


def _load() -> Extension:
    record = read_build_record()
    if record.why_no_extension is not None:
        return Extension(facts=None, unavailable_reason=record.why_no_extension)
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        expected = ".".join(map(str, OLDEST_TORCH))
        raise RunError(f"pytbptt: found torch {torch.__version__}, expected {expected} or later")
    try:
        module = importlib.import_module("pytbptt._C")
    except ImportError as error:
        raise RunError(
            f"pytbptt._C does not load with torch {torch.__version__} ({error}); to build again: {build_command()}"
        ) from error
    uses_openmp = "parallel backend: OpenMP" in torch.__config__.parallel_info()
    try:
        module.set_threads_run_concurrently(uses_openmp)
    except AttributeError:
        raise RunError(f"pytbptt._C was built from other sources; to build again: {build_command()}") from None
    return Extension(facts=module.build_facts() | _load_cuda(record.why_no_cuda), unavailable_reason=None)


def _load_cuda(not_built_reason: str | None) -> dict[str, Any]:
    """The CUDA part of `facts`. Warns if there is a GPU but no kernels."""
    reason = not_built_reason
    if reason is None:
        try:
            module = importlib.import_module("pytbptt._cuda")
        except ImportError as error:  # torch was changed to a build without CUDA, or of another major release
            reason = f"pytbptt._cuda does not load with torch {torch.__version__} ({error})"
        else:
            toolkit = "{}.{}".format(*module.toolkit)
            return {"why_no_cuda": None, "cuda_architectures": module.architectures, "cuda_toolkit": toolkit}
    if torch.version.cuda and os.environ.get("PYTBPTT_BACKEND") != "reference" and torch.cuda.device_count():
        warnings.warn(
            f"pytbptt has no CUDA kernels ({reason}): on GPUs it falls back to the reference in plain PyTorch, which "
            f"is slower and takes more memory; to build them: {build_command()}",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"why_no_cuda": reason}


try:
    EXTENSION = _load()
except RunError as error:
    program = getattr(sys.modules["__main__"], "__spec__", None)
    if program is None or not program.name.startswith("pytbptt."):
        raise
    sys.exit(f"python -m {program.name}: {error}")
