"""Operations on model memories, independent of the architecture.

A memory is a dataclass whose fields are tensors or tuples of tensors. Each field says which dimension of its tensors
is the stream (dimension 0 unless its metadata says otherwise), and which one holds an entry for each token, if one
does; that is all these functions need to know::

    @memory.register
    @dataclass(frozen=True)
    class TransformerXLMemory:
        hidden: Tensor = field(metadata={"stream_dim": 1, "time_dim": 2})  # (L, B, M, E)
        first: Tensor  # (B,)

No function changes the memory that it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pytbptt.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Memory = TypeVar("Memory", bound=DataclassInstance)
else:
    Memory = TypeVar("Memory")
Class = TypeVar("Class", bound=type)


def register(cls: Class) -> Class:
    """Register a dataclass as a pytree node (for torch.compile, torch.export, torch.func) and as a safe global for
    torch.load(weights_only=True)."""
    pytree.register_dataclass(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    torch.serialization.add_safe_globals([cls])
    return cls


def detach(memory: Memory) -> Memory:
    """Detach all tensors, which truncates backpropagation at the chunk boundary."""
    return _map(lambda tensor, dim: tensor.detach(), memory)


def to(memory: Memory, device: torch.device | str) -> Memory:
    """The memory on `device`, its dtypes as they are."""
    return _map(lambda tensor, dim: tensor.to(device), memory)


def num_streams(memory: DataclassInstance) -> int:
    """B, the number of streams, which is the same in every tensor.

    Raises:
        InputError: two tensors hold different numbers of streams.
    """
    sizes = {name: tensor.shape[dim] for name, tensor, dim in _tensors(memory)}
    if len(set(sizes.values())) != 1:
        raise InputError(f"memory: found {sizes} streams, expected the same number in each")
    return next(iter(sizes.values()))


def select(memory: Memory, streams: Tensor | slice) -> Memory:
    """The memory of some streams: int64 indices in the order wanted (a copy), or a slice (views)."""
    return _map(lambda tensor, dim: tensor[(slice(None),) * dim + (streams,)], memory)


def latest(memory: Memory, length: int) -> Memory:
    """The last `length` entries of per-token tensors (views); other tensors unchanged."""
    new_fields: dict[str, Any] = {}
    for field in dataclasses.fields(memory):
        if (dim := field.metadata.get("time_dim")) is not None:
            tensor = getattr(memory, field.name)
            num_entries = min(length, tensor.shape[dim])
            new_fields[field.name] = tensor.narrow(dim, tensor.shape[dim] - num_entries, num_entries)
    return dataclasses.replace(memory, **new_fields)


def reset(memory: Memory, initial: Memory, streams: Tensor) -> Memory:
    """Replace the memory of the streams where `streams`, bool (B,), is True by `initial`."""

    def where(tensor: Tensor, initial_tensor: Tensor, dim: int) -> Tensor:
        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
        return torch.where(streams.view(shape), initial_tensor, tensor)

    if tuple(streams.shape) != (num_streams(memory),) or streams.dtype != torch.bool:
        found = f"{streams.dtype} {tuple(streams.shape)}"
        raise InputError(f"memory: reset: streams: found {found}, expected torch.bool ({num_streams(memory)},)")
    return _map(lambda tensor, initial_tensor, dim: where(tensor, initial_tensor, dim), memory, initial)


def concatenate(memories: Sequence[Memory]) -> Memory:
    """Concatenate memories along the stream dimension; the inverse of `split`."""
    if not memories:
        raise InputError("memory: concatenate: found no memory, expected at least one")
    return _map(lambda *tensors, dim: torch.cat(tensors, dim=dim), *memories)


def split(memory: Memory, size: int) -> list[Memory]:
    """Split into memories of `size` consecutive streams (copies, so that none keeps the full tensor alive).

    Raises:
        InputError: `size` does not divide the number of streams.
    """
    streams = num_streams(memory)
    if size < 1 or streams % size:
        raise InputError(f"memory: split: found {streams} streams, expected a multiple of {size}")
    groups = (select(memory, slice(start, start + size)) for start in range(0, streams, size))
    return [_map(lambda tensor, dim: tensor.clone(), group) for group in groups]


def state_dict(memory: DataclassInstance) -> dict[str, Tensor]:
    """The memory's tensors by name (`"hidden"`; `"h.0"`, `"h.1"` for a tuple), as a checkpoint holds them."""
    return {name: tensor.detach() for name, tensor, _ in _tensors(memory)}


def load(template: Memory, state: Mapping[str, Tensor]) -> Memory:
    """The memory that `state_dict` gave, for any number of streams, on the template's device and in its dtypes.

    Args:
        template: a memory of the same model, such as `model.init_memory(1)`.
        state: tensors by name.

    Raises:
        InputError: names or per-stream shapes differ from the template's, or the tensors' numbers of streams differ.
    """
    expected = [name for name, _, _ in _tensors(template)]
    if set(state) != set(expected):
        raise InputError(f"memory: found tensors {sorted(state)}, expected {sorted(expected)}")
    streams: dict[int, str] = {}
    for name, tensor, dim in _tensors(template):
        found = tuple(state[name].shape)
        expected_shape = ["B" if d == dim else str(size) for d, size in enumerate(tensor.shape)]
        if len(found) != tensor.dim() or any(size != found[d] for d, size in enumerate(tensor.shape) if d != dim):
            raise InputError(f"memory: {name}: found shape {found}, expected ({', '.join(expected_shape)})")
        streams.setdefault(found[dim], name)
    if len(streams) > 1:
        (first, name), (second, other) = list(streams.items())[:2]
        raise InputError(f"memory: {other}: found {second} streams, expected {first} as in {name}")
    names = iter(expected)
    return _map(lambda tensor, dim: state[next(names)].to(tensor.device, tensor.dtype), template)


def _tensors(memory: DataclassInstance) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and stream dimension of everything in the memory."""
    for field in dataclasses.fields(memory):
        value, dim = getattr(memory, field.name), field.metadata.get("stream_dim", 0)
        if isinstance(value, tuple):
            yield from ((f"{field.name}.{n}", tensor, dim) for n, tensor in enumerate(value))
        else:
            yield field.name, value, dim


def _map(function: Callable[..., Tensor], memory: Memory, *others: Memory) -> Memory:
    """A memory of `function(tensor, *others' tensors, dim=stream dimension)`, in the order of `_tensors`."""
    new_fields: dict[str, Any] = {}
    for field in dataclasses.fields(memory):
        values, dim = [getattr(m, field.name) for m in (memory, *others)], field.metadata.get("stream_dim", 0)
        if isinstance(values[0], tuple):
            new_fields[field.name] = tuple(function(*tensors, dim=dim) for tensors in zip(*values, strict=True))
        else:
            new_fields[field.name] = function(*values, dim=dim)
    return dataclasses.replace(memory, **new_fields)
