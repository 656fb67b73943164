"""Learning rate as a function of the update's number alone, so that a resumed run cannot be off by one."""

import math

from pytbptt.training.config import OptimizationSettings


def learning_rate(settings: OptimizationSettings, update: int, max_update: int) -> float:
    """Learning rate of the update number `update`, counted from 0, of a run of `max_update`.

    All schedules rise linearly over the warm-up. Then `cosine` and `linear` fall to min_lr at max_update,
    `inverse_sqrt` falls as 1/sqrt(update) from the end of the warm-up and `constant` stays. `one_cycle` (Smith,
    "Super-Convergence", 2018) rises by a cosine over the warm-up, a quarter of the run if that is 0, and falls by
    another.
    """
    peak, least, warmup = settings.lr, settings.min_lr, settings.warmup_updates
    if settings.lr_scheduler == "one_cycle":
        warmup = warmup or max_update // 4
        if update < warmup:
            return least + (peak - least) * _half_cosine(1 - (update + 1) / warmup)
    elif update < warmup:
        return peak * (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, max_update - warmup))
    if settings.lr_scheduler in ("cosine", "one_cycle"):
        return least + (peak - least) * _half_cosine(progress)
    if settings.lr_scheduler == "linear":
        return peak + (least - peak) * progress
    if settings.lr_scheduler == "inverse_sqrt":
        return max(least, peak * math.sqrt(max(1, warmup) / max(1, warmup, update + 1)))
    return peak


def _half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
