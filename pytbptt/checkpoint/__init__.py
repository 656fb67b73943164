"""What is saved of a run: `file` is the format and how it is read, `writer` writes it while training goes on."""

from pytbptt.checkpoint.file import (
    BEST as BEST,
    FORMAT as FORMAT,
    KEYS as KEYS,
    LAST as LAST,
    LoadedCheckpoint as LoadedCheckpoint,
    kept as kept,
    load_checkpoint as load_checkpoint,
    model_config as model_config,
    model_state as model_state,
    read as read,
    read_first as read_first,
    read_latest as read_latest,
    snapshot as snapshot,
    text_format as text_format,
    without_run as without_run,
    write as write,
)
