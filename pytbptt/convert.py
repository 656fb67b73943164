"""Bring a checkpoint of another project home: python -m pytbptt.convert CHECKPOINT [--vocabulary FILE] ..."""

import filecmp
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.conversion import reading, transfo_xl
from pytbptt.conversion.awd_lstm import from_awd_lstm, from_fastai
from pytbptt.conversion.fairseq import from_fairseq
from pytbptt.conversion.kimiyoung import from_kimiyoung, from_nvidia
from pytbptt.conversion.original import read
from pytbptt.conversion.transfo_xl import from_transfo_xl, to_transfo_xl
from pytbptt.conversion.vocabulary import read_symbols, renumbered
from pytbptt.data import Vocabulary
from pytbptt.data.vocabulary import DICTIONARY, TOKENIZER
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import NEVER
from pytbptt.runtime.atomic import folder_to_write
from pytbptt.runtime.cli import run
from pytbptt.runtime.extras import Positional

__all__ = [
    "from_awd_lstm",
    "from_fairseq",
    "from_fastai",
    "from_kimiyoung",
    "from_nvidia",
    "from_transfo_xl",
    "to_transfo_xl",
]


@dataclass
class ConvertSettings:
    source: Positional[str]
    """The checkpoint: a file, or a directory with config.json as transformers writes it."""
    save_dir: str = "converted"
    """Where dict.txt and checkpoint_best.pt go; what is there of that name is not replaced, but a conversion that was
    killed is made whole."""
    vocabulary: str = ""
    """Its vocabulary: TransfoXL's vocab.bin, kimiyoung's cache.pt, fairseq's dict.txt, awd-lstm-lm's corpus….data,
    fastai's itos.pkl, or a text file of symbols; nothing: what lies in the directory of transformers."""
    config: str = ""
    """JSON file of its settings by the original's names, where the checkpoint lacks them or they shall differ."""


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


def _config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    return reading.read_json(Path(path), "an object", "--config")


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


if __name__ == "__main__":
    run("python -m pytbptt.convert", ConvertSettings, convert, __doc__)
