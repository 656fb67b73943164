"""Parameters that several modules share, and what would take them apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restored_ties(module: nn.Module) -> Iterator[None]:
    """Let parameters that are one before the block be one after it.

    torch.nn.Module.to_empty, and any move where torch makes new parameters, makes one for each of their names.
    """
    ties = _ties(module)
    yield
    for first, *others in ties:
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


def shared_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Give all names of a shared parameter one entry in a state_dict that is about to be loaded, so that assign=True
    does not take them apart; a file may have left out all but one.

    Returns:
        What is wrong: entries of one parameter that differ, of which the last would have won without a word.
    """
    wrong = []
    for tie in _ties(module):
        found = [prefix + name for name in tie if prefix + name in state_dict]
        if not found:
            continue
        entry = state_dict[found[0]]
        if not isinstance(entry, Tensor):
            continue
        differ = [name for name in found[1:] if not _are_same(entry, state_dict[name])]
        if differ:
            wrong.append(f"{differ[0]} and {found[0]} are one parameter here, but their entries differ")
            continue
        if not isinstance(entry, nn.Parameter):
            entry = nn.Parameter(entry, module.get_parameter(tie[0]).requires_grad)
        state_dict.update(dict.fromkeys([prefix + name for name in tie], entry))
    return wrong


def _ties(module: nn.Module) -> list[list[str]]:
    """The names of every parameter that has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [tie for tie in names.values() if len(tie) > 1]


def _are_same(one: Tensor, other: Any) -> bool:
    """Whether two entries hold the same values; taken for granted where they cannot be read here."""
    if one is other or type(one) not in (Tensor, nn.Parameter) or type(other) not in (Tensor, nn.Parameter):
        return True
    if one.is_meta or other.is_meta or one.device != other.device or one.shape != other.shape:
        return bool(one.shape == other.shape)
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return bool(one.dtype == other.dtype)
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())
