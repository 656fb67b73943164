"""The two ways in which pytbptt refuses: the user's input is wrong, or the run itself failed."""


class InputError(ValueError):
    """A user's mistake: one line with what was found and what was expected (exit status 2)."""


class RunError(RuntimeError):
    """A failure that is nobody's input: a full disk, a loss that stays not finite (exit status 1)."""
