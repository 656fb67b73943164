"""evaluation_chunks: every token is scored once, and chunk edges do not depend on the number of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytbptt.data import IndexedTokens, Vocabulary, evaluation_chunks, write_indexed
from pytbptt.errors import InputError

HYPOTHESIS_SETTINGS = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval-chunks")


def sequential_corpus(folder, size, documents=()):
    """Token i is 10 + i, which shows its position and differs from the padding; documents start at `documents` too."""
    ids = 10 + np.arange(size, dtype=np.int32)
    write_indexed(folder / "test", np.split(ids, list(documents)), np.int32)
    return IndexedTokens(folder / "test")


@HYPOTHESIS_SETTINGS
@given(
    st.integers(1, 120),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 40),
    st.integers(1, 4),
    st.lists(st.integers(1, 100), unique=True),
)
def test_every_token_is_scored_once_after_its_warm_up(folder, size, streams, bptt, warm_up, world_size, documents):
    corpus = sequential_corpus(folder, size, sorted(start for start in documents if start < size))
    starts = set(corpus.documents[1:].tolist())
    warm_up_steps = -(-warm_up // bptt) * bptt
    scored = []
    rows_seen = 0
    for rank in range(world_size):
        chunks = list(evaluation_chunks(corpus, streams, bptt, warm_up=warm_up, rank=rank, world_size=world_size))
        if not chunks:
            continue
        rows = len(chunks[0].tokens)
        rows_seen += rows
        assert all(chunk.tokens.shape[0] == rows and chunk.tokens.shape[1] <= bptt for chunk in chunks)
        assert all(chunk.tokens.shape[1] == bptt for chunk in chunks[:-1])
        for row in range(rows):
            begins = [bool(chunk.begins[row]) for chunk in chunks]
            assert sum(begins) == 1
            begin = begins.index(True)
            assert all((chunk.targets[row] == -100).all() for chunk in chunks[:begin])
            assert all((chunk.tokens[row] == Vocabulary.EOS).all() for chunk in chunks[:begin])
            tokens = torch.cat([chunk.tokens[row] for chunk in chunks[begin:]]).tolist()
            targets = torch.cat([chunk.targets[row] for chunk in chunks[begin:]]).tolist()
            scored_here = [target - 10 for target in targets if target != -100]
            first = scored_here[0] - targets.index(10 + scored_here[0])  # index of the target of the row's first input
            assert scored_here == list(range(scored_here[0], scored_here[-1] + 1))
            assert scored_here[0] - first == min(warm_up_steps, scored_here[0])
            assert first % bptt == 0  # the same chunk edges for any number of rows
            text = [Vocabulary.EOS, *range(10, 10 + size)]
            fed = scored_here[-1] + 1 - first
            assert tokens[:fed] == text[first : first + fed]
            assert set(tokens[fed:]) <= {Vocabulary.EOS}
            assert targets[scored_here[-1] + 1 - first :] == [-100] * (len(targets) - fed)
            scored += scored_here
            if starts:
                resets = torch.cat([chunk.reset[row] for chunk in chunks[begin:]]).tolist()
                assert resets[:fed] == [target in starts for target in range(first, first + fed)]
            else:
                assert chunks[0].reset is None
    assert sorted(scored) == list(range(size))
    assert rows_seen <= streams


def test_single_stream_has_no_padding_chunks(folder):
    chunks = list(evaluation_chunks(sequential_corpus(folder, 20), 1, 8, warm_up=100))
    assert [chunk.tokens.shape[1] for chunk in chunks] == [8, 8, 4]
    assert bool(chunks[0].begins[0])
    assert not any(bool(chunk.begins[0]) for chunk in chunks[1:])
    assert torch.equal(chunks[0].to("cpu").targets, 10 + torch.arange(8)[None])


def test_invalid_arguments_raise(folder):
    corpus = sequential_corpus(folder, 20)
    for wrong in ({"streams": 0}, {"bptt": 0}, {"warm_up": -1}, {"rank": 1}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found"):
            evaluation_chunks(corpus, **({"streams": 1, "bptt": 1} | wrong))
    vocabulary = Vocabulary.from_counts({"a": 1})
    with pytest.raises(InputError, match=r"test.bin: found id 10 at token 0, expected 0 to 7"):
        list(evaluation_chunks(IndexedTokens(folder / "test", vocabulary), 2, 5))
