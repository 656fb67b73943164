"""StreamLoader: each stream is read in order and completely, in any layout, and can be resumed at any update."""

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from pytbptt.data import IndexedTokens, StreamLoader, Vocabulary, streams, write_indexed
from pytbptt.errors import InputError

HYPOTHESIS_SETTINGS = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(autouse=True, scope="module")
def small_reads():
    """A small READ_SIZE, so that several reads happen in these small corpora."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_SIZE", 40)
        yield


def sequential_corpus(folder: Path, size: int, documents: list[int] | None = None) -> IndexedTokens:
    """A corpus whose token i is i, so that a chunk shows where it was read; documents start at `documents` too."""
    ids = np.arange(size, dtype=np.int32)
    write_indexed(folder / "train", np.split(ids, documents or []), np.int32, "megatron" if documents else "fairseq")
    return IndexedTokens(folder / "train")


def join_streams(chunks: list[Any], first: int, batch_size: int, update_freq: int, field: str = "tokens") -> dict:
    """A rank's chunks, concatenated for each stream; `first` is the rank's first stream."""
    parts: dict[int, list[torch.Tensor]] = {}
    for chunk in chunks:
        for row, part in enumerate(getattr(chunk, field)):
            parts.setdefault(first + chunk.group * batch_size + row, []).append(part)
    return {stream: torch.cat(part) for stream, part in parts.items()}


def all_streams(corpus: IndexedTokens, layout: tuple[int, int, int], field: str = "tokens", **options: Any) -> dict:
    batch_size, update_freq, world_size = layout
    joined = {}
    for rank in range(world_size):
        loader = StreamLoader(
            corpus, batch_size, rank=rank, world_size=world_size, update_freq=update_freq, prefetch=0, **options
        )
        joined |= join_streams(list(loader), rank * update_freq * batch_size, batch_size, update_freq, field)
    return joined


layouts = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@HYPOTHESIS_SETTINGS
@given(layouts, st.integers(1, 12), st.integers(1, 30), st.integers(0, 5), st.sampled_from([None, "awd"]))
def test_streams_cover_every_target_once_in_order(folder, layout, bptt, per_stream, rest, variation):
    S = int(np.prod(layout))
    corpus = sequential_corpus(folder, S * per_stream + 1 + min(rest, S - 1))
    inputs = all_streams(corpus, layout, bptt=bptt, bptt_variation=variation)
    targets = all_streams(corpus, layout, "targets", bptt=bptt, bptt_variation=variation)
    assert sorted(inputs) == list(range(S))
    for stream in range(S):
        expected = torch.arange(stream * per_stream, (stream + 1) * per_stream)
        assert torch.equal(inputs[stream], expected)
        assert torch.equal(targets[stream], expected + 1)


def test_chunks_have_documented_shapes_and_dtypes(folder):
    loader = StreamLoader(sequential_corpus(folder, 2 * 3 * 10 + 1), 2, 4, update_freq=3)
    assert loader.streams == 6
    assert loader.tokens_per_stream == 10
    assert len(loader) == loader.remaining == 3
    chunks = list(loader)
    assert [(chunk.index, chunk.group) for chunk in chunks] == list(itertools.product(range(3), range(3)))
    assert [chunk.tokens.shape[1] for chunk in chunks] == [4] * 6 + [2] * 3
    assert all(chunk.tokens.dtype == chunk.targets.dtype == torch.int64 for chunk in chunks)
    assert all(chunk.tokens.is_contiguous() and chunk.targets.is_contiguous() for chunk in chunks)
    assert all(chunk.reset is None for chunk in chunks)
    assert torch.equal(chunks[0].to("cpu").tokens, chunks[0].tokens)


def test_update_freq_reads_the_same_streams_as_more_ranks(folder):
    corpus = sequential_corpus(folder, 1000)
    assert_streams_equal(all_streams(corpus, (3, 4, 1), bptt=7), all_streams(corpus, (3, 1, 4), bptt=7))


def assert_streams_equal(actual: dict, expected: dict) -> None:
    assert sorted(actual) == sorted(expected)
    assert all(torch.equal(actual[stream], expected[stream]) for stream in expected)


@HYPOTHESIS_SETTINGS
@given(
    st.sampled_from([((2, 3, 1), (1, 2, 3)), ((6, 1, 1), (2, 1, 3)), ((1, 2, 3), (3, 2, 1)), ((2, 3, 1), (2, 3, 1))]),
    st.integers(0, 25),
    st.sampled_from([None, "awd"]),
    st.booleans(),
    st.sampled_from([0, 2]),
)
def test_loader_state_restores_under_any_layout(folder, layouts, updates, variation, rotate, prefetch):
    """With another number of ranks, groups and rows, in a later epoch, and with prefetched chunks."""
    corpus = sequential_corpus(folder, 6 * 40 + 1)
    (B, U, W), (b, u, w) = layouts
    options = {"bptt": 9, "bptt_variation": variation, "rotate": rotate, "prefetch": prefetch}

    def run(loader: StreamLoader, updates: int) -> list[Any]:
        chunks: list[Any] = []
        while len(chunks) < updates * loader.update_freq:
            chunks += itertools.islice(loader, updates * loader.update_freq - len(chunks))
        return chunks

    states, expected = {}, {}
    for rank in range(W):
        loader = StreamLoader(corpus, B, rank=rank, world_size=W, update_freq=U, **options)
        run(loader, updates)
        states[rank] = loader.state_dict()
        expected |= join_streams(run(loader, 8), rank * U * B, B, U)
    assert all(state == states[0] for state in states.values())
    actual = {}
    for rank in range(w):
        loader = StreamLoader(corpus, b, rank=rank, world_size=w, update_freq=u, **options)
        loader.load_state_dict(states[0])
        actual |= join_streams(run(loader, 8), rank * u * b, b, u)
    assert_streams_equal(actual, expected)


def test_state_within_an_update_requires_same_layout(folder):
    corpus = sequential_corpus(folder, 241)
    loader = StreamLoader(corpus, 2, 9, update_freq=3)
    chunks = iter(loader)
    for _ in range(4):
        next(chunks)
    state = loader.state_dict()
    assert (state["index"], state["group"]) == (1, 1)
    resumed = StreamLoader(corpus, 2, 9, update_freq=3)
    resumed.load_state_dict(state)
    expected = next(chunks)
    actual = next(iter(resumed))
    assert (actual.index, actual.group) == (expected.index, expected.group) == (1, 1)
    assert torch.equal(actual.tokens, expected.tokens)
    with pytest.raises(InputError, match="within an update of 3 groups of 2"):
        StreamLoader(corpus, 3, 9, update_freq=2).load_state_dict(state)


def test_state_of_the_last_chunk_ends_the_epoch(folder):
    loader = StreamLoader(sequential_corpus(folder, 21), 2, 4)
    for chunk in loader:
        if chunk.index == 2:
            break
    assert loader.remaining == 0
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert list(loader) == []
    assert (loader.epoch, loader.index, loader.remaining) == (1, 0, 3)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"bptt": 8}, {"bptt_variation": "awd"}])
def test_incompatible_loader_state_raises(folder, change):
    corpus = sequential_corpus(folder, 241)
    loader = StreamLoader(corpus, 2, 9)
    list(itertools.islice(loader, 3))
    other = StreamLoader(corpus, **({"batch_size": 2, "bptt": 9} | change))
    with pytest.raises(InputError, match="loader state: found"):
        other.load_state_dict(loader.state_dict())
    assert (other.epoch, other.index) == (0, 0)


def test_awd_lengths_distribution_and_same_on_all_ranks(folder):
    corpus = sequential_corpus(folder, 4 * 30_000 + 1)
    lengths = {}
    for epoch, rank in itertools.product(range(2), range(2)):
        loader = StreamLoader(corpus, 1, 70, rank=rank, world_size=2, update_freq=2, bptt_variation="awd", seed=3)
        for _ in range(epoch):
            list(loader)
        chunks = list(loader)
        lengths[epoch, rank] = [chunk.tokens.shape[1] for chunk in chunks if chunk.group == 0]
        assert lengths[epoch, rank] == [chunk.tokens.shape[1] for chunk in chunks if chunk.group == 1]
    assert lengths[0, 0] == lengths[0, 1]
    assert lengths[1, 0] == lengths[1, 1]
    assert lengths[0, 0] != lengths[1, 0]
    random_lengths = np.array(lengths[0, 0][:-1])
    assert random_lengths.min() >= 5
    assert 0.9 < np.mean(random_lengths > 52) < 1
    assert abs(np.mean(random_lengths[random_lengths > 52]) - 69.5) < 1.5  # int() lowers the mean by half a token
    short = StreamLoader(corpus, 4, 3, bptt_variation="awd")
    assert min(chunk.tokens.shape[1] for chunk in itertools.islice(short, 100)) == 5


@HYPOTHESIS_SETTINGS
@given(st.integers(1, 9), st.integers(1, 40), st.lists(st.integers(1, 120), unique=True), st.booleans())
def test_reset_is_set_at_the_last_token_before_a_document(folder, bptt, per_stream, starts, rotate):
    corpus = sequential_corpus(
        folder, 3 * per_stream + 1, sorted(start for start in starts if start < 3 * per_stream + 1) or [1]
    )
    options = {"bptt": bptt, "rotate": rotate}
    inputs, resets = (all_streams(corpus, (3, 1, 1), field, **options) for field in ("tokens", "reset"))
    ends = {int(start) - 1 for start in corpus.documents[1:]}
    for stream, ids in inputs.items():
        first = stream * per_stream
        wrapped = {first} if int(ids[0]) != first else set()
        expected = [int(token) in ends | wrapped for token in ids]
        assert resets[stream].tolist() == expected


@HYPOTHESIS_SETTINGS
@example(40, 1, 10)  # each stream wraps around at the start of a read
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40))
def test_rotate_rolls_each_stream(folder, batch_size, bptt, per_stream):
    corpus = sequential_corpus(folder, batch_size * per_stream + 1)
    loader = StreamLoader(corpus, batch_size, bptt, rotate=True, prefetch=0)
    for _ in range(2):
        chunks = list(loader)
        fields = ("tokens", "targets", "reset")
        inputs, targets, resets = (join_streams(chunks, 0, batch_size, 1, field) for field in fields)
        for stream, ids in inputs.items():
            unrotated = torch.arange(stream * per_stream, (stream + 1) * per_stream)
            assert torch.equal(ids, torch.roll(unrotated, -int(ids[0] - unrotated[0])))
            assert torch.equal(targets[stream], ids + 1)
            assert torch.equal(resets[stream], (ids == unrotated[0]) & (torch.arange(per_stream) > 0))


def test_rotation_depends_on_seed_epoch_and_stream(folder):
    corpus = sequential_corpus(folder, 8 * 1000 + 1)

    def offsets(seed: int, epoch: int) -> list[int]:
        loader = StreamLoader(corpus, 8, 500, rotate=True, seed=seed)
        for _ in range(epoch):
            list(loader)
        return [int(token) % 1000 for token in next(iter(loader)).tokens[:, 0]]

    assert offsets(1, 1) == offsets(1, 1)
    assert len({tuple(offsets(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert len(set(offsets(1, 0))) > 1


def test_reset_on_symbol_document_and_default(folder):
    vocabulary = Vocabulary.from_counts({"a": 3, "b": 2})
    ids = vocabulary.encode("a b\na\nb b b\n\n").astype(np.uint16)
    write_indexed(folder / "lines", [ids], np.uint16, "fairseq")
    corpus = IndexedTokens(folder / "lines", vocabulary)
    chunk = next(iter(StreamLoader(corpus, 1, 20, reset_on="</s>")))
    assert torch.equal(chunk.reset, chunk.tokens == vocabulary.EOS)
    assert next(iter(StreamLoader(corpus, 1, 20))).reset is None
    assert next(iter(StreamLoader(corpus, 1, 20, reset_on="document"))).reset is None
    with pytest.raises(InputError, match="reset_on: found 'c', expected document, none or a symbol"):
        StreamLoader(corpus, 1, 20, reset_on="c")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ids_outside_the_vocabulary_raise_with_position(folder, prefetch):
    vocabulary = Vocabulary.from_counts({"a": 1})
    ids = np.full(100, 4, dtype=np.int32)
    for wrong, position in ((8, 61), (-1, 61), (8, 99)):
        ids[61:] = 4
        ids[position] = wrong
        write_indexed(folder / "wrong", [ids], np.int32)
        loader = StreamLoader(IndexedTokens(folder / "wrong", vocabulary), 3, 5, prefetch=prefetch)
        with pytest.raises(InputError, match=rf"wrong.bin: found id {wrong} at token {position}, expected 0 to 7"):
            list(loader)


def test_too_short_corpus_and_invalid_arguments_raise(folder):
    corpus = sequential_corpus(folder, 24)
    assert len(StreamLoader(corpus, 23, 5)) == 1
    with pytest.raises(InputError, match="found 24 tokens, expected at least 25 for 24 streams"):
        StreamLoader(corpus, 2, 5, update_freq=3, world_size=4)
    for wrong in ({"batch_size": 0}, {"bptt": 0}, {"rank": 1}, {"bptt_variation": "none"}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found"):
            StreamLoader(corpus, **({"batch_size": 1, "bptt": 1} | wrong))


def test_abandoned_iterators_leave_no_thread(folder):
    corpus = sequential_corpus(folder, 10_001)
    loader = StreamLoader(corpus, 2, 5, prefetch=3)
    for _ in loader:
        break
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert not [thread for thread in threading.enumerate() if thread.name == "pytbptt-prefetch"]
    first, second = iter(loader), iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="this iterator is no longer valid"):
        next(first)


@pytest.mark.parametrize("rotate", [False, True])
def test_read_returns_past_tokens_without_advancing(folder: Path, rotate: bool) -> None:
    corpus = sequential_corpus(folder, 200, documents=[50, 61, 130])
    loader = StreamLoader(corpus, 2, 5, update_freq=3, rotate=rotate, prefetch=0)
    chunks = list(itertools.islice(loader, 12))
    assert loader.position == 20
    past = loader.read(3, 20)
    assert [chunk.group for chunk in past] == [0, 1, 2]
    for field in ("tokens", "targets", "reset"):
        expected = join_streams(chunks, 0, 2, 3, field)
        actual = join_streams(past, 0, 2, 3, field)
        assert all(torch.equal(actual[stream], expected[stream][3:]) for stream in range(6))
    assert loader.position == 20


class FakeStream:
    """In place of torch.cuda.Stream: logs its events."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_event(self):
        self.log.append(f"{self.name} stream: record event")
        return "event"

    def wait_event(self, event):
        self.log.append(f"{self.name} stream: wait for {event}")


def test_prefetch_copy_is_ordered_by_cuda_event(tmp_path, monkeypatch):
    log, names = [], ["copy"]
    copy_stream = FakeStream(log, "copy")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: copy_stream if priority < 0 else None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(names.append(stream.name)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, "current"))
    monkeypatch.setattr("pytbptt.data.prefetching.to_device_async", lambda tensor, device: tensor + 0)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"tensor.record_stream: {stream.name}")
    )
    corpus = sequential_corpus(tmp_path, 39)
    chunk = next(iter(StreamLoader(corpus, 2, 5, prefetch=0, copy_to=torch.device("cuda"))))
    assert len(log) > 1, "copies of all chunks of a read are started before the first chunk is returned"
    assert set(log) == {"copy stream: record event"}
    chunk_on_gpu = chunk.to("cuda")
    assert log[-3:] == ["current stream: wait for event", *["tensor.record_stream: current"] * 2]
    assert set(names) == {"copy"}
    assert chunk_on_gpu.tokens is not chunk.tokens
    assert torch.equal(chunk_on_gpu.tokens, chunk.tokens)
    assert torch.equal(chunk_on_gpu.targets, chunk.targets)
    assert chunk_on_gpu.reset is None
    assert torch.equal(chunk.to("cpu").tokens, chunk.tokens)
