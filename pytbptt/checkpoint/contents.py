"""What a checkpoint holds.

A run's is filled by `Trainer.state_dict`, a converted model's by `weights_only_checkpoint`.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import torch

from pytbptt.data import TextFormat, Vocabulary
from pytbptt.data.text_format import RESET_NEVER
from pytbptt.errors import InputError
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.nn.language_model import LanguageModel, ModelConfig
from pytbptt.runtime.cli import as_type

FORMAT_VERSION = 1
DEFAULT_TOKENS_PER_SAMPLE = 128
"""Chunk length for evaluating converted checkpoints, which record none."""
REQUIRED_KEYS = {
    "format",
    "model",
    "average",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "loader",
    "validation",
    "memory",
    "config",
    "vocabulary",
    "progress",
}
"""What every checkpoint of this format has. A key that is added later is optional, as older checkpoints lack it."""


def snapshot(value: Any) -> Any:
    """A copy of a checkpoint's contents in host memory, which further training does not change.

    Tensors that share memory, such as tied weights, still share it in the copy.
    """
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, Mapping):
            return {key: copy(element) for key, element in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(element) for element in value)
        return value

    return copy(value)


def weights_only_checkpoint(model: LanguageModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """A checkpoint of converted weights: it can be evaluated and fine-tuned, but there is no run to resume.

    Its text format never resets memory: other projects carry memory through the whole text.
    """
    return {
        **dict.fromkeys(REQUIRED_KEYS),
        "format": FORMAT_VERSION,
        "model": model.state_dict(),
        "config": {
            "model": model_config_to_dict(model.config),
            "run": {"tokens_per_sample": DEFAULT_TOKENS_PER_SAMPLE},
        },
        "vocabulary": vocabulary.state_dict(),
        "text": TextFormat(reset_on=RESET_NEVER).state_dict(),
    }


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as a checkpoint stores it."""
    return {"arch": config.arch, **dataclasses.asdict(config)}


def model_config_from_dict(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The inverse of `model_config_to_dict`; `overrides` replaces fields.

    Raises:
        InputError: a field that the architecture does not have (names the nearest), or a value of another type.
    """
    values = dict(state)
    config_type = ARCHITECTURES[values.pop("arch")]
    known = [entry.name for entry in dataclasses.fields(config_type)]
    for key, value in (overrides or {}).items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise InputError(f"--model-overrides: {key}: unknown{f'; did you mean {nearest[0]}?' if nearest else ''}")
        values[key] = as_type(typing.get_type_hints(config_type)[key], value, f"--model-overrides: {key}")
    return config_type(**values)


def text_format(checkpoint: Mapping[str, Any]) -> TextFormat:
    """The text format of a checkpoint; from older checkpoints without one, as much as --reset-on says of it."""
    legacy = {"reset_on": checkpoint["config"]["run"].get("reset_on", "auto")}
    return TextFormat.from_state_dict(checkpoint.get("text", legacy))
