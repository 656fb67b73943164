"""A setting that a block of code chooses for itself."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Setting(Generic[Value]):
    """What the innermost block around a call chose, or `default`.

    A thread goes by its own blocks. One that is in none, as autograd's and DataParallel's threads are, goes by the
    block that any thread entered last. Blocks of several threads may overlap: each takes back its own choice alone.
    """

    def __init__(self, default: Value) -> None:
        self.default = default
        self._own = threading.local()
        self._everyones: tuple[_Choice[Value], ...] = ()  # never changed, but replaced: it is read without the lock
        self._lock = threading.Lock()

    def get(self) -> Value:
        """The value that counts here."""
        # torch.compile follows all of this, and compiles anew where another value counts.
        choices: tuple[_Choice[Value], ...] = getattr(self._own, "choices", ()) or self._everyones
        return choices[-1].value if choices else self.default

    @contextmanager
    def choose(self, value: Value) -> Iterator[None]:
        """Choose for the block."""
        choice = _Choice(value)
        before = getattr(self._own, "choices", ())
        with self._lock:
            self._everyones = (*self._everyones, choice)
        self._own.choices = (*before, choice)
        try:
            yield
        finally:
            self._own.choices = before
            with self._lock:
                self._everyones = tuple(other for other in self._everyones if other is not choice)


class _Choice(Generic[Value]):
    """One block's."""

    def __init__(self, value: Value) -> None:
        self.value = value
