"""When a run stops: signals, and the limits in its settings."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import RunSettings
from pytbptt.training.metrics import Progress

# Windows only has the first two.
STOP_SIGNALS = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle STOP_SIGNALS with `handler` within the block.

    A signal that is already ignored, such as SIGHUP under nohup, stays ignored.
    """
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Stopping:
    """Whether and why a run stops; all ranks stop at the same update.

    Args:
        settings: the limits of the run.
        updates: length of the learning rate schedule.
        distributed: rank, world size and device.
    """

    def __init__(self, settings: RunSettings, updates: int, distributed: DistributedContext) -> None:
        self.settings, self.updates, self.distributed = settings, updates, distributed
        self.signal = ""
        """The name of the signal that this process received; empty if none."""
        self.started = time.monotonic()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within the block, a signal stops the run after the current update or during scoring; a second one at once."""

        def stop(number: int, frame: Any) -> None:
            self.signal = signal.Signals(number).name
            signal.signal(number, signal.SIG_DFL)

        with handle_signals(stop):
            yield

    def told(self) -> bool:
        """Whether any rank received a signal."""
        return self.distributed.any(bool(self.signal))

    def reason(self, progress: Progress, epoch: int) -> str:
        """The limit in the settings that the run has reached, in words; empty if none.

        Args:
            progress: of the run.
            epoch: number of completed epochs.
        """
        run = self.settings
        if (run.max_update or not run.max_epoch) and progress.update >= self.updates:
            return f"update {self.updates} (--max-update)"
        if run.max_epoch and epoch >= run.max_epoch:
            return f"the end of epoch {run.max_epoch} (--max-epoch)"
        if run.patience and progress.without_improvement >= run.patience:
            return f"{run.patience} validations without improvement (--patience)"
        minutes = self.distributed.broadcast((time.monotonic() - self.started) / 60) if run.max_minutes else 0.0
        if run.max_minutes and minutes >= run.max_minutes:
            return f"{run.max_minutes:g} minutes (--max-minutes)"
        return ""
