"""rel_attention: the fused op, eager PyTorch, torch.compile, SDPA and FlexAttention.

SDPA takes the position term as its mask, FlexAttention as a captured tensor. Flash attention without positions is a
bound. All but the fused op concatenate memory and chunk.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import floors
from benchmarks.harness import Op, Size
from pytbptt.ops import backend, rel_attention

Problem = dict[str, Tensor]


def make(B: int, T: int, M: int, H: int, D: int, device: str, dtype: torch.dtype) -> Problem:
    """As in training, where the memory is detached."""

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

    problem = {name: normal(B, T, H, D) for name in ("query", "key", "value")}
    problem |= {"position": normal(M + T, H, D), "content_bias": normal(H, D), "position_bias": normal(H, D)}
    return problem | {name: normal(B, M, H, D, grad=False) for name in ("memory_key", "memory_value")}


def fused(problem: Problem) -> Tensor:
    with backend("fused"):
        return rel_attention(**problem)


def eager(problem: Problem) -> Tensor:
    with backend("reference"):
        return rel_attention(**problem)


_compiled_eager = torch.compile(rel_attention, dynamic=False)


def compiled_eager(problem: Problem) -> Tensor:
    with backend("reference"):
        return _compiled_eager(**problem)


def _keys_and_values(problem: Problem) -> tuple[Tensor, Tensor]:
    key = torch.cat([problem["memory_key"], problem["key"]], dim=1)
    value = torch.cat([problem["memory_value"], problem["value"]], dim=1)
    return key.transpose(1, 2), value.transpose(1, 2)


def _by_distance(problem: Problem) -> Tensor:
    """scale (query + position_bias)·position for every distance, (B, H, T, M + T), the farthest first."""
    biased = (problem["query"] + problem["position_bias"]) * problem["query"].shape[-1] ** -0.5
    return torch.einsum("bihd,jhd->bhij", biased, problem["position"].flip(0))


def _biased_query(problem: Problem) -> Tensor:
    return (problem["query"] + problem["content_bias"]).transpose(1, 2)


@cache
def _future(T: int, keys: int, device: str) -> Tensor:
    """The causal mask: True for keys after the query."""
    return torch.ones(T, keys, dtype=torch.bool, device=device).triu(keys - T + 1)


def sdpa(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    by_distance = _by_distance(problem)
    B, H, T, keys = by_distance.shape
    shifted = F.pad(by_distance, (1, 0)).view(B, H, keys + 1, T)[:, :, 1:].reshape(B, H, T, keys)
    mask = shifted.masked_fill(_future(T, keys, key.device.type), float("-inf"))
    return F.scaled_dot_product_attention(_biased_query(problem), key, value, mask).transpose(1, 2)


_flex_attention = torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(T: int, keys: int, device: str) -> Any:
    return create_block_mask(lambda b, h, i, j: j <= keys - T + i, None, None, T, keys, device)


def flex(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    by_distance = _by_distance(problem)
    T, keys = by_distance.shape[-2:]

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + by_distance[b, h, i, (T - 1 - i + j).clamp(max=keys - 1)]

    mask = _block_mask(T, keys, key.device.type)
    return _flex_attention(_biased_query(problem), key, value, score_mod=add_position, block_mask=mask).transpose(1, 2)


def flash_without_positions(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    T, keys = problem["query"].shape[1], key.shape[2]
    if key.device.type == "cuda":
        mask: Any = causal_lower_right(T, keys)
    else:
        mask = ~_future(T, keys, key.device.type)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(problem["query"].transpose(1, 2), key, value, mask).transpose(1, 2)


def _size(B: int, T: int, M: int, H: int, D: int, *devices: str, **options: Any) -> Size:
    return Size({"B": B, "T": T, "M": M, "H": H, "D": D}, devices or ("cpu", "cuda"), **options)


SWEEP_T, SWEEP_M = 128, 512  # while the other one varies
SWEEP = [(T, SWEEP_M) for T in (32, 64, 128, 256, 512, 1024)]
SWEEP += [(SWEEP_T, M) for M in (0, 128, 256, 1024, 2048)]

REL_ATTENTION = Op(
    module=__name__,
    name="rel_attention",
    sizes={
        "seed-training": _size(15, 150, 150, 10, 41, "cuda"),
        "seed-evaluation": _size(1, 64, 640, 10, 41),
        "seed-decoding": _size(1, 1, 640, 10, 41, modes=("forward",)),
        "enwik8": _size(22, 512, 512, 8, 64, "cuda"),
        "nvidia-base": _size(32, 192, 192, 8, 64, "cuda"),
        "nvidia-large": _size(8, 384, 384, 16, 64, "cuda"),
        "long": _size(4, 2048, 2048, 16, 64, "cuda"),
        "seed-4-streams": _size(4, 150, 150, 10, 41, "cpu"),
        "enwik8-2-streams": _size(2, 512, 512, 8, 64, "cpu"),
        "bytes": _size(16, 128, 128, 4, 64, "cpu"),
        "tiny": _size(2, 5, 3, 2, 8, default=False),
        **{f"sweep-T{T}-M{M}": _size(1, T, M, 8, 64, default=False) for T, M in SWEEP},
    },
    make=make,
    implementations={
        "fused": fused,
        "eager": eager,
        "compiled_eager": compiled_eager,
        "sdpa": sdpa,
        "flex_attention": flex,
        "flash_without_positions": flash_without_positions,
    },
    leaves=lambda problem: [tensor for tensor in problem.values() if tensor.requires_grad],
    work=floors.rel_attention,
    bounds=("flash_without_positions",),
    compiled=("compiled_eager", "flex_attention"),
)
OPS = {op.name: op for op in (REL_ATTENTION,)}
