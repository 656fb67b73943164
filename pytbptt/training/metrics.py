"""The progress of a run, and sums over its updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pytbptt.runtime.distributed import DistributedContext


@dataclass
class Progress:
    """The progress of a run, which checkpoints store."""

    update: int = 0
    tokens: int = 0
    """Targets scored in training so far, over all ranks."""
    skipped: int = 0
    """Updates that changed no weight because their gradient was not finite."""
    skipped_in_a_row: int = 0
    validated_at: int = -1
    best_loss: float = float("inf")
    without_improvement: int = 0
    bptt_backward: int = 0
    """The length that --bptt-adaptive chose last; 0 without it."""
    stopped: str = ""
    """Why the run ended; empty until it does."""

    def record_validation(self, loss: float) -> bool:
        """Record a validation loss; True if it is the best so far."""
        improved = loss < self.best_loss
        self.validated_at, self.best_loss = self.update, min(self.best_loss, loss)
        self.without_improvement = 0 if improved else self.without_improvement + 1
        return improved

    def reset_validation(self) -> None:
        """Reset the results of earlier validations."""
        self.validated_at, self.best_loss, self.without_improvement = -1, float("inf"), 0


class MetricsAccumulator:
    """Sums over updates, kept on the training device: adding to them does not wait for the device, reading does.

    The tensors stay at their addresses, so that a CUDA graph may add to them.

    Args:
        distributed: rank, world size and device.
    """

    def __init__(self, distributed: DistributedContext) -> None:
        self.distributed = distributed
        self.sums = torch.zeros(4, dtype=torch.float64, device=distributed.device)
        """Over the updates since the last log entry that were not skipped: negative log-likelihood, number of targets,
        gradient norm, and number of updates."""
        self.skips = torch.zeros(2, dtype=torch.int64, device=distributed.device)
        """Updates skipped because their gradient was not finite: in the whole run, and in a row up to now."""

    def add(self, nll: Tensor, count: Tensor, norm: Tensor) -> None:
        """Add one update.

        Args:
            nll, count: float64 (), over this rank's targets.
            norm: gradient norm (); not finite if the update was skipped.
        """
        skipped = ~norm.isfinite()
        self.sums += torch.stack([nll, count, norm.double(), torch.ones_like(nll)]).masked_fill(skipped, 0.0)
        self.skips.copy_(torch.stack([self.skips[0] + skipped, (self.skips[1] + 1) * skipped]))

    def state_dict(self) -> dict[str, float]:
        """The sums, those over targets summed over all ranks: every rank must call this."""
        nll, count = self.distributed.sum(self.sums[:2]).tolist()
        grad_norm, updates = self.sums[2:].tolist()
        return {"nll": nll, "count": count, "grad_norm": grad_norm, "updates": int(updates)}

    def load_state_dict(self, state: dict[str, float], progress: Progress) -> None:
        """Restore the sums, and the numbers of skipped updates from `progress`."""
        mine = float(self.distributed.is_main_process)  # saved are the sums over all ranks: rank 0 takes them whole
        nll, count = mine * state["nll"], mine * state["count"]
        self.sums.copy_(torch.tensor([nll, count, state["grad_norm"], state["updates"]], dtype=torch.float64))
        self.skips.copy_(torch.tensor([progress.skipped, progress.skipped_in_a_row]))
