"""rel_attention on a GPU beside everything else that computes it there: python -m benchmarks.gpu.

Times forward, and forward with backward, of the fused op, eager PyTorch, the same compiled, SDPA with the position term
as a mask, and FlexAttention with the position term captured, and as a bound flash attention without positions (SDPA's
flash backend with the lower-right causal mask). A figure is the median of ROUNDS, the implementations taking turns;
peak memory is what a run allocates beyond its inputs. What an implementation cannot do is recorded with its reason.
Needs torch and numpy only; writes benchmarks/results/<gpu>-<date>.json.
"""

import argparse
import re
import statistics
import subprocess
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import record
from pytbptt.extension import EXTENSION
from pytbptt.ops import backend, rel_attention

SIZES = {  # B, H, T, M, D
    "seed, training": (15, 10, 150, 150, 41),
    "seed, evaluation": (1, 10, 64, 640, 41),
    "enwik8": (22, 8, 512, 512, 64),
    "NVIDIA base": (32, 8, 192, 192, 64),
    "NVIDIA large": (8, 16, 384, 384, 64),
    "long": (4, 16, 2048, 2048, 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS, WARM_UP = 30, 5
Problem = dict[str, Tensor]


def make(B: int, H: int, T: int, M: int, D: int, dtype: torch.dtype) -> Problem:
    """What a model trains with: the memory comes detached."""
    torch.manual_seed(0)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=grad)

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
    """(query + v)·position for every distance, (B, H, T, M + T), the farthest first."""
    return torch.einsum("bihd,jhd->bhij", problem["query"] + problem["position_bias"], problem["position"].flip(0))


def sdpa(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    by_distance = _by_distance(problem)
    B, H, T, keys = by_distance.shape
    shifted = F.pad(by_distance, (1, 0)).view(B, H, keys + 1, T)[:, :, 1:].reshape(B, H, T, keys)
    future = torch.ones(T, keys, dtype=torch.bool, device="cuda").triu(keys - T + 1)
    mask = (shifted * problem["query"].shape[-1] ** -0.5).masked_fill(future, float("-inf"))
    content = (problem["query"] + problem["content_bias"]).transpose(1, 2)
    return F.scaled_dot_product_attention(content, key, value, mask).transpose(1, 2)


_flex = torch.compile(flex_attention, dynamic=False)
_block_masks: dict[tuple[int, int], Any] = {}


def flex(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    T, D = problem["query"].shape[1], problem["query"].shape[-1]
    keys = key.shape[2]
    by_distance = _by_distance(problem) * D**-0.5

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + by_distance[b, h, i, (T - 1 - i + j).clamp(max=keys - 1)]

    if (T, keys) not in _block_masks:
        _block_masks[T, keys] = create_block_mask(lambda b, h, i, j: j <= keys - T + i, None, None, T, keys, "cuda")
    content = (problem["query"] + problem["content_bias"]).transpose(1, 2)
    return _flex(content, key, value, score_mod=add_position, block_mask=_block_masks[T, keys]).transpose(1, 2)


def flash_without_positions(problem: Problem) -> Tensor:
    key, value = _keys_and_values(problem)
    mask = causal_lower_right(problem["query"].shape[1], key.shape[2])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(problem["query"].transpose(1, 2), key, value, mask).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Tensor]] = {
    "fused": fused,
    "eager": eager,
    "compiled eager": compiled_eager,
    "sdpa": sdpa,
    "flex_attention": flex,
    "flash without positions": flash_without_positions,
}


def forward(implementation: Callable[[Problem], Tensor], problem: Problem) -> None:
    with torch.no_grad():
        implementation(problem)


def forward_and_backward(implementation: Callable[[Problem], Tensor], problem: Problem) -> None:
    out = implementation(problem)
    wanted = [t for t in problem.values() if t.requires_grad]
    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)


MODES = {"forward": forward, "forward+backward": forward_and_backward}


def measure(mode: str, problem: Problem) -> dict[str, dict[str, Any]]:
    """Milliseconds and peak bytes of every implementation, or why it has none."""
    run = MODES[mode]
    results: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        try:
            for _ in range(WARM_UP):
                run(implementation, problem)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(implementation, problem)
            torch.cuda.synchronize()
        except Exception as error:  # a peer that cannot is part of the result, whatever it raises
            results[name] = {"cannot": f"{type(error).__name__}: {error}".split("\n")[0]}
            continue
        results[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        times[name] = []
    for _ in range(ROUNDS):
        for name, taken in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(IMPLEMENTATIONS[name], problem)
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
    for name, taken in times.items():
        results[name]["milliseconds"] = statistics.median(taken)
    return results


def gpu_facts() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0],
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time rel_attention on a GPU.")
    parser.add_argument("--output", help="file for the results, by default benchmarks/results/<gpu>-<date>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not EXTENSION.serves("cuda"):
        raise SystemExit("python -m benchmarks.gpu: needs a GPU and an extension built with CUDA kernels")
    machine = record.describe() | gpu_facts()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    results = []
    for dtype in DTYPES:
        for label, size in SIZES.items():
            problem = make(*size, dtype=DTYPES[dtype])
            for mode in MODES:
                measured = measure(mode, problem)
                results.append({"size": label, "B,H,T,M,D": size, "dtype": dtype, "mode": mode, "measured": measured})
                shown = ", ".join(
                    f"{name} {one['milliseconds']:.3f} ms" if "milliseconds" in one else f"{name} cannot"
                    for name, one in measured.items()
                )
                print(f"{label}, {dtype}, {mode}: {shown}", flush=True)
    record.write(arguments.output or f"benchmarks/results/{slug}-{date.today()}.json", "gpu", machine, results)


if __name__ == "__main__":
    main()
