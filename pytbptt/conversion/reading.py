"""The weights in whatever file they lie: of torch.save or safetensors, whole or in shards, wrapped and prefixed."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.weights import without_prefix
from pytbptt.errors import InputError

INDEX = ".index.json"
FILES = ("pytorch_model.bin", "model.safetensors", f"pytorch_model.bin{INDEX}", f"model.safetensors{INDEX}")
"""Where save_pretrained writes weights, or which shards have them."""
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
"""Where training scripts keep a model's weights beside other things, the usual first."""
LANDMARKS = (
    "transformer.word_emb.emb_layers.0.weight",
    "word_emb.emb_layers.0.weight",
    "0.encoder.weight",
    "encoder.weight",
)
"""Weights that every model of a project has, of TransfoXL, kimiyoung's, fastai's and salesforce's; longer names first,
where one ends as another does."""


def read(path: Path) -> safe_unpickle.Contents:
    """The contents of a file of torch.save, of safetensors, or of all shards that an index names.

    Raises:
        InputError: unreadable or incomplete; safetensors without that package.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix != ".safetensors":
        return safe_unpickle.read(path)
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError:
        raise InputError(f"{path}: found no package safetensors here, expected it: pip install safetensors") from None
    try:
        return safe_unpickle.Contents(safetensors.load_file(path), [])
    except Exception as error:  # the library raises a bare one of its own
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: found no safetensors file ({reason}), expected one") from None


def weights_of(path: Path, value: Any) -> dict[str, Tensor]:
    """The weights of a model, by the names that they have where nothing is wrapped around it.

    Args:
        path: of the file, for messages.
        value: its contents: a state_dict or a module, in dicts of other things if need be; names may all begin alike.

    Raises:
        InputError: names of which some begin so and others do not.
    """
    weights = _unwrapped(value) or {}
    for landmark in LANDMARKS:
        for name in weights:
            if name == landmark or name.endswith(f".{landmark}"):
                prefix = name.removesuffix(landmark)
                other = next((other for other in weights if not other.startswith(prefix)), None)
                if other is not None:
                    found = f"weights of {prefix}* and {other} beside them"
                    raise InputError(f"{path}: found {found}, expected all names to begin alike")
                return without_prefix(weights, prefix)
    return weights


def read_json(path: Path, expected: str, flag: str = "") -> dict[str, Any]:
    """An object of JSON.

    Args:
        path: of the file.
        expected: what it should be, for messages.
        flag: what named it, if something did.

    Raises:
        InputError: no readable file of JSON, or something else in it.
    """
    name = f"{flag}: {path}" if flag else str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: found no readable JSON ({error}), expected {expected}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}: found a {type(value).__name__}, expected {expected}")
    return value


def _unwrapped(value: Any, depth: int = 0) -> dict[str, Tensor] | None:
    """The tensors by name that have a landmark among them, wherever in `value` they are."""
    if safe_unpickle.is_module(value):
        value = safe_unpickle.state_dict(value)
    if not isinstance(value, dict):
        return None
    tensors = {str(name): entry for name, entry in value.items() if isinstance(entry, Tensor)}
    if any(name.endswith(LANDMARKS) for name in tensors):
        return tensors
    order = [*WRAPPERS, *(name for name in value if name not in WRAPPERS)] if depth < 3 else []
    inside = (_unwrapped(value[name], depth + 1) for name in order if name in value)
    return next((found for found in inside if found is not None), None)


def _read_shards(index: Path) -> safe_unpickle.Contents:
    places: Mapping[str, Any] = read_json(index, "the index of a model's shards").get("weight_map") or {}
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: found no weight_map, expected the index of a model's shards")
    weights: dict[str, Any] = {}
    refused: list[str] = []
    for shard in dict.fromkeys(places.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: found shard {shard!r}, expected the name of a file beside it")
        path = index.with_name(shard)
        if not path.is_file():
            raise InputError(f"{index}: found no {path}, expected every shard that it names beside it")
        contents = read(path)
        if not safe_unpickle.is_state_dict(contents.value):
            raise InputError(f"{path}: found a {type(contents.value).__name__}, expected a state_dict")
        weights.update(contents.value)
        refused += [name for name in contents.refused if name not in refused]
    missing = next((name for name in places if name not in weights), None)
    if missing is not None:
        raise InputError(f"{index}: found no {missing} in its shards, expected it in {places[missing]}")
    return safe_unpickle.Contents(weights, refused)
