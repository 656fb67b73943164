"""What a run counts: how far it has come, and sums over its updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pytbptt.runtime.distributed import Processes


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

    def validated(self, loss: float) -> bool:
        """Take the loss of a validation; whether it is the best so far."""
        improved = loss < self.best_loss
        self.validated_at, self.best_loss = self.update, min(self.best_loss, loss)
        self.without_improvement = 0 if improved else self.without_improvement + 1
        return improved

    def forget_validations(self) -> None:
        """As if there had been none."""
        self.validated_at, self.best_loss, self.without_improvement = -1, float("inf"), 0


class Tally:
    """Sums over updates, kept on the training device: to read them is to wait for it, to add to them is not.

    They stay where they are, so that a CUDA graph may add to them.

    Args:
        processes: this process among those that share the work.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
        """Since the last entry of the log, of the updates that were made: negative log-likelihood, targets, norm of the
        gradient, and their number."""
        self.skips = torch.zeros(2, dtype=torch.int64, device=processes.device)
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

    def state_dict(self) -> dict[str, float]:
        """The sums, those of targets over all processes, each of which has to ask."""
        nll, count = self.processes.sum(self.sums[:2]).tolist()
        grad_norm, updates = self.sums[2:].tolist()
        return {"nll": nll, "count": count, "grad_norm": grad_norm, "updates": int(updates)}

    def load_state_dict(self, state: dict[str, float], progress: Progress) -> None:
        """Go on with such sums, and with what `progress` says of skipped updates."""
        own_share = float(self.processes.is_first)  # what all processes had added up is the first one's now
        nll, count = own_share * state["nll"], own_share * state["count"]
        self.sums.copy_(torch.tensor([nll, count, state["grad_norm"], state["updates"]], dtype=torch.float64))
        self.skips.copy_(torch.tensor([progress.skipped, progress.skipped_in_a_row]))
