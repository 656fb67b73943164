"""prepare: fairseq's tokens and dictionary, independence of the number of workers, and atomic output."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pytbptt.data import IndexedTokens, IndexedWriter, PrepareSettings, Vocabulary, blocks, load, prepare, tokenising
from pytbptt.errors import InputError, RunError

TEXT = "the cat sat\non the mat , the\tend\n\n <unk> zeta </s> \xa0 alpha\r\nold\rmac  lines\nno newline at the end"


def fairseq_lines(text: str) -> list[list[str]]:
    """Reference implementation of fairseq's tokens: universal newlines, split at white space, </s> after each line."""
    lines = re.split("\r\n|\r|\n", text)
    if not lines[-1]:
        lines.pop()
    return [[*re.sub(r"\s+", " ", line).strip().split(), "</s>"] for line in lines]


def random_text(lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = [f"{rng.choice('abcdefgh')}{rng.randint(0, 300)}é" for _ in range(400)] + ["</s>", "<unk>", "日本"]
    ends = ["\n"] * 8 + [" \n", "\n\n", "\r\n"]
    return "".join(" ".join(rng.choices(words, k=rng.randint(0, 20))) + rng.choice(ends) for _ in range(lines))


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def prepare_folder(folder: Path, text: Path, **settings) -> Path:
    prepare(PrepareSettings(trainpref=text, destdir=folder, **({"workers": 1} | settings)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", random_text(300), "\n", "one", "a\n\n\n"])
def test_tokenization_matches_fairseq(tmp_path, text):
    write_text(tmp_path / "text", text)
    write_text(tmp_path / "other", "the zebra sat\n<unk>\n")
    prepare(
        PrepareSettings(trainpref=tmp_path / "text", testpref=tmp_path / "other", destdir=tmp_path / "bin", workers=1)
    )
    lines = fairseq_lines(text)
    counts = Counter(word for line in lines for word in line)
    vocabulary = Vocabulary.load(tmp_path / "bin")
    assert vocabulary == Vocabulary.from_counts(counts)
    tokens = load(tmp_path / "bin", "train")
    assert tokens[:].tolist() == [vocabulary.index(word) for line in lines for word in line]
    assert tokens.lengths.tolist() == [len(line) for line in lines]
    assert tokens.dtype == np.uint16
    test = load(tmp_path / "bin", "test")
    assert test[:].tolist() == [
        vocabulary.index(word) for line in fairseq_lines("the zebra sat\n<unk>\n") for word in line
    ]


def test_report_prints_counts(tmp_path, capsys):
    write_text(tmp_path / "text", "a a b\nc <unk>\n")
    prepare_folder(tmp_path / "bin", tmp_path / "text", thresholdsrc=2)
    stdout = capsys.readouterr().out
    assert "Dictionary: 8 types" in stdout
    assert "2 sents, 7 tokens, 28.6% replaced by <unk>" in stdout  # <unk> in the text itself is not counted as replaced
    assert f"Wrote preprocessed data to {tmp_path / 'bin'}" in stdout


@pytest.mark.parametrize("kind", [{}, {"bytes": True}, {"bpe": 300}], ids=["words", "bytes", "bpe"])
@pytest.mark.parametrize("documents", ["file", "line", "blank"])
def test_output_does_not_depend_on_number_of_workers(tmp_path, monkeypatch, kind, documents):
    """With blocks much shorter than the text. Tokens, dictionary and documents do not depend on the blocks either."""
    text = write_text(tmp_path / "text", random_text(400))
    one_block = prepare_folder(tmp_path / "one-block", text, documents=documents, **kind)
    monkeypatch.setattr("pytbptt.data.preparation.BLOCK_BYTES", 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 500)
    monkeypatch.setattr(tokenising, "SLICE_CHARS", 100)
    one_worker = contents(prepare_folder(tmp_path / "one", text, documents=documents, **kind))
    three_workers = contents(prepare_folder(tmp_path / "three", text, documents=documents, workers=3, **kind))
    assert one_worker == three_workers
    expected = contents(one_block)
    assert one_worker["dict.txt"] == expected["dict.txt"]
    assert one_worker["train.bin"] == expected["train.bin"]
    assert load(tmp_path / "one").documents.tolist() == load(one_block).documents.tolist()


@pytest.mark.parametrize("kind", [{"bytes": True}, {"bpe": 300}, {}], ids=["bytes", "bpe", "words"])
def test_block_size_does_not_change_tokens(tmp_path, monkeypatch, kind):
    text = write_text(tmp_path / "text", "a long line " * 200 + "é" * 300 + "\nshort\n" + "x" * 400)
    expected = contents(prepare_folder(tmp_path / "expected", text, **kind))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    actual = contents(prepare_folder(tmp_path / "actual", text, **kind))
    assert actual["train.bin"] == expected["train.bin"]
    assert load(tmp_path / "actual").documents.tolist() == [0]


@pytest.mark.parametrize("kind", [{"bytes": True}, {"bpe": 270}], ids=["bytes", "bpe"])
@pytest.mark.parametrize(
    ("text", "documents", "expected"),
    [
        ("a\nb\n", "file", ["a\nb\n"]),
        ("a\nb", "file", ["a\nb"]),
        ("a\n\nbé\n", "line", ["a", "", "bé"]),
        ("a\nb", "line", ["a", "b"]),
        ("\n \na\nb\n\n\t\nc\n\n", "blank", ["a\nb\n", "c\n"]),
        ("a\n\nb", "blank", ["a\n", "b"]),
    ],
)
def test_documents_end_with_one_separator(tmp_path, kind, text, documents, expected):
    write_text(tmp_path / "text", text)
    tokens = load(prepare_folder(tmp_path / "bin", tmp_path / "text", documents=documents, **kind))
    starts = [*tokens.documents.tolist(), len(tokens)]
    actual = [tokens[a:b] for a, b in itertools.pairwise(starts)]
    assert [tokens.vocabulary.decode(document[:-1]) for document in actual] == expected
    assert all(document[-1] == Vocabulary.EOS for document in actual)
    assert sum((document == Vocabulary.EOS).sum() for document in actual) == len(expected)


@pytest.mark.parametrize(("documents", "starts"), [("file", [0]), ("line", [0, 1, 3, 4, 5, 7]), ("blank", [0, 5])])
def test_document_boundaries_of_word_corpora(tmp_path, documents, starts):
    write_text(tmp_path / "text", "\na\n\n \nb\nc d")
    tokens = load(prepare_folder(tmp_path / "bin", tmp_path / "text", documents=documents))
    assert len(tokens) == 10
    assert tokens.documents.tolist() == starts
    fairseq = prepare_folder(tmp_path / "fairseq", tmp_path / "text", documents=documents, index_format="fairseq")
    assert not load(fairseq).has_document_index
    assert load(fairseq)[:].tolist() == tokens[:].tolist()


def test_bytes_mode_accepts_binary(tmp_path):
    data = bytes(range(256)) * 3
    (tmp_path / "text").write_bytes(data)
    tokens = load(prepare_folder(tmp_path / "bin", tmp_path / "text", bytes=True))
    assert len(tokens.vocabulary) == 264
    assert (tokens[:-1] - 4).astype(np.uint8).tobytes() == data
    assert tokens[-1] == Vocabulary.EOS


@pytest.mark.parametrize("kind", [{}, {"bpe": 300}], ids=["words", "bpe"])
@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_utf8_raises_with_byte_offset(tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 50)
    monkeypatch.setattr("pytbptt.data.preparation.BLOCK_BYTES", 1)
    (tmp_path / "text").write_bytes(b"some line\n" * 30 + b"caf\xe9\n" + b"more\n" * 30)
    with pytest.raises(InputError, match=r"text: found a byte at 303 \(0xe9\) that is not UTF-8.*--bytes takes"):
        prepare_folder(tmp_path / "bin", tmp_path / "text", workers=workers, **kind)
    assert list((tmp_path / "bin").glob("*")) == []


def test_invalid_arguments_raise_one_line_errors(tmp_path):
    text = write_text(tmp_path / "text", "a b\n")
    (tmp_path / "empty").touch()
    (tmp_path / "file").touch()
    invalid = [
        ({}, "found none of --trainpref"),
        ({"testpref": text}, "found no --trainpref, expected one to make a vocabulary from"),
        ({"trainpref": tmp_path / "no"}, "no: found no such file"),
        ({"trainpref": tmp_path}, "neither a regular file nor a pipe"),
        ({"trainpref": tmp_path / "empty"}, "empty: found an empty file"),
        ({"trainpref": text, "validpref": tmp_path / "empty"}, "empty: found an empty file"),
        ({"trainpref": text, "destdir": tmp_path / "file"}, "file: found"),
        ({"trainpref": text, "bytes": True, "bpe": 300}, "found --bytes and --bpe, expected at most one"),
        ({"trainpref": text, "bpe": 100}, "--bpe: found 100, expected 256"),
        ({"trainpref": text, "bytes": True, "thresholdsrc": 3}, "--thresholdsrc or --nwordssrc with --bytes"),
        ({"trainpref": text, "workers": 0}, "--workers: found 0"),
        ({"trainpref": text, "srcdict": tmp_path / "no"}, "no: found no readable file"),
    ]
    for settings, message in invalid:
        with pytest.raises(InputError, match=re.escape(message)) as error:
            prepare(PrepareSettings(**({"destdir": tmp_path / "bin"} | settings)))
        assert "\n" not in str(error.value)


def test_full_disk_removes_output(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytbptt.data.writer.os.fsync", fail)
    with pytest.raises(RunError, match="no space left on the disk"):
        prepare_folder(tmp_path / "bin", write_text(tmp_path / "text", "a b\n"))
    assert not (tmp_path / "bin").exists()


def test_new_vocabulary_in_existing_folder_is_refused(tmp_path):
    text, more = write_text(tmp_path / "text", "a b\n"), write_text(tmp_path / "more", "b c\n")
    folder = prepare_folder(tmp_path / "bin", text)
    before = contents(folder)
    with pytest.raises(InputError, match=r"found a prepared corpus there.*--srcdict"):
        prepare_folder(folder, more)
    assert contents(folder) == before
    prepare(PrepareSettings(testpref=more, destdir=folder, srcdict=folder / "dict.txt", workers=1))
    assert {**contents(folder), **before} == contents(folder)
    assert load(folder, "test")[:].tolist() == [load(folder).vocabulary.index("b"), 3, 2]


@pytest.mark.parametrize("kind", [{"bytes": True}, {"bpe": 300}], ids=["bytes", "bpe"])
def test_srcdict_selects_tokenizer_kind(tmp_path, kind):
    text = write_text(tmp_path / "text", random_text(50))
    folder = prepare_folder(tmp_path / "bin", text, **kind)
    with_srcdict = prepare_folder(tmp_path / "with-srcdict", text, srcdict=folder / "dict.txt")
    assert contents(with_srcdict) == contents(folder)


def start_forked(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_killed_prepare_leaves_no_loadable_corpus(tmp_path):
    """Killed while it writes; the next run into the same folder gives the output of an uninterrupted one."""
    text = write_text(tmp_path / "text", random_text(20_000) * 4)
    expected = contents(prepare_folder(tmp_path / "expected", text))
    folder = tmp_path / "bin"
    process = start_forked(prepare_folder, folder, text)
    temporary = folder / "train.bin.tmp"
    while not (temporary.exists() and temporary.stat().st_size > 0):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert_not_loadable(folder)
    assert contents(prepare_folder(folder, text)) == expected


def assert_not_loadable(folder: Path) -> None:
    assert not list(folder.glob("*.idx"))
    with pytest.raises(InputError, match="found splits: none"):
        load(folder)


def test_prepare_killed_between_renames_leaves_no_loadable_corpus(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text", random_text(50))
    expected = contents(prepare_folder(tmp_path / "expected", text))

    def kill_self(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    for method in (
        "writer.IndexedWriter.publish_bin",
        "vocabulary.Vocabulary.save",
        "writer.IndexedWriter.publish_idx",
    ):
        folder = tmp_path / method
        with monkeypatch.context() as patch:
            patch.setattr(f"pytbptt.data.{method}", kill_self)
            process = start_forked(prepare_folder, folder, text)
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_not_loadable(folder)
        assert contents(prepare_folder(folder, text)) == expected


PROGRAM_WITH_WORKERS = """
import multiprocessing, sys, time
from pytbptt.data import blocks, tokenising
def slow(block):
    time.sleep(60)
with blocks.WorkerPool(2, tokenising.init_worker, ("file", None)) as workers:
    iterator = workers.map(slow, [blocks.Block(None, 0, 0, True)] * 3)
    import threading
    threading.Timer(0.5, lambda: print(*(p.pid for p in multiprocessing.active_children()), flush=True)).start()
    next(iterator)
"""


def test_workers_end_when_parent_is_killed():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM_WITH_WORKERS], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in process_state(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.05)


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_concurrent_writers_are_refused(tmp_path):
    def open_writer(folder: str) -> None:
        try:
            IndexedWriter(f"{folder}/train", np.uint16)
        except InputError as error:
            sys.exit(7 if "another process" in str(error) else 1)

    (tmp_path / "bin").mkdir()
    with IndexedWriter(tmp_path / "bin" / "train", np.uint16) as writer:
        process = start_forked(open_writer, str(tmp_path / "bin"))
        process.join()
        assert process.exitcode == 7
        writer.add(np.array([5, 6]))
    assert IndexedTokens(tmp_path / "bin" / "train")[:].tolist() == [5, 6]


def test_prepare_cli_writes_expected_files(tmp_path):
    write_text(tmp_path / "text", "a b\n")
    command = [sys.executable, "-m", "pytbptt.prepare", "--only-source", "--trainpref", tmp_path / "text"]
    flags = ["--destdir", tmp_path / "bin", "--workers", "2"]
    process = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert sorted(contents(tmp_path / "bin")) == ["dict.txt", "text.json", "train.bin", "train.idx", "train.size.json"]
