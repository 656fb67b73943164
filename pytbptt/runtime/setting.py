"""A setting that a `with` block overrides, in the block's thread and in threads that have no block of their own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Setting(Generic[Value]):
    """A value that the innermost `choose` block around a call sets; `default` outside of any.

    A thread inside blocks of its own uses those. A thread without one, such as autograd's and DataParallel's threads,
    uses the block that was entered last in any thread. Blocks of different threads may overlap: leaving one removes
    that block's value only.
    """

    def __init__(self, default: Value) -> None:
        self.default = default
        self._local = threading.local()
        self._all_threads: tuple[_Choice[Value], ...] = ()  # replaced, never changed: it is read without the lock
        self._lock = threading.Lock()

    def get(self) -> Value:
        """The value in effect."""
        # torch.compile traces this and guards it: it recompiles where the value has changed.
        choices: tuple[_Choice[Value], ...] = getattr(self._local, "choices", ()) or self._all_threads
        return choices[-1].value if choices else self.default

    @contextmanager
    def choose(self, value: Value) -> Iterator[None]:
        """Set the value for the block."""
        choice = _Choice(value)
        before = getattr(self._local, "choices", ())
        with self._lock:
            self._all_threads = (*self._all_threads, choice)
        self._local.choices = (*before, choice)
        try:
            yield
        finally:
            self._local.choices = before
            with self._lock:
                self._all_threads = tuple(other for other in self._all_threads if other is not choice)


class _Choice(Generic[Value]):
    """One block's value; an object of its own, so that equal values of two blocks stay apart."""

    def __init__(self, value: Value) -> None:
        self.value = value
