"""A checkpoint of another project: which one it is of, and its model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt.conversion import awd_lstm, fairseq, kimiyoung, reading, safe_unpickle, transfo_xl
from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel


@dataclass(frozen=True)
class Original:
    """A checkpoint of another project, read."""

    project: str
    model: LanguageModel
    """With the original's ids."""
    blocked_globals: list[str]
    """Classes and functions that its file names and that were read as data."""
    note: str = ""
    """Warning about something missing from the file and what was used instead, or ""."""


def read(source: Path, config: dict[str, Any]) -> Original:
    """The model in a checkpoint of any of the projects.

    Args:
        source: the file or directory.
        config: settings that override the checkpoint's.

    Raises:
        InputError: unreadable, unknown format, or missing settings.
    """
    if source.is_dir():
        contents, found = transfo_xl.read_directory(source)
        weights = reading.extract_state_dict(source, contents.value)
        return Original(
            "transfo_xl", transfo_xl.from_transfo_xl(weights, {**found, **config}), contents.blocked_globals
        )
    contents = reading.read(source)
    try:
        return _original(source, contents.value, config, contents.blocked_globals)
    except RecursionError:
        raise InputError(f"{source}: found objects that contain themselves, expected a checkpoint") from None


def _original(source: Path, value: Any, config: dict[str, Any], blocked_globals: list[str]) -> Original:
    """The model that a file's contents are of."""
    if fairseq.is_checkpoint(value):
        found = {**fairseq.flags(value), **config}
        return Original("fairseq", fairseq.from_fairseq(value["model"], found), blocked_globals)
    if kimiyoung.is_nvidia(value):
        weights = reading.extract_state_dict(source, value["model_state"])
        return Original("nvidia", kimiyoung.from_nvidia(weights, {**value["model_config"], **config}), blocked_globals)
    model, criterion, *_ = value if isinstance(value, list) and len(value) > 1 else (value, None)
    model = safe_unpickle.unwrap_data_parallel(model)
    if kimiyoung.is_mem_transformer(model):
        found = {**kimiyoung.configuration(model), **config}
        return Original("kimiyoung", kimiyoung.from_kimiyoung(safe_unpickle.state_dict(model), found), blocked_globals)
    weights = reading.extract_state_dict(source, model)
    if awd_lstm.is_fastai(weights):
        alone = awd_lstm.is_fastai_encoder(weights)
        note = "found only an encoder, as save_encoder writes it; the decoder is tied to it, with a bias of 0"
        return Original("fastai", awd_lstm.from_fastai(weights), blocked_globals, note if alone else "")
    if awd_lstm.is_salesforce(weights):
        found = {**awd_lstm.configuration(model, criterion), **config} if safe_unpickle.is_module(model) else config
        return Original(
            "awd_lstm", awd_lstm.from_awd_lstm(weights, found, safe_unpickle.state_dict(criterion)), blocked_globals
        )
    if any(name.endswith("word_emb.emb_layers.0.weight") for name in weights):
        transfo_xl.check_has_softmax(weights)
        if any(name.startswith("transformer.") for name in weights):
            found = _require_config(source, config, "config.json")
            return Original("transfo_xl", transfo_xl.from_transfo_xl(weights, found), blocked_globals)
        found = _require_config(source, config, "JSON of MemTransformerLM's arguments")
        return Original("kimiyoung", kimiyoung.from_kimiyoung(weights, found), blocked_globals)
    held = f"a {type(value).__name__}" if not isinstance(value, safe_unpickle.OpaqueObject) else value.name
    beside = f" (it names {', '.join(blocked_globals)}; refused)" if blocked_globals else ""
    raise InputError(
        f"{source}: found {held}{beside}, expected a checkpoint of TransfoXL, kimiyoung/transformer-xl, NVIDIA's, "
        "fairseq's transformer_xl, awd-lstm-lm or fastai"
    )


def _require_config(source: Path, config: dict[str, Any], what: str) -> dict[str, Any]:
    if not config:
        raise InputError(f"{source}: found weights alone, expected --config with their {what}")
    return config
