"""Relative-position attention in plain PyTorch: the definition that every compiled kernel is held to."""

import torch
from torch import Tensor

from pytbptt.ops.philox import attention_keep_mask, dropout_threshold
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
    keys = key.shape[1]
    scores = scale * unscaled_scores(query + content_bias, query + position_bias, key, position)
    visible = visible_keys(T, keys, first_key, window, query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1, dtype=accumulation_dtype(scores.dtype))
    weights = weights.masked_fill(~visible, 0.0)  # a row with no visible key is NaN until here
    if dropout_p > 0.0 and seed is not None:
        kept = attention_keep_mask(seed, B, H, T, keys, dropout_p)
        weights = weights * kept / (1.0 - dropout_threshold(dropout_p) / 65536)
    return torch.einsum("bhij,bjhd->bihd", weights.to(value.dtype), value)


def unscaled_scores(query_u: Tensor, query_v: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """The scores (B, H, T, keys) before they are scaled, of queries with content_bias and with position_bias added."""
    keys = key.shape[1]
    farthest_first = torch.arange(keys - 1, -1, -1, device=key.device).clamp(max=position.shape[0] - 1)
    content = torch.einsum("bihd,bjhd->bhij", query_u, key)
    position_scores = torch.einsum("bihd,jhd->bhij", query_v, position[farthest_first])
    return content + _relative_shift(position_scores)


def visible_keys(T: int, keys: int, first_key: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, as a mask that broadcasts to the scores."""
    i = torch.arange(T, device=device).view(T, 1)
    j = torch.arange(keys, device=device)
    M = keys - T
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
    B, H, T, keys = position_scores.shape
    padded = torch.nn.functional.pad(position_scores, (1, 0))
    return padded.view(B, H, keys + 1, T)[:, :, 1:].reshape(B, H, T, keys)
