"""Modules for which torch.jit.script fails with one clear line."""

from typing import NoReturn

from torch import nn

from pytbptt.errors import InputError


class UnscriptableModule(nn.Module):
    """A module that torch.jit.script cannot compile; without this, torch's error is pages long."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise InputError(
            f"{type(self).__name__}: torch.jit.script cannot compile it, expected torch.compile or torch.export"
        )
