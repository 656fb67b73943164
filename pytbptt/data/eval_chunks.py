"""Evaluation chunks: every token is a target exactly once, after optional unscored context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pytbptt.data.indexed import IndexedTokens, Runs
from pytbptt.data.prefetching import to_device_async
from pytbptt.data.resets import ResetRule
from pytbptt.data.vocabulary import Vocabulary
from pytbptt.errors import InputError

IGNORE_INDEX = -100
"""Target that is not scored, as in pytbptt.nn.cross_entropy."""


@dataclass
class EvaluationChunk:
    """Up to bptt tokens of every row: `tokens`, `targets` (rows, T) int64, targets -100 where not scored.

    `reset` is (rows, T) bool, or None where nothing is ever reset. `begins` (rows,) bool marks rows whose text starts
    in this chunk and which need the initial memory. Resets at padding positions have no meaning.
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None
    begins: Tensor

    def to(self, device: torch.device | str) -> EvaluationChunk:
        """The chunk on `device`."""
        return EvaluationChunk(
            to_device_async(self.tokens, device),
            to_device_async(self.targets, device),
            None if self.reset is None else to_device_async(self.reset, device),
            to_device_async(self.begins, device),
        )


def evaluation_chunks(
    tokens: IndexedTokens,
    streams: int,
    bptt: int,
    *,
    warm_up: int = 0,
    reset_on: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationChunk]:
    """Yields the chunks that score all N tokens of a corpus: inputs are `</s>` and tokens[:-1], targets are tokens.

    The N targets are split into `streams` rows (over all ranks) of n = ceil(N / streams) targets, n rounded up to a
    multiple of `bptt`; empty rows are dropped. Each row first reads up to `warm_up` unscored inputs before its own;
    before its text starts and after it ends it is padded with `</s>` and target -100. Chunk boundaries are the same for
    every `streams`. Chunks without text for this rank are skipped. Ranks get contiguous rows.

    Raises:
        InputError: sizes that are not positive, a rank outside the world, or an id outside the vocabulary.
    """
    for name, value in {"streams": streams, "bptt": bptt, "world_size": world_size}.items():
        if value < 1:
            raise InputError(f"{name}: found {value}, expected 1 or more")
    if warm_up < 0:
        raise InputError(f"warm_up: found {warm_up}, expected 0 or more")
    if not 0 <= rank < world_size:
        raise InputError(f"rank: found {rank}, expected 0 to {world_size - 1}")
    resets = ResetRule(tokens, reset_on)
    N = len(tokens)
    n = _round_up(-(-N // streams), bptt)
    rows = -(-N // n)
    local_rows = np.arange(rows * rank // world_size, rows * (rank + 1) // world_size, dtype=np.int64)
    return _chunks(tokens, local_rows * n, n, bptt, _round_up(warm_up, bptt), resets)


def _chunks(
    tokens: IndexedTokens, row_starts: NDArray[np.int64], n: int, bptt: int, warm_up: int, resets: ResetRule
) -> Iterator[EvaluationChunk]:
    """Chunks for rows that score targets row_starts[r] … row_starts[r] + n - 1, clipped to the corpus."""
    if len(row_starts) == 0:
        return
    rows = np.arange(len(row_starts))
    text_starts = np.maximum(row_starts - warm_up, 0)  # the first target that is predicted, scored or not
    stops = np.minimum(row_starts + n, len(tokens))
    skipped_steps = warm_up - int((row_starts - text_starts).max())  # steps before any of these rows has text
    for step in range(skipped_steps, warm_up + n, bptt):
        starts = row_starts - warm_up + step
        T = min(bptt, int((stops - starts).max()))
        if T <= 0:
            return
        lengths = np.where(starts >= text_starts, np.clip(stops - starts, 0, T), 0)
        inputs = np.full((len(row_starts), T), Vocabulary.EOS, dtype=tokens.dtype)
        targets = np.zeros((len(row_starts), T), dtype=tokens.dtype)
        # The first target has no preceding token; its input is `</s>`.
        missing_context = (starts == 0).astype(np.int64)
        input_lengths = np.maximum(lengths - missing_context, 0)
        tokens.read(Runs(starts - 1 + missing_context, input_lengths, rows, missing_context), inputs)
        tokens.read(Runs(starts, lengths, rows, np.zeros_like(rows)), targets)
        scored = targets.astype(np.int64)
        scored[(np.arange(T) >= lengths[:, None]) | (starts < row_starts)[:, None]] = IGNORE_INDEX
        reset = None
        if resets.any_resets:
            reset = torch.from_numpy(resets.mask(inputs, Runs(starts - 1, lengths, rows, np.zeros_like(rows))))
        begins = torch.from_numpy(starts == text_starts)
        yield EvaluationChunk(torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(scored), reset, begins)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
