"""Sizes, tokens and work of the measured cases. Does not import pytbptt, which the peer's environment lacks."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

SEED = 1
LEARNING_RATE = 0.00025
CLIP_NORM = 0.25


@dataclass(frozen=True)
class Case:
    """A model, the chunks that it reads, and targets for the ratio of the peer's time to pytbptt's."""

    name: str
    summary: str
    arch: str
    """transformer_xl or awd_lstm."""
    vocab_size: int
    sizes: dict[str, Any]
    """Settings of the model, with the names of pytbptt's configuration."""
    batch_size: int
    bptt: int
    warm_up: int
    """Chunks read before timing, which fill the memory."""
    chunks: int
    """Chunks per timed run."""
    ours: tuple[str, ...]
    """What pytbptt runs; the first is the baseline of the ratios."""
    theirs: dict[str, float | None]
    """What the peer runs, with the target of each ratio, if any."""
    optimizer: Literal["adam", "sgd"] = "adam"
    device: str = "cpu"
    bf16: bool = False
    """Mixed precision in bfloat16."""

    @property
    def trained(self) -> bool:
        return "train" in self.theirs

    @property
    def tokens_per_turn(self) -> int:
        return self.chunks * self.batch_size * self.bptt


CASES = {
    case.name: case
    for case in (
        Case(
            name="evaluation",
            summary="the seed's evaluation, batch 1, 64 tokens at a time, memory 640",
            arch="transformer_xl",
            vocab_size=267_744,
            sizes={
                "cutoffs": (20_000, 40_000, 200_000),
                "n_layer": 16,
                "d_model": 410,
                "n_head": 10,
                "d_head": 41,
                "d_inner": 2100,
                "mem_len": 640,
                "clamp_len": 400,
                "same_length": True,
                "dropout": 0.0,
            },
            batch_size=1,
            bptt=64,
            warm_up=10,
            chunks=16,
            ours=("loss", "loss-by-chunk"),
            theirs={"log_prob": 6.0, "loss": 3.5, "loss-together": None},
        ),
        Case(
            name="training-small",
            summary="training, byte vocabulary, 16 streams, T = M = 128",
            arch="transformer_xl",
            vocab_size=256,
            sizes={
                "cutoffs": (),
                "n_layer": 6,
                "d_model": 256,
                "n_head": 4,
                "d_head": 64,
                "d_inner": 1024,
                "mem_len": 128,
                "clamp_len": -1,
                "same_length": False,
                "dropout": 0.1,
            },
            batch_size=16,
            bptt=128,
            warm_up=2,
            chunks=1,
            ours=("train",),
            theirs={"train": 1.35},
        ),
        Case(
            name="training-long",
            summary="training, byte vocabulary, 1 stream, T = M = 512",
            arch="transformer_xl",
            vocab_size=256,
            sizes={
                "cutoffs": (),
                "n_layer": 12,
                "d_model": 512,
                "n_head": 8,
                "d_head": 64,
                "d_inner": 2048,
                "mem_len": 512,
                "clamp_len": -1,
                "same_length": False,
                "dropout": 0.1,
            },
            batch_size=1,
            bptt=512,
            warm_up=2,
            chunks=1,
            ours=("train",),
            theirs={"train": 1.35},
        ),
    )
}


class TokenStream:
    """Chunks of random ids by Zipf's law: the probability of rank r is proportional to 1 / r.

    So the targets reach every cluster of an adaptive softmax. All implementations read the same ids.
    """

    def __init__(self, case: Case) -> None:
        self.batch_size, self.bptt, self.device = case.batch_size, case.bptt, case.device
        self.generator = torch.Generator().manual_seed(SEED)
        self.cumulative = (1.0 / torch.arange(1, case.vocab_size + 1, dtype=torch.float64)).cumsum(0)

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 (B, T) each."""
        uniform = (
            torch.rand(self.batch_size, self.bptt + 1, generator=self.generator, dtype=torch.float64)
            * self.cumulative[-1]
        )
        ids = torch.searchsorted(self.cumulative, uniform).clamp(max=len(self.cumulative) - 1).to(self.device)
        return ids[:, :-1], ids[:, 1:]
