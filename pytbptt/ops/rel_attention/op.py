"""Relative-position attention over memory and chunk."""

from typing import Any

import torch
from torch import Tensor

from pytbptt.ops import dispatch
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.rel_attention import reference
from pytbptt.runtime.device import accumulation_dtype, autocast_dtype

# The limit is largest_head_size in csrc/rel_attention/cuda/launch.h.
dispatch.OPS["rel_attention"] = dispatch.SizeLimit("head sizes", 128)


def rel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    *,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    first_key: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Causal attention with Transformer-XL's relative positions, over a memory and the chunk that follows it.

    The keys of a query are the M of the memory and the T of the chunk, in this order::

        score[b,h,i,j] = scale * ((query_i + u)·key_j + (query_i + v)·position[min(M + i - j, R - 1)])
        visible iff max(first_key[b,i], M + i - window + 1) <= j <= M + i
        out = dropout(softmax_j(score)) @ value

    Args:
        query, key, value: (B, T, H, D), the chunk's projections.
        position: (R, H, D), row d is the projected embedding of distance d; distances >= R use row R - 1.
        content_bias, position_bias: (H, D), u and v of the paper.
        memory_key, memory_value: (B, M, H, D), the memory's projections, oldest first; both or neither.
        first_key: int32 (B, T), the lowest visible index among the M + T keys; default 0.
        window: how many keys a query sees, itself included; default all.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) that a weight is dropped; the mask depends only on the seed and the weight's
            position.
        seed: int64 (1,) on the inputs' device; drawn from the device's generator when None.

    Returns:
        (B, T, H, D); a row without a visible key is 0.

    Raises:
        TypeError, ValueError: a non-tensor argument, or mismatched shapes, dtypes, devices or options; the message
            names the argument.

    Source: Dai et al., "Transformer-XL" (2019), section 3.3. Under autocast the inputs are cast to its dtype. Saved for
    backward: inputs, output and the log-sum-exp (B, H, T); in 16-bit dtypes also the output's rounding residual.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "position": position,
        "content_bias": content_bias,
        "position_bias": position_bias,
        "memory_key": memory_key,
        "memory_value": memory_value,
    }
    _check(tensors, first_key, window, dropout_p, seed)
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value, position = query.to(dtype), key.to(dtype), value.to(dtype), position.to(dtype)
        content_bias, position_bias = content_bias.to(dtype), position_bias.to(dtype)
        if memory_key is not None and memory_value is not None:
            memory_key, memory_value = memory_key.to(dtype), memory_value.to(dtype)
    if dropout_p > 0.0 and seed is None:
        # Draw the seed outside the op, so that recomputation (checkpointing) uses the same mask.
        seed = torch.randint(2**63 - 1, (1,), device=query.device)
    inputs = (query, key, value, position, content_bias, position_bias, memory_key, memory_value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (*inputs, first_key, window, scale, dropout_p, seed)
    if dispatch.uses_fused("rel_attention", query):
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        out, _, _ = dispatch.call_op(torch.ops.pytbptt.rel_attention, *arguments, save, dispatch.allows_tf32(query))
        return out  # type: ignore[no-any-return]  # torch.ops is untyped
    return reference.rel_attention(*arguments)


_MAY_BE_NONE = ("memory_key", "memory_value", "first_key", "seed")


def _check(
    tensors: dict[str, Tensor | None],
    first_key: Tensor | None,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    for name, tensor in (*tensors.items(), ("first_key", first_key), ("seed", seed)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _MAY_BE_NONE):
            raise TypeError(f"rel_attention: {name}: found {type(tensor).__name__}, expected a tensor")
    query, position, memory_key = tensors["query"], tensors["position"], tensors["memory_key"]
    assert query is not None
    assert position is not None
    if query.dim() != 4 or query.shape[3] < 1:
        raise ValueError(f"rel_attention: query: found shape {tuple(query.shape)}, expected (B, T, H, D), D at least 1")
    if not query.is_floating_point():
        raise ValueError(f"rel_attention: query: found {query.dtype}, expected a floating-point dtype")
    B, T, H, D = query.shape
    if (memory_key is None) != (tensors["memory_value"] is None):
        raise ValueError("rel_attention: memory_key and memory_value: found one of them, expected both or neither")
    if memory_key is not None and memory_key.dim() != 4:
        found = f"found shape {tuple(memory_key.shape)}"
        raise ValueError(f"rel_attention: memory_key: {found}, expected (B, M, H, D)")
    if position.dim() != 3 or position.shape[0] < 1:
        found = f"found shape {tuple(position.shape)}"
        raise ValueError(f"rel_attention: position: {found}, expected (R, H, D), R at least 1")
    M, R = 0 if memory_key is None else memory_key.shape[1], position.shape[0]
    chunk, memory, bias = (B, T, H, D), (B, M, H, D), (H, D)
    expected = {
        "query": chunk,
        "key": chunk,
        "value": chunk,
        "position": (R, H, D),
        "content_bias": bias,
        "position_bias": bias,
        "memory_key": memory,
        "memory_value": memory,
    }
    autocast = autocast_dtype(query) is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"rel_attention: {name}: found shape {tuple(tensor.shape)}, expected {expected[name]}")
        if tensor.device != query.device:
            raise ValueError(f"rel_attention: {name}: found on {tensor.device}, expected {query.device} as query")
        if not tensor.is_floating_point() or (tensor.dtype != query.dtype and not autocast):
            raise ValueError(f"rel_attention: {name}: found {tensor.dtype}, expected {query.dtype} as query")
    if first_key is not None and (tuple(first_key.shape) != (B, T) or first_key.dtype != torch.int32):
        found = f"{first_key.dtype} {tuple(first_key.shape)}"
        raise ValueError(f"rel_attention: first_key: found {found}, expected torch.int32 {(B, T)}")
    if first_key is not None and first_key.device != query.device:
        raise ValueError(f"rel_attention: first_key: found on {first_key.device}, expected {query.device} as query")
    if window is not None and (isinstance(window, bool | float) or not 1 <= window < 2**63):
        raise ValueError(f"rel_attention: window: found {window!r}, expected an integer of at least 1, below 2**63")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"rel_attention: dropout_p: found {dropout_p}, expected at least 0 and below 1")
    if seed is not None and (tuple(seed.shape) != (1,) or seed.dtype != torch.int64 or seed.device != query.device):
        found = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"rel_attention: seed: found {found}, expected torch.int64 (1,) on {query.device}")


# The compiled op: its schema is in csrc/rel_attention/cpu/op.cpp. Its tensors, in order:
_INPUTS = ("query", "key", "value", "position", "content_bias", "position_bias", "memory_key", "memory_value")


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = query.shape
    sums_dtype = accumulation_dtype(query.dtype)
    rounding = (B, T, H, D) if save and query.dtype in (torch.float16, torch.bfloat16) else (0,)
    return query.new_empty(B, T, H, D), query.new_empty(rounding), query.new_empty(B, H, T, dtype=sums_dtype)


def _fake_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    first_key: Tensor | None,
    window: int | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    rounding: Tensor,
    log_sum_exp: Tensor,
    memory_needs_grad: bool,
    tf32: bool,
) -> tuple[Tensor, ...]:
    def gradient(tensor: Tensor | None) -> Tensor:
        return query.new_empty(0) if tensor is None else query.new_empty(tensor.shape)

    memory = (memory_key, memory_value) if memory_needs_grad else (None, None)
    return tuple(gradient(t) for t in (query, key, value, position, content_bias, position_bias, *memory))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (first_key, window, scale, dropout_p, seed, _, tf32) = inputs[: len(_INPUTS)], inputs[len(_INPUTS) :]
    out, rounding, log_sum_exp = output
    ctx.mark_non_differentiable(rounding, log_sum_exp)
    ctx.save_for_backward(*tensors, first_key, seed, out, rounding, log_sum_exp)
    ctx.window, ctx.scale, ctx.dropout_p, ctx.tf32 = window, scale, dropout_p, tf32


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, first_key, seed, out, rounding, log_sum_exp = ctx.saved_tensors
    # Memory is usually detached; skipping its gradient saves much of the work.
    memory_needs_grad = any(ctx.needs_input_grad[_INPUTS.index(name)] for name in ("memory_key", "memory_value"))
    settings = (first_key, ctx.window, ctx.scale, ctx.dropout_p, seed)
    gradients = dispatch.call_op(
        torch.ops.pytbptt.rel_attention_backward,
        *(grad_out, *tensors, *settings, out, rounding, log_sum_exp, memory_needs_grad, ctx.tf32),
    )
    needed = ctx.needs_input_grad[: len(_INPUTS)]
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *[None] * 7)


if EXTENSION.facts is not None:
    torch.library.register_fake("pytbptt::rel_attention", _fake)
    torch.library.register_fake("pytbptt::rel_attention_backward", _fake_backward)
    dispatch.register_autograd("rel_attention", _backward, _setup_context)
    dispatch.forbid_double_backward("rel_attention")
