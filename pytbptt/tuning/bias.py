"""What truncation costs: the decay of the gradient with lag, and the bias of each bptt."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pytbptt.data import Chunk, IndexedTokens, StreamLoader
from pytbptt.nn import TransformerXL
from pytbptt.nn.language_model import LanguageModel
from pytbptt.truncation import TruncationBias, measure_lags, truncation_bias
from pytbptt.tuning.plan import Plan

LSTM_CHUNK, TRANSFORMER_CHUNK = 8, 16
"""Tokens that a lag counts: a Transformer-XL reads all of its memory for every chunk, so it has fewer."""
MEMORY_COST = 0.2
"""Of reading a token of memory, beside training on a token."""
COST = 3
"""A token in so short a chunk takes so much longer than one in training's."""
STREAMS = 4
LONGEST_LAG = 256
"""Tokens to look back, at most; beyond, the decay is taken to go on."""
FEWEST_SAMPLES, MOST_SAMPLES = 12, 64


def measure_bias(
    model: LanguageModel, tokens: IndexedTokens, device: torch.device, plan: Plan, reset_on: str, seed: int
) -> TruncationBias:
    """The truncation bias of the gradient with each of the plan's bptts, in evaluation mode (without dropout).

    A bptt shorter than the chunk that lags count is left out.
    """
    model.eval()
    length, read = LSTM_CHUNK, float(LSTM_CHUNK)
    if isinstance(model, TransformerXL):
        length, read = TRANSFORMER_CHUNK, TRANSFORMER_CHUNK + MEMORY_COST * model.config.mem_len
    streams = max(1, min(STREAMS, len(tokens) // (4 * LONGEST_LAG)))
    loader = StreamLoader(tokens, streams, length, reset_on=reset_on)
    chunks = loader.tokens_per_stream // length
    lags = max(1, min(LONGEST_LAG // length, plan.bptts[-1] // length, chunks // 2))
    samples = int(max(FEWEST_SAMPLES, min(MOST_SAMPLES, plan.bias / (COST * lags * streams * read))))
    every = max(1, min(lags, (chunks - lags) // samples))

    def step(chunk: Chunk, memory: Any) -> tuple[Tensor, Any]:
        chunk = chunk.to(device)
        result, memory = model.loss(chunk.tokens, chunk.targets, memory, chunk.reset, detach=False)
        return result.objective, memory

    measured = measure_lags(
        step,
        islice(loader, min(chunks, lags + every * samples)),
        model.init_memory(streams),
        model.parameters(),
        chunk_length=length,
        lags=lags,
        every=every,
    )
    return truncation_bias(measured, [bptt for bptt in plan.bptts if bptt >= length], seed=seed)
