"""Parts of the ctypes bindings that both ops share."""

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int64, c_void_p

import torch
from torch import Tensor

SCALARS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # enum Scalar of csrc/common/scalar.h
Tensors = dict[str, Tensor]


def add_buffers(library: ctypes.CDLL, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
    """Lets kernels read the inputs and write the outputs, each with its whole storage."""
    for tensor, writable in [*((t, False) for t in inputs), *((t, True) for t in outputs)]:
        storage = tensor.untyped_storage()
        library.add_buffer(c_void_p(storage.data_ptr()), c_int64(storage.nbytes()), c_bool(writable))


def launch(library: ctypes.CDLL, name: str, *arguments: Structure | Tensor) -> None:
    """Calls a function of structures and device memory; asserts that it returns no error message."""
    function = getattr(library, name)
    function.restype = c_char_p
    function.argtypes = [c_void_p if isinstance(a, Tensor) else POINTER(type(a)) for a in arguments]
    error = function(*(a.data_ptr() if isinstance(a, Tensor) else byref(a) for a in arguments))
    assert error is None, error.decode()


def nan_workspace(nbytes: int) -> Tensor:
    return torch.full((nbytes // 4,), float("nan"))
