"""What can be known of a tensor here and now: autocast, transforms, values on the host, capture."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast would have such a tensor in; None where it leaves it alone, as float64 always."""
    device = tensor.device.type
    # Not torch.amp.is_autocast_available, which torch 2.11 cannot compile: torch.compile would break the graph here.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def has_values(tensor: Tensor) -> bool:
    """Whether there are values that Python could look at: not in a fake tensor, an exported graph or a transform."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or is_transformed():
        return False
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    return all(torch._C._get_dispatch_mode(mode) is None for mode in modes)


def free_to_read(tensor: Tensor) -> bool:
    """Whether Python may look at the values here and now: it would wait for a GPU, and break a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and has_values(tensor)


def captured(tensor: Tensor) -> bool:
    """Whether what is done with this tensor is taken down now, to be repeated without Python."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed() -> bool:
    """Whether a call happens inside a transform of torch.func, such as grad, jvp or vmap, or at a level of forward-mode
    differentiation. A custom op of Python's autograd has no rule for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of a dtype are taken in: float32, or float64 where they are that."""
    return torch.float64 if dtype == torch.float64 else torch.float32
