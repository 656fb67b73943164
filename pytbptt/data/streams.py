"""Batches of contiguous chunks from parallel streams, for truncated BPTT."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytbptt.data.indexed import IndexedTokens, Runs
from pytbptt.data.prefetching import AsyncTransfer, Transfer, prefetch, to_device_async
from pytbptt.data.resets import ResetRule
from pytbptt.errors import InputError
from pytbptt.runtime.renamed import Renamed

BpttVariation = Literal["awd"]

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]  # inputs, targets, resets

MIN_DRAWN_LENGTH, DRAWN_LENGTH_STD = 5, 5  # of AWD-LSTM's random chunk lengths
READ_SIZE = 1 << 17  # tokens per read (in whole chunks), to amortise Python's cost per row and per queue item
RNG_LENGTHS, RNG_OFFSETS = 1, 2  # sub-seeds of an epoch's two random states


@dataclass
class Chunk:
    """`bptt` tokens of every stream of one accumulation group.

    `tokens` and `targets` are (B, T) int64, `targets` one token further on; `reset` is (B, T) bool, or None
    from a loader that never resets. `index` is the chunk's number in the epoch, `group` its accumulation group (0 …
    update_freq - 1); keep one memory per group.
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None
    group: int
    index: int
    transfer: Transfer | None = field(default=None, repr=False, compare=False)
    """Its tensors on the loader's GPU, or on their way to it."""

    ahead, sent_ahead = Renamed("transfer"), Renamed("start_transfer")

    def to(self, device: torch.device | str) -> Chunk:
        """The chunk on `device`; uses the loader's prefetched copy if there is one."""
        if self.transfer is not None and torch.device(device).type == "cuda":
            return _chunk_from_tensors(self.transfer.tensors(), self.group, self.index)
        return _chunk_from_tensors(
            [to_device_async(tensor, device) for tensor in self._tensors()], self.group, self.index
        )

    def start_transfer(self, async_transfer: AsyncTransfer) -> Chunk:
        """The chunk, with an asynchronous copy to the GPU started."""
        return _chunk_from_tensors(self._tensors(), self.group, self.index, async_transfer.copy(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [self.tokens, self.targets, *([] if self.reset is None else [self.reset])]


def _chunk_from_tensors(tensors: list[Tensor], group: int, index: int, transfer: Transfer | None = None) -> Chunk:
    return Chunk(tensors[0], tensors[1], tensors[2] if len(tensors) == 3 else None, group, index, transfer)


class StreamLoader:
    """Reads a corpus of N tokens as S = batch_size · update_freq · world_size streams, chunk by chunk.

    Stream s owns the n = (N - 1) // S tokens from s · n on; its targets are the tokens one further on. Rank r, group
    g, row b reads stream (r · update_freq + g) · batch_size + b. Iterating yields the rest of the current epoch (all
    groups of one update in turn) and then increments `epoch`. All ranks get the same number of chunks; the last may be
    shorter. The caller must reset the model's memory at each epoch.

    Args:
        tokens: the corpus.
        batch_size, bptt: rows of a chunk, and tokens of each.
        rank, world_size: this process among those that share the streams.
        update_freq: accumulation groups.
        bptt_variation: "awd" samples each chunk's length as AWD-LSTM does (mean bptt with probability 0.95, else bptt /
            2; std 5; minimum 5), seeded by (seed, epoch), equal on all ranks and groups. None: always `bptt`.
        reset_on: "document", "none" or a symbol, see `ResetRule`; None: as the data's text format says.
        rotate: start each stream at a random offset in every epoch, seeded by (seed, epoch); a reset marks where it
            wraps around.
        seed: of random lengths and offsets.
        prefetch: number of reads (about 128 Ki tokens, at least one chunk) prefetched by a thread; 0 disables
            prefetching.
        copy_to: GPU to prefetch every chunk to (in that thread, on a side stream); used by `Chunk.to`.

    Raises:
        InputError: sizes that are not positive, a corpus too short for its streams, or, while iterating, an id outside
            the vocabulary.
    """

    def __init__(
        self,
        tokens: IndexedTokens,
        batch_size: int,
        bptt: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        update_freq: int = 1,
        bptt_variation: BpttVariation | None = None,
        reset_on: str | None = None,
        rotate: bool = False,
        seed: int = 1,
        prefetch: int = 2,
        copy_to: torch.device | None = None,
    ) -> None:
        for name, value in {
            "batch_size": batch_size,
            "bptt": bptt,
            "world_size": world_size,
            "update_freq": update_freq,
        }.items():
            if value < 1:
                raise InputError(f"{name}: found {value}, expected 1 or more")
        if not 0 <= rank < world_size:
            raise InputError(f"rank: found {rank}, expected 0 to {world_size - 1}")
        if bptt_variation not in (None, *get_args(BpttVariation)):
            raise InputError(f"bptt_variation: found {bptt_variation!r}, expected None or 'awd'")
        self.corpus = tokens
        self.batch_size, self.bptt, self.update_freq = batch_size, bptt, update_freq
        self.streams = batch_size * update_freq * world_size
        self.tokens_per_stream = (len(tokens) - 1) // self.streams
        if self.tokens_per_stream < 1:
            raise InputError(
                f"{tokens.bin_path}: found {len(tokens)} tokens, expected at least {self.streams + 1} "
                f"for {self.streams} streams (batch size · update freq · world size)"
            )
        self._first_stream = rank * update_freq * batch_size
        self._variation, self._rotate, self._seed = bptt_variation, rotate, seed
        self._prefetch, self._async_transfer = prefetch, None if copy_to is None else AsyncTransfer(copy_to)
        self._resets = ResetRule(tokens, reset_on)
        self._iterator_generation = 0  # only the newest iterator may advance the position
        self._set_position(epoch=0, index=0, group=0)

    def _set_position(self, epoch: int, index: int, group: int) -> None:
        self.epoch, self.index, self._group = epoch, index, group
        self._edges = self._chunk_edges()
        # Depends only on (seed, epoch), so that a resumed run uses the same offsets.
        n = self.tokens_per_stream
        self._offsets = self._rng(RNG_OFFSETS).randint(n, size=self.streams, dtype=np.int64) if self._rotate else None

    def _rng(self, purpose: int) -> np.random.RandomState:
        # RandomState, because its draws never change from one NumPy to the next: a resumed run repeats them.
        return np.random.RandomState([self._seed & 0xFFFFFFFF, self.epoch, purpose])

    def _chunk_edges(self) -> NDArray[np.int64]:
        """Where the chunks of this epoch begin in a stream, and its end (chunks + 1,)."""
        n = self.tokens_per_stream
        if self._variation is None:
            return np.append(np.arange(0, n, self.bptt), n)
        rng, total = self._rng(RNG_LENGTHS), 0
        drawn: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        while total < n:
            size = 1 + (n - total) // self.bptt
            mean = np.where(rng.random_sample(size) < 0.95, self.bptt, self.bptt / 2)
            lengths = np.maximum(MIN_DRAWN_LENGTH, rng.normal(mean, DRAWN_LENGTH_STD).astype(np.int64))
            drawn.append(lengths)
            total += int(lengths.sum())
        edges = np.cumsum(np.concatenate(drawn))
        return np.append(edges[edges < n], n)

    def __len__(self) -> int:
        """Chunk indexes in the current epoch; each is yielded update_freq times, once per group."""
        return len(self._edges) - 1

    @property
    def remaining(self) -> int:
        """Chunk indexes of the current epoch not yet started or not yet yielded for every group."""
        return len(self) - self.index

    def __iter__(self) -> Iterator[Chunk]:
        self._iterator_generation += 1
        return self._rest_of_epoch(self._iterator_generation)

    def _rest_of_epoch(self, generation: int) -> Generator[Chunk, None, None]:
        source: Generator[list[Chunk], None, None] = self._iter_reads()
        if self._prefetch > 0:
            source = prefetch(source, self._prefetch)
        try:
            for chunks in source:
                for chunk in chunks:
                    if generation != self._iterator_generation:
                        raise RuntimeError(
                            "the loader was iterated again or restored: this iterator is no longer valid"
                        )
                    # Advance before the yield, so that state_dict counts a yielded chunk as consumed.
                    last = chunk.group == self.update_freq - 1
                    self.index, self._group = (chunk.index + 1, 0) if last else (chunk.index, chunk.group + 1)
                    yield chunk
        finally:
            source.close()
        if generation == self._iterator_generation:
            self._set_position(self.epoch + 1, 0, 0)

    def _iter_reads(self) -> Generator[list[Chunk], None, None]:
        """The rest of the epoch, in lists of the chunks of one read of the corpus.

        Copies the position at the start, because this runs in the prefetch thread.
        """
        edges, index, group, offsets = self._edges, self.index, self._group, self._offsets
        chunks_per_read = max(1, READ_SIZE // (self.update_freq * self.batch_size * self.bptt))
        for first in range(index, len(edges) - 1, chunks_per_read):
            stop = min(first + chunks_per_read, len(edges) - 1)
            inputs, targets, reset = self._read(int(edges[first]), int(edges[stop]), offsets)
            chunks = []
            for i in range(first, stop):
                columns = slice(edges[i] - edges[first], edges[i + 1] - edges[first])
                for g in range(group if i == index else 0, self.update_freq):
                    part = slice(g * self.batch_size, (g + 1) * self.batch_size), columns
                    resets = None if reset is None else reset[part]
                    chunks.append(self._chunk(i, g, inputs[part], targets[part], resets))
            yield chunks

    def read(self, start: int, stop: int) -> list[Chunk]:
        """Reads tokens `start` to `stop` of every stream, one chunk per group, without moving the position."""
        inputs, targets, reset = self._read(start, stop, self._offsets)
        rows = [slice(g * self.batch_size, (g + 1) * self.batch_size) for g in range(self.update_freq)]
        resets = [None if reset is None else reset[part] for part in rows]
        return [self._chunk(self.index, g, inputs[part], targets[part], resets[g]) for g, part in enumerate(rows)]

    @property
    def position(self) -> int:
        """Tokens of every stream before the next chunk."""
        return int(self._edges[self.index])

    def _read(self, start: int, stop: int, offsets: NDArray[np.int64] | None) -> Arrays:
        """Inputs, targets and resets (all rows of this rank, T) of tokens `start` to `stop` of its streams.

        With `offsets` (S,), each stream starts at its offset and wraps around.
        """
        n, T = self.tokens_per_stream, stop - start
        row = np.arange(self.update_freq * self.batch_size, dtype=np.int64)
        zero, stream_starts = np.zeros_like(row), (self._first_stream + row) * n
        if offsets is None:
            runs = Runs(stream_starts + start, zero + T, row, zero)
        else:
            # Two runs a row, the second perhaps empty: up to the stream's end, and on from its start.
            positions = (offsets[self._first_stream + row] + start) % n
            before = np.minimum(T, n - positions)
            first, second = (stream_starts + positions, before, row, zero), (stream_starts, T - before, row, before)
            runs = Runs(*map(np.concatenate, zip(first, second, strict=True)))
        inputs, targets = (np.empty((len(row), T), self.corpus.dtype) for _ in range(2))
        self.corpus.read(runs, inputs)
        self.corpus.read(runs._replace(starts=runs.starts + 1), targets)
        if offsets is None and not self._resets.any_resets:
            return inputs, targets, None
        reset = self._resets.mask(inputs, runs)
        if offsets is not None:
            # At the wrap, memory holds the end of the stream, which does not precede its start.
            wrap = (n - positions) % n
            wraps = (wrap < T) & ((wrap > 0) | (start > 0))
            reset[row[wraps], wrap[wraps]] = True
        return inputs, targets, reset

    def _chunk(
        self, index: int, group: int, inputs: NDArray[Any], targets: NDArray[Any], reset: NDArray[np.bool_] | None
    ) -> Chunk:
        tensors = [torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))]
        if reset is not None:
            tensors.append(torch.from_numpy(np.ascontiguousarray(reset)))
        chunk = _chunk_from_tensors(tensors, group, index)
        return chunk if self._async_transfer is None else chunk.start_transfer(self._async_transfer)

    def state_dict(self) -> dict[str, int]:
        """The position after the last chunk yielded (not prefetched).

        `position` counts the tokens of a stream before the next chunk, and `tokens_per_stream` all of them;
        `batch_size` and `update_freq` matter only between the groups of one update.
        """
        return {
            "epoch": self.epoch,
            "index": self.index,
            "group": self._group,
            "position": self.position,
            "streams": self.streams,
            "tokens_per_stream": self.tokens_per_stream,
            "batch_size": self.batch_size,
            "update_freq": self.update_freq,
        }

    def begin_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch. Invalidates earlier iterators."""
        self._set_position(epoch, 0, 0)
        self._iterator_generation += 1

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume at a saved position; the same streams may be divided differently into ranks, groups and rows.

        Invalidates earlier iterators.

        Raises:
            InputError: different streams, corpus or chunk lengths; or a state saved in the middle of an update whose
                groups are divided differently now.
        """
        for name in ("streams", "tokens_per_stream"):
            if state[name] != getattr(self, name):
                raise InputError(f"loader state: found {state[name]} {name}, expected {getattr(self, name)}")
        layout = {name: getattr(self, name) for name in ("batch_size", "update_freq")}
        if state["group"] != 0 and any(state[name] != value for name, value in layout.items()):
            raise InputError(
                f"loader state: found one saved within an update of {state['update_freq']} groups of "
                f"{state['batch_size']}, expected the same division (here {self.update_freq} of {self.batch_size})"
            )
        before = self.epoch, self.index, self._group
        self._set_position(state["epoch"], state["index"], state["group"])
        found = int(self._edges[self.index]) if self.index < len(self._edges) else None
        if found != state["position"]:
            self._set_position(*before)
            raise InputError(
                f"loader state: found chunk {state['index']} at token {state['position']} of its stream, "
                f"expected {found} (another bptt, variation or seed?)"
            )
        self._iterator_generation += 1
