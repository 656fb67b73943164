"""Language models trained with truncated backpropagation through time.

See the README for how the modules fit together. `pytbptt.ops` holds the two ops (LSTM, relative attention) that the
models use.
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytbptt import checkpoint, convert, data, errors, memory, nn, ops, truncation
    from pytbptt.checkpoint import load_checkpoint
    from pytbptt.data import Chunk, IndexedTokens, StreamLoader, Vocabulary, load, write_indexed
    from pytbptt.errors import InputError, RunError
    from pytbptt.nn import AWDLSTM, LSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig
    from pytbptt.truncated_bptt import TruncatedBPTT

__version__ = "0.1.0"

__all__ = [
    "AWDLSTM",
    "LSTM",
    "AWDLSTMConfig",
    "Chunk",
    "IndexedTokens",
    "InputError",
    "RunError",
    "StreamLoader",
    "TransformerXL",
    "TransformerXLConfig",
    "TruncatedBPTT",
    "Vocabulary",
    "checkpoint",
    "convert",
    "data",
    "errors",
    "load",
    "load_checkpoint",
    "memory",
    "nn",
    "ops",
    "truncation",
    "write_indexed",
]
_MODULES = ("checkpoint", "convert", "data", "errors", "memory", "nn", "ops", "truncation")


def __getattr__(name: str) -> Any:
    """Import public names lazily (PEP 562), so that `import pytbptt.ops` needs only torch and numpy."""
    if name in _MODULES:
        return importlib.import_module(f"pytbptt.{name}")
    if name in __all__:
        for module_name in (
            "pytbptt.errors",
            "pytbptt.data",
            "pytbptt.nn",
            "pytbptt.checkpoint",
            "pytbptt.truncated_bptt",
        ):
            module = importlib.import_module(module_name)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'pytbptt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_without_extension() -> None:
    from pytbptt.errors import RunError
    from pytbptt.runtime.build_record import build_command, read_build_record

    try:
        why = read_build_record().why_no_extension
    except RunError:
        return  # reported by the code that loads the extension
    if why is not None and os.environ.get("PYTBPTT_BACKEND") != "reference":
        warnings.warn(
            f"pytbptt has no compiled extension ({why}): falling back to the reference in plain PyTorch, which is "
            f"slower and takes more memory; to build it: {build_command()}",
            RuntimeWarning,
            stacklevel=3,
        )


_warn_without_extension()
