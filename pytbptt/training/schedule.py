"""The learning rate as a function of the update's number alone, so that a resumed run cannot be off by one."""

import math

import torch
from torch import Tensor

from pytbptt.training.config import OptimizationSettings


class Schedule:
    """Sets an optimizer's learning rate.

    Args:
        optimizer: its learning rate is set.
        settings: the kind of schedule and its rates.
        max_update: length of the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: OptimizationSettings, max_update: int) -> None:
        self.optimizer, self.settings, self.max_update = optimizer, settings, max_update
        self.lr = settings.lr
        """The learning rate of the optimizer's next step."""

    def step_update(self, update: int, scale: float = 1.0) -> None:
        """Set the learning rate of the update number `update`, counted from 0, times `scale`."""
        self._set_lr(scale * learning_rate(self.settings, update, self.max_update))

    def state_dict(self) -> dict[str, float]:
        """The learning rate; everything else follows from the update's number."""
        return {"lr": self.lr}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Set the learning rate."""
        self._set_lr(state["lr"])

    def _set_lr(self, lr: float) -> None:
        self.lr = lr
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def learning_rate(settings: OptimizationSettings, update: int, max_update: int) -> float:
    """Learning rate of the update number `update`, counted from 0, of a run of `max_update`.

    All schedules rise linearly over the warm-up. Then `cosine` and `linear` fall to min_lr at max_update,
    `inverse_sqrt` falls as 1/sqrt(update) from the end of the warm-up and `constant` stays. `one_cycle` (Smith,
    "Super-Convergence", 2018) rises along a half cosine during warm-up (a quarter of the run if warmup_updates is 0)
    and falls along another.
    """
    peak, min_lr, warmup = settings.lr, settings.min_lr, settings.warmup_updates
    if settings.lr_scheduler == "one_cycle":
        warmup = warmup or max_update // 4
        if update < warmup:
            return min_lr + (peak - min_lr) * _half_cosine(1 - (update + 1) / warmup)
    elif update < warmup:
        return peak * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, max_update - warmup))
    if settings.lr_scheduler in ("cosine", "one_cycle"):
        return min_lr + (peak - min_lr) * _half_cosine(progress)
    if settings.lr_scheduler == "linear":
        return peak + (min_lr - peak) * progress
    if settings.lr_scheduler == "inverse_sqrt":
        return max(min_lr, peak * math.sqrt(max(1, warmup) / max(1, warmup, update + 1)))
    return peak


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
