"""Attributes under the names that they had before they were renamed."""

import sys
import warnings
from typing import Any

SCANNERS = ("inspect", "torch", "unittest")
"""Modules that read all attributes of an object: nobody asks them for the old name."""


class Renamed:
    """A class attribute that gives another one, with a DeprecationWarning: `old = Renamed("new")` in the class's body.

    Both reading and writing go to the attribute of the new name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __set_name__(self, owner: type, old: str) -> None:
        self.message = f"{owner.__name__}.{old} is {self.name} now; the old name will be removed after release 0.1"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] not in SCANNERS:
            warnings.warn(self.message, DeprecationWarning, stacklevel=2)
        return getattr(owner if instance is None else instance, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        warnings.warn(self.message, DeprecationWarning, stacklevel=2)
        setattr(instance, self.name, value)
