"""Checkpoints: one file, written whole or not at all, read without running anything from it."""

import dataclasses
import difflib
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pytbptt.atomic import replacing
from pytbptt.data import Vocabulary
from pytbptt.errors import InputError, RunError
from pytbptt.nn.architectures import ARCHITECTURES, Model, ModelConfig, build_model

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
FORMAT = 1
KEYS = {
    "format",
    "model",
    "average",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "loader",
    "memory",
    "config",
    "vocabulary",
    "progress",
}


def write(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Save under a temporary name, flush to the disk, rename: `path` is the old file or the new one, never a part.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there before is intact.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(checkpoint), file)
    except (OSError, RuntimeError) as error:
        # torch's zip writer hides a failing disk behind a RuntimeError of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        kept = f"; the checkpoint before it is intact: {path}" if path.exists() else ""
        raise RunError(f"could not save {path}: {reason}{kept}") from None


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU.

    Raises:
        InputError: missing, truncated or corrupt, carrying code (which is never run), or none of pytbptt's.
    """
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a checkpoint of python -m pytbptt.train")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if code := re.search(r"global:? ([\w.]+)", str(error), re.IGNORECASE):
            found = f"found code in the checkpoint ({code[1]})"
            raise InputError(f"{path}: {found}, expected tensors and values: refused") from None
        raise InputError(f"{path}: truncated or corrupt, or no checkpoint") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError):
        raise InputError(f"{path}: truncated or corrupt, or no checkpoint") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= KEYS:
        found = f"keys {sorted(checkpoint)}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
        raise InputError(f"{path}: not a checkpoint of pytbptt: found {found}, expected {sorted(KEYS)}")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: found checkpoint format {checkpoint['format']}, expected {FORMAT}")
    return checkpoint


def read_latest(save_dir: Path) -> dict[str, Any] | None:
    """The last checkpoint of a folder; the best one, with a warning, if that is broken; None if there is neither."""
    paths = [path for path in (save_dir / LAST, save_dir / BEST) if path.exists()]
    for path in paths:
        try:
            checkpoint = read(path)
        except InputError as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}; falling back to {paths[-1]}", file=sys.stderr)
        else:
            return checkpoint
    return None


def model_state(config: ModelConfig) -> dict[str, Any]:
    """A model's configuration as a checkpoint holds it."""
    arch = next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))
    return {"arch": arch, **dataclasses.asdict(config)}


def model_config(state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The other way; `overrides` replaces fields.

    Raises:
        InputError: a field that the architecture does not have, naming the nearest.
    """
    values = dict(state)
    kind = ARCHITECTURES[values.pop("arch")]
    known = [entry.name for entry in dataclasses.fields(kind)]
    for key, value in (overrides or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(f"--model-overrides: {key}: unknown{f'; did you mean {near[0]}?' if near else ''}")
        if not isinstance(value, type(values[key])) and not (isinstance(values[key], float) and isinstance(value, int)):
            raise InputError(f"--model-overrides: {key}: found {value!r}, expected a {type(values[key]).__name__}")
        values[key] = value
    return kind(**values)


def load_model(
    path: Path, device: torch.device, overrides: Mapping[str, Any] | None = None
) -> tuple[Model, Vocabulary, dict[str, Any]]:
    """The model of a checkpoint, for evaluation: with its averaged weights where it has them.

    Args:
        path: the checkpoint.
        device: where the model goes.
        overrides: fields of the model's configuration to replace, such as mem_len.

    Returns:
        The model in evaluation mode, its vocabulary, and the run's settings by flag name.

    Raises:
        InputError: an unreadable checkpoint, or overrides that do not fit it.
    """
    checkpoint = read(path)
    model = build_model(model_config(checkpoint["config"]["model"], overrides))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: weights do not fit the model (--model-overrides?): {detail}") from None
    average = checkpoint["average"]
    if average is not None and average["mean"] is not None and average["updates"]:
        model.load_state_dict(average["mean"], strict=False)
    return model.to(device).eval(), Vocabulary.from_state_dict(checkpoint["vocabulary"]), checkpoint["config"]["run"]
