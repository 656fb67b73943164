"""The signals that stop a run."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

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
