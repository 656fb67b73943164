"""The weights to measure at: a checkpoint's, or those of a short training."""

from pathlib import Path

import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.data import IndexedTokens, Vocabulary
from pytbptt.errors import InputError
from pytbptt.training.config import TrainSettings
from pytbptt.tuning.plan import Plan
from pytbptt.tuning.trial import Start, Trial


def from_checkpoint(path: Path, tokens: IndexedTokens) -> Start:
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
    origin = f"{path}, update {progress['update']:,}" if progress else f"{path}, converted"
    return Start(checkpoint["model"], checkpoint["optimizer"], origin)


def from_training(settings: TrainSettings, tokens: IndexedTokens, device: torch.device, plan: Plan) -> Start:
    """New weights, trained as the settings say for as many updates as the plan has tokens for."""
    bptt, batch_size = settings.data.tokens_per_sample, settings.data.batch_size
    updates = max(1, plan.training // (bptt * batch_size))
    with Trial(settings, tokens, device, bptt=bptt, batch_size=batch_size) as trial:
        for _ in range(updates):
            trial.update()
        nll, count, *_ = trial.trainer.step.tally.sums.tolist()
        loss = nll / count if count else float("nan")
        return Start(
            checkpoints.snapshot(trial.trainer.model.state_dict()),
            checkpoints.snapshot(trial.trainer.step.optimizer.state_dict()),
            f"{updates} updates of {batch_size} x {bptt} tokens from --seed {settings.run.seed}, mean loss {loss:.3f}",
        )
