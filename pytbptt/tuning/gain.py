"""What a longer bptt buys: loss after equal numbers of tokens and after equal time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pytbptt.data import IndexedTokens, StreamLoader
from pytbptt.nn.language_model import LanguageModel
from pytbptt.training.config import TrainSettings
from pytbptt.tuning.trial import Start, Trial

SCORINGS = 8
"""Times that a run's loss is measured."""
SCORED = 16_384
"""Tokens that it is measured on."""
STREAMS = 16


@dataclass(frozen=True)
class Curve:
    """One run."""

    bptt: int
    batch_size: int
    seconds: tuple[float, ...]
    """Of training, at each scoring."""
    tokens: tuple[int, ...]
    """Trained on by then."""
    losses: tuple[float, ...]
    """Nats per token of held-out text."""


@dataclass(frozen=True)
class GainPoint:
    """One bptt beside the others."""

    bptt: int
    at_equal_tokens: float
    """Nats per token, after as many tokens as the slowest run saw."""
    at_equal_time: float
    """Nats per token, after --train-minutes."""


def train_each(
    settings: TrainSettings,
    train: IndexedTokens,
    held_out: IndexedTokens,
    device: torch.device,
    start: Start,
    bptts: Sequence[int],
    update_tokens: int,
    minutes: float,
    step: Callable[[float], None],
) -> list[Curve]:
    """Train with each bptt from the same weights, `minutes` each, at the settings' peak learning rate.

    As for stability, updates have the same number of tokens whatever the bptt: shorter chunks come from more streams.

    Args:
        held_out: what to score on; its scoring's time does not count.
        update_tokens: of one update, over all its streams, about.
        step: called with the share that is done since the last call.
    """
    curves = []
    for bptt in bptts:
        streams = max(1, update_tokens // bptt)
        with Trial(settings, train, device, bptt=bptt, batch_size=streams, start=start) as trial:
            curve, spent = Curve(bptt, streams, (), (), ()), 0.0
            for scoring in range(1, SCORINGS + 1):
                while spent < scoring / SCORINGS * 60 * minutes:
                    started = time.perf_counter()
                    trial.update()
                    spent += time.perf_counter() - started
                loss = held_out_loss(trial.trainer.model, held_out, device, bptt, settings.data.reset_on)
                curve = replace(
                    curve,
                    seconds=(*curve.seconds, spent),
                    tokens=(*curve.tokens, trial.trainer.progress.tokens),
                    losses=(*curve.losses, loss),
                )
                step(1 / SCORINGS / len(bptts))
        curves.append(curve)
    return curves


def compare(curves: Sequence[Curve]) -> list[GainPoint]:
    """Each run's loss where the one with the fewest tokens ended, between two scorings, and at its own end."""
    common = min(curve.tokens[-1] for curve in curves)
    return [
        GainPoint(curve.bptt, float(np.interp(common, curve.tokens, curve.losses)), curve.losses[-1])
        for curve in curves
    ]


def held_out_loss(model: LanguageModel, tokens: IndexedTokens, device: torch.device, bptt: int, reset_on: str) -> float:
    """Nats per token of the first SCORED tokens' worth of STREAMS streams, read in chunks as in training."""
    streams = max(1, min(STREAMS, (len(tokens) - 1) // bptt))
    loader = StreamLoader(tokens, streams, bptt, reset_on=reset_on)
    nll, count = 0.0, 0
    memory: Any = model.init_memory(streams)
    model.eval()
    with torch.no_grad():
        for chunk in loader:
            chunk = chunk.to(device)
            result, memory = model.loss(chunk.tokens, chunk.targets, memory, chunk.reset)
            nll, count = nll + float(result.nll), count + int(result.count)
            if count >= SCORED:
                break
    model.train()
    return nll / count
