"""Vocabulary: fairseq's dict.txt, state_dict, and encoding and decoding of text."""

import io

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytbptt.data import PrepareSettings, Vocabulary, prepare
from pytbptt.errors import InputError

COUNTS = {"the": 5, "b": 2, "a": 2, "Z": 2, "é": 2, "<unk>": 9, "</s>": 3, "rare": 1}


@pytest.fixture(scope="module")
def bpe_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text").write_text("the naïve cat sat on the mat\nthe dog\n日本語\n" * 20, encoding="utf-8")
    prepare(PrepareSettings(trainpref=folder / "text", destdir=folder / "bin", bpe=280, workers=1))
    return Vocabulary.load(folder / "bin")


def test_dict_txt_format_matches_fairseq(tmp_path):
    """By decreasing count, then by code point; without special symbols; padded to a multiple of 8 with counts of 0."""
    vocabulary = Vocabulary.from_counts(COUNTS)
    vocabulary.save(tmp_path)
    assert (tmp_path / "dict.txt").read_text(encoding="utf-8") == (
        "the 5\nZ 2\na 2\nb 2\né 2\nrare 1\n" + "".join(f"madeupword000{number} 0\n" for number in range(6))
    )
    assert len(vocabulary) == 16
    assert [vocabulary.symbol(token) for token in range(6)] == ["<s>", "<pad>", "</s>", "<unk>", "the", "Z"]
    assert vocabulary.index("rare") == 9
    assert vocabulary.index("never seen") == vocabulary.UNK == 3
    assert Vocabulary.load(tmp_path) == Vocabulary.load(tmp_path / "dict.txt") == vocabulary


def test_threshold_and_nwords_match_fairseq():
    assert "rare" not in Vocabulary.from_counts(COUNTS, threshold=2)
    assert "é" in Vocabulary.from_counts(COUNTS, threshold=2)
    kept = Vocabulary.from_counts(COUNTS, nwords=6)  # including the four special symbols
    assert [kept.symbol(token) for token in range(4, 8)] == ["the", "Z", "madeupword0000", "madeupword0001"]
    assert len(Vocabulary.from_counts(COUNTS, nwords=2)) == 8
    made_up = Vocabulary.from_counts({"madeupword0000": 3})
    assert [made_up.symbol(token) for token in range(4, 8)] == [f"madeupword000{number}" for number in range(4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1\nb\n", r"dict.txt, line 2: found 'b', expected 'symbol count'"),
        (b"a 1\nb two\n", r"dict.txt, line 2: found 'b two', expected 'symbol count'"),
        (b"a 1\n\nb 2\n", r"dict.txt, line 2: found ''"),
        (b"a 1\nb 2\na 3\n", r"dict.txt, line 3: found 'a' a second time"),
        (b"a 1\n<unk> 3\n", r"dict.txt, line 2: found '<unk>' a second time"),
        (b"a 1\nb\xff 2\n", r"dict.txt, line 2: found a byte that is not UTF-8"),
        (b"", r"dict.txt: found no symbols"),
    ],
)
def test_invalid_dict_txt_raises_with_line_number(tmp_path, content, message):
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Vocabulary.load(tmp_path)


def test_flagged_duplicates_overwrite_as_in_fairseq(tmp_path):
    (tmp_path / "dict.txt").write_text("a 1\nb 2\na 3 #fairseq:overwrite\nc 1\n")
    vocabulary = Vocabulary.load(tmp_path)
    assert [vocabulary.index(symbol) for symbol in "abc"] == [6, 5, 7]
    (tmp_path / "copy").mkdir()
    vocabulary.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "dict.txt").read_bytes() == (tmp_path / "dict.txt").read_bytes()


def test_vocabulary_kind_survives_save_and_load(tmp_path, bpe_vocabulary):
    assert Vocabulary.bytes().kind == "bytes"
    assert len(Vocabulary.bytes()) == 264
    assert Vocabulary.bytes().index("<0x41>") == 4 + 0x41
    assert Vocabulary.from_counts(COUNTS).kind == "words"
    assert bpe_vocabulary.kind == "bpe"
    assert len(bpe_vocabulary) == 288
    bpe_vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == bpe_vocabulary
    Vocabulary.bytes().save(tmp_path)  # replaces a BPE vocabulary: its tokenizer.json must be removed
    assert Vocabulary.load(tmp_path).kind == "bytes"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: found no tokenizer"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize("kind", ["words", "bytes", "bpe"])
def test_state_dict_round_trip(kind, bpe_vocabulary):
    vocabulary = {"words": Vocabulary.from_counts(COUNTS), "bytes": Vocabulary.bytes(), "bpe": bpe_vocabulary}[kind]
    file = io.BytesIO()
    torch.save(vocabulary.state_dict(), file)
    file.seek(0)
    loaded = Vocabulary.from_state_dict(torch.load(file, weights_only=True))
    assert loaded == vocabulary
    assert loaded.kind == vocabulary.kind
    assert loaded.fingerprint() == vocabulary.fingerprint()
    assert loaded.fingerprint() != Vocabulary.from_counts({"other": 1}).fingerprint()


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_byte_and_bpe_decoding_inverts_encoding(bpe_vocabulary, text):
    for vocabulary in (Vocabulary.bytes(), bpe_vocabulary):
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        decoder = vocabulary.decoder()
        assert "".join([decoder.add(int(token)) for token in ids]) + decoder.flush() == text


def test_word_decoding_restores_lines():
    vocabulary = Vocabulary.from_counts(COUNTS)
    ids = vocabulary.encode("the  b\n\nnever a\n")
    assert ids.tolist() == [4, 7, 2, 2, 3, 6, 2]
    assert vocabulary.decode(ids) == "the b\n\n<unk> a\n"
    assert vocabulary.encode(b"the\n").tolist() == [4, 2]
    with pytest.raises(InputError, match="found a byte at 1 that is not UTF-8"):
        vocabulary.encode(b"a\xff")
    with pytest.raises(InputError, match="token id: found 16, expected 0 to 15"):
        vocabulary.decode([16])


def test_decoder_buffers_incomplete_utf8(bpe_vocabulary):
    for vocabulary in (Vocabulary.bytes(), bpe_vocabulary):
        ids = vocabulary.encode("本語 é")
        decoder = vocabulary.decoder()
        parts = [decoder.add(int(token)) for token in ids]
        assert "".join(parts) == "本語 é"
        assert "�" not in "".join(parts)
    decoder = Vocabulary.bytes().decoder()
    assert [decoder.add(4 + byte) for byte in b"\xe6\x9c"] == ["", ""]
    assert decoder.add(Vocabulary.EOS) == "�\n"
    assert decoder.add(Vocabulary.PAD) == ""
    assert decoder.add(4 + ord("x")) == "x"
    assert Vocabulary.bytes().encode("\udcff").tolist() == [4 + 0xFF]  # surrogateescape, as in sys.argv
    decoder = bpe_vocabulary.decoder()
    assert decoder.add(bpe_vocabulary.index("æ")) == ""  # the byte 0xE6
    assert decoder.flush() == "�"
