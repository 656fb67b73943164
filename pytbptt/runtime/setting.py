"""A setting that a `with` block overrides, in the block's thread and in threads without a block of their own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ScopedSetting(Generic[Value]):
    """A value that the innermost `override` block around a call sets; `default` outside of any.

    A thread inside blocks of its own uses those. A thread without one, such as autograd's and DataParallel's threads,
    uses the block that was entered last in any thread. Blocks of different threads may overlap: leaving one removes
    that block's value only.
    """

    def __init__(self, default: Value) -> None:
        self.default = default
        self._local = threading.local()
        self._all_threads: tuple[_Override[Value], ...] = ()  # replaced, never changed: it is read without the lock
        self._lock = threading.Lock()

    def get(self) -> Value:
        """The value in effect."""
        # torch.compile traces this and guards it: it recompiles where the value has changed.
        overrides: tuple[_Override[Value], ...] = getattr(self._local, "overrides", ()) or self._all_threads
        return overrides[-1].value if overrides else self.default

    @contextmanager
    def override(self, value: Value) -> Iterator[None]:
        """Set the value for the block."""
        entry = _Override(value)
        outer = getattr(self._local, "overrides", ())
        with self._lock:
            self._all_threads = (*self._all_threads, entry)
        self._local.overrides = (*outer, entry)
        try:
            yield
        finally:
            self._local.overrides = outer
            with self._lock:
                self._all_threads = tuple(other for other in self._all_threads if other is not entry)


class _Override(Generic[Value]):
    """One block's value; an object of its own, so that equal values of two blocks stay apart."""

    def __init__(self, value: Value) -> None:
        self.value = value
