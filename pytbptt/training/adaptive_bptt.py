"""The measurement behind --bptt-adaptive: the bias of truncation with the current weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pytbptt.data import IndexedTokens, StreamLoader
from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel
from pytbptt.truncation import TruncationBias, measure_lags, truncation_bias

STREAMS = 8
"""Independent of training's batch size, so that every rank measures the same."""
CHUNKS_PER_MAX_K2 = 16
"""Chunks that the longest backward length is divided into; a lag is one chunk."""
LAGS = 24
"""Lags to measure; those beyond CHUNKS_PER_MAX_K2 show how the gradient decays further."""
CHUNKS = 40
"""Chunks to read; the losses of chunk LAGS and later are the samples."""


def measure_truncation_bias(
    model: LanguageModel, tokens: IndexedTokens, *, k1: int, max_k2: int, reset_on: str, seed: Sequence[int]
) -> TruncationBias:
    """The bias of gradients over `k1` to `max_k2` tokens, of which the last `k1` are scored.

    Measured without dropout at a position of the corpus drawn from `seed`; training's random state does not change.

    Args:
        model: its training mode is restored afterwards.
        tokens: the training corpus.
        k1: tokens of every stream that an update scores.
        max_k2: the longest backward length.
        reset_on: as --reset-on.
        seed: non-negative integers.

    Raises:
        InputError: the corpus is too short for `max_k2`.
    """
    chunk_length = max(1, max_k2 // CHUNKS_PER_MAX_K2)
    loader = StreamLoader(tokens, STREAMS, chunk_length, reset_on=reset_on, prefetch=0)
    if loader.tokens_per_stream < chunk_length * CHUNKS:
        largest = (len(tokens) - 1) // STREAMS // CHUNKS * CHUNKS_PER_MAX_K2
        raise InputError(
            f"--bptt-backward: found {max_k2}, expected at most {largest} for --bptt-adaptive on {len(tokens)} tokens"
        )
    start = int(np.random.RandomState(seed).randint(loader.tokens_per_stream - chunk_length * CHUNKS + 1))
    device = next(model.parameters()).device
    chunks = (
        loader.read(position, position + chunk_length)[0].to(device)
        for position in range(start, start + chunk_length * CHUNKS, chunk_length)
    )

    def step(chunk: Any, memory: Any) -> tuple[Tensor, Any]:
        result, memory = model.loss(chunk.tokens, chunk.targets, memory, chunk.reset, detach=False)
        return result.objective, memory

    training = model.training
    model.eval()
    try:
        measured = measure_lags(
            step, chunks, model.init_memory(STREAMS), model.parameters(), chunk_length=chunk_length, lags=LAGS
        )
    finally:
        model.train(training)
    lengths = {k1, max_k2, *range(chunk_length * -(-k1 // chunk_length), max_k2, chunk_length)}
    return truncation_bias(measured, [length for length in lengths if length >= chunk_length], new=k1)
