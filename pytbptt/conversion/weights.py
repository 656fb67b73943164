"""Load the weights of other projects, by their names there, into a model of pytbptt."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytbptt.errors import InputError
from pytbptt.nn.language_model import LanguageModel, ModelConfig


def build_and_load(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    names: Callable[[Any], Mapping[str, Sequence[str]]],
    ignored: tuple[str, ...] = (),
) -> LanguageModel:
    """Build the model and load `weights`; every parameter must be present and every weight used.

    Shapes are checked on the meta device first, because a damaged or hostile config may ask for any size.

    Args:
        config: of the model.
        weights: by their original names.
        names: maps a model to {our name: candidate original names}; the first candidate present is used.
        ignored: endings of the names that may be left over.

    Raises:
        InputError: a weight that is missing, left over, or of another size.
    """
    layers = dataclasses.asdict(config)["n_layer"]
    if layers > len(weights):
        raise InputError(f"configuration: n_layer: found {layers}, expected no more than {len(weights)} weights")
    try:
        with torch.device("meta"):
            meta_model = config.build()
    except (RuntimeError, TypeError, OverflowError) as error:  # torch's, for what it cannot count
        detail = str(error).splitlines()[0][:120]
        raise InputError(f"configuration: found invalid sizes ({detail}), expected those of the weights") from None
    candidates = names(meta_model)
    loaded = {}
    for key, tensor in meta_model.state_dict().items():
        name = next((name for name in candidates[key] if name in weights), None)
        if name is None:
            raise InputError(f"weights: found no {' or '.join(candidates[key])}, expected it {tuple(tensor.shape)}")
        if weights[name].shape != tensor.shape:
            found = f"{name} {tuple(weights[name].shape)}"
            raise InputError(f"weights: found {found}, expected {tuple(tensor.shape)} by the configuration")
        if weights[name].untyped_storage().nbytes() < tensor.numel() * weights[name].element_size():
            raise InputError(f"weights: found {name} with too little data, expected all of {tuple(tensor.shape)}")
        loaded[key] = weights[name]
    known = {name for names_of_key in candidates.values() for name in names_of_key}
    for name in weights:
        if name not in known and not name.endswith(ignored):
            raise InputError(f"weights: found {name}, expected no such weight in this model")
    model = config.build()
    model.load_state_dict(loaded)
    return model


def config_value(config: Mapping[str, Any], name: str, value_type: type, default: Any = None) -> Any:
    """One entry of a configuration.

    Raises:
        InputError: missing without a default, or of another type.
    """
    value = config.get(name, default)
    if value_type is float and type(value) is int:
        value = float(value)
    if value_type is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not value_type:
        found = "nothing" if value is None else repr(value)[:60]
        raise InputError(f"configuration: {name}: found {found}, expected {value_type.__name__}")
    return value


def int_list(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """An entry of a configuration that is a list of integers; empty where there is none.

    Raises:
        InputError: anything else.
    """
    values = config.get(name, [])
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise InputError(f"configuration: {name}: found {repr(values)[:60]}, expected a list of integers")
    return tuple(values)


def strip_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
