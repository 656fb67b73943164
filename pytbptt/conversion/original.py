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
    refused: list[str]
    """Classes and functions that its file names and that were read as data."""
    note: str = ""
    """What the file lacked and what stands in its place, if so."""


def read(source: Path, config: dict[str, Any]) -> Original:
    """The model in a checkpoint of any of the projects.

    Args:
        source: the file or directory.
        config: settings that go before those that the checkpoint holds.

    Raises:
        InputError: unreadable, of no known kind, or without settings that it needs.
    """
    if source.is_dir():
        contents, found = transfo_xl.read_directory(source)
        weights = reading.weights_of(source, contents.value)
        return Original("transfo_xl", transfo_xl.from_transfo_xl(weights, {**found, **config}), contents.refused)
    contents = reading.read(source)
    try:
        return _original(source, contents.value, config, contents.refused)
    except RecursionError:
        raise InputError(f"{source}: found objects that contain themselves, expected a checkpoint") from None


def _original(source: Path, value: Any, config: dict[str, Any], refused: list[str]) -> Original:
    """The model that a file's contents are of."""
    if fairseq.is_checkpoint(value):
        found = {**fairseq.flags(value), **config}
        return Original("fairseq", fairseq.from_fairseq(value["model"], found), refused)
    if kimiyoung.is_of_nvidia(value):
        weights = reading.weights_of(source, value["model_state"])
        return Original("nvidia", kimiyoung.from_nvidia(weights, {**value["model_config"], **config}), refused)
    model, criterion, *_ = value if isinstance(value, list) and len(value) > 1 else (value, None)
    model = safe_unpickle.without_wrapper(model)
    if kimiyoung.is_configured(model):
        found = {**kimiyoung.configuration(model), **config}
        return Original("kimiyoung", kimiyoung.from_kimiyoung(safe_unpickle.state_dict(model), found), refused)
    weights = reading.weights_of(source, model)
    if awd_lstm.is_of_fastai(weights):
        alone = awd_lstm.is_encoder_of_fastai(weights)
        note = "found an encoder alone, as save_encoder writes it: its decoder is the same table, with a bias of 0"
        return Original("fastai", awd_lstm.from_fastai(weights), refused, note if alone else "")
    if awd_lstm.is_of_salesforce(weights):
        found = {**awd_lstm.configuration(model, criterion), **config} if safe_unpickle.is_module(model) else config
        return Original(
            "awd_lstm", awd_lstm.from_awd_lstm(weights, found, safe_unpickle.state_dict(criterion)), refused
        )
    if any(name.endswith("word_emb.emb_layers.0.weight") for name in weights):
        transfo_xl.require_softmax(weights)
        if any(name.startswith("transformer.") for name in weights):
            found = _needed(source, config, "config.json")
            return Original("transfo_xl", transfo_xl.from_transfo_xl(weights, found), refused)
        found = _needed(source, config, "JSON of MemTransformerLM's arguments")
        return Original("kimiyoung", kimiyoung.from_kimiyoung(weights, found), refused)
    held = f"a {type(value).__name__}" if not isinstance(value, safe_unpickle.Record) else value.name
    beside = f" (it names {', '.join(refused)}; refused)" if refused else ""
    raise InputError(
        f"{source}: found {held}{beside}, expected a checkpoint of TransfoXL, kimiyoung/transformer-xl, NVIDIA's, "
        "fairseq's transformer_xl, awd-lstm-lm or fastai"
    )


def _needed(source: Path, config: dict[str, Any], what: str) -> dict[str, Any]:
    if not config:
        raise InputError(f"{source}: found weights alone, expected --config with their {what}")
    return config
