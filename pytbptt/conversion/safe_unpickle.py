"""Load pickles and torch.save files as data: only tensors and plain containers are built; no other code runs.

Unpickling can call any importable function. Here only the globals in ALLOWED_GLOBALS resolve; everything else becomes
an OpaqueObject, which stores the constructor's arguments and the state.
"""

import pickle
import tarfile
import types
import typing
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytbptt.errors import InputError

ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as Python 2 called it
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The magic number that starts torch.save's legacy (non-zip) format."""


class OpaqueObject:
    """Stands for an object of a class, or the result of a call, that is not in ALLOWED_GLOBALS."""

    name = ""
    """The global's qualified name, such as "mem_transformer.MemTransformerLM"."""
    dump_patches = False
    """Read by torch.load for modules saved with their source: whether to dump a patch when the source differs."""
    args: tuple[Any, ...]
    state: Any
    """The state that __setstate__ received, normally the object's __dict__."""
    items: dict[Any, Any]
    """Items set on it, if it stands for a dict."""
    elements: list[Any]
    """Elements added to it, if it stands for a list."""

    def __new__(cls, *args: Any, **options: Any) -> "OpaqueObject":
        opaque = super().__new__(cls)
        opaque.args, opaque.state, opaque.items, opaque.elements = args, None, {}, []
        return opaque

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, element: Any) -> None:
        self.elements.append(element)

    def extend(self, elements: Any) -> None:
        self.elements.extend(elements)


@dataclass(frozen=True)
class FileContents:
    """The contents of a file."""

    value: Any
    """Tensors, plain containers and `OpaqueObject`s."""
    blocked_globals: list[str]
    """Globals not on the allow-list, without duplicates, in order of appearance."""


def read(path: Path) -> FileContents:
    """A pickle, or what torch.save wrote in any of its formats since 2017, on the CPU.

    Raises:
        InputError: missing, unreadable, or neither of the two.
    """
    expected = "expected a file of torch.save or a pickle"
    if not path.is_file():
        raise InputError(f"{path}: found no such file, {expected}")
    blocked_globals: list[str] = []
    module = _pickle_module(blocked_globals)
    try:
        if _is_torch_file(path, module):
            with warnings.catch_warnings():
                # torch.load warns that it cannot compare the module's source with that of the stand-in class.
                warnings.simplefilter("ignore")
                value = torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
        else:
            with open(path, "rb") as file:
                value = module.load(file, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}, {expected}") from None
    except InputError:
        raise
    except Exception as error:  # the type depends on the contents
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        blocked = f"; it names {', '.join(blocked_globals)}" if blocked_globals else ""
        raise InputError(f"{path}: found something unreadable ({reason}{blocked}), {expected}") from None
    return FileContents(value, blocked_globals)


def attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of the object that an `OpaqueObject` stands for; empty for anything else."""
    if not isinstance(value, OpaqueObject):
        return {}
    states = value.state if isinstance(value.state, tuple) else (value.state,)  # with slots, two dicts
    return {str(name): entry for state in states if isinstance(state, dict) for name, entry in state.items()}


def is_module(value: Any) -> bool:
    """Whether it stands for a torch.nn.Module."""
    return attributes(value).keys() >= {"_modules", "_parameters"}


def unwrap_data_parallel(value: Any) -> Any:
    """The module inside of a DataParallel or the like, or the value itself."""
    if list(_module_dict(value, "_modules")) == ["module"]:
        return _module_dict(value, "_modules")["module"]
    return value


def state_dict(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """What Module.state_dict() would return for the module that an `OpaqueObject` stands for."""
    weights: dict[str, Tensor] = {}
    for attribute in ("_parameters", "_buffers"):
        for name, tensor in _module_dict(module, attribute).items():
            if isinstance(tensor, Tensor):
                weights[f"{prefix}{name}"] = tensor.detach()
    for name, child in _module_dict(module, "_modules").items():
        if is_module(child):
            weights.update(state_dict(child, f"{prefix}{name}."))
    return weights


def submodule(module: Any, path: str) -> Mapping[str, Any]:
    """The attributes of a module's submodule, such as "layers.0.dec_attn"; none if it has no such submodule."""
    for name in path.split("."):
        module = _module_dict(module, "_modules").get(name)
    return attributes(module)


def _module_dict(module: Any, attribute: str) -> Mapping[str, Any]:
    """A module's parameters, buffers or submodules; empty if a damaged file has something else there."""
    found = attributes(module).get(attribute)
    return found if isinstance(found, dict) else {}


def is_state_dict(value: Any) -> bool:
    """Whether it is tensors by name, at least one."""
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, Tensor) for entry in value.values())


def _pickle_module(blocked_globals: list[str]) -> Any:
    """A replacement for the module pickle, for torch.load; appends globals not allowed to `blocked_globals`."""
    classes: dict[str, type[OpaqueObject]] = {}

    # Use the pure-Python unpickler: in the C one a single opcode in a 14-byte file can make the memo allocate
    # gigabytes.
    class Unpickler(pickle._Unpickler):
        dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _reject_bytearray}

        def __init__(self, file: typing.IO[bytes], **options: Any) -> None:
            super().__init__(_SizeCheckedFile(file), **options)

        def find_class(self, module: str, name: str) -> Any:
            allowed = ALLOWED_GLOBALS.get((module, name))
            if allowed is not None:
                return allowed
            qualified_name = f"{module}.{name}"
            if qualified_name not in classes:
                classes[qualified_name] = type("OpaqueObject", (OpaqueObject,), {"name": qualified_name})
                blocked_globals.append(qualified_name)
            return classes[qualified_name]

    def load(file: typing.IO[bytes], **options: Any) -> Any:
        return Unpickler(file, **options).load()

    module: Any = types.ModuleType("pytbptt.conversion.safe_unpickle.pickle")
    module.Unpickler, module.load = Unpickler, load
    return module


class _SizeCheckedFile:
    """File wrapper that rejects reads longer than the rest of the file; the unpickler would allocate whatever length
    the pickle claims."""

    def __init__(self, file: typing.IO[bytes]) -> None:
        self._file, self.readline = file, file.readline

    def read(self, size: int) -> bytes:
        if size > _UNCHECKED_READ:
            position = self._file.tell()
            if size > self._file.seek(0, 2) - position:
                raise EOFError(f"{size} bytes are said to follow")
            self._file.seek(position)
        return self._file.read(size)


_UNCHECKED_READ = 1 << 16


def _reject_bytearray(unpickler: Any) -> None:
    raise pickle.UnpicklingError("a bytearray, which no checkpoint has")


def _is_torch_file(path: Path, module: Any) -> bool:
    """Whether torch.save wrote it.

    Raises:
        InputError: TorchScript or an old tar file, which torch.load would pass to other loaders.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        # The same test as torch.load's, which would then call torch.jit.load.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise InputError(f"{path}: found TorchScript, which is code, expected weights: refused")
        return True
    if tarfile.is_tarfile(path):
        raise InputError(f"{path}: found a tar file, expected a file of torch.save (of torch 0.2 or later) or a pickle")
    with open(path, "rb") as file:
        first = module.load(file, encoding="utf-8")
    return isinstance(first, int) and first == LEGACY_MAGIC
