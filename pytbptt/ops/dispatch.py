"""Dispatch between the compiled ops ("fused") and plain PyTorch ("reference")."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pytbptt.errors import InputError, RunError
from pytbptt.ops.extension import EXTENSION
from pytbptt.runtime.build_record import build_command
from pytbptt.runtime.device import is_in_func_transform
from pytbptt.runtime.setting import ScopedSetting

Backend = Literal["auto", "fused", "reference"]
_BACKENDS = get_args(Backend)

SUPPORTED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class SizeLimit:
    """The largest last dimension that an op's CUDA kernels support."""

    name: str
    """What that dimension is, in the plural, for messages."""
    largest: int


OPS: dict[str, SizeLimit | None] = {}
"""Registry of ops by name; None: no limit."""
already_warned: set[str] = set()


# An invalid PYTBPTT_BACKEND raises at the first call, not on import, where command-line programs could not catch it.
_backend: ScopedSetting[str] = ScopedSetting(os.environ.get("PYTBPTT_BACKEND") or "auto")
requested_cpu_isa = os.environ.get("PYTBPTT_CPU_ISA")
"""Requested instruction set; if the CPU or build lacks it, the extension uses the best available one."""


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Select the implementation of both ops inside the block, for this thread and for threads that have not selected
    one.

    Args:
        name: "reference": plain PyTorch; "fused": the compiled op, or RunError if it cannot be used; "auto": the
            compiled op if it can be used, otherwise the reference. PYTBPTT_BACKEND sets the default.

    Raises:
        InputError: any other name.
    """
    if name not in _BACKENDS:
        raise InputError(f"backend: found {name!r}, expected one of {', '.join(_BACKENDS)}")
    with _backend.override(name):
        yield


def chosen_backend() -> str:
    """The backend selected by `backend` or PYTBPTT_BACKEND.

    Raises:
        InputError: PYTBPTT_BACKEND is not a valid backend.
    """
    chosen = _backend.get()
    if chosen not in _BACKENDS:
        raise InputError(f"PYTBPTT_BACKEND: found {chosen!r}, expected one of {', '.join(_BACKENDS)}")
    return chosen


def uses_fused(op: str, tensor: Tensor) -> bool:
    """Whether to use the compiled op for tensors like `tensor`. Warns once if "auto" has to fall back.

    Raises:
        RunError: backend("fused") is selected, but the fused op cannot be used.
    """
    reason = fused_unsupported_reason(op, tensor.device, tensor.dtype, tensor.shape[-1])
    if reason is None:
        reason = _transform_unsupported_reason()
    if reason is None:
        return True
    chosen = chosen_backend()
    if chosen == "fused":
        raise RunError(f"{op}: the fused op cannot be used: {reason}")
    # Kernels that were not built were warned about on import; meta tensors compute nothing.
    built = EXTENSION.supports("cuda" if tensor.is_cuda else "cpu")
    if chosen == "auto" and built and tensor.device.type != "meta":
        _warn_once(f"{op}: falling back to the reference in plain PyTorch, which is slower: {reason}")
    return False


def fused_unsupported_reason(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str | None:
    """Why the compiled op does not support tensors of this device and dtype; None if it does.

    Args:
        op: one of OPS.
        device, dtype: of the op's tensors.
        size: of their last dimension.

    Raises:
        InputError: PYTBPTT_BACKEND is not a valid backend, or PYTBPTT_CPU_ISA not one that this processor has.
    """
    if chosen_backend() == "reference":
        return "backend reference was chosen"
    if EXTENSION.facts is None:
        return f"pytbptt has no compiled extension: {EXTENSION.unavailable_reason}"
    if not EXTENSION.supports(device.type):
        if device.type == "cuda":
            reason = EXTENSION.facts["why_no_cuda"]
            return f"no CUDA kernels were built: {reason}; to build them, with nvcc in CUDA_HOME: {build_command()}"
        return f"no kernels are written for device type {device.type}, only for cpu and cuda"
    if device.type == "cpu" and requested_cpu_isa and requested_cpu_isa != EXTENSION.facts["cpu_isa_in_use"]:
        built, best = EXTENSION.facts["cpu_isas"], EXTENSION.facts["cpu_isa_in_use"]
        raise InputError(
            f"PYTBPTT_CPU_ISA: found {requested_cpu_isa!r}, expected one of {', '.join(built[: built.index(best) + 1])}"
        )
    if dtype not in SUPPORTED_DTYPES[device.type]:
        supported = ", ".join(map(_name, SUPPORTED_DTYPES[device.type]))
        return f"no kernels are written for {_name(dtype)} on {device.type}, only for {supported}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            found = f"{properties.name} of {properties.major}.{properties.minor}"
            return f"CUDA kernels need compute capability 8.0 or more, found {found}"
        architectures = EXTENSION.facts["cuda_architectures"]
        if not _is_arch_compatible(architectures, (properties.major, properties.minor)):
            found = f"{properties.name} of {properties.major}.{properties.minor}"
            return f"CUDA kernels were built for {architectures}, found {found}; to build again: {build_command()}"
        if (limit := OPS[op]) and size > limit.largest:
            return f"CUDA kernels support {limit.name} up to {limit.largest}, found {size}"
    return None


def _is_arch_compatible(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs code compiled for these architectures, named as in
    TORCH_CUDA_ARCH_LIST."""
    for architecture in re.split("[; ]+", architectures):
        found = re.fullmatch(r"(\d+)\.(\d)(a|f)?(\+PTX)?", architecture)
        if found is None:
            return True  # an architecture name such as Ampere: leave the check to CUDA
        built, arch_specific, ptx = (int(found[1]), int(found[2])), found[3] == "a", found[4] is not None
        same_major = built[0] == capability[0] and built[1] <= capability[1] and not arch_specific
        if built == capability or same_major or (ptx and not arch_specific and built <= capability):
            return True
    return False


def _transform_unsupported_reason() -> str | None:
    """Why the compiled op cannot be used in the current context (torch.func, ONNX export), or None."""
    if is_in_func_transform():
        return TRANSFORM_ERROR
    if torch.onnx.is_in_onnx_export():
        return "ONNX has no such operator"
    return None


def describe(op: str, device: torch.device, dtype: torch.dtype, size: int = 0) -> str:
    """Which implementation handles such tensors, and why if not the compiled one; see `fused_unsupported_reason`."""
    reason = fused_unsupported_reason(op, device, dtype, size)
    if reason is None:
        return f"fused ({EXTENSION.facts['cpu_isa_in_use']})" if device.type == "cpu" and EXTENSION.facts else "fused"
    return f"{'none, for backend fused was chosen' if chosen_backend() == 'fused' else 'reference'}: {reason}"


def allows_tf32(tensor: Tensor) -> bool:
    """Whether torch lets float32 products of such tensors round their operands to TF32; other dtypes never do."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and cuda_rounds_to_tf32()


# torch.compile cannot trace this setting, but guards on it and recompiles when it changes.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cuda_rounds_to_tf32() -> bool:
    # Not torch.backends.cuda.matmul.allow_tf32, which raises where TF32 was allowed by this newer setting.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def call_op(op: Callable[..., Any], *arguments: Any) -> Any:
    """The results of a compiled op.

    Raises:
        torch.OutOfMemoryError: a GPU has too little memory. The op cannot raise it itself: errors cross torch's stable
            ABI only as text.
    """
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "CUDA out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


TRANSFORM_ERROR = "it does not support torch.func transforms or forward-mode derivatives, and one is active"


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """As torch.library.register_autograd, but raises a clear error under torch.func transforms (torch's is very long)
    and forward-mode AD (where torch would return zeros)."""
    overload = getattr(torch.ops.pytbptt, op).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = overload(*arguments)
        setup_context(ctx, arguments, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{op}_with_gradient", (torch.autograd.Function,), methods)

    def run(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if torch._C._are_functorch_transforms_active() or _have_tangents(tensors):
            raise RuntimeError(f"torch.ops.pytbptt.{op}: {TRANSFORM_ERROR}; the reference does: {_CHOOSE_REFERENCE}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    _LIBRARY.impl(op, run, "Autograd")  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("pytbptt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _have_tangents(tensors: list[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)  # type: ignore[no-untyped-call]


def forbid_double_backward(op: str) -> None:
    """Make double backward raise; without a rule autograd would treat that derivative as zero."""

    def raise_error(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"{op}: the fused op has no second derivative; the reference has one: {_CHOOSE_REFERENCE}")

    register_autograd(f"{op}_backward", raise_error, lambda ctx, arguments, results: None)


_CHOOSE_REFERENCE = "pytbptt.ops.backend('reference')"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # under torch.compile it warns while tracing
def _warn_once(message: str) -> None:
    if message not in already_warned:
        already_warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
