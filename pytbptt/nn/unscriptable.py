"""Modules that torch.jit.script refuses in one line."""

from typing import NoReturn

from torch import nn

from pytbptt.errors import InputError


class Unscriptable(nn.Module):
    """A module that torch.jit.script cannot compile: torch itself would answer with pages of what it read."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise InputError(
            f"{type(self).__name__}: torch.jit.script cannot compile it, expected torch.compile or torch.export"
        )
