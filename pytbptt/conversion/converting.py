"""What `python -m pytbptt.convert` does: a checkpoint of another project becomes one of ours."""

import filecmp
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from pytbptt import checkpoint as checkpoints
from pytbptt.atomic import folder_to_write
from pytbptt.conversion import awd_lstm, fairseq, inert, kimiyoung, reading, transfo_xl
from pytbptt.conversion.vocabulary import read_symbols, renumbered
from pytbptt.data import Vocabulary
from pytbptt.data.vocabulary import DICTIONARY, TOKENIZER
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import NEVER
from pytbptt.nn.architectures import Model


@dataclass
class ConvertSettings:
    source: tyro.conf.Positional[str]
    """The checkpoint: a file, or a directory with config.json as transformers writes it."""
    save_dir: str = "converted"
    """Where dict.txt and checkpoint_best.pt go; what is there of that name is not replaced, but a conversion that was
    killed is made whole."""
    vocabulary: str = ""
    """Its vocabulary: TransfoXL's vocab.bin, kimiyoung's cache.pt, fairseq's dict.txt, awd-lstm-lm's corpus….data,
    fastai's itos.pkl, or a text file of symbols; nothing: what lies in the directory of transformers."""
    config: str = ""
    """JSON file of its settings by the original's names, where the checkpoint lacks them or they shall differ."""


@dataclass(frozen=True)
class Original:
    """A checkpoint of another project, read."""

    project: str
    model: Model
    """With the original's ids."""
    refused: list[str]
    """Classes and functions that its file names and that were read as data."""
    note: str = ""
    """What the file lacked and what stands in its place, if so."""


def convert(settings: ConvertSettings) -> None:
    """Read, convert, write, and say what was made.

    Raises:
        InputError: a file that is unreadable or of another kind, or whose parts do not fit together.
        RunError: the result could not be written.
    """
    source, save_dir = Path(settings.source), Path(settings.save_dir)
    for path in (save_dir / checkpoints.BEST, save_dir / checkpoints.LAST):
        if path.exists():
            raise _would_be_replaced(path)
    original = read(source, _config(settings.config))
    vocabulary_path = _vocabulary_path(source, settings.vocabulary, original.project)
    if original.project == "fairseq":
        model, vocabulary = original.model, Vocabulary.load(vocabulary_path)
        if len(vocabulary) != model.config.vocab_size:
            found = f"{len(vocabulary)} types"
            raise InputError(f"--vocabulary: {vocabulary_path}: found {found}, expected {model.config.vocab_size}")
        _say_refused(source, original.refused)
    else:
        symbols, refused = read_symbols(vocabulary_path)
        model, vocabulary = renumbered(original.model, symbols)
        _say_refused(source, original.refused)
        _say_refused(vocabulary_path, refused)
    _refuse_another(save_dir, vocabulary)
    with folder_to_write(save_dir):
        # The checkpoint last: killed before it is there, a conversion is begun again.
        vocabulary.save(save_dir)
        checkpoints.write(save_dir / checkpoints.BEST, checkpoints.without_run(model, vocabulary))
    print(f"{original.project}, {original.model.num_parameters():,} parameters, {len(vocabulary):,} types")
    if original.note:
        print(f"{source}: {original.note}", file=sys.stderr)
    biases = model.softmax.biases[0].tolist()
    never = [symbol for symbol, bias in zip(Vocabulary.SPECIALS, biases, strict=False) if bias == NEVER]
    if never:
        print(f"never predicted, because the original does not have them: {' '.join(never)}")
    print(f"python -m pytbptt.score TEXT --path {shlex.quote(str(save_dir / checkpoints.BEST))}")


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
    model = inert.without_wrapper(model)
    if kimiyoung.is_configured(model):
        found = {**kimiyoung.configuration(model), **config}
        return Original("kimiyoung", kimiyoung.from_kimiyoung(inert.state_dict(model), found), refused)
    weights = reading.weights_of(source, model)
    if awd_lstm.is_of_fastai(weights):
        alone = awd_lstm.is_encoder_of_fastai(weights)
        note = "found an encoder alone, as save_encoder writes it: its decoder is the same table, with a bias of 0"
        return Original("fastai", awd_lstm.from_fastai(weights), refused, note if alone else "")
    if awd_lstm.is_of_salesforce(weights):
        found = {**awd_lstm.configuration(model, criterion), **config} if inert.is_module(model) else config
        return Original("awd_lstm", awd_lstm.from_awd_lstm(weights, found, inert.state_dict(criterion)), refused)
    if any(name.endswith("word_emb.emb_layers.0.weight") for name in weights):
        transfo_xl.require_softmax(weights)
        if any(name.startswith("transformer.") for name in weights):
            found = _needed(source, config, "config.json")
            return Original("transfo_xl", transfo_xl.from_transfo_xl(weights, found), refused)
        found = _needed(source, config, "JSON of MemTransformerLM's arguments")
        return Original("kimiyoung", kimiyoung.from_kimiyoung(weights, found), refused)
    held = f"a {type(value).__name__}" if not isinstance(value, inert.Record) else value.name
    beside = f" (it names {', '.join(refused)}; refused)" if refused else ""
    raise InputError(
        f"{source}: found {held}{beside}, expected a checkpoint of TransfoXL, kimiyoung/transformer-xl, NVIDIA's, "
        "fairseq's transformer_xl, awd-lstm-lm or fastai"
    )


def _config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    return reading.read_json(Path(path), "an object", "--config")


def _needed(source: Path, config: dict[str, Any], what: str) -> dict[str, Any]:
    if not config:
        raise InputError(f"{source}: found weights alone, expected --config with their {what}")
    return config


def _vocabulary_path(source: Path, given: str, project: str) -> Path:
    if given:
        return Path(given)
    for name in transfo_xl.VOCABULARIES:
        if source.is_dir() and (source / name).exists():
            return source / name
    if project == "nvidia":
        return source  # which holds it
    where = {
        "transfo_xl": "vocab.bin, vocab.pkl or vocab.txt of its tokenizer",
        "kimiyoung": "cache.pt from the folder of its data",
        "fairseq": "dict.txt from the folder of its data",
        "awd_lstm": "corpus.….data that main.py left in its folder",
        "fastai": "itos.pkl that goes with it",
    }
    raise InputError(f"--vocabulary: found none, expected the {where[project]}")


def _refuse_another(save_dir: Path, vocabulary: Vocabulary) -> None:
    """Refuse a folder that holds another vocabulary; this one is what a conversion has left that was killed."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(folder)
        for name in (TOKENIZER, DICTIONARY):
            there, ours = save_dir / name, Path(folder) / name
            if there.exists() and not (ours.exists() and filecmp.cmp(there, ours, shallow=False)):
                raise _would_be_replaced(there)


def _would_be_replaced(path: Path) -> InputError:
    return InputError(f"--save-dir: found {path}, expected a folder without: it would be replaced")


def _say_refused(path: Path, refused: Iterable[str]) -> None:
    if names := ", ".join(refused):
        print(f"{path}: refused to make objects of, and read as data: {names}", file=sys.stderr)
