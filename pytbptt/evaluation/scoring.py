"""The loss of a text under a model: every token once, whatever the batch."""

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
from pytbptt.nn.cross_entropy import UNSCORED
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.cuda_graph import Graphed
from pytbptt.runtime.distributed import Processes
from pytbptt.runtime.extras import progress_bar

Forward = Callable[[Tensor, Any, Tensor | None], tuple[Tensor, Any]]

TOGETHER = 512
"""Tokens that are read at once, where the cut into chunks changes nothing: matrix products of 64 rows take half as long
again."""
SCORED_TOGETHER = 2048
"""Targets that go through the softmax at once: what takes longest in it is to read the tables of 267,744 words, most of
them for the few targets of its tails."""


def bits(nats: float) -> float:
    """A loss in nats, in bits."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """exp of a loss in nats; infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


class Interrupted(Exception):  # noqa: N818 - no error: it is what was asked for
    """A scoring was told to give up."""


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
        return bits(self.loss)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


def chunk_length(model: LanguageModel, bptt: int, streams: int) -> int:
    """Tokens of each of `streams` streams to read at once so that their loss is that of `bptt` at a time.

    As many chunks as make TOGETHER tokens, unless what a token sees depends on its place in the chunk.
    """
    if model.knows_chunks:
        return bptt
    return bptt * max(1, TOGETHER // (bptt * streams))


def score(
    model: LanguageModel,
    tokens: IndexedTokens,
    *,
    streams: int,
    bptt: int,
    warm_up: int,
    reset_on: str,
    processes: Processes,
    progress: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    cuda_graph: bool = True,
) -> Score:
    """Score every token of a text once, the first from end-of-sentence.

    Args:
        model: its training mode is restored afterwards.
        tokens: N tokens.
        streams: how many pieces of the text are read side by side, over all processes.
        bptt: tokens of every stream in one forward pass; more are read at once where that does not change the loss.
        warm_up: tokens before a stream that fill its memory and are not scored; rounded up to multiples of bptt.
        reset_on: as --reset-on.
        processes: this process among those that share the work.
        progress: show a progress bar on a terminal.
        interrupted: asked before every chunk whether to give up; it is enough if one process does.
        cuda_graph: on a GPU, launch a chunk's forward pass as one CUDA graph.

    Returns:
        The same score on every process.

    Raises:
        Interrupted: on every process, if `interrupted` said so on one.
    """
    started = time.monotonic()
    chunks = evaluation_chunks(
        tokens,
        streams,
        chunk_length(model, bptt, streams),  # of all processes: a warm-up is a multiple of it
        warm_up=warm_up,
        reset_on=reset_on,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    given_up = False
    scorer = Scorer(model, processes.device, cuda_graph)
    hidden = None if progress else True  # None: where there is no terminal
    with _evaluating(model), progress_bar(total=len(tokens), unit="token", unit_scale=True, disable=hidden) as bar:
        for chunk in chunks:
            if given_up := interrupted():
                break
            bar.update(scorer.read(chunk) * processes.world_size)
        nll, count = scorer.sums()
        total, scored, gave_up = processes.sum(torch.stack([nll, count, count.new_tensor(given_up)])).tolist()
    if gave_up:
        raise Interrupted
    return Score(total, int(scored), time.monotonic() - started)


class Scorer:
    """Reads chunk after chunk of the same streams, carrying the memory, and sums what their targets cost.

    The targets wait until there are SCORED_TOGETHER of them: what takes longest in the softmax of a large vocabulary
    is to read its tables, and the chunks between them need only the memory. For a model in evaluation mode, without
    gradients. Nobody waits for a GPU before the sums.

    Args:
        model: on the device.
        device: where the chunks are read.
        cuda_graph: as for `score`.
    """

    def __init__(self, model: LanguageModel, device: torch.device, cuda_graph: bool = True) -> None:
        self.model, self.device = model, device
        self.graphed = cuda_graph and device.type == "cuda"
        self.forward: Forward = Graphed(self._forward, device) if self.graphed else self._forward
        self.memory: Any = None
        self.initial: Any = None
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.in_tails = [0] * len(model.softmax.sizes[1:])  # of what waits

    def read(self, chunk: EvaluationChunk) -> int:
        """Read one chunk, which is on the CPU; how many of its targets are scored."""
        scored, begins = int((chunk.targets != UNSCORED).sum()), bool(chunk.begins.any())
        in_tails = self.model.softmax.count(chunk.targets)
        chunk = chunk.to(self.device)
        if self.initial is None:
            self.initial = self.memory = self.model.init_evaluation_memory(chunk.tokens.shape[0])
        if begins:
            self.memory = pytbptt.memory.reset(self.memory, self.initial, chunk.begins)
        output, self.memory = self.forward(chunk.tokens, self.memory, chunk.reset)
        if scored:  # a warm-up's targets are not
            rows = output.flatten(0, 1)
            self.waiting.append((rows.clone() if self.graphed else rows, chunk.targets.flatten()))
            self.in_tails = [before + here for before, here in zip(self.in_tails, in_tails, strict=True)]
        if sum(len(targets) for _, targets in self.waiting) >= SCORED_TOGETHER:
            self._score()
        return scored

    def sums(self) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood in nats and the number of all targets so far, float64 () each."""
        self._score()
        return self.nll, self.count

    def _score(self) -> None:
        if self.waiting:
            outputs, targets = zip(*self.waiting, strict=True)
            self.waiting = []
            nll, count = self.model.softmax.nll(torch.cat(outputs), torch.cat(targets), capacity=self.in_tails)
            self.in_tails = [0] * len(self.in_tails)
            self.nll += nll
            self.count += count

    def _forward(self, tokens: Tensor, memory: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        return self.model(tokens, memory, reset)  # type: ignore[no-any-return]  # a module's call is untyped


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
