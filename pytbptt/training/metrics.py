"""What a run counts: how far it has come, and sums over its updates."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Progress:
    """How far a run has come; everything here goes into the checkpoint."""

    update: int = 0
    tokens: int = 0
    """Targets scored in training so far, over all processes."""
    skipped: int = 0
    """Updates whose gradient was not finite, and which changed no weight."""
    skipped_in_a_row: int = 0
    validated_at: int = -1
    best_loss: float = float("inf")
    without_improvement: int = 0
    bptt_backward: int = 0
    """What --bptt-adaptive has chosen last; 0 without it."""
    stopped: str = ""
    """Why the run has ended; empty while it has not."""


class Tally:
    """Sums over updates, kept on the training device: to read them is to wait for it, to add to them is not.

    They stay where they are, so that a CUDA graph may add to them.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """Since the last entry of the log, of the updates that were made: negative log-likelihood, targets, norm of the
        gradient, and their number."""
        self.skips = torch.zeros(2, dtype=torch.int64, device=device)
        """Updates skipped, for their gradient was not finite: in the whole run, and in a row up to now."""

    def add(self, nll: Tensor, count: Tensor, norm: Tensor) -> None:
        """One more update.

        Args:
            nll, count: float64 (), over this process's targets.
            norm: (), of the gradient; not finite if the update was skipped.
        """
        skipped = ~norm.isfinite()
        self.sums += torch.stack([nll, count, norm.double(), torch.ones_like(nll)]).masked_fill(skipped, 0.0)
        self.skips.copy_(torch.stack([self.skips[0] + skipped, (self.skips[1] + 1) * skipped]))
