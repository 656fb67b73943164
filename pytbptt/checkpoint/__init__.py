"""Checkpoints of a run: `file` has the format and reads it, `writer` writes it in the background of training."""

from pytbptt.checkpoint.file import (
    BEST as BEST,
    FORMAT as FORMAT,
    KEYS as KEYS,
    LAST as LAST,
    LoadedCheckpoint as LoadedCheckpoint,
    kept_checkpoints as kept_checkpoints,
    load_checkpoint as load_checkpoint,
    model_config as model_config,
    model_state as model_state,
    read as read,
    read_first as read_first,
    read_latest as read_latest,
    snapshot as snapshot,
    text_format as text_format,
    weights_only_checkpoint as weights_only_checkpoint,
    write as write,
)
