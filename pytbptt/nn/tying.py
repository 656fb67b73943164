"""Keep tied parameters (those that several modules share) tied."""

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
    ties = _tied_parameters(module)
    yield
    for first, *others in ties:
        for name in others:
            module_name, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(module_name), attribute, module.get_parameter(first))


def sync_tied_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Give all names of a tied parameter the same entry in a state_dict that is about to be loaded: so it stays tied
    with assign=True, and a file may contain only one of the names.

    Returns:
        Error messages for tied parameters whose entries differ; torch would silently load the last one.
    """
    errors = []
    for tie in _tied_parameters(module):
        found = [prefix + name for name in tie if prefix + name in state_dict]
        if not found:
            continue
        entry = state_dict[found[0]]
        if not isinstance(entry, Tensor):
            continue
        differ = [name for name in found[1:] if not _same_values(entry, state_dict[name])]
        if differ:
            errors.append(f"{differ[0]} and {found[0]} are tied in this model, but their entries differ")
            continue
        if not isinstance(entry, nn.Parameter):
            entry = nn.Parameter(entry, module.get_parameter(tie[0]).requires_grad)
        state_dict.update(dict.fromkeys([prefix + name for name in tie], entry))
    return errors


def _tied_parameters(module: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [tie for tie in names.values() if len(tie) > 1]


def _same_values(one: Tensor, other: Any) -> bool:
    """Whether two entries have the same values; assumed where they cannot be compared here."""
    if one is other or type(one) not in (Tensor, nn.Parameter) or type(other) not in (Tensor, nn.Parameter):
        return True
    if one.is_meta or other.is_meta or one.device != other.device or one.shape != other.shape:
        return bool(one.shape == other.shape)
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return bool(one.dtype == other.dtype)
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())
