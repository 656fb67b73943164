"""Turns text files into an indexed corpus with its vocabulary: what `python -m pytbptt.prepare` does."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pytbptt.data.blocks import BLOCK_BYTES, Block, WorkerPool, split_blocks
from pytbptt.data.indexed import IndexFormat, check_index_format, token_dtype
from pytbptt.data.text_files import STANDARD_INPUT, TextFile, open_text
from pytbptt.data.text_format import DocumentUnit, TextFormat
from pytbptt.data.text_size import TextSize
from pytbptt.data.tokenising import EncodedBlock, encode_bytes, encode_pieces, encode_words, init_worker, slice_text
from pytbptt.data.vocabulary import DICTIONARY, Vocabulary
from pytbptt.data.writer import IndexedWriter
from pytbptt.errors import InputError, RunError
from pytbptt.runtime.atomic import warn_once, writable_folder
from pytbptt.runtime.extras import import_extra, progress_bar

MAX_BYTES_PER_WORD = 25
"""Above this many bytes per word, the text probably has no spaces between words."""
MAX_CHARACTERS = 1 << 21
"""An upper bound on the pieces that single Unicode characters can need."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class PrepareSettings:
    """Turn text files into token files and a dictionary, as fairseq-preprocess does.

    By default tokens are words: what white space separates, and </s> at the end of every line. Texts are UTF-8, plain
    or compressed (gzip, bzip2, xz, zstd); - is the standard input.
    """

    trainpref: tuple[Path, ...] = ()
    """Training text, from which the vocabulary is made: one file or several, at exactly these paths; empty: none."""

    validpref: tuple[Path, ...] = ()
    """Validation text; empty: none."""

    testpref: tuple[Path, ...] = ()
    """Test text; empty: none."""

    destdir: Path = Path("data-bin")
    """Directory for dict.txt and {train,valid,test}.{bin,idx}."""

    only_source: bool = False
    """Accepted for fairseq compatibility; language-model data has no target side."""

    thresholdsrc: int = 0
    """Words with fewer occurrences are replaced by <unk>; with --chars, such characters are spelt as bytes."""

    nwordssrc: int = -1
    """Number of types to keep, the four special symbols included; -1 keeps all."""

    srcdict: Path | None = None
    """Use this dict.txt (and the tokenizer.json beside it, if any) instead of making a vocabulary."""

    bpe: int = 0
    """Train a byte-level BPE of this many pieces (256 or more) and use it instead of words; 0: words."""

    tokenizer: Path | None = None
    """Use this tokenizer.json, as the tokenizers package writes it, instead of words."""

    chars: bool = False
    """Use characters instead of words, for text without spaces; characters not in the training text are spelt as
    bytes."""

    bytes: bool = False
    """Use bytes instead of words; accepts any file and keeps a byte order mark as data."""

    documents: DocumentUnit = "file"
    """What a document is: a whole file, a line, or what blank lines separate. Memory can be reset between them."""

    index_format: IndexFormat = "megatron"
    """Dialect of the .idx: Megatron-LM's remembers documents, fairseq's does not."""

    workers: int = available_cores()
    """Worker processes. The output does not depend on it."""

    def __post_init__(self) -> None:
        """Accept strings for paths, and a single path for a tuple of paths."""
        for name in ("trainpref", "validpref", "testpref"):
            paths = getattr(self, name)
            paths = [paths] if isinstance(paths, str | os.PathLike) else paths or []
            setattr(self, name, tuple(Path(path) for path in paths))
        for name in ("destdir", "srcdict", "tokenizer"):
            path = getattr(self, name)
            setattr(self, name, None if path is None else Path(path))


def prepare(settings: PrepareSettings) -> None:
    """Run preprocessing and print a summary. Output files appear only once all of them are complete.

    Raises:
        InputError: a missing, empty or non-UTF-8 file, or settings that contradict each other.
        RunError: the disk is full.
    """
    files = {"train": settings.trainpref, "valid": settings.validpref, "test": settings.testpref}
    paths = {split: files[split] for split in files if files[split]}
    _check(settings, paths)
    vocabulary = _preset_vocabulary(settings)
    _check_destination(settings.destdir, vocabulary, settings.documents)
    try:
        with writable_folder(settings.destdir, "--destdir"), ExitStack() as stack:
            binary = vocabulary is not None and vocabulary.kind == "bytes"
            splits = {
                split: [stack.enter_context(open_text(path, settings.destdir, binary=binary)) for path in paths[split]]
                for split in paths
            }
            if settings.bpe or settings.chars:
                vocabulary = _train_bpe(splits["train"], settings)
            total = sum(text.size for texts in splits.values() for text in texts)
            workers = settings.workers if total > BLOCK_BYTES else 1
            pool = stack.enter_context(WorkerPool(workers, init_worker, (settings.documents, vocabulary)))
            writers: dict[str, IndexedWriter] = {}
            sizes: dict[str, TextSize] = {}
            vocabulary = _encode(settings, splits, vocabulary, pool, writers, sizes, stack)
            _publish(settings.destdir, vocabulary, TextFormat(settings.documents), writers, sizes)
    except OSError as error:
        where = error.filename or settings.destdir
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{settings.destdir}: no space left on the disk for the corpus") from None
        raise InputError(f"{where}: found {error.strerror}, expected a place to write to") from None
    print(f"Wrote preprocessed data to {settings.destdir}")


def _check(settings: PrepareSettings, splits: dict[str, tuple[Path, ...]]) -> None:
    if not splits:
        raise InputError("found none of --trainpref, --validpref and --testpref, expected at least one")
    if sum(paths.count(STANDARD_INPUT) for paths in splits.values()) > 1:
        raise InputError("found - more than once, expected the standard input for one text only")
    unit_flags = [name for name in ("bytes", "chars", "bpe", "tokenizer", "srcdict") if getattr(settings, name)]
    if len(unit_flags) > 1:
        raise InputError(f"found {' and '.join('--' + flag for flag in unit_flags)}, expected at most one of them")
    if "train" not in splits and unit_flags in ([], ["chars"], ["bpe"]):
        raise InputError("found no --trainpref, expected one to make a vocabulary from (or --srcdict, or --bytes)")
    if unit_flags not in ([], ["chars"]) and (settings.thresholdsrc > 0 or settings.nwordssrc > 0):
        raise InputError(
            f"found --thresholdsrc or --nwordssrc with --{unit_flags[0]}, expected them with words or characters alone"
        )
    if settings.bpe and settings.bpe < 256:
        raise InputError(f"--bpe: found {settings.bpe}, expected 256 pieces (the bytes) or more")
    if settings.workers < 1:
        raise InputError(f"--workers: found {settings.workers}, expected 1 or more")
    check_index_format(settings.index_format)


def _preset_vocabulary(settings: PrepareSettings) -> Vocabulary | None:
    """The vocabulary, if the settings choose one that needs no training text."""
    if settings.bytes:
        return Vocabulary.bytes()
    if settings.srcdict is not None:
        return Vocabulary.load(settings.srcdict)
    if settings.tokenizer is None:
        return None
    vocabulary = Vocabulary.load_tokenizer(settings.tokenizer)
    first, second = vocabulary.encode("a\n"), vocabulary.encode("b\n")
    if vocabulary.encode("a\nb\n").tolist() != [*first, *second]:
        warn_once(
            f"{settings.tokenizer}: its pieces depend on the preceding line. Text is tokenized in parts of about "
            "65,536 characters, so pieces at the edges of parts differ from those of the whole text"
        )
    return vocabulary


def _check_destination(destination: Path, vocabulary: Vocabulary | None, documents: DocumentUnit) -> None:
    """Raise InputError if the destination has a corpus with another vocabulary or document unit: its splits would be
    misread."""
    if not any(destination.glob("*.idx")) or not (destination / DICTIONARY).exists():
        return
    if vocabulary is None or vocabulary != Vocabulary.load(destination):
        raise InputError(
            f"{destination}: found a prepared corpus there, expected an empty place (remove it, choose another "
            f"--destdir, or add to it with --srcdict {destination / DICTIONARY})"
        )
    existing = TextFormat.load(destination).documents
    if existing not in (None, documents):
        raise InputError(
            f"--documents: found {documents}, expected {existing}, as in the corpus in {destination} (or choose "
            "another --destdir)"
        )


def _encode(
    settings: PrepareSettings,
    splits: dict[str, list[TextFile]],
    vocabulary: Vocabulary | None,
    pool: WorkerPool,
    writers: dict[str, IndexedWriter],
    sizes: dict[str, TextSize],
    stack: ExitStack,
) -> Vocabulary:
    """Encode all splits to temporary files, fill `writers` and `sizes`, and return the vocabulary (built from the
    training text if None)."""
    builder = VocabularyBuilder(vocabulary)
    kind = "words" if vocabulary is None else vocabulary.kind
    function = {"words": encode_words, "bytes": encode_bytes, "bpe": encode_pieces}[kind]
    for split, texts in splits.items():
        names = ", ".join(text.name for text in texts)
        dtype = token_dtype(len(vocabulary)) if vocabulary is not None else np.dtype(np.int32)
        writer = IndexedWriter(settings.destdir / split, dtype, settings.index_format)
        writers[split] = writer
        stack.callback(writer.discard)
        blank = settings.documents == "blank"
        blocks = chain.from_iterable(
            split_blocks(text, allow_mid_word=kind == "bytes", keep_blank_runs=blank) for text in texts
        )
        size = TextSize()
        for encoded in _with_progress(pool.map(function, blocks), split, sum(text.size for text in texts)):
            tokens = encoded.tokens
            size += encoded.size
            if kind == "words":
                tokens, missing = builder.to_global_ids(encoded)
                size += TextSize(unknown=missing)
            writer.add(tokens, encoded.lengths, encoded.ends)
        if vocabulary is None:
            vocabulary = Vocabulary.from_counts(builder.counts(), settings.thresholdsrc, settings.nwordssrc)
            table, missing = builder.finalize(vocabulary)
            size += TextSize(unknown=missing)
            writer.renumber(table, token_dtype(len(vocabulary)))
            _warn_if_unsegmented(names, size)
        if writer.tokens == 0:
            raise InputError(f"{names}: found nothing but blank lines, expected text")
        writer.finish()
        sizes[split] = size = size + TextSize(writer.tokens)
        if split == next(iter(splits)):
            print(f"Dictionary: {len(vocabulary)} types")
        report = f"{writer.documents} documents, {writer.tokens} tokens"
        if kind == "words":
            replaced = 100 * size.unknown / writer.tokens
            report = f"{writer.sequences} sents, {writer.tokens} tokens, {replaced:.3}% replaced by <unk>"
        print(f"{split}: {names}: {report}")
        if size.altered and not size.unknown:
            warn_once(f"{names}: numbers per byte and per word will not be comparable: {size.incomparable_reason}")
    assert vocabulary is not None
    return vocabulary


def _warn_if_unsegmented(names: str, size: TextSize) -> None:
    if size.words <= size.lines or size.bytes > MAX_BYTES_PER_WORD * size.words:
        warn_once(
            f"{names}: found {size.words} words in {size.lines} lines, {size.bytes / max(1, size.words):.0f} bytes a "
            "word. Words are what spaces separate: for text without them, --chars takes characters and --bpe N pieces"
        )


def _publish(
    destination: Path,
    vocabulary: Vocabulary,
    text_format: TextFormat,
    writers: dict[str, IndexedWriter],
    sizes: dict[str, TextSize],
) -> None:
    """Rename the finished files into place, .idx files last: a .bin without an .idx is not a corpus."""
    for writer in writers.values():
        writer.publish_bin()
    vocabulary.save(destination)
    text_format.save(destination)
    for split, writer in writers.items():
        sizes[split].save(destination / split)
        writer.publish_idx()


class VocabularyBuilder:
    """Merges the workers' local word ids into global ones, and counts the words for a vocabulary.

    Global ids are by first appearance, specials first, until `finalize` (or from the start, if a vocabulary is given)
    replaces them by the vocabulary's.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._ids = {symbol: number for number, symbol in enumerate(Vocabulary.SPECIALS)}
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._tables: dict[int, NDArray[np.int32]] = {}  # by worker: its local ids → global ids; -1 for unknown words

    def to_global_ids(self, encoded: EncodedBlock) -> tuple[NDArray[np.int32], int]:
        """The block's tokens as global ids, and the number of <unk> among them."""
        table = self._tables.get(encoded.worker, np.arange(len(Vocabulary.SPECIALS), dtype=np.int32))
        if encoded.new_words:
            new = np.fromiter(map(self._word_id, encoded.new_words), np.int32, len(encoded.new_words))
            table = np.concatenate([table, new])
        self._tables[encoded.worker] = table
        tokens = table[encoded.tokens]
        if self._vocabulary is None:
            counts = np.bincount(tokens, minlength=len(self._ids)).astype(np.int64)
            counts[: len(self._counts)] += self._counts
            self._counts = counts
            return tokens, 0
        unknown = tokens < 0
        tokens[unknown] = Vocabulary.UNK
        return tokens, int(unknown.sum())

    def _word_id(self, word: str) -> int:
        if self._vocabulary is None:
            return self._ids.setdefault(word, len(self._ids))
        return self._vocabulary.index(word) if word in self._vocabulary else -1

    def counts(self) -> dict[str, int]:
        """The count of every word so far."""
        return dict(zip(self._ids, self._counts.tolist(), strict=True))

    def finalize(self, vocabulary: Vocabulary) -> tuple[NDArray[np.int32], int]:
        """Switch to the vocabulary's ids. Returns the table from provisional to final ids, and the number of <unk>
        tokens so far."""
        self._vocabulary = vocabulary
        final = np.fromiter(map(self._word_id, self._ids), np.int32, len(self._ids))
        self._tables = {worker: final[table] for worker, table in self._tables.items()}
        unknown = final < 0
        return np.where(unknown, Vocabulary.UNK, final), int(self._counts[unknown].sum())


def _with_progress(results: Iterator[tuple[Block, EncodedBlock]], name: str, size: int) -> Iterator[EncodedBlock]:
    with progress_bar(desc=name, total=size, unit="B", unit_scale=True, disable=None) as bar:
        for block, encoded in results:
            yield encoded
            bar.update(block.stop - block.start)


def _train_bpe(texts: list[TextFile], settings: PrepareSettings) -> Vocabulary:
    """Trains a byte-level BPE on texts, read block by block; the same texts give the same pieces.

    --chars is a BPE whose merges join only the bytes of single characters.
    """
    # Set explicitly, so that tokenizers does not warn when the process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizers = import_extra("tokenizers")
    Regex, decoders, pre_tokenizers = tokenizers.Regex, tokenizers.decoders, tokenizers.pre_tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Splitting after newlines first makes the pieces of a line independent of the lines around it, and so of the
    # blocks that a file is read in.
    split = (Regex(r"(?m:.)|\n"), "isolated") if settings.chars else (Regex("\n"), "merged_with_previous")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(*split),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not settings.chars),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    pieces, min_frequency = settings.bpe, 0
    if settings.chars:
        num_types = settings.nwordssrc - len(Vocabulary.SPECIALS)
        pieces, min_frequency = max(256, num_types) if settings.nwordssrc > 0 else MAX_CHARACTERS, settings.thresholdsrc
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=pieces,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    size = sum(text.size for text in texts)
    with progress_bar(desc="bpe", total=size, unit="B", unit_scale=True, disable=None) as bar:

        def lines() -> Iterator[list[str]]:
            for text in texts:
                for block in split_blocks(text, allow_mid_word=False, keep_blank_runs=False):
                    yield list(slice_text(block.text()))
                    bar.update(block.stop - block.start)

        tokenizer.train_from_iterator(lines(), trainer)
    return Vocabulary.from_tokenizer(tokenizer.to_str())
