"""The model of a checkpoint, for evaluation and generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pytbptt.checkpoint.contents import model_config_from_dict, text_format
from pytbptt.checkpoint.file import read
from pytbptt.data import TextFormat, Vocabulary
from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel


class LoadedCheckpoint(NamedTuple):
    """A trained model, its vocabulary and its settings."""

    model: LanguageModel
    """In evaluation mode, with the averaged weights if there are any."""
    vocabulary: Vocabulary
    run: dict[str, Any]
    """The run's settings by flag name; for a converted model, only tokens_per_sample."""
    text_format: TextFormat
    """How its text was split into documents, and where memory was reset."""


def load_checkpoint(
    path: str | Path, device: torch.device | str = "cpu", overrides: Mapping[str, Any] | None = None
) -> LoadedCheckpoint:
    """The model of a checkpoint, for evaluation and generation.

    Args:
        path: a file that training or conversion wrote.
        device: where the model goes.
        overrides: fields of the model's configuration to replace, such as mem_len.

    Raises:
        InputError: an unreadable checkpoint, or overrides that do not fit it.
    """
    path = Path(path)
    checkpoint = read(path)
    model = model_config_from_dict(checkpoint["config"]["model"], overrides).build()
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights do not fit the model (--model-overrides?): {detail}") from None
    average, run = checkpoint["average"], checkpoint["config"]["run"]
    if average is not None and average["mean"] is not None and average["updates"]:
        model.load_state_dict(average["mean"], strict=False)
    return LoadedCheckpoint(
        model.to(device).eval(),
        Vocabulary.from_state_dict(checkpoint["vocabulary"]),
        run,
        text_format(checkpoint),
    )
