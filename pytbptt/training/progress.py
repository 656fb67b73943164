"""How far a run has come."""

from dataclasses import dataclass


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
