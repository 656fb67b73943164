"""Detect which project a checkpoint is of, and convert its model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt.conversion import awd_lstm, fairseq, kimiyoung, safe_unpickle, transfo_xl, weight_files
from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel


@dataclass(frozen=True)
class SourceCheckpoint:
    """A converted checkpoint of another project."""

    project: str
    model: LanguageModel
    """With the token ids of the original."""
    blocked_globals: list[str]
    """Classes and functions that the file refers to; their objects were read as data."""
    warning: str = ""
    """Warning about something missing from the file and what was used instead, or ""."""


def read(source: Path, config: dict[str, Any]) -> SourceCheckpoint:
    """The model in a checkpoint of any of the projects.

    Args:
        source: the file or directory.
        config: settings that override the checkpoint's.

    Raises:
        InputError: unreadable, unknown format, or missing settings.
    """
    if source.is_dir():
        contents, found = transfo_xl.read_directory(source)
        weights = weight_files.extract_state_dict(source, contents.value)
        return SourceCheckpoint(
            "transfo_xl", transfo_xl.from_transfo_xl(weights, {**found, **config}), contents.blocked_globals
        )
    contents = weight_files.read(source)
    try:
        return _detect_and_convert(source, contents.value, config, contents.blocked_globals)
    except RecursionError:
        raise InputError(f"{source}: found objects that contain themselves, expected a checkpoint") from None


def _detect_and_convert(
    source: Path, value: Any, config: dict[str, Any], blocked_globals: list[str]
) -> SourceCheckpoint:
    """Detect the project from a file's contents, and convert the model."""
    if fairseq.is_checkpoint(value):
        found = {**fairseq.model_args(value), **config}
        return SourceCheckpoint("fairseq", fairseq.from_fairseq(value["model"], found), blocked_globals)
    if kimiyoung.is_nvidia_checkpoint(value):
        weights = weight_files.extract_state_dict(source, value["model_state"])
        return SourceCheckpoint(
            "nvidia", kimiyoung.from_nvidia(weights, {**value["model_config"], **config}), blocked_globals
        )
    model, criterion, *_ = value if isinstance(value, list) and len(value) > 1 else (value, None)
    model = safe_unpickle.unwrap_data_parallel(model)
    if kimiyoung.is_mem_transformer(model):
        found = {**kimiyoung.config_from_module(model), **config}
        return SourceCheckpoint(
            "kimiyoung", kimiyoung.from_kimiyoung(safe_unpickle.state_dict(model), found), blocked_globals
        )
    weights = weight_files.extract_state_dict(source, model)
    if awd_lstm.is_fastai_state_dict(weights):
        encoder_only = awd_lstm.is_fastai_encoder(weights)
        warning = "found only an encoder, as save_encoder writes it; the decoder is tied to it, with a bias of 0"
        return SourceCheckpoint(
            "fastai", awd_lstm.from_fastai(weights), blocked_globals, warning if encoder_only else ""
        )
    if awd_lstm.is_salesforce_state_dict(weights):
        found = (
            {**awd_lstm.config_from_modules(model, criterion), **config} if safe_unpickle.is_module(model) else config
        )
        return SourceCheckpoint(
            "awd_lstm", awd_lstm.from_awd_lstm(weights, found, safe_unpickle.state_dict(criterion)), blocked_globals
        )
    if any(name.endswith("word_emb.emb_layers.0.weight") for name in weights):
        transfo_xl.check_has_softmax(weights)
        if any(name.startswith("transformer.") for name in weights):
            found = _require_config(source, config, "config.json")
            return SourceCheckpoint("transfo_xl", transfo_xl.from_transfo_xl(weights, found), blocked_globals)
        found = _require_config(source, config, "JSON of MemTransformerLM's arguments")
        return SourceCheckpoint("kimiyoung", kimiyoung.from_kimiyoung(weights, found), blocked_globals)
    description = f"a {type(value).__name__}" if not isinstance(value, safe_unpickle.OpaqueObject) else value.name
    suffix = f" (it names {', '.join(blocked_globals)}; refused)" if blocked_globals else ""
    raise InputError(
        f"{source}: found {description}{suffix}, expected a checkpoint of TransfoXL, kimiyoung/transformer-xl, "
        "NVIDIA's, fairseq's transformer_xl, awd-lstm-lm or fastai"
    )


def _require_config(source: Path, config: dict[str, Any], expected: str) -> dict[str, Any]:
    if not config:
        raise InputError(f"{source}: found only weights, expected --config with their {expected}")
    return config
