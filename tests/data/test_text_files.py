"""Input files of prepare: compressed, piped, several, with a byte order mark, binary; and external tokenizers."""

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
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _clear_warnings() -> None:
    warn_once.cache_clear()


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def prepare_contents(folder: Path, *texts: Path, **settings) -> dict[str, bytes]:
    """Prepare a training split; returns the files written."""
    prepare(PrepareSettings(**({"trainpref": texts, "destdir": folder, "workers": 1} | settings)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ids(folder: Path) -> list[int]:
    return load(folder, "train")[:].tolist()


@pytest.mark.parametrize("source", ["file", "pipe"])
@pytest.mark.parametrize("compression", ["plain", *COMPRESS])
@pytest.mark.parametrize("settings", [{}, {"bytes": True}, {"bpe": 260}, {"chars": True}], ids=str)
def test_compressed_and_piped_input_equals_plain(tmp_path, compression, source, settings):
    expected = prepare_contents(tmp_path / "expected", write_file(tmp_path / "plain", TEXT), **settings)
    half = len(TEXT) // 2
    compress = COMPRESS.get(compression, bytes)
    # Two compressed parts after one another, which each of these formats allows.
    text = write_file(tmp_path / "text", compress(TEXT[:half]) + compress(TEXT[half:]))
    if source == "pipe":
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=(text.read_bytes(),), daemon=True).start()
        text = pipe
    assert prepare_contents(tmp_path / "actual", text, **settings) == expected


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_damaged_compressed_file_raises_and_leaves_no_output(tmp_path, compression, damage):
    content = COMPRESS[compression](os.urandom(2000).hex().encode())
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    text = write_file(tmp_path / "text", content[:middle] if damage == "truncated" else flipped)
    if compression == "zstd" and damage == "flipped":
        text.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(b"text " * 99)[:-1] + b"\0")
    with pytest.raises(InputError, match=f"text: found damaged or incomplete {compression} data"):
        prepare_contents(tmp_path / "bin", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_prepare_reads_stdin(tmp_path):
    expected = prepare_contents(tmp_path / "expected", write_file(tmp_path / "text", TEXT))
    command = [sys.executable, "-m", "pytbptt.prepare", "--trainpref", "-", "--destdir"]
    for name, content in {"plain": TEXT, "compressed": gzip.compress(TEXT)}.items():
        subprocess.run([*command, tmp_path / name], input=content, check=True)
        assert {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} == expected
    with open(tmp_path / "text", "rb") as stdin:
        subprocess.run([*command, tmp_path / "redirected"], stdin=stdin, check=True)
    assert {path.name: path.read_bytes() for path in sorted((tmp_path / "redirected").iterdir())} == expected
    empty = subprocess.run([*command, tmp_path / "bin"], input=b"", capture_output=True)
    assert empty.returncode == 2
    assert b"standard input: found an empty file" in empty.stderr
    with pytest.raises(InputError, match="found - more than once"):
        prepare_contents(tmp_path / "bin", Path("-"), validpref="-")


def test_each_input_file_is_a_document(tmp_path):
    first, second = write_file(tmp_path / "first", b"a b\nc"), write_file(tmp_path / "second", gzip.compress(b"d\n"))
    prepare_contents(tmp_path / "bin", first, second, validpref=[second, first])
    train, valid = load(tmp_path / "bin", "train"), load(tmp_path / "bin", "valid")
    assert [train.vocabulary.symbol(token) for token in train[:].tolist()] == "a b </s> c </s> d </s>".split()
    assert train.documents.tolist() == [0, 5]
    assert valid[:].tolist() == [*train[5:].tolist(), *train[:5].tolist()]


@pytest.mark.parametrize("settings", [{}, {"bpe": 260}, {"chars": True}], ids=str)
def test_bom_is_stripped_from_text(tmp_path, settings):
    expected = prepare_contents(tmp_path / "expected", write_file(tmp_path / "plain", TEXT), **settings)
    with_bom = write_file(tmp_path / "with-bom", BOM + TEXT)
    assert prepare_contents(tmp_path / "actual", with_bom, **settings) == expected
    compressed = write_file(tmp_path / "with-bom.gz", gzip.compress(BOM + TEXT))
    assert prepare_contents(tmp_path / "compressed", compressed, **settings) == expected
    with pytest.raises(InputError, match="found an empty file"):
        prepare_contents(tmp_path / "bin", write_file(tmp_path / "bom-only", BOM), **settings)


def test_bom_is_kept_in_bytes_mode(tmp_path):
    prepare_contents(tmp_path / "bin", write_file(tmp_path / "with-bom", BOM + TEXT), bytes=True)
    assert ids(tmp_path / "bin") == [*Vocabulary.bytes().encode(BOM + TEXT), Vocabulary.EOS]


def test_bom_is_stripped_from_dictionary(tmp_path):
    (tmp_path / "dict.txt").write_bytes(BOM + b"the 3\ncat 1\n")
    assert Vocabulary.load(tmp_path) == Vocabulary(["the", "cat"], [3, 1])


def archives() -> dict[str, bytes]:
    zip_file = io.BytesIO()
    with zipfile.ZipFile(zip_file, "w") as zip_archive:
        zip_archive.writestr("text", TEXT)
    tar_file = io.BytesIO()
    with tarfile.open(fileobj=tar_file, mode="w") as tar_archive:
        tar_archive.addfile(tarfile.TarInfo("text"), io.BytesIO())
    tar = tar_file.getvalue()
    return {"a zip archive": zip_file.getvalue(), "a tar archive": tar, "a tar archive ": gzip.compress(tar)}


@pytest.mark.parametrize("kind", ["a zip archive", "a tar archive", "a tar archive ", "UTF-16", "zero bytes"])
def test_non_text_files_are_rejected_or_warned(tmp_path, capsys, kind):
    content = {**archives(), "UTF-16": TEXT.decode().encode("utf-16"), "zero bytes": b"a\0b"}[kind]
    file = write_file(tmp_path / "file", content)
    if kind == "zero bytes":  # valid UTF-8
        prepare_contents(tmp_path / "words", file)
    else:
        for settings in ({}, {"bpe": 260}, {"chars": True}):
            with pytest.raises(InputError, match=f"file: found {kind.strip()}, expected"):
                prepare_contents(tmp_path / "bin", file, **settings)
    warn_once.cache_clear()
    capsys.readouterr()
    prepare_contents(tmp_path / "bin", file, bytes=True)
    assert f"warning: {file}: found " in capsys.readouterr().err
    plain = gzip.decompress(content) if kind.endswith(" ") else content
    assert ids(tmp_path / "bin")[:-1] == Vocabulary.bytes().encode(plain).tolist()


def test_missing_zstandard_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        prepare_contents(tmp_path / "bin", write_file(tmp_path / "text", COMPRESS["zstd"](TEXT)))


@pytest.mark.parametrize(
    "text", ["今天天气很好我们去公园\n他说你好\n", "ACGTTGCA\nGGTA\n", "a naïve 🙂🙃 é́ line\r\n\n\tx"]
)
def test_characters_are_tokens(tmp_path, text):
    prepare_contents(tmp_path / "bin", write_file(tmp_path / "text", text.encode()), chars=True)
    vocabulary = Vocabulary.load(tmp_path / "bin")
    tokens = ids(tmp_path / "bin")
    assert len(tokens) == len(text) + 1
    assert tokens[-1] == Vocabulary.EOS
    assert vocabulary.decode(tokens[:-1]) == text
    assert [vocabulary.decode([token]) for token in tokens[:-1]] == list(text)
    unseen = "ß 漢字"
    assert vocabulary.decode(vocabulary.encode(unseen).tolist()) == unseen


def test_rare_characters_fall_back_to_bytes(tmp_path):
    text = write_file(tmp_path / "text", ("日" * 5 + "本" * 2).encode())
    prepare_contents(tmp_path / "bin", text, chars=True, thresholdsrc=3)
    assert len(ids(tmp_path / "bin")) == 5 + 2 * 3 + 1
    prepare_contents(tmp_path / "nwords", text, chars=True, nwordssrc=4 + 256 + 2)
    assert len(ids(tmp_path / "nwords")) == 5 + 2 * 3 + 1


def word_level_tokenizer(symbols: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    tokenizer = Tokenizer(models.WordLevel({symbol: n for n, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    return tokenizer.to_str()


def test_external_tokenizer_json_is_used(tmp_path):
    content = word_level_tokenizer(["<unk>", "</s>", "the", "cat"], pre_tokenizers.WhitespaceSplit())
    file = write_file(tmp_path / "any-name.json", content.encode())
    text = write_file(tmp_path / "text", b"the cat </s> sat\n")
    prepare_contents(tmp_path / "bin", text, tokenizer=file)
    tokens = load(tmp_path / "bin", "train")
    symbols = [tokens.vocabulary.symbol(token) for token in tokens[:].tolist()]
    assert symbols == ["the", "cat", "</s>", "<unk>", "</s>"]
    assert {Vocabulary.EOS, Vocabulary.UNK} <= set(tokens[:].tolist())
    files = prepare_contents(tmp_path / "with-srcdict", text, srcdict=tmp_path / "bin" / "dict.txt")
    assert files["train.bin"] == tokens[:].tobytes()


def test_unsupported_tokenizer_raises(tmp_path, capsys):
    text = write_file(tmp_path / "text", b"a\n")
    with_newline = word_level_tokenizer(["<unk>", "a\n"], pre_tokenizers.WhitespaceSplit())
    for content, message in (("{}", "found no tokenizer"), (with_newline, "found the piece 'a.n'")):
        with pytest.raises(InputError, match=f"invalid.json: tokenizer: {message}"):
            prepare_contents(tmp_path / "bin", text, tokenizer=write_file(tmp_path / "invalid.json", content.encode()))
    with pytest.raises(InputError, match=r"absent\.json: No such file"):
        prepare_contents(tmp_path / "bin", text, tokenizer=tmp_path / "absent.json")
    metaspace = word_level_tokenizer(["<unk>", "a", "b"], pre_tokenizers.Metaspace())
    prepare_contents(tmp_path / "bin", text, tokenizer=write_file(tmp_path / "metaspace.json", metaspace.encode()))
    assert "warning:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "warns"),
    [
        ("今天天气很好我们去公园\n他说你好\n明天见\n", True),
        ("ACGTTGCATTAGGACCATTGACCAGT ACGTTGCATTAGGACCATTGACCAGT\n", True),
        ("a list\nof words\nor fewer\n", False),
        ("Donaudampfschifffahrtsgesellschaft ist ein langes Wort\n\n\n", False),
    ],
)
def test_text_without_spaces_warns(tmp_path, capsys, text, warns):
    prepare_contents(tmp_path / "bin", write_file(tmp_path / "text", text.encode()))
    assert ("--chars takes characters" in capsys.readouterr().err) is warns
