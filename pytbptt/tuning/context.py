"""Effective context length of models with mem_len."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytbptt.data import IndexedTokens, StreamLoader
from pytbptt.nn.language_model import LanguageModel, ModelConfig
from pytbptt.tuning.plan import MIN_BPTT, Plan
from pytbptt.tuning.trial import InitialWeights

STREAMS, CHUNK_LENGTH = 16, 32
MIN_HELD_OUT = 2 * CHUNK_LENGTH + 1
"""Minimum validation tokens: one context chunk, one scored chunk, and the last target."""
MAX_LENGTH_RATIO = 4
"""Maximum tested context as a multiple of the trained one; the weights were never trained on longer ones."""
HARDEST_FRACTION = 0.1
"""Fraction of hardest targets used for the relative gain (r in Dai et al.)."""
MIN_GAIN = 0.01
"""Minimum relative gain for longer context to count."""


@dataclass(frozen=True)
class ContextPoint:
    """The loss if every token sees exactly `length` tokens, itself included, in each layer."""

    length: int
    loss: float
    """Nats per token."""
    hardest: float
    """Nats per token, over the HARDEST_FRACTION of targets with the highest loss at the shortest length."""


def lengths_to_measure(trained: int) -> list[int]:
    """Powers of two up to MAX_LENGTH_RATIO times what the weights were trained to see."""
    return [MIN_BPTT << n for n in range((MAX_LENGTH_RATIO * trained // MIN_BPTT).bit_length())]


def measure_context(
    config: ModelConfig,
    start: InitialWeights,
    tokens: IndexedTokens,
    device: torch.device,
    plan: Plan,
    bptt: int,
    reset_on: str,
) -> list[ContextPoint]:
    """The loss of the same targets with each memory length.

    Args:
        config: of the model, with the mem_len that the weights were trained with.
        start: the weights.
        tokens: held out from training, if the data has such a split.
        bptt: chunk length that the weights were trained with.
    """
    lengths = lengths_to_measure(config.memory_length + bptt)
    chunks = min(plan.context, len(tokens) - 1) // STREAMS // CHUNK_LENGTH
    tokens_per_stream = max(2, chunks) * CHUNK_LENGTH
    warm_up = min(2 * lengths[-1], tokens_per_stream // 2)
    losses = []
    for length in lengths:
        model = config.replace(mem_len=length, same_length=True).build().to(device)
        start.load_into(model)
        losses.append(_losses(model.eval(), tokens, device, tokens_per_stream, warm_up, reset_on))
    hardest = losses[0].topk(max(1, int(HARDEST_FRACTION * len(losses[0])))).indices
    return [
        ContextPoint(length, float(loss.mean()), float(loss[hardest].mean()))
        for length, loss in zip(lengths, losses, strict=True)
    ]


def effective_context(points: Sequence[ContextPoint]) -> int:
    """The shortest context for which no longer one reduces the loss of the hardest targets by MIN_GAIN or more.

    After Dai et al., "Transformer-XL" (2019), section 4.3 and appendix C, with a group of one model: the relative gain
    of c' over c is (loss(c) - loss(c')) / loss(c) over the targets that are hardest with a short context.
    """
    return next(
        point.length
        for n, point in enumerate(points)
        if all(point.hardest - longer.hardest < MIN_GAIN * point.hardest for longer in points[n + 1 :])
    )


def _losses(
    model: LanguageModel,
    tokens: IndexedTokens,
    device: torch.device,
    tokens_per_stream: int,
    warm_up: int,
    reset_on: str,
) -> Tensor:
    """Per-target loss in nats after the warm-up, float64 on the CPU."""
    streams = max(1, min(STREAMS, (len(tokens) - 1) // tokens_per_stream))
    loader = StreamLoader(tokens, streams, CHUNK_LENGTH, reset_on=reset_on)
    memory, losses = model.init_memory(streams), []
    with torch.no_grad():
        for chunk in loader:
            if (chunk.index + 1) * CHUNK_LENGTH > tokens_per_stream:
                break
            chunk = chunk.to(device)
            output, memory = model(chunk.tokens, memory, chunk.reset)
            if chunk.index * CHUNK_LENGTH >= warm_up:
                nll, _ = model.softmax.nll(output, chunk.targets, reduction="none")
                losses.append(nll.flatten().double().cpu())
    return torch.cat(losses)
