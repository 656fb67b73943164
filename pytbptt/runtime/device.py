"""The context of a tensor: autocast, transforms, tracing, CUDA graph capture, values readable on the host."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts such a tensor to; None if it does not cast; it never casts float64."""
    device = tensor.device.type
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 breaks the graph there.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor has values that Python could read: not a fake tensor, an exported graph's or a transform's."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or is_in_func_transform():
        return False
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def can_read_on_host(tensor: Tensor) -> bool:
    """Whether Python may read the values now without waiting for a GPU or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(tensor)


def is_tracing_or_capturing(tensor: Tensor) -> bool:
    """Whether operations on this tensor are being traced by torch.compile or captured in a CUDA graph."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def is_in_func_transform() -> bool:
    """Whether a call is inside a transform of torch.func, such as grad, jvp or vmap, or of forward-mode automatic
    differentiation. A torch.autograd.Function has no rule for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
