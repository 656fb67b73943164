"""The two exceptions of pytbptt: wrong input from the user, and a run that failed."""

import re


class InputError(ValueError):
    """Invalid input: the message is one line that says what was found and what was expected (exit status 2)."""


class RunError(RuntimeError):
    """A failure that no input caused, such as a full disk or a loss that stays infinite or NaN (exit status 1)."""


OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory")
"""Matches the message of the RuntimeError that torch raises when it runs out of memory, on a GPU or the CPU."""
