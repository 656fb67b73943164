"""Weights of other projects, by their names there, into a model of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytbptt.errors import InputError
from pytbptt.nn.architectures import Model


def fill(
    model: Model,
    weights: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str]],
    ignored: tuple[str, ...] = (),
) -> None:
    """Copy weights into a model, every one of the model's and none left over.

    Args:
        model: what is filled, in place.
        weights: by their original names.
        names: for every name in the model's state_dict its original names; the first that is there is taken.
        ignored: endings of the names that may be left over.

    Raises:
        InputError: a weight that is missing, left over, or of another size.
    """
    with torch.no_grad():
        for ours, tensor in model.state_dict().items():
            name = next((name for name in names[ours] if name in weights), None)
            if name is None:
                raise InputError(f"weights: found no {' or '.join(names[ours])}, expected it {tuple(tensor.shape)}")
            if weights[name].shape != tensor.shape:
                found = f"{name} {tuple(weights[name].shape)}"
                raise InputError(f"weights: found {found}, expected {tuple(tensor.shape)} by the configuration")
            tensor.copy_(weights[name])
    known = {name for candidates in names.values() for name in candidates}
    for name in weights:
        if name not in known and not name.endswith(ignored):
            raise InputError(f"weights: found {name}, expected no such weight in this model")


def setting(config: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """One entry of a configuration.

    Raises:
        InputError: missing without a default, or of another type.
    """
    value = config.get(name, default)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        found = "nothing" if value is None else repr(value)[:60]
        raise InputError(f"configuration: {name}: found {found}, expected {kind.__name__}")
    return value


def whole_numbers(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """An entry of a configuration that is a list of integers; empty where there is none.

    Raises:
        InputError: anything else.
    """
    values = config.get(name, [])
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise InputError(f"configuration: {name}: found {repr(values)[:60]}, expected a list of integers")
    return tuple(values)


def without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
