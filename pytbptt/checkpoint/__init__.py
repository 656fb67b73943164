"""What is saved of a run: `file` is the format and how it is read, `writer` writes it while training goes on."""

from pytbptt.checkpoint.file import (
    BEST,
    FORMAT,
    KEYS,
    LAST,
    LoadedCheckpoint,
    kept,
    load_checkpoint,
    model_config,
    model_state,
    read,
    read_first,
    read_latest,
    snapshot,
    text_format,
    without_run,
    write,
)

__all__ = [
    "BEST",
    "FORMAT",
    "KEYS",
    "LAST",
    "LoadedCheckpoint",
    "kept",
    "load_checkpoint",
    "model_config",
    "model_state",
    "read",
    "read_first",
    "read_latest",
    "snapshot",
    "text_format",
    "without_run",
    "write",
]
