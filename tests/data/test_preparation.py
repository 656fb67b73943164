"""Preparation: fairseq's tokens and dictionary, the same bytes for any number of workers, whole or not at all."""

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

from pytbptt.data import IndexedTokens, PrepareSettings, Vocabulary, blocks, load, prepare, tokenising
from pytbptt.errors import InputError, RunError

TEXT = "the cat sat\non the mat , the\tend\n\n <unk> zeta </s> \xa0 alpha\r\nold\rmac  lines\nno newline at the end"


def fairseq_lines(text: str) -> list[list[str]]:
    """fairseq's tokens, by its definition: universal newlines, runs of white space, </s> after each line."""
    lines = re.split("\r\n|\r|\n", text)
    if not lines[-1]:
        lines.pop()
    return [[*re.sub(r"\s+", " ", line).strip().split(), "</s>"] for line in lines]


def random_text(lines: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = [f"{draw.choice('abcdefgh')}{draw.randint(0, 300)}é" for _ in range(400)] + ["</s>", "<unk>", "日本"]
    ends = ["\n"] * 8 + [" \n", "\n\n", "\r\n"]
    return "".join(" ".join(draw.choices(words, k=draw.randint(0, 20))) + draw.choice(ends) for _ in range(lines))


def put(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def ran(folder: Path, text: Path, **settings) -> Path:
    prepare(PrepareSettings(trainpref=text, destdir=folder, **({"workers": 1} | settings)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", random_text(300), "\n", "one", "a\n\n\n"])
def test_words_are_fairseqs(tmp_path, text):
    put(tmp_path / "text", text)
    put(tmp_path / "other", "the zebra sat\n<unk>\n")
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


def test_report_is_fairseqs_in_spirit(tmp_path, capsys):
    put(tmp_path / "text", "a a b\nc <unk>\n")
    ran(tmp_path / "bin", tmp_path / "text", thresholdsrc=2)
    shown = capsys.readouterr().out
    assert "Dictionary: 8 types" in shown
    assert "2 sents, 7 tokens, 28.6% replaced by <unk>" in shown  # the <unk> of the text replaces nothing
    assert f"Wrote preprocessed data to {tmp_path / 'bin'}" in shown


@pytest.mark.parametrize("kind", [{}, {"bytes": True}, {"bpe": 300}], ids=["words", "bytes", "bpe"])
@pytest.mark.parametrize("documents", ["file", "line", "blank"])
def test_any_number_of_workers_writes_the_same(tmp_path, monkeypatch, kind, documents):
    """Also over blocks that are far shorter than the text, and as one block for what does not depend on blocks."""
    text = put(tmp_path / "text", random_text(400))
    one_block = ran(tmp_path / "whole", text, documents=documents, **kind)
    monkeypatch.setattr("pytbptt.data.preparation.BLOCK_BYTES", 1)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 500)
    monkeypatch.setattr(tokenising, "SLICE", 100)
    one = contents(ran(tmp_path / "one", text, documents=documents, **kind))
    three = contents(ran(tmp_path / "three", text, documents=documents, workers=3, **kind))
    assert one == three
    whole = contents(one_block)
    assert one["dict.txt"] == whole["dict.txt"]
    assert one["train.bin"] == whole["train.bin"]
    assert load(tmp_path / "one").documents.tolist() == load(one_block).documents.tolist()


@pytest.mark.parametrize("kind", [{"bytes": True}, {"bpe": 300}, {}], ids=["bytes", "bpe", "words"])
def test_lines_longer_than_a_block_are_cut_without_a_trace(tmp_path, monkeypatch, kind):
    text = put(tmp_path / "text", "a long line " * 200 + "é" * 300 + "\nshort\n" + "x" * 400)
    whole = contents(ran(tmp_path / "whole", text, **kind))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    cut = contents(ran(tmp_path / "cut", text, **kind))
    assert cut["train.bin"] == whole["train.bin"]
    assert load(tmp_path / "cut").documents.tolist() == [0]


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
    put(tmp_path / "text", text)
    tokens = load(ran(tmp_path / "bin", tmp_path / "text", documents=documents, **kind))
    starts = [*tokens.documents.tolist(), len(tokens)]
    found = [tokens[a:b] for a, b in itertools.pairwise(starts)]
    assert [tokens.vocabulary.decode(document[:-1]) for document in found] == expected
    assert all(document[-1] == Vocabulary.EOS for document in found)
    assert sum((document == Vocabulary.EOS).sum() for document in found) == len(expected)


@pytest.mark.parametrize(("documents", "starts"), [("file", [0]), ("line", [0, 1, 3, 4, 5, 7]), ("blank", [0, 5])])
def test_documents_of_words(tmp_path, documents, starts):
    put(tmp_path / "text", "\na\n\n \nb\nc d")
    tokens = load(ran(tmp_path / "bin", tmp_path / "text", documents=documents))
    assert len(tokens) == 10
    assert tokens.documents.tolist() == starts
    fairseq = ran(tmp_path / "fairseq", tmp_path / "text", documents=documents, index_format="fairseq")
    assert not load(fairseq).has_document_index
    assert load(fairseq)[:].tolist() == tokens[:].tolist()


def test_bytes_take_anything(tmp_path):
    data = bytes(range(256)) * 3
    (tmp_path / "text").write_bytes(data)
    tokens = load(ran(tmp_path / "bin", tmp_path / "text", bytes=True))
    assert len(tokens.vocabulary) == 264
    assert (tokens[:-1] - 4).astype(np.uint8).tobytes() == data
    assert tokens[-1] == Vocabulary.EOS


@pytest.mark.parametrize("kind", [{}, {"bpe": 300}], ids=["words", "bpe"])
@pytest.mark.parametrize("workers", [1, 2])
def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 50)
    monkeypatch.setattr("pytbptt.data.preparation.BLOCK_BYTES", 1)
    (tmp_path / "text").write_bytes(b"some line\n" * 30 + b"caf\xe9\n" + b"more\n" * 30)
    with pytest.raises(InputError, match=r"text: found a byte at 303 \(0xe9\) that is not UTF-8.*--bytes takes"):
        ran(tmp_path / "bin", tmp_path / "text", workers=workers, **kind)
    assert list((tmp_path / "bin").glob("*")) == []


def test_bad_input_is_one_clear_line(tmp_path):
    text = put(tmp_path / "text", "a b\n")
    (tmp_path / "empty").touch()
    (tmp_path / "file").touch()
    wrong = [
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
    for settings, message in wrong:
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            prepare(PrepareSettings(**({"destdir": tmp_path / "bin"} | settings)))
        assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytbptt.data.writer.os.fsync", full)
    with pytest.raises(RunError, match="no space left on the disk"):
        ran(tmp_path / "bin", put(tmp_path / "text", "a b\n"))
    assert not (tmp_path / "bin").exists()


def test_a_second_vocabulary_is_not_put_over_a_corpus(tmp_path):
    text, more = put(tmp_path / "text", "a b\n"), put(tmp_path / "more", "b c\n")
    folder = ran(tmp_path / "bin", text)
    before = contents(folder)
    with pytest.raises(InputError, match=r"found a prepared corpus there.*--srcdict"):
        ran(folder, more)
    assert contents(folder) == before
    prepare(PrepareSettings(testpref=more, destdir=folder, srcdict=folder / "dict.txt", workers=1))
    assert {**contents(folder), **before} == contents(folder)
    assert load(folder, "test")[:].tolist() == [load(folder).vocabulary.index("b"), 3, 2]


@pytest.mark.parametrize("kind", [{"bytes": True}, {"bpe": 300}], ids=["bytes", "bpe"])
def test_a_given_dictionary_brings_its_kind(tmp_path, kind):
    text = put(tmp_path / "text", random_text(50))
    folder = ran(tmp_path / "bin", text, **kind)
    again = ran(tmp_path / "again", text, srcdict=folder / "dict.txt")
    assert contents(again) == contents(folder)


def start_forked(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path):
    """Killed while it writes, with workers, which must die too; the next run makes of it what an unhurt run does."""
    text = put(tmp_path / "text", random_text(20_000) * 4)
    expected = contents(ran(tmp_path / "whole", text))
    folder = tmp_path / "bin"
    process = start_forked(ran, folder, text)
    temporary = folder / "train.bin.tmp"
    while not (temporary.exists() and temporary.stat().st_size > 0):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert_nothing_whole(folder)
    assert contents(ran(folder, text)) == expected


def assert_nothing_whole(folder: Path) -> None:
    assert not list(folder.glob("*.idx"))
    with pytest.raises(InputError, match="found splits: none"):
        load(folder)


def test_a_run_killed_between_its_renames_leaves_nothing_whole(tmp_path, monkeypatch):
    text = put(tmp_path / "text", random_text(50))
    expected = contents(ran(tmp_path / "whole", text))

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    for method in (
        "writer.IndexedWriter.publish_bin",
        "vocabulary.Vocabulary.save",
        "writer.IndexedWriter.publish_idx",
    ):
        folder = tmp_path / method
        with monkeypatch.context() as patch:
            patch.setattr(f"pytbptt.data.{method}", die)
            process = start_forked(ran, folder, text)
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_nothing_whole(folder)
        assert contents(ran(folder, text)) == expected


WITH_WORKERS = """
import multiprocessing, sys, time
from pytbptt.data import blocks, tokenising
def slow(block):
    time.sleep(60)
with blocks.Workers(2, tokenising.initialise, ("file", None)) as workers:
    iterator = workers.map(slow, [blocks.Block(None, 0, 0, True)] * 3)
    import threading
    threading.Timer(0.5, lambda: print(*(p.pid for p in multiprocessing.active_children()), flush=True)).start()
    next(iterator)
"""


def test_workers_die_with_a_killed_parent():
    process = subprocess.Popen([sys.executable, "-c", WITH_WORKERS], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.05)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_two_runs_into_one_place_do_not_mix(tmp_path):
    from pytbptt.data import IndexedWriter

    def other(folder: str) -> None:
        try:
            IndexedWriter(f"{folder}/train", np.uint16)
        except InputError as error:
            sys.exit(7 if "another process" in str(error) else 1)

    (tmp_path / "bin").mkdir()
    with IndexedWriter(tmp_path / "bin" / "train", np.uint16) as writer:
        process = start_forked(other, str(tmp_path / "bin"))
        process.join()
        assert process.exitcode == 7
        writer.add(np.array([5, 6]))
    assert IndexedTokens(tmp_path / "bin" / "train")[:].tolist() == [5, 6]


def test_the_command(tmp_path):
    put(tmp_path / "text", "a b\n")
    command = [sys.executable, "-m", "pytbptt.prepare", "--only-source", "--trainpref", tmp_path / "text"]
    done = subprocess.run([*command, "--destdir", tmp_path / "bin", "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(contents(tmp_path / "bin")) == ["dict.txt", "text.json", "train.bin", "train.idx", "train.size.json"]
