"""One LSTM layer over one chunk."""

from typing import Any

import torch
from torch import Tensor

from pytbptt.ops.dispatch import OPS, allows_tf32, call_op, forbid_double_backward, register_autograd, uses_fused
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.lstm import reference
from pytbptt.runtime.device import autocast_dtype

OPS["lstm"] = None


def lstm(
    gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence of an LSTM layer, from gates that already hold the input projection and both biases.

    Per step, with (i, f, g, o) = gates[t] + h @ weight_hh.T::

        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)

    Args:
        gates: (T, B, 4H), in torch.nn.LSTM's order i f g o.
        weight_hh: (4H, H), after DropConnect if there is any.
        h0, c0: (B, H), the state before the first step; c0 stays float32 under autocast and for 16-bit gates.
        reset: bool (T, B); where true, h and c are zeroed before that step, and so are the gradients through them.

    Returns:
        output (T, B, H), h_n (B, H) and c_n (B, H).

    Raises:
        TypeError, ValueError: a non-tensor argument, or mismatched shapes, dtypes or devices; the message names the
            argument.

    Source: Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with the forget gate of Gers et al. (2000).
    """
    _check_types(gates=gates, weight_hh=weight_hh, h0=h0, c0=c0, reset=reset)
    dtype = autocast_dtype(gates)
    _check(gates, weight_hh, h0, c0, reset, autocast=dtype is not None)
    if dtype is not None:
        gates, weight_hh, h0, c0 = gates.to(dtype), weight_hh.to(dtype), h0.to(dtype), c0.float()
    if not uses_fused("lstm", gates):
        return reference.lstm(gates, weight_hh, h0, c0, reset)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (gates, weight_hh, h0, c0))
    output, h_n, c_n, _, _ = call_op(torch.ops.pytbptt.lstm, gates, weight_hh, h0, c0, reset, save, allows_tf32(gates))
    return output, h_n, c_n


def _check_types(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (value is None and name == "reset"):
            raise TypeError(f"lstm: {name}: found {type(value).__name__}, expected a tensor")


def _check(gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None, *, autocast: bool) -> None:
    if gates.dim() != 3 or gates.shape[2] % 4:
        raise ValueError(f"lstm: gates: found shape {tuple(gates.shape)}, expected (T, B, 4H)")
    dtype, device = gates.dtype, gates.device
    if not dtype.is_floating_point:
        raise ValueError(f"lstm: gates: found {dtype}, expected a floating-point dtype")
    T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 4
    cell_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    for name, tensor, shape, expected in (
        ("weight_hh", weight_hh, (4 * H, H), dtype),
        ("h0", h0, (B, H), dtype),
        ("c0", c0, (B, H), cell_dtype),
    ):
        if tensor.shape != shape:
            raise ValueError(f"lstm: {name}: found shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != device:
            raise ValueError(f"lstm: {name}: found on {tensor.device}, expected {device} as gates")
        if tensor.dtype != expected and not (autocast and tensor.dtype.is_floating_point):
            raise ValueError(f"lstm: {name}: found {tensor.dtype}, expected {expected} for gates of {dtype}")
    if reset is not None and (reset.shape != (T, B) or reset.dtype != torch.bool):
        raise ValueError(f"lstm: reset: found {reset.dtype} {tuple(reset.shape)}, expected torch.bool {(T, B)}")
    if reset is not None and reset.device != device:
        raise ValueError(f"lstm: reset: found on {reset.device}, expected {device} as gates")


def _fake(
    gates: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, reset: Tensor | None, save: bool, tf32: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, H = gates.shape[0], gates.shape[1], gates.shape[2] // 4
    activated, cells = ((T, B, 4 * H), (T, B, H)) if save else ((0,), (0,))
    return (
        gates.new_empty(T, B, H),
        h0.new_empty(B, H),
        c0.new_empty(B, H),
        gates.new_empty(activated),
        c0.new_empty(cells),
    )


def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    reset: Tensor | None,
    output: Tensor,
    activated: Tensor,
    cells: Tensor,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        activated.new_empty(activated.shape),
        weight_hh.new_empty(weight_hh.shape),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight_hh, h0, c0, reset, _, ctx.tf32 = inputs
    hidden, _, _, activated, cells = output
    ctx.mark_non_differentiable(activated, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight_hh, h0, c0, reset, hidden, activated, cells)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_h_n is None and grad_c_n is None:
        return None, None, None, None, None, None, None
    grads = call_op(torch.ops.pytbptt.lstm_backward, grad_output, grad_h_n, grad_c_n, *ctx.saved_tensors, ctx.tf32)
    return *grads, None, None, None


if EXTENSION.facts is not None:
    torch.library.register_fake("pytbptt::lstm", _fake)
    torch.library.register_fake("pytbptt::lstm_backward", _fake_backward)
    register_autograd("lstm", _backward, _setup_context)
    forbid_double_backward("lstm")
