"""The loss of a text under a model: every token once, whatever the batch."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import pytbptt.memory
from pytbptt.data import IndexedTokens, evaluation_chunks
from pytbptt.nn import AWDLSTM, TransformerXL
from pytbptt.training.distributed import Processes

LSTM_WARM_UP = 1024


@dataclass(frozen=True)
class Score:
    """What a text costs under a model."""

    nll: float
    """Negative log-likelihood of all tokens, in nats."""
    count: int
    """Tokens scored."""
    seconds: float
    """Wall time."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.count

    @property
    def bits(self) -> float:
        """Bits per token."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def warm_up_tokens(model: TransformerXL | AWDLSTM, bptt: int) -> int:
    """Tokens to read ahead of a stream so that its loss is what one stream from the text's beginning gives.

    Transformer-XL sees no further back than L·(M-1) tokens with same_length and less than L·(M+T) without it. An
    LSTM has no such bound: LSTM_WARM_UP tokens are an approximation.
    """
    if isinstance(model, AWDLSTM):
        return LSTM_WARM_UP
    config = model.config
    reach = config.mem_len - 1 if config.same_length else config.mem_len + bptt
    return config.n_layer * reach if config.mem_len else 0


def score(
    model: TransformerXL | AWDLSTM,
    tokens: IndexedTokens,
    *,
    streams: int,
    bptt: int,
    warm_up: int,
    reset_on: str,
    processes: Processes,
    progress: bool = False,
) -> Score:
    """Score every token of a text once, the first from end-of-sentence.

    Args:
        model: its training mode is restored afterwards.
        tokens: N tokens.
        streams: how many pieces of the text are read side by side, over all processes.
        bptt: tokens of every stream in one forward pass.
        warm_up: tokens before a stream that fill its memory and are not scored; rounded up to multiples of bptt.
        reset_on: as --reset-on.
        processes: this process among those that share the work.
        progress: show a progress bar.

    Returns:
        The same score on every process.
    """
    device = processes.device
    nll = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    memory: Any = None
    initial: Any = None
    started = time.monotonic()
    chunks = evaluation_chunks(
        tokens,
        streams,
        bptt,
        warm_up=warm_up,
        reset_on=None if reset_on == "auto" else reset_on,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    with _evaluating(model), tqdm(total=len(tokens), unit="token", unit_scale=True, disable=not progress) as bar:
        for chunk in chunks:
            chunk = chunk.to(device)
            if initial is None:
                initial = memory = init_memory(model, chunk.tokens.shape[0])
            memory = pytbptt.memory.reset(memory, initial, chunk.begins)
            result, memory = model.loss(chunk.tokens, chunk.targets, memory, reset=chunk.reset)
            nll += result.nll
            count += result.count
            if progress:
                bar.update(int(result.count) * processes.world_size)
    total, scored = processes.sum(torch.stack([nll, count.double()])).tolist()
    return Score(total, int(scored), time.monotonic() - started)


def init_memory(model: TransformerXL | AWDLSTM, streams: int) -> Any:
    """The memory that evaluation starts with: projected keys and values where the model has them."""
    if isinstance(model, TransformerXL):
        return model.init_memory(streams, projected=True)
    return model.init_memory(streams)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
