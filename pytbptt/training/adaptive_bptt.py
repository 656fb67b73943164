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
RESOLUTION = 16
"""Parts that the longest backward length is divided into; a lag is one part."""
LAGS = 24
"""Lags to measure; those beyond RESOLUTION show how the gradient decays further."""
PARTS = 40
"""Parts to read; the losses of part LAGS and later are the samples."""


def measured_bias(
    model: LanguageModel, tokens: IndexedTokens, *, new: int, longest: int, reset_on: str, seed: Sequence[int]
) -> TruncationBias:
    """The bias of gradients over `new` to `longest` tokens, of which the last `new` are scored.

    Measured without dropout at a position of the corpus drawn from `seed`; training's random state does not change.

    Args:
        model: its training mode is restored afterwards.
        tokens: the training corpus.
        new: k1.
        longest: the longest k2.
        reset_on: as --reset-on.
        seed: non-negative integers.

    Raises:
        InputError: the corpus is too short for `longest`.
    """
    part = max(1, longest // RESOLUTION)
    loader = StreamLoader(tokens, STREAMS, part, reset_on=reset_on, prefetch=0)
    if loader.tokens_per_stream < part * PARTS:
        most = (len(tokens) - 1) // STREAMS // PARTS * RESOLUTION
        raise InputError(
            f"--bptt-backward: found {longest}, expected at most {most} for --bptt-adaptive on {len(tokens)} tokens"
        )
    start = int(np.random.RandomState(seed).randint(loader.tokens_per_stream - part * PARTS + 1))
    device = next(model.parameters()).device
    chunks = (loader.read(place, place + part)[0].to(device) for place in range(start, start + part * PARTS, part))

    def step(chunk: Any, memory: Any) -> tuple[Tensor, Any]:
        result, memory = model.loss(chunk.tokens, chunk.targets, memory, chunk.reset, detach=False)
        return result.objective, memory

    training = model.training
    model.eval()
    try:
        measured = measure_lags(
            step, chunks, model.init_memory(STREAMS), model.parameters(), chunk_length=part, lags=LAGS
        )
    finally:
        model.train(training)
    lengths = {new, longest, *range(part * -(-new // part), longest, part)}
    return truncation_bias(measured, [length for length in lengths if length >= part], new=new)
