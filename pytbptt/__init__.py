"""Language models trained with truncated backpropagation through time.

The README shows how these go together; `pytbptt.ops` has the two operations that they are built on.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytbptt.data import Chunk, IndexedTokens, StreamLoader, Vocabulary, load, write_indexed
    from pytbptt.errors import InputError, RunError
    from pytbptt.nn import AWDLSTM, LSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig
    from pytbptt.training.truncated_bptt import TruncatedBPTT

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
    "load",
    "write_indexed",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import pytbptt.ops` needs torch and numpy alone."""
    if name in __all__:
        for home in ("pytbptt.errors", "pytbptt.data", "pytbptt.nn", "pytbptt.training.truncated_bptt"):
            module = importlib.import_module(home)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'pytbptt' has no attribute {name!r}")
