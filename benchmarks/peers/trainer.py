"""Runs the updates of `python -m pytbptt.train`: the Trainer's, on tokens from a file."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import ours
from benchmarks.peers.cases import CLIP_NORM, LEARNING_RATE, Case, TokenStream
from benchmarks.peers.parts import Range
from benchmarks.peers.worker import serve
from pytbptt.data import Chunk, StreamLoader, Vocabulary, load, write_indexed
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.runtime.distributed import distributed_context
from pytbptt.training.config import DataSettings, OptimizationSettings, RunSettings, TrainSettings
from pytbptt.training.trainer import Trainer

CHUNKS = 64  # per stream and epoch


class TrainerRunner:
    """Reads its own corpus, whose tokens have the distribution of TokenStream."""

    def __init__(self, case: Case) -> None:
        optimization = OptimizationSettings(
            optimizer=case.optimizer, lr=LEARNING_RATE, clip_norm=CLIP_NORM, bf16=case.bf16
        )
        self.context = distributed_context(case.device)
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), case)
            settings = TrainSettings(
                data=DataSettings(data=folder, tokens_per_sample=case.bptt, batch_size=case.batch_size),
                model=ARCHITECTURES[case.arch](vocab_size=case.vocab_size, **case.sizes),
                optimization=optimization,
                run=RunSettings(device="cuda" if case.device == "cuda" else "cpu"),
            )
            self.trainer = Trainer(settings, load(folder), None, self.context.__enter__())
        self.updates = self._updates()

    def parameters(self) -> int:
        return self.trainer.model.num_parameters()

    def ranges(self) -> list[Range]:
        self.trainer.step.compute_or_replay = self.trainer.step.compute  # the replay of a CUDA graph has no ranges
        return [
            *ours.RANGES,
            (self, "next_update", "data"),
            (Chunk, "to", "data"),
            (self.trainer.step.optimizer, "step", "optimizer"),
            (self.trainer.step.optimizer, "zero_grad", "optimizer"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        ]

    def run(self, work: str, chunks: TokenStream, count: int) -> None:
        for _ in range(count):
            self.trainer.update(self.next_update())

    def next_update(self) -> list[Chunk]:
        return next(self.updates)

    def _updates(self) -> Iterator[list[Chunk]]:
        loader: StreamLoader = self.trainer.loader
        while True:
            for chunk in loader:
                yield [chunk]


def write_corpus(folder: Path, case: Case) -> None:
    """Writes a split "train" with CHUNKS chunks per stream, and a dictionary of the vocabulary's size."""
    stream = TokenStream(replace(case, device="cpu"))
    ids = [stream.next()[1].numpy().ravel() for _ in range(CHUNKS)]
    write_indexed(folder / "train", [np.concatenate([*ids, ids[0][:1]])], np.int32, "fairseq")
    words = max(0, case.vocab_size - len(Vocabulary.SPECIALS))
    Vocabulary([f"w{n}" for n in range(words)], list(itertools.repeat(1, words))).save(folder)


if __name__ == "__main__":
    serve(TrainerRunner)
