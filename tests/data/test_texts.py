"""Texts as people have them: compressed, from pipes, several, with a byte order mark, without spaces, or no texts."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pytbptt.data import PrepareSettings, Vocabulary, load, prepare
from pytbptt.errors import InputError
from pytbptt.runtime.atomic import warn_once

TEXT = "the cat sat\non the mat , the end\n\nçà 日本 🙂\n".encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _every_warning_anew() -> None:
    warn_once.cache_clear()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def ran(folder: Path, *texts: Path, **settings) -> dict[str, bytes]:
    prepare(PrepareSettings(**({"trainpref": texts, "destdir": folder, "workers": 1} | settings)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ids(folder: Path) -> list[int]:
    return load(folder, "train")[:].tolist()


@pytest.mark.parametrize("through", ["file", "pipe"])
@pytest.mark.parametrize("packing", ["plain", *PACK])
@pytest.mark.parametrize("settings", [{}, {"bytes": True}, {"bpe": 260}, {"chars": True}], ids=str)
def test_packed_or_piped_is_the_plain_text(tmp_path, packing, through, settings):
    expected = ran(tmp_path / "expected", put(tmp_path / "plain", TEXT), **settings)
    half = len(TEXT) // 2
    pack = PACK.get(packing, bytes)
    text = put(tmp_path / "text", pack(TEXT[:half]) + pack(TEXT[half:]))  # each format allows several one after another
    if through == "pipe":
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=(text.read_bytes(),), daemon=True).start()
        text = pipe
    assert ran(tmp_path / "found", text, **settings) == expected


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("packing", PACK)
def test_damaged_packing_is_refused_and_leaves_nothing(tmp_path, packing, damage):
    content = PACK[packing](os.urandom(2000).hex().encode())
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    text = put(tmp_path / "text", content[:middle] if damage == "cut" else flipped)
    if packing == "zstd" and damage == "flipped":
        text.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(b"text " * 99)[:-1] + b"\0")
    with pytest.raises(InputError, match=f"text: found damaged or incomplete {packing} data"):
        ran(tmp_path / "bin", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_standard_input(tmp_path):
    expected = ran(tmp_path / "expected", put(tmp_path / "text", TEXT))
    command = [sys.executable, "-m", "pytbptt.prepare", "--trainpref", "-", "--destdir"]
    for name, content in {"plain": TEXT, "packed": gzip.compress(TEXT)}.items():
        subprocess.run([*command, tmp_path / name], input=content, check=True)
        assert {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} == expected
    with open(tmp_path / "text", "rb") as redirected:
        subprocess.run([*command, tmp_path / "redirected"], stdin=redirected, check=True)
    assert {path.name: path.read_bytes() for path in sorted((tmp_path / "redirected").iterdir())} == expected
    nothing = subprocess.run([*command, tmp_path / "bin"], input=b"", capture_output=True)
    assert nothing.returncode == 2
    assert b"standard input: found an empty file" in nothing.stderr
    with pytest.raises(InputError, match="found - more than once"):
        ran(tmp_path / "bin", Path("-"), validpref="-")


def test_several_files_are_several_documents(tmp_path):
    first, second = put(tmp_path / "first", b"a b\nc"), put(tmp_path / "second", gzip.compress(b"d\n"))
    ran(tmp_path / "bin", first, second, validpref=[second, first])
    train, valid = load(tmp_path / "bin", "train"), load(tmp_path / "bin", "valid")
    assert [train.vocabulary.symbol(token) for token in train[:].tolist()] == "a b </s> c </s> d </s>".split()
    assert train.documents.tolist() == [0, 5]
    assert valid[:].tolist() == [*train[5:].tolist(), *train[:5].tolist()]


@pytest.mark.parametrize("settings", [{}, {"bpe": 260}, {"chars": True}], ids=str)
def test_a_byte_order_mark_is_no_text(tmp_path, settings):
    expected = ran(tmp_path / "expected", put(tmp_path / "plain", TEXT), **settings)
    marked = put(tmp_path / "marked", BOM + TEXT)
    assert ran(tmp_path / "found", marked, **settings) == expected
    assert ran(tmp_path / "packed", put(tmp_path / "marked.gz", gzip.compress(BOM + TEXT)), **settings) == expected
    with pytest.raises(InputError, match="found an empty file"):
        ran(tmp_path / "bin", put(tmp_path / "mark", BOM), **settings)


def test_a_byte_order_mark_is_three_of_the_bytes(tmp_path):
    ran(tmp_path / "bin", put(tmp_path / "marked", BOM + TEXT), bytes=True)
    assert ids(tmp_path / "bin") == [*Vocabulary.bytes().encode(BOM + TEXT), Vocabulary.EOS]


def test_a_dictionary_with_a_byte_order_mark(tmp_path):
    (tmp_path / "dict.txt").write_bytes(BOM + b"the 3\ncat 1\n")
    assert Vocabulary.load(tmp_path) == Vocabulary(["the", "cat"], [3, 1])


def archives() -> dict[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text", TEXT)
    taped = io.BytesIO()
    with tarfile.open(fileobj=taped, mode="w") as tape:
        tape.addfile(tarfile.TarInfo("text"), io.BytesIO())
    tar = taped.getvalue()
    return {"a zip archive": packed.getvalue(), "a tar archive": tar, "a tar archive ": gzip.compress(tar)}


@pytest.mark.parametrize("kind", ["a zip archive", "a tar archive", "a tar archive ", "UTF-16", "zero bytes"])
def test_what_is_no_text_is_never_taken_for_one_without_a_word(tmp_path, capsys, kind):
    content = {**archives(), "UTF-16": TEXT.decode().encode("utf-16"), "zero bytes": b"a\0b"}[kind]
    file = put(tmp_path / "file", content)
    if kind == "zero bytes":  # which are UTF-8
        ran(tmp_path / "words", file)
    else:
        for settings in ({}, {"bpe": 260}, {"chars": True}):
            with pytest.raises(InputError, match=f"file: found {kind.strip()}, expected"):
                ran(tmp_path / "bin", file, **settings)
    warn_once.cache_clear()
    capsys.readouterr()
    ran(tmp_path / "bin", file, bytes=True)
    assert f"warning: {file}: found " in capsys.readouterr().err
    plain = gzip.decompress(content) if kind.endswith(" ") else content
    assert ids(tmp_path / "bin")[:-1] == Vocabulary.bytes().encode(plain).tolist()


def test_zstd_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        ran(tmp_path / "bin", put(tmp_path / "text", PACK["zstd"](TEXT)))


@pytest.mark.parametrize(
    "text", ["今天天气很好我们去公园\n他说你好\n", "ACGTTGCA\nGGTA\n", "a naïve 🙂🙃 é́ line\r\n\n\tx"]
)
def test_characters_are_tokens(tmp_path, text):
    ran(tmp_path / "bin", put(tmp_path / "text", text.encode()), chars=True)
    vocabulary = Vocabulary.load(tmp_path / "bin")
    found = ids(tmp_path / "bin")
    assert len(found) == len(text) + 1
    assert found[-1] == Vocabulary.EOS
    assert vocabulary.decode(found[:-1]) == text
    assert [vocabulary.decode([token]) for token in found[:-1]] == list(text)
    unseen = "ß 漢字"
    assert vocabulary.decode(vocabulary.encode(unseen).tolist()) == unseen


def test_rare_characters_are_their_bytes(tmp_path):
    text = put(tmp_path / "text", ("日" * 5 + "本" * 2).encode())
    ran(tmp_path / "bin", text, chars=True, thresholdsrc=3)
    assert len(ids(tmp_path / "bin")) == 5 + 2 * 3 + 1
    ran(tmp_path / "fewer", text, chars=True, nwordssrc=4 + 256 + 2)
    assert len(ids(tmp_path / "fewer")) == 5 + 2 * 3 + 1


def a_tokenizer(symbols: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def test_a_tokenizer_is_taken_as_it_is(tmp_path):
    content = a_tokenizer(["<unk>", "</s>", "the", "cat"], pre_tokenizers.WhitespaceSplit())
    file = put(tmp_path / "any-name.json", content.encode())
    text = put(tmp_path / "text", b"the cat </s> sat\n")
    ran(tmp_path / "bin", text, tokenizer=file)
    tokens = load(tmp_path / "bin", "train")
    symbols = [tokens.vocabulary.symbol(token) for token in tokens[:].tolist()]
    assert symbols == ["the", "cat", "</s>", "<unk>", "</s>"]
    assert {Vocabulary.EOS, Vocabulary.UNK} <= set(tokens[:].tolist())
    assert ran(tmp_path / "again", text, srcdict=tmp_path / "bin" / "dict.txt")["train.bin"] == tokens[:].tobytes()


def test_a_tokenizer_that_cannot_be_served(tmp_path, capsys):
    text = put(tmp_path / "text", b"a\n")
    for content, message in {
        "{}": "no.json: tokenizer: found no tokenizer",
        a_tokenizer(["<unk>", "a\n"], pre_tokenizers.WhitespaceSplit()): "no.json: tokenizer: found the piece 'a.n'",
    }.items():
        with pytest.raises(InputError, match=message):
            ran(tmp_path / "bin", text, tokenizer=put(tmp_path / "no.json", content.encode()))
    with pytest.raises(InputError, match=r"absent\.json: No such file"):
        ran(tmp_path / "bin", text, tokenizer=tmp_path / "absent.json")
    joins = a_tokenizer(["<unk>", "a", "b"], pre_tokenizers.Metaspace())
    ran(tmp_path / "bin", text, tokenizer=put(tmp_path / "joins.json", joins.encode()))
    assert "warning:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("今天天气很好我们去公园\n他说你好\n明天见\n", True),
        ("ACGTTGCATTAGGACCATTGACCAGT ACGTTGCATTAGGACCATTGACCAGT\n", True),
        ("a list\nof words\nor fewer\n", False),
        ("Donaudampfschifffahrtsgesellschaft ist ein langes Wort\n\n\n", False),
    ],
)
def test_text_without_spaces_is_warned_of(tmp_path, capsys, text, warned):
    ran(tmp_path / "bin", put(tmp_path / "text", text.encode()))
    assert ("--chars takes characters" in capsys.readouterr().err) is warned
