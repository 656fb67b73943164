"""Checkpoints of a run: `contents` says what they hold, `file` how it is stored, `folder` which to resume from; `model`
loads one for evaluation, and `writer` writes them in the background of training."""

from pytbptt.checkpoint.contents import (
    FORMAT_VERSION as FORMAT_VERSION,
    REQUIRED_KEYS as REQUIRED_KEYS,
    model_config_from_dict as model_config_from_dict,
    model_config_to_dict as model_config_to_dict,
    snapshot as snapshot,
    text_format as text_format,
    weights_only_checkpoint as weights_only_checkpoint,
)
from pytbptt.checkpoint.file import read as read, write as write
from pytbptt.checkpoint.folder import (
    BEST_CHECKPOINT as BEST_CHECKPOINT,
    LAST_CHECKPOINT as LAST_CHECKPOINT,
    kept_checkpoints as kept_checkpoints,
    read_first_undamaged as read_first_undamaged,
    read_latest as read_latest,
)
from pytbptt.checkpoint.model import LoadedCheckpoint as LoadedCheckpoint, load_checkpoint as load_checkpoint
