"""When a run stops: signals, the limits in its settings, and too many updates without a finite gradient."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pytbptt.errors import RunError
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import RunSettings
from pytbptt.training.metrics import Progress

# Windows only has the first two.
STOP_SIGNALS = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]
MAX_SKIPPED_IN_A_ROW = 10
"""A run fails after this many updates in a row that were skipped because their gradient was not finite."""


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle STOP_SIGNALS with `handler` within the block.

    A signal that is already ignored, such as SIGHUP under nohup, stays ignored.
    """
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous_handlers = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


class StopCondition:
    """Whether and why a run stops; all ranks stop at the same update.

    Args:
        settings: the limits of the run.
        max_update: length of the learning rate schedule.
        distributed: rank, world size and device.
    """

    def __init__(self, settings: RunSettings, max_update: int, distributed: DistributedContext) -> None:
        self.settings, self.max_update, self.distributed = settings, max_update, distributed
        self.signal = ""
        """The name of the signal that this process received; empty if none."""
        self.started = time.monotonic()

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within the block, a signal stops the run after the current update or during scoring; a second one at once."""

        def stop(number: int, frame: Any) -> None:
            self.signal = signal.Signals(number).name
            signal.signal(number, signal.SIG_DFL)

        with handle_signals(stop):
            yield

    def signal_received(self) -> bool:
        """Whether any rank received a signal."""
        return self.distributed.any_rank(bool(self.signal))

    def stop_reason(self, progress: Progress, epoch: int) -> str:
        """The limit in the settings that the run has reached, as text; empty if none.

        Args:
            progress: of the run.
            epoch: number of completed epochs.
        """
        run = self.settings
        if (run.max_update or not run.max_epoch) and progress.update >= self.max_update:
            return f"update {self.max_update} (--max-update)"
        if run.max_epoch and epoch >= run.max_epoch:
            return f"the end of epoch {run.max_epoch} (--max-epoch)"
        if run.patience and progress.without_improvement >= run.patience:
            return f"{run.patience} validations without improvement (--patience)"
        minutes = self.distributed.broadcast((time.monotonic() - self.started) / 60) if run.max_minutes else 0.0
        if run.max_minutes and minutes >= run.max_minutes:
            return f"{run.max_minutes:g} minutes (--max-minutes)"
        return ""


def raise_if_too_many_skipped(progress: Progress) -> None:
    """Stop a run that has diverged.

    Raises:
        RunError: the last MAX_SKIPPED_IN_A_ROW updates or more were skipped because their gradient was not finite.
    """
    if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"the gradient was not finite in {progress.skipped_in_a_row} updates in a row, up to update "
            f"{progress.update}: lower --lr, --clip-norm or --tokens-per-sample, or raise --warmup-updates; the last "
            "checkpoint is from before that"
        )
