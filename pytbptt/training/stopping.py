"""What ends a run: signals, and what its settings say."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pytbptt.runtime.distributed import Processes
from pytbptt.training.config import RunSettings
from pytbptt.training.metrics import Progress

# Windows has the first two alone.
STOP_SIGNALS = [signal.Signals[n] for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have the handler called for STOP_SIGNALS as long as the context lasts.

    One that is ignored from the beginning, as SIGHUP under nohup, stays so.
    """
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Stopping:
    """Whether and why a run stops.

    Args:
        settings: how long it shall be.
        updates: that its schedule has.
        processes: this one among those of the job; all of them stop at once.
    """

    def __init__(self, settings: RunSettings, updates: int, processes: Processes) -> None:
        self.settings, self.updates, self.processes = settings, updates, processes
        self.signal = ""
        """The name of the signal that this process was told to stop by."""
        self.started = time.monotonic()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Signals end the run after the update or within the scoring that they find it in; a second one, at once."""

        def stop(number: int, frame: Any) -> None:
            self.signal = signal.Signals(number).name
            signal.signal(number, signal.SIG_DFL)

        with handle_signals(stop):
            yield

    def told(self) -> bool:
        """Whether any process was told to."""
        return self.processes.any(bool(self.signal))

    def reason(self, progress: Progress, epoch: int) -> str:
        """What the settings say that ends the run here, in words; empty if nothing does.

        Args:
            progress: of the run.
            epoch: how many are over.
        """
        run = self.settings
        if (run.max_update or not run.max_epoch) and progress.update >= self.updates:
            return f"update {self.updates} (--max-update)"
        if run.max_epoch and epoch >= run.max_epoch:
            return f"the end of epoch {run.max_epoch} (--max-epoch)"
        if run.patience and progress.without_improvement >= run.patience:
            return f"{run.patience} validations without improvement (--patience)"
        minutes = self.processes.broadcast((time.monotonic() - self.started) / 60) if run.max_minutes else 0.0
        if run.max_minutes and minutes >= run.max_minutes:
            return f"{run.max_minutes:g} minutes (--max-minutes)"
        return ""
