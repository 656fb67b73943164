"""The two ways in which pytbptt refuses: the user's input is wrong, or the run itself failed."""

import re


class InputError(ValueError):
    """A user's mistake: one line with what was found and what was expected (exit status 2)."""


class RunError(RuntimeError):
    """A failure that is nobody's input: a full disk, a loss that stays not finite (exit status 1)."""


OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory")
"""What the RuntimeError says that torch raises for want of memory, on a GPU and on the CPU."""
