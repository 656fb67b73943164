"""The built-in corpus, and the compression baselines that its models are compared with."""

import gzip
import itertools
import lzma
import math
import multiprocessing
import platform
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from pytbptt.data import (
    IndexedTokens,
    Vocabulary,
    built_in_corpus,
    compressed_bits_per_byte,
    load,
    order1_bits_per_byte,
    text_bytes,
    text_size,
    write_indexed,
)
from pytbptt.errors import InputError, RunError

NAME = f"python-stdlib-{platform.python_version()}"


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    return built_in_corpus.python_stdlib(tmp_path_factory.mktemp("data-bin"))


def document_contents(tokens):
    starts = [*tokens.documents.tolist(), len(tokens)]
    for start, stop in itertools.pairwise(starts):
        assert tokens[stop - 1] == Vocabulary.EOS
        yield (tokens[start : stop - 1] - 4).astype(np.uint8).tobytes()


def test_stdlib_corpus_contains_each_file_once(stdlib):
    assert stdlib.name == NAME
    source = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if path.is_file() and not excluded & set(path.relative_to(source).parts[:-1])
    )
    sizes = {}
    for split in ("train", "valid", "test"):
        tokens = load(stdlib, split)
        assert tokens.has_document_index
        assert tokens.vocabulary.kind == "bytes"
        files = [path for path in paths if built_in_corpus.assign_split(path) == split]
        assert list(document_contents(tokens)) == [(source / path).read_bytes() for path in files]
        sizes[split] = len(files)
    assert sizes["train"] / len(paths) == pytest.approx(0.94, abs=0.03)
    assert min(sizes.values()) > 0


def test_load_by_name_uses_cache(tmp_path, monkeypatch, stdlib):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "data-bin" / NAME).symlink_to(stdlib)
    assert load("python-stdlib", "test").fingerprint() == load(stdlib, "test").fingerprint()


def build_corpus(folder):
    built_in_corpus.python_stdlib(folder)


def test_concurrent_corpus_builds_do_not_disturb_one_another(tmp_path, monkeypatch, stdlib):
    files = ["ast.py", "bisect.py", "heapq.py", "json/decoder.py", "xml/sax/handler.py", "token.py"]
    monkeypatch.setattr(built_in_corpus, "source_files", lambda source: (source / path for path in files))
    processes = [
        multiprocessing.get_context("fork").Process(target=build_corpus, args=(tmp_path / "data",)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]
    assert len(load(tmp_path / "data" / NAME, "train")) > 0


def test_missing_files_raise(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere: found no such directory, expected one written by .*python-stdlib"):
        load("nowhere")
    Vocabulary.bytes().save(tmp_path)
    with pytest.raises(InputError, match="found splits: none; expected train"):
        load(tmp_path)
    write_indexed(tmp_path / "valid", [np.array([5])], np.uint16)
    with pytest.raises(InputError, match=re.escape("found splits: valid; expected test (test.idx and test.bin)")):
        load(tmp_path, "test")
    assert len(load(tmp_path, "valid")) == 1
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(InputError, match=r"dict.txt: found no readable file"):
        load(tmp_path, "valid")
    monkeypatch.setattr(built_in_corpus, "source_files", lambda source: iter(()))
    with pytest.raises(RunError, match=r"found no .py files"):
        built_in_corpus.python_stdlib(tmp_path / "data")


def byte_corpus(prefix, texts):
    vocabulary = Vocabulary.bytes()
    write_indexed(prefix, [np.append(vocabulary.encode(text), vocabulary.EOS) for text in texts], np.uint16)
    return IndexedTokens(prefix, vocabulary)


def test_compressed_size_excludes_separators(tmp_path):
    texts = [b"some text, " * 50, b"more text\n" * 30, b""]
    tokens = byte_corpus(tmp_path / "x", texts)
    text = b"".join(texts)
    assert text_bytes(tokens) == len(text)
    bits = compressed_bits_per_byte(tokens)
    assert bits["gzip -9"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
    assert bits["xz -9"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))


def test_order1_bits_match_hand_computation(tmp_path):
    train, test = byte_corpus(tmp_path / "train", [b"ab", b"ab"]), byte_corpus(tmp_path / "test", [b"aab"])
    # train counts: a after </s> 2 of 2, a after a 0 of 2, b after a 2 of 2, </s> after b 2 of 2; add-one over 257
    expected = -sum(math.log2(p) for p in (3 / 259, 1 / 259, 3 / 259, 3 / 259)) / 3
    assert order1_bits_per_byte(train, test) == pytest.approx(expected)


def test_baselines_do_not_depend_on_read_size(tmp_path, monkeypatch, stdlib):
    tokens = load(stdlib, "test")
    expected = order1_bits_per_byte(tokens, tokens), text_bytes(tokens)
    monkeypatch.setattr("pytbptt.data.baselines.READ_SIZE", 10_007)
    assert (order1_bits_per_byte(tokens, tokens), text_bytes(tokens)) == pytest.approx(expected)
    assert 2.5 < order1_bits_per_byte(load(stdlib, "train"), tokens) < 4.5


def test_text_size_of_stdlib_corpus(stdlib):
    for split in ("train", "valid", "test"):
        tokens = load(stdlib, split)
        size = text_size(tokens)
        assert (size.tokens, size.bytes) == (len(tokens), text_bytes(tokens))
        assert size.bytes >= size.characters > size.words > size.lines > 0


def test_baselines_require_byte_vocabulary(tmp_path):
    write_indexed(tmp_path / "x", [np.array([5])], np.uint16)
    words = IndexedTokens(tmp_path / "x", Vocabulary.from_counts({"a": 1}))
    for baseline in (text_bytes, compressed_bits_per_byte):
        with pytest.raises(InputError, match="found a vocabulary of words, expected one of bytes"):
            baseline(words)
    with pytest.raises(InputError, match="found separators only"):
        compressed_bits_per_byte(byte_corpus(tmp_path / "y", [b""]))
