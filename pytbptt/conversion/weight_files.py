"""Load a state_dict from torch.save or safetensors files, sharded or not, and strip wrappers and prefixes."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.weights import strip_prefix
from pytbptt.errors import InputError

INDEX = ".index.json"
WEIGHT_FILES = ("pytorch_model.bin", "model.safetensors", f"pytorch_model.bin{INDEX}", f"model.safetensors{INDEX}")
"""Weight and shard-index file names used by save_pretrained."""
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "module")
"""Keys under which training scripts save the state_dict, most common first."""
SIGNATURE_KEYS = (
    "transformer.word_emb.emb_layers.0.weight",
    "word_emb.emb_layers.0.weight",
    "0.encoder.weight",
    "encoder.weight",
)
"""A parameter name that identifies each project's models. Longer names come first where one is a suffix of another."""


def read(path: Path) -> safe_unpickle.FileContents:
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
        return safe_unpickle.FileContents(safetensors.load_file(path), [])
    except Exception as error:  # safetensors raises its own exception type
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: found no safetensors file ({reason}), expected one") from None


def extract_state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    """A model's state_dict, with wrapper prefixes such as "module." removed.

    Args:
        path: of the file, for messages.
        value: its contents: a state_dict or module, possibly nested in dicts; all names may share a prefix.

    Raises:
        InputError: only some names have the common prefix.
    """
    weights = _find_state_dict(value) or {}
    for signature in SIGNATURE_KEYS:
        for name in weights:
            if name == signature or name.endswith(f".{signature}"):
                prefix = name.removesuffix(signature)
                outlier = next((outlier for outlier in weights if not outlier.startswith(prefix)), None)
                if outlier is not None:
                    found = f"weights of {prefix}* and {outlier} beside them"
                    raise InputError(f"{path}: found {found}, expected all names to have the same prefix")
                return strip_prefix(weights, prefix)
    return weights


def read_json(path: Path, expected: str, flag: str = "") -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: of the file.
        expected: what it should be, for messages.
        flag: the flag that gave the path, for messages; "" if none.

    Raises:
        InputError: not a readable JSON file, or not an object.
    """
    name = f"{flag}: {path}" if flag else str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: found no readable JSON ({error}), expected {expected}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}: found a {type(value).__name__}, expected {expected}")
    return value


def _find_state_dict(value: Any, depth: int = 0) -> dict[str, Tensor] | None:
    """The first dict of tensors in `value`, searched depth-first, that contains a signature."""
    if safe_unpickle.is_module(value):
        value = safe_unpickle.state_dict(value)
    if not isinstance(value, dict):
        return None
    tensors = {str(name): entry for name, entry in value.items() if isinstance(entry, Tensor)}
    if any(name.endswith(SIGNATURE_KEYS) for name in tensors):
        return tensors
    order = [*STATE_DICT_KEYS, *(name for name in value if name not in STATE_DICT_KEYS)] if depth < 3 else []
    candidates = (_find_state_dict(value[name], depth + 1) for name in order if name in value)
    return next((found for found in candidates if found is not None), None)


def _read_shards(index: Path) -> safe_unpickle.FileContents:
    weight_map: Mapping[str, Any] = read_json(index, "the index of a model's shards").get("weight_map") or {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: found no weight_map, expected the index of a model's shards")
    weights: dict[str, Any] = {}
    blocked_globals: list[str] = []
    for shard in dict.fromkeys(weight_map.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index}: found shard {shard!r}, expected the name of a file beside it")
        path = index.with_name(shard)
        if not path.is_file():
            raise InputError(f"{index}: found no {path}, expected every shard that it names beside it")
        contents = read(path)
        if not safe_unpickle.is_state_dict(contents.value):
            raise InputError(f"{path}: found a {type(contents.value).__name__}, expected a state_dict")
        weights.update(contents.value)
        blocked_globals += [name for name in contents.blocked_globals if name not in blocked_globals]
    missing = next((name for name in weight_map if name not in weights), None)
    if missing is not None:
        raise InputError(f"{index}: found no {missing} in its shards, expected it in {weight_map[missing]}")
    return safe_unpickle.FileContents(weights, blocked_globals)
