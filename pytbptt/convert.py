"""Convert another project's checkpoint: python -m pytbptt.convert CHECKPOINT [--vocabulary FILE] ..."""

import filecmp
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.conversion import transfo_xl, weight_files
from pytbptt.conversion.awd_lstm import from_awd_lstm, from_fastai
from pytbptt.conversion.fairseq import from_fairseq
from pytbptt.conversion.kimiyoung import from_kimiyoung, from_nvidia
from pytbptt.conversion.source_checkpoint import read
from pytbptt.conversion.transfo_xl import from_transfo_xl, to_transfo_xl
from pytbptt.conversion.vocabulary import read_symbols, renumber
from pytbptt.data import Vocabulary
from pytbptt.data.vocabulary import DICTIONARY, TOKENIZER
from pytbptt.errors import InputError
from pytbptt.nn.adaptive import MASKED_BIAS
from pytbptt.runtime.atomic import writable_folder
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
    """Output directory for dict.txt and checkpoint_best.pt. Existing files are not overwritten; an interrupted
    conversion is completed."""
    vocabulary: str = ""
    """Its vocabulary: TransfoXL's vocab.bin, kimiyoung's cache.pt, fairseq's dict.txt, awd-lstm-lm's corpus….data,
    fastai's itos.pkl, or a text file of symbols; empty: the vocabulary file in the transformers directory."""
    config: str = ""
    """JSON file with model settings, by the original project's names, to add to or override the checkpoint's;
    empty: none."""


def convert(settings: ConvertSettings) -> None:
    """Read, convert and write a checkpoint, and print a summary.

    Raises:
        InputError: an unreadable file, an unknown format, or parts that do not fit together.
        RunError: the result could not be written.
    """
    source, save_dir = Path(settings.source), Path(settings.save_dir)
    for path in (save_dir / checkpoints.BEST_CHECKPOINT, save_dir / checkpoints.LAST_CHECKPOINT):
        if path.exists():
            raise _overwrite_error(path)
    original = read(source, _config(settings.config))
    vocabulary_path = _vocabulary_path(source, settings.vocabulary, original.project)
    if original.project == "fairseq":
        model, vocabulary = original.model, Vocabulary.load(vocabulary_path)
        if len(vocabulary) != model.config.vocab_size:
            found = f"{len(vocabulary)} types"
            raise InputError(f"--vocabulary: {vocabulary_path}: found {found}, expected {model.config.vocab_size}")
        _warn_blocked_globals(source, original.blocked_globals)
    else:
        symbols, blocked_globals = read_symbols(vocabulary_path)
        model, vocabulary = renumber(original.model, symbols)
        _warn_blocked_globals(source, original.blocked_globals)
        _warn_blocked_globals(vocabulary_path, blocked_globals)
    _check_same_vocabulary(save_dir, vocabulary)
    with writable_folder(save_dir):
        # Write the checkpoint last: without it, a rerun starts the conversion again.
        vocabulary.save(save_dir)
        checkpoints.write(
            save_dir / checkpoints.BEST_CHECKPOINT, checkpoints.weights_only_checkpoint(model, vocabulary)
        )
    print(f"{original.project}, {original.model.num_parameters():,} parameters, {len(vocabulary):,} types")
    if original.warning:
        print(f"{source}: {original.warning}", file=sys.stderr)
    biases = model.softmax.biases[0].tolist()
    never_predicted = [symbol for symbol, bias in zip(Vocabulary.SPECIALS, biases, strict=False) if bias == MASKED_BIAS]
    if never_predicted:
        print(f"never predicted, because the original does not have them: {' '.join(never_predicted)}")
    print(f"python -m pytbptt.score TEXT --path {shlex.quote(str(save_dir / checkpoints.BEST_CHECKPOINT))}")


def _config(path: str) -> dict[str, Any]:
    if not path:
        return {}
    return weight_files.read_json(Path(path), "an object", "--config")


def _vocabulary_path(source: Path, vocabulary: str, project: str) -> Path:
    """The file named by --vocabulary, or else the one that comes with the checkpoint."""
    if vocabulary:
        return Path(vocabulary)
    for name in transfo_xl.VOCABULARY_FILES:
        if source.is_dir() and (source / name).exists():
            return source / name
    if project == "nvidia":
        return source  # NVIDIA's checkpoints contain the vocabulary
    expected = {
        "transfo_xl": "vocab.bin, vocab.pkl or vocab.txt of its tokenizer",
        "kimiyoung": "cache.pt from the folder of its data",
        "fairseq": "dict.txt from the folder of its data",
        "awd_lstm": "corpus.….data that main.py left in its folder",
        "fastai": "itos.pkl that goes with it",
    }
    raise InputError(f"--vocabulary: found none, expected the {expected[project]}")


def _check_same_vocabulary(save_dir: Path, vocabulary: Vocabulary) -> None:
    """Raise InputError if the directory has a different vocabulary; the same one is from an interrupted conversion."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(folder)
        for name in (TOKENIZER, DICTIONARY):
            existing, new = save_dir / name, Path(folder) / name
            if existing.exists() and not (new.exists() and filecmp.cmp(existing, new, shallow=False)):
                raise _overwrite_error(existing)


def _overwrite_error(path: Path) -> InputError:
    return InputError(f"--save-dir: found {path}, which would be overwritten; expected a folder without it")


def _warn_blocked_globals(path: Path, blocked_globals: Iterable[str]) -> None:
    if names := ", ".join(blocked_globals):
        print(f"{path}: read as plain data, without running their code: {names}", file=sys.stderr)


if __name__ == "__main__":
    run("python -m pytbptt.convert", ConvertSettings, convert, __doc__)
