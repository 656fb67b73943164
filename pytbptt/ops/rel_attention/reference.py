"""Relative-position attention in plain PyTorch: the definition that the compiled kernels are tested against."""

import torch
from torch import Tensor

from pytbptt.ops.philox import dropout_threshold, philox
from pytbptt.runtime.device import accumulation_dtype


def rel_attention(
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
) -> Tensor:
    """Arguments and result of `pytbptt.ops.rel_attention`, checked and with defaults filled in by it."""
    if memory_key is not None and memory_value is not None:
        key, value = torch.cat([memory_key, key], dim=1), torch.cat([memory_value, value], dim=1)
    B, T, H, _ = query.shape
    S = key.shape[1]
    scores = scale * unscaled_scores(query + content_bias, query + position_bias, key, position)
    visible = visible_keys(T, S, first_key, window, query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1, dtype=accumulation_dtype(scores.dtype))
    weights = weights.masked_fill(~visible, 0.0)  # a row with no visible key is NaN until here
    if dropout_p > 0.0 and seed is not None:
        keep_mask = attention_keep_mask(seed, B, H, T, S, dropout_p)
        weights = weights * keep_mask / (1.0 - dropout_threshold(dropout_p) / 65536)
    return torch.einsum("bhij,bjhd->bihd", weights.to(value.dtype), value)


def unscaled_scores(query_u: Tensor, query_v: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """The scores (B, H, T, S) before they are scaled, of queries with content_bias and with position_bias added."""
    S = key.shape[1]
    farthest_first = torch.arange(S - 1, -1, -1, device=key.device).clamp(max=position.shape[0] - 1)
    content = torch.einsum("bihd,bjhd->bhij", query_u, key)
    position_scores = torch.einsum("bihd,jhd->bhij", query_v, position[farthest_first])
    return content + _relative_shift(position_scores)


def visible_keys(T: int, S: int, first_key: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, as a mask that broadcasts to the scores."""
    i = torch.arange(T, device=device).view(T, 1)
    j = torch.arange(S, device=device)
    M = S - T
    visible = j <= M + i
    if window is not None:
        visible = visible & (j > M + i - window)
    if first_key is not None:
        visible = visible & (j >= first_key.view(-1, 1, T, 1))
    return visible


def _relative_shift(position_scores: Tensor) -> Tensor:
    """Convert scores indexed by distance (largest first) to scores indexed by key.

    Key j of query i is at distance M + i - j, which is column T - 1 - i + j of that row: every row is one further
    to the right than the next. Dai et al. (2019), appendix B. What lies after the query itself is left undefined.
    """
    B, H, T, S = position_scores.shape
    padded = torch.nn.functional.pad(position_scores, (1, 0))
    return padded.view(B, H, S + 1, T)[:, :, 1:].reshape(B, H, T, S)


def attention_keep_mask(seed: Tensor, B: int, H: int, T: int, S: int, dropout_p: float) -> Tensor:
    """Which attention weights dropout keeps.

    Weight (b, h, i, j) is kept where 16 random bits are at least `dropout_threshold(dropout_p)`. The bits are half-word
    `j % 8` (low halves first) of the Philox block with counter (j // 8, i, b * H + h, 0) and key (low, high
    word of the seed).

    Args:
        seed: int64 of shape (1,).
        B, H, T, S: streams, heads, queries, and keys of memory and chunk (M + T).
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        bool tensor (B, H, T, M + T) on the seed's device.
    """
    device = seed.device
    block = torch.arange((S + 7) // 8, device=device)
    row = torch.arange(T, device=device).view(-1, 1)
    sequence = torch.arange(B * H, device=device).view(-1, 1, 1)
    words = philox((block, row, sequence, torch.zeros_like(block)), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    bits = halves.reshape(B, H, T, 8 * block.shape[0])[..., :S]  # -1 would be unknown where B is 0
    return bits >= dropout_threshold(dropout_p)
