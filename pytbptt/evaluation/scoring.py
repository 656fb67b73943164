"""Evaluate the loss of a text; every token is scored once, for any batch size."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pytbptt.memory
from pytbptt.data import EvaluationChunk, IndexedTokens, evaluation_chunks
from pytbptt.nn.cross_entropy import IGNORE_INDEX
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.runtime.extras import progress_bar

Forward = Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]]

MIN_CHUNK_TOKENS = 512
"""Target number of tokens per forward pass where chunking does not affect the loss; products of only 64 rows are about
1.5 times as slow per token."""
SOFTMAX_BATCH_TOKENS = 2048
"""Targets per softmax call. With a large vocabulary (267,744 words) the softmax is bound by reading its weights, mostly
for the few targets in the tails, so several chunks share one call."""


def bits(nats: float) -> float:
    """A loss in nats, in bits."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """exp of a loss in nats; infinite if it exceeds the range of float."""
    return math.exp(nats) if nats < 700 else math.inf


class Interrupted(Exception):  # noqa: N818 - not an error, but a requested stop
    """`score` stopped because `should_stop` said so."""


@dataclass(frozen=True)
class Score:
    """Result of scoring a text."""

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
        return bits(self.loss)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def chunk_length(model: LanguageModel, bptt: int, streams: int) -> int:
    """Chunk length for evaluation that gives the same loss as `bptt`: the largest multiple of it within
    MIN_CHUNK_TOKENS tokens, or `bptt` itself if what a token sees depends on its position in the chunk."""
    if model.is_chunk_dependent:
        return bptt
    return bptt * max(1, MIN_CHUNK_TOKENS // (bptt * streams))


def score(
    model: LanguageModel,
    tokens: IndexedTokens,
    *,
    streams: int,
    bptt: int,
    warm_up: int,
    reset_on: str,
    distributed: DistributedContext,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    cuda_graph: bool = True,
) -> Score:
    """Score every token of a text once, the first from end-of-sentence.

    Args:
        model: its training mode is restored afterwards.
        tokens: N tokens.
        streams: number of streams that the text is split into, over all processes.
        bptt: tokens of every stream in one forward pass; more are read at once if that does not change the loss.
        warm_up: tokens before a stream that fill its memory and are not scored; rounded up to multiples of bptt.
        reset_on: as --reset-on.
        distributed: rank, world size and device.
        progress: show a progress bar on a terminal.
        should_stop: called before every chunk; True on any process stops all of them.
        cuda_graph: on a GPU, launch a chunk's forward pass as one CUDA graph.

    Returns:
        The same score on every process.

    Raises:
        Interrupted: on every process, if `should_stop` said so on one.
    """
    started = time.monotonic()
    chunks = evaluation_chunks(
        tokens,
        streams,
        # From the number of all streams, so that ranks agree: the warm-up is rounded up to a multiple of it.
        chunk_length(model, bptt, streams),
        warm_up=warm_up,
        reset_on=reset_on,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )
    stop = False
    scorer = Scorer(model, distributed.device, cuda_graph)
    disable = None if progress else True  # None: disabled if there is no terminal
    with _eval_mode(model), progress_bar(total=len(tokens), unit="token", unit_scale=True, disable=disable) as bar:
        for chunk in chunks:
            if stop := should_stop():
                break
            bar.update(scorer.read(chunk) * distributed.world_size)
        nll, count = scorer.totals()
        total, scored, any_stop = distributed.sum(torch.stack([nll, count, count.new_tensor(stop)])).tolist()
    if any_stop:
        raise Interrupted
    return Score(total, int(scored), time.monotonic() - started)


class Scorer:
    """Scores consecutive chunks of the same streams, carrying the memory.

    Targets are buffered until there are SOFTMAX_BATCH_TOKENS, because a large softmax is bound by reading its weights.
    Does not synchronise with the GPU before `totals`.

    Args:
        model: on the device.
        device: to score on.
        cuda_graph: as for `score`.
    """

    def __init__(self, model: LanguageModel, device: torch.device, cuda_graph: bool = True) -> None:
        self.model, self.device = model, device
        self.uses_cuda_graph = cuda_graph and device.type == "cuda"
        self.forward: Forward = CUDAGraphRunner(self._forward, device) if self.uses_cuda_graph else self._forward
        self.memory: Any = None
        self.initial: Any = None
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.tail_counts = [0] * len(model.softmax.cluster_sizes[1:])  # targets per tail among the buffered ones

    def read(self, chunk: EvaluationChunk) -> int:
        """Read one chunk, which is on the CPU; returns how many of its targets are scored."""
        scored, begins = int((chunk.targets != IGNORE_INDEX).sum()), bool(chunk.begins.any())
        tail_counts = self.model.softmax.tail_counts(chunk.targets)
        chunk = chunk.to(self.device)
        if self.initial is None:
            self.initial = self.memory = self.model.init_evaluation_memory(chunk.tokens.shape[0])
        if begins:
            self.memory = pytbptt.memory.reset(self.memory, self.initial, chunk.begins)
        output, self.memory = self.forward(chunk.tokens, self.memory, chunk.reset)
        if scored:  # a warm-up's targets are not
            rows = output.flatten(0, 1)
            self.pending.append((rows.clone() if self.uses_cuda_graph else rows, chunk.targets.flatten()))
            self.tail_counts = [sum(counts) for counts in zip(self.tail_counts, tail_counts, strict=True)]
        if sum(len(targets) for _, targets in self.pending) >= SOFTMAX_BATCH_TOKENS:
            self._score()
        return scored

    def totals(self) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood in nats and the number of all targets so far, float64 () each."""
        self._score()
        return self.nll, self.count

    def _score(self) -> None:
        if self.pending:
            outputs, targets = zip(*self.pending, strict=True)
            self.pending = []
            nll, count = self.model.softmax.nll(torch.cat(outputs), torch.cat(targets), capacity=self.tail_counts)
            self.tail_counts = [0] * len(self.tail_counts)
            self.nll += nll
            self.count += count

    def _forward(self, tokens: Tensor, memory: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return self.model(tokens, memory, reset)  # type: ignore[no-any-return]  # a module's call is untyped


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
