"""Keeps parameters tied that several modules share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def preserve_ties(module: nn.Module) -> Iterator[None]:
    """Tie parameters again after the block that were tied before it.

    torch.nn.Module.to_empty, and other moves that create new parameters, create one for each name.
    """
    ties = _ties(module)
    yield
    for first, *others in ties:
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, module.get_parameter(first))


def shared_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Give all names of a tied parameter the same entry in a state_dict that is about to be loaded: so it stays tied
    with assign=True, and a file may contain only one of the names.

    Returns:
        Error messages for tied parameters whose entries differ; torch would silently load the last one.
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
            wrong.append(f"{differ[0]} and {found[0]} are tied in this model, but their entries differ")
            continue
        if not isinstance(entry, nn.Parameter):
            entry = nn.Parameter(entry, module.get_parameter(tie[0]).requires_grad)
        state_dict.update(dict.fromkeys([prefix + name for name in tie], entry))
    return wrong


def _ties(module: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [tie for tie in names.values() if len(tie) > 1]


def _are_same(one: Tensor, other: Any) -> bool:
    """Whether two entries have the same values; assumed where they cannot be compared here."""
    if one is other or type(one) not in (Tensor, nn.Parameter) or type(other) not in (Tensor, nn.Parameter):
        return True
    if one.is_meta or other.is_meta or one.device != other.device or one.shape != other.shape:
        return bool(one.shape == other.shape)
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return bool(one.dtype == other.dtype)
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())
