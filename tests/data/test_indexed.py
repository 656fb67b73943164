"""The index formats of fairseq and Megatron are written and read, and errors in a file are described."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pytbptt.data import IndexedTokens, IndexedWriter, Vocabulary, write_indexed, writer
from pytbptt.data.indexed import Runs, token_dtype
from pytbptt.errors import InputError, RunError

HYPOTHESIS_SETTINGS = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("indexed")


def reference_index(sequences, code, size, documents=None, modes=False):
    """The content of an .idx file, independent of the library's writer."""
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, len(lengths))
    if documents is not None:
        index += struct.pack("<Q", len(documents))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    if documents is not None:
        index += struct.pack(f"<{len(documents)}q", *documents)
    return index + (b"\x00" * len(lengths) if modes else b"")


def write_corpus(folder, sequences, dtype, code, **index):
    dtype = np.dtype(dtype)
    (folder / "x.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    (folder / "x.idx").write_bytes(reference_index(sequences, code, dtype.itemsize, **index))
    return folder / "x"


corpora = st.lists(
    st.lists(st.lists(st.integers(0, 60000), max_size=5), min_size=1, max_size=3), min_size=1, max_size=6
).filter(lambda documents: any(sequence for document in documents for sequence in document))


@HYPOTHESIS_SETTINGS
@given(corpora, st.sampled_from([("uint16", 8), ("int32", 4), ("int64", 5)]), st.sampled_from(["megatron", "fairseq"]))
def test_written_files_follow_the_format_and_read_back(folder, corpus, kind, index_format):
    dtype, code = kind
    documents = [[np.array(sequence, dtype=dtype) for sequence in document] for document in corpus]
    write_indexed(folder / "x", documents, dtype, index_format)
    sequences = [sequence for document in documents for sequence in document]
    entries = np.cumsum([0] + [len(document) for document in documents]).tolist()
    expected = reference_index(
        sequences, code, np.dtype(dtype).itemsize, entries if index_format == "megatron" else None
    )
    assert (folder / "x.idx").read_bytes() == expected
    assert (folder / "x.bin").read_bytes() == np.concatenate(sequences).tobytes()

    tokens = IndexedTokens(folder / "x")
    assert len(tokens) == sum(map(len, sequences))
    assert np.array_equal(tokens[:], np.concatenate(sequences))
    assert tokens[1:3].dtype == np.dtype(dtype)
    assert tokens.has_document_index == (index_format == "megatron")
    sizes = [sum(map(len, document)) for document in documents]
    starts = [sum(sizes[:i]) for i in range(len(sizes)) if sizes[i] > 0]
    assert tokens.documents.tolist() == (starts if index_format == "megatron" else [0])
    assert sorted(path.name for path in folder.iterdir()) == ["x.bin", "x.idx"]


def test_index_with_modes_and_uint32(folder):
    sequences = [[1, 2, 3], [4], [5, 6]]
    prefix = write_corpus(folder, sequences, "uint32", 9)
    assert IndexedTokens(prefix)[:].tolist() == [1, 2, 3, 4, 5, 6]
    prefix = write_corpus(folder, sequences, "int32", 4, documents=[0, 2, 3], modes=True)
    assert IndexedTokens(prefix).documents.tolist() == [0, 4]
    prefix = write_corpus(folder, sequences, "int32", 4, documents=[0])  # no entry for the end of the last document
    assert IndexedTokens(prefix).documents.tolist() == [0]


def replace_bytes(start, stop, content):
    def change(idx, bin_):
        return idx[:start] + content + idx[stop:], bin_

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_bytes(0, 9, b"TNTIDX\x00\x00\x00"), r"x.idx: found fairseq's older index .*expected mmap: prepare"),
        (replace_bytes(0, 9, b"TNTIDY\x00\x00\x00"), r"x.idx: found magic b'TNTIDY.*expected b'MMIDIDX"),
        (replace_bytes(9, 17, struct.pack("<Q", 2)), r"x.idx: found version 2, expected 1"),
        (replace_bytes(17, 18, b"\x07"), r"x.idx: found dtype code 7, expected one of"),
        (lambda idx, bin_: (idx[:20], bin_), r"x.idx: found 20 bytes, expected at least 26"),
        (lambda idx, bin_: (b"", bin_), r"x.idx: found 0 bytes, expected at least 26"),
        (lambda idx, bin_: (idx[:-1], bin_), r"x.idx: found \d+ bytes, expected 62 \(fairseq\) or 70\+8d"),
        (lambda idx, bin_: (idx + b"\x00", bin_), r"x.idx: found \d+ bytes, expected 62 \(fairseq\)"),
        (replace_bytes(18, 26, struct.pack("<Q", 1 << 60)), r"x.idx: found 94 bytes, expected"),
        (replace_bytes(34, 38, struct.pack("<i", 2)), r"x.idx: found sequence 1 at byte 6, expected 4 by the lengths"),
        (replace_bytes(34, 38, struct.pack("<i", -3)), r"x.idx: found a length of -3 at sequence 0"),
        (
            replace_bytes(78, 86, struct.pack("<q", 4)),
            r"x.idx: found document entries from 0 to 3, expected them to rise",
        ),
        (lambda idx, bin_: (idx, bin_[:-2]), r"x.bin: found 10 bytes, expected 12 by x.idx"),
        (lambda idx, bin_: (idx, bin_ + b"\x00"), r"x.bin: found 13 bytes, expected 12 by x.idx"),
    ],
)
def test_corrupt_index_raises(folder, change, message):
    prefix = write_corpus(folder, [[1, 2, 3], [4], [5, 6]], "uint16", 8, documents=[0, 2, 3])
    idx, bin_ = change((folder / "x.idx").read_bytes(), (folder / "x.bin").read_bytes())
    (folder / "x.idx").write_bytes(idx)
    (folder / "x.bin").write_bytes(bin_)
    with pytest.raises(InputError, match=message) as error:
        IndexedTokens(prefix).documents  # noqa: B018 (the index of documents is read lazily)
    assert "\n" not in str(error.value)


def test_missing_and_empty_files_raise(tmp_path):
    with pytest.raises(InputError, match=r"x.idx: found no readable file"):
        IndexedTokens(tmp_path / "x")
    write_indexed(tmp_path / "x", [], np.uint16)
    with pytest.raises(InputError, match=r"x.bin: found no tokens"):
        IndexedTokens(tmp_path / "x")
    with pytest.raises(InputError, match=r"found no vocabulary"):
        IndexedTokens(write_corpus(tmp_path, [[1]], "uint16", 8)).vocabulary  # noqa: B018 (a property that raises)


def test_failed_write_keeps_old_corpus(tmp_path):
    write_indexed(tmp_path / "x", [np.array([1, 2])], np.uint16)

    def documents():
        yield np.array([3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_indexed(tmp_path / "x", documents(), np.uint16)
    assert IndexedTokens(tmp_path / "x")[:].tolist() == [1, 2]
    with pytest.raises(InputError, match="expected uint16"):
        write_indexed(tmp_path / "x", [np.array([70000])], np.uint16)
    with pytest.raises(InputError, match="index_format: found 'nanotron', expected one of megatron, fairseq"):
        write_indexed(tmp_path / "x", [], np.uint16, "nanotron")
    with pytest.raises(InputError, match="dtype: found float32"):
        write_indexed(tmp_path / "x", [], np.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_old_index_is_removed_before_new_tokens_are_published(tmp_path):
    """Between publish_bin and publish_idx the corpus cannot be loaded, rather than be loaded with the old documents."""
    write_indexed(tmp_path / "x", [np.array([1, 2]), np.array([3])], np.uint16)
    new = IndexedWriter(tmp_path / "x", np.uint16)
    new.add(np.array([4, 5, 6]))
    new.finish()
    assert IndexedTokens(tmp_path / "x")[:].tolist() == [1, 2, 3]
    new.publish_bin()
    with pytest.raises(InputError, match=r"x.idx: found no readable file"):
        IndexedTokens(tmp_path / "x")
    new.publish_idx()
    assert IndexedTokens(tmp_path / "x")[:].tolist() == [4, 5, 6]


def test_sequences_too_long_for_the_index_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SEQUENCE_LENGTH", 4)
    write_indexed(tmp_path / "x", [np.arange(10), np.arange(8)], np.uint16)
    tokens = IndexedTokens(tmp_path / "x")
    assert tokens.lengths.tolist() == [4, 4, 2, 4, 4]
    assert tokens.documents.tolist() == [0, 10]


def test_renumber_rewrites_ids_and_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COPY_SIZE", 7)
    ids = np.random.default_rng(0).integers(0, 50, 100).astype(np.int32)
    table = np.random.default_rng(1).permutation(50)
    with IndexedWriter(tmp_path / "x", np.int32) as file:
        file.add(ids[:60], np.array([20, 40]))
        file.renumber(np.arange(50), np.int32)
        file.add(ids[60:])
        file.renumber(table, np.uint16)
    tokens = IndexedTokens(tmp_path / "x")
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens[:], table[ids])
    assert tokens.lengths.tolist() == [20, 40, 40]


def test_fingerprint_depends_on_tokens_and_documents(tmp_path):
    fingerprints = set()
    for name, ids, split in (("a", [1, 2, 3], []), ("b", [1, 2, 4], []), ("c", [1, 2, 3], [1])):
        write_indexed(tmp_path / name, np.split(np.array(ids), split), np.uint16)
        fingerprints.add(IndexedTokens(tmp_path / name).fingerprint())
        assert IndexedTokens(tmp_path / name).fingerprint() in fingerprints
    assert len(fingerprints) == 3


def test_modified_file_raises_on_read(tmp_path):
    """Reading a memory map beyond the end of a truncated file would kill the process."""
    for change in (lambda path: os.truncate(path, 1000), lambda path: path.write_bytes(bytes(200_000))):
        write_indexed(tmp_path / "train", [np.arange(100_000) % 50], "uint16")
        tokens = IndexedTokens(tmp_path / "train")
        runs = Runs(*(np.array([value]) for value in (90_000, 10, 0, 0)))
        output = np.empty((1, 10), "uint16")
        tokens.read(runs, output)
        change(tmp_path / "train.bin")
        with pytest.raises(RunError, match=r"train\.bin: found it changed since it was opened"):
            tokens.read(runs, output)


def test_open_corpus_is_readable_after_its_files_are_replaced(tmp_path):
    write_indexed(tmp_path / "train", [np.arange(100)], "uint16")
    tokens = IndexedTokens(tmp_path / "train")
    write_indexed(tmp_path / "train", [np.zeros(100)], "uint16")
    output = np.empty((1, 10), "uint16")
    tokens.read(Runs(*(np.array([value]) for value in (50, 10, 0, 0))), output)
    assert tokens.fingerprint() != IndexedTokens(tmp_path / "train").fingerprint()
    os.remove(tmp_path / "train.bin")
    assert len(tokens.fingerprint()) == 16
    assert output.tolist() == [list(range(50, 60))]


def test_dtype_follows_fairseq_and_megatron():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32
    assert len(Vocabulary.bytes()) == 264
