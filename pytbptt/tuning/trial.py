"""Run training updates with a given bptt and batch size, for measurements."""

import copy
import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytbptt import checkpoint as checkpoints
from pytbptt.data import Chunk, IndexedTokens, Vocabulary
from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import TrainSettings, TruncationSettings
from pytbptt.training.trainer import Trainer
from pytbptt.training.update import load_optimizer
from pytbptt.tuning.plan import Plan


@dataclass(frozen=True)
class InitialWeights:
    """The weights that measurements start from, and the optimizer state that belongs to them."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    """None for a converted checkpoint: use a new optimizer."""
    source: str
    """Where the weights come from, for people to read."""

    def load_into(self, model: LanguageModel) -> None:
        """Load the weights into a model.

        Raises:
            InputError: the model has other sizes.
        """
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:200]
            raise InputError(f"--path: weights do not fit the settings: {detail}") from None


class Trial:
    """A Trainer with the given sizes and a constant (peak) learning rate.

    Args:
        settings: the user's; a trial has one accumulation group and plain truncated BPTT whatever they say.
        tokens: what to train on.
        device: to train on.
        bptt, batch_size: sizes in place of the settings'.
        start: weights and optimizer state to start from; None: new ones from --seed.
        full_memory: start with a full memory (of zeros), so that the first update costs as much as later ones.

    Raises:
        InputError: weights or an optimizer that do not fit the settings.
    """

    def __init__(
        self,
        settings: TrainSettings,
        tokens: IndexedTokens,
        device: torch.device,
        *,
        bptt: int,
        batch_size: int,
        start: InitialWeights | None = None,
        full_memory: bool = False,
    ) -> None:
        model = settings.model
        if model.has_mem_len and full_memory:
            model = model.replace(initial_memory="zeros")
        trial_settings = dataclasses.replace(
            settings,
            model=model,
            data=dataclasses.replace(
                settings.data,
                tokens_per_sample=bptt,
                batch_size=batch_size,
                update_freq=1,
                bptt_variation="none",
            ),
            truncation=TruncationSettings(),
            optimization=dataclasses.replace(
                settings.optimization,
                lr_scheduler="constant",
                warmup_updates=0 if start is not None else settings.optimization.warmup_updates,
            ),
        )
        self.trainer = Trainer(trial_settings, tokens, None, DistributedContext(0, 1, device))
        if start is not None:
            start.load_into(self.trainer.model)
            try:
                if start.optimizer is not None:
                    load_optimizer(self.trainer.step.optimizer, copy.deepcopy(start.optimizer))
            except ValueError as error:
                raise InputError(f"--path: optimizer state does not fit the settings: {error}") from None
        self._updates = self._over_epochs()

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        self._updates.close()
        self.trainer.checkpoint_writer.close()

    def update(self) -> float:
        """Run one update; returns the gradient norm before clipping, NaN if the update was skipped."""
        norm = float(self.trainer.update(next(self._updates)))
        return norm if norm < float("inf") else float("nan")

    def _over_epochs(self) -> Generator[list[Chunk], None, None]:
        while True:
            yield from self.trainer.updates()
            self.trainer.step.reset_streams()


def from_checkpoint(path: Path, tokens: IndexedTokens) -> InitialWeights:
    """A checkpoint's weights as training left them (not their average), and its optimizer's state, if it has one.

    Raises:
        InputError: an unreadable checkpoint, or one of another vocabulary than the data's.
    """
    checkpoint = checkpoints.read(path)
    vocabulary = Vocabulary.from_state_dict(checkpoint["vocabulary"])
    if vocabulary.fingerprint() != tokens.vocabulary.fingerprint():
        raise InputError(
            f"--path: {path}: found another vocabulary ({len(vocabulary)} types) than the data's "
            f"({len(tokens.vocabulary)} types), expected the same"
        )
    progress = checkpoint["progress"]
    source = f"{path}, update {progress['update']:,}" if progress else f"{path}, converted"
    return InitialWeights(checkpoint["model"], checkpoint["optimizer"], source)


def train_from_scratch(
    settings: TrainSettings, tokens: IndexedTokens, device: torch.device, plan: Plan
) -> InitialWeights:
    """New weights, trained with the settings for as many updates as the plan has tokens for."""
    bptt, batch_size = settings.data.tokens_per_sample, settings.data.batch_size
    updates = max(1, plan.training // (bptt * batch_size))
    with Trial(settings, tokens, device, bptt=bptt, batch_size=batch_size) as trial:
        for _ in range(updates):
            trial.update()
        sums = trial.trainer.step.metrics.state_dict()
        loss = sums["nll"] / sums["count"] if sums["count"] else float("nan")
        return InitialWeights(
            checkpoints.snapshot(trial.trainer.model.state_dict()),
            checkpoints.snapshot(trial.trainer.step.optimizer.state_dict()),
            f"{updates} updates of {batch_size} x {bptt} tokens from --seed {settings.run.seed}, mean loss {loss:.3f}",
        )
