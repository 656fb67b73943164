"""rel_attention on a GPU beside everything else that computes it there, and whole training steps with it:
python -m benchmarks.gpu.

Times forward, and forward with backward, of the fused op, eager PyTorch, the same compiled, SDPA with the position term
as a mask, and FlexAttention with the position term captured, and as a bound flash attention without positions (SDPA's
flash backend with the lower-right causal mask). A figure is the median of ROUNDS, the implementations taking turns:
`milliseconds` are the GPU's, between two events behind work that keeps it busy until all is launched, and
`milliseconds_launched` the host's, from the call to the end of the work. Peak memory is what a run allocates beyond
what it found. What an implementation cannot do is recorded with its reason. A training step is a Transformer-XL's loss,
backward, clipping and Adam under autocast, launched kernel by kernel: with the fused op, with that and padded products,
and with eager attention. Needs torch and numpy only; writes benchmarks/results/<gpu>-<date>.json, case by case, from
which benchmarks.gpu_tables makes the tables. `floor_milliseconds` is the least that the GPU could take; see gpu_floors.
"""

import argparse
import itertools
import math
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import gpu_floors, record
from pytbptt.extension import EXTENSION
from pytbptt.nn import TransformerXL, TransformerXLConfig, aligned
from pytbptt.ops import backend, rel_attention

SIZES = {  # B, H, T, M, D
    "seed, training": (15, 10, 150, 150, 41),
    "seed, evaluation": (1, 10, 64, 640, 41),
    "enwik8": (22, 8, 512, 512, 64),
    "NVIDIA base": (32, 8, 192, 192, 64),
    "NVIDIA large": (8, 16, 384, 384, 64),
    "long": (4, 16, 2048, 2048, 64),
}
MODELS = {  # and their streams
    "seed": (
        TransformerXLConfig(
            vocab_size=267744, n_layer=16, d_model=410, n_head=10, d_head=41, d_inner=2100, mem_len=150, dropout=0.1
        ),
        15,
    ),
    "NVIDIA base": (
        TransformerXLConfig(
            vocab_size=267735, n_layer=16, d_model=512, n_head=8, d_head=64, d_inner=2048, mem_len=192, dropout=0.1
        ),
        32,
    ),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS, WARM_UP = 30, 5
MOST_CYCLES_PER_SECOND = 2e9
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


def training_steps(config: TransformerXLConfig, streams: int) -> dict[str, Callable[[], None]]:
    """One update, as long as the memory, of tokens by Zipf's law; all train the same model."""
    torch.manual_seed(0)
    model = TransformerXL(config).cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    drawn = torch.rand(2, streams, config.mem_len, device="cuda")
    tokens, targets = drawn.mul(math.log(config.vocab_size)).exp().long().sub(1).clamp(max=config.vocab_size - 1)
    with torch.no_grad():
        _, memory = model(tokens)

    def step(which: str) -> None:
        with backend(which), torch.autocast("cuda", torch.bfloat16):
            result, _ = model.loss(tokens, targets, memory)
        result.objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    def padded() -> None:
        with aligned.padded_products():
            step("fused")

    return {"fused": partial(step, "fused"), "fused, padded": padded, "eager": partial(step, "reference")}


def measure(runs: dict[str, Callable[[], None]]) -> dict[str, dict[str, Any]]:
    """Milliseconds and peak bytes of every implementation, or why it has none."""
    results: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[tuple[float, float]]] = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM_UP):
                run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
        except Exception as error:  # a peer that cannot is part of the result, whatever it raises
            results[name] = cannot(error)
            continue
        results[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
        rounds[name] = []
    for _ in range(ROUNDS):
        for name, taken in list(rounds.items()):
            try:
                taken.append(time_once(runs[name]))
            except Exception as error:  # the others go on
                results[name] = cannot(error)
                del rounds[name]
    for name, taken in rounds.items():
        busy, launched = zip(*taken, strict=True)
        first, median, third = statistics.quantiles(busy, n=4)
        results[name] |= {"milliseconds": median, "quartiles": [first, third]}
        results[name] |= {"milliseconds_launched": statistics.median(launched)}
    return results


def time_once(run: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds that a GPU takes for what `run` launches, and from the call to the end of the work."""
    started = time.perf_counter()
    run()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * launched + 1e-4) * MOST_CYCLES_PER_SECOND))  # until everything is launched
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), 1000 * whole


def cannot(error: Exception) -> dict[str, Any]:
    return {"cannot": f"{type(error).__name__}: {error}".split("\n")[0]}


def show(label: str, measured: dict[str, dict[str, Any]]) -> None:
    """Print a line of what `measure` gave."""
    figures = (
        f"{name} {one['milliseconds']:.3f} ms" if "milliseconds" in one else f"{name} cannot ({one['cannot']})"
        for name, one in measured.items()
    )
    print(f"{label}: {', '.join(figures)}", flush=True)


def gpu_facts() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Time rel_attention on a GPU.")
    parser.add_argument("--output", help="file for the results, by default benchmarks/results/<gpu>-<date>.json")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES), help="none: training steps alone")
    parser.add_argument("--mode", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS), help="whose training step is timed")
    parser.add_argument("--without", nargs="*", choices=IMPLEMENTATIONS, default=[])
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not EXTENSION.serves("cuda"):
        raise SystemExit("python -m benchmarks.gpu: needs a GPU and an extension built with CUDA kernels")
    machine = record.describe() | gpu_facts()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = arguments.output or f"benchmarks/results/{slug}-{date.today()}.json"
    results: list[dict[str, Any]] = []

    def add(case: dict[str, Any], prepare: Callable[[], dict[str, Callable[[], None]]]) -> None:
        try:
            measured = measure(prepare())
        except Exception as error:  # out of memory, say: the other cases go on
            measured = {"fused": cannot(error)}
        results.append(case | {"measured": measured})
        floor = f", floor {case['floor_milliseconds']:.3f} ms" if "floor_milliseconds" in case else ""
        show(f"{case['size']}, {case['dtype']}, {case['mode']}{floor}", measured)
        record.write(path, "gpu", machine, results)  # as they come: a run that is stopped keeps what it measured

    def ops(size: tuple[int, ...], dtype: str, mode: str) -> dict[str, Callable[[], None]]:
        problem = make(*size, dtype=DTYPES[dtype])
        return {
            name: partial(MODES[mode], implementation, problem)
            for name, implementation in IMPLEMENTATIONS.items()
            if name not in arguments.without
        }

    for dtype in arguments.dtype:
        rates = gpu_floors.rates(DTYPES[dtype])
        for label, mode in itertools.product(arguments.size, arguments.mode):
            size = SIZES[label]
            torch.compiler.reset()  # torch gives up compiling a function that it has compiled for too many sizes
            case = {"size": label, "B,H,T,M,D": size, "dtype": dtype, "mode": mode, "rates": rates}
            floor = gpu_floors.rel_attention(*size, mode=mode, rates=rates)
            add(case | {"floor_milliseconds": floor}, partial(ops, size, dtype, mode))
    for label in arguments.model:
        config, streams = MODELS[label]
        case = {"size": label, "tokens": streams * config.mem_len, "dtype": "bfloat16", "mode": "training step"}
        add(case, partial(training_steps, config, streams))


if __name__ == "__main__":
    main()
