"""Whole models as users run them: tokens/s and peak memory in training and evaluation, and where the time goes.

Beside pytbptt stand the same model on reference ops and the peer of benchmarks/peers: transformers' TransfoXL, or
AWD-LSTM on torch.nn.LSTM. Each is a process of its own; they take turns over tokens drawn by Zipf's law, so that what
else the machine does slows all alike. Where the time goes is found in a further turn, under the profiler.
"""

import contextlib
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pictures, record
from benchmarks.peers.cases import Case, TokenStream
from benchmarks.peers.parts import OTHER
from benchmarks.peers.process import Process
from pytbptt.errors import InputError, RunError
from pytbptt.nn.architectures import ARCHITECTURES
from pytbptt.ops.extension import EXTENSION
from pytbptt.runtime.cli import run
from pytbptt.training.config import read_command_line

PARTS = (
    *("embedding", "projections", "attention", "lstm", "feed-forward", "norms", "loss", "optimizer", "data"),
    "communication",
    OTHER,
)


Preset = Literal["wt103-base", "enwik8-base", "awd-lstm-wt2"]


@dataclass(frozen=True)
class Recipe:
    """What a preset leaves open: its data's vocabulary, and how its model is evaluated."""

    vocab_size: int
    streams: int
    """Streams of the whole recipe."""
    streams_on_cpu: int
    evaluation: dict[str, Any]
    """Sizes of the model that are others in evaluation."""
    bptt: int
    """Tokens of a chunk in evaluation."""
    batch_size: int
    """Streams in evaluation."""


RECIPES: dict[Preset, Recipe] = {
    "wt103-base": Recipe(267_744, 60, 2, {"mem_len": 640, "clamp_len": 400, "same_length": True}, 64, 1),
    "enwik8-base": Recipe(204, 22, 1, {"mem_len": 2100, "clamp_len": 820, "same_length": True}, 128, 1),
    "awd-lstm-wt2": Recipe(33_278, 80, 20, {}, 70, 10),
}


@dataclass
class EndToEndSettings:
    preset: tuple[Preset, ...] = tuple(RECIPES)
    """Recipes to measure."""
    batch_size: int = 0
    """Streams in training; 0: the recipe's on a GPU, 1 to 20 on a CPU."""
    rounds: int = 5
    """Turns of every implementation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    bf16: bool = False
    """Mixed precision in bfloat16, on all sides."""
    peer_python: str = "benchmarks/peers/.venv/bin/python"
    """The interpreter of the environment that `make bench-peers` makes, seen from the repository's root; "" leaves
    TransfoXL out."""
    output: str = "benchmarks/results/end-to-end.json"
    """Where the results go, seen from there too; the picture goes beside them."""


def cases(preset: Preset, settings: EndToEndSettings, device: str) -> list[Case]:
    """Training and evaluation of a preset."""
    recipe, train = RECIPES[preset], read_command_line(["data", "--preset", preset])
    sizes = dataclasses.asdict(train.model)
    del sizes["vocab_size"]
    on_gpu = device == "cuda"

    def case(work: str, sizes: dict[str, Any], batch_size: int, bptt: int, chunks: int, warm_up: int) -> Case:
        return Case(
            name=f"{preset}, {'training' if work == 'train' else 'evaluation'}",
            summary=f"{batch_size} streams, {bptt} tokens a chunk",
            arch=train.arch,
            vocab_size=recipe.vocab_size,
            sizes=sizes,
            batch_size=batch_size,
            bptt=bptt,
            warm_up=warm_up,
            chunks=chunks,
            ours=(work,),
            theirs={work: None},
            optimizer="adam" if train.optimization.optimizer == "adam" else "sgd",
            device=device,
            bf16=settings.bf16,
        )

    streams = settings.batch_size or (recipe.streams if on_gpu else recipe.streams_on_cpu)
    bptt, memory = train.data.tokens_per_sample, recipe.evaluation.get("mem_len", 0)
    warm_up = max(2, memory // recipe.bptt)
    return [
        case("train", sizes, streams, bptt, 20 if on_gpu else 1, 2),
        case("loss", {**sizes, **recipe.evaluation}, recipe.batch_size, recipe.bptt, 8, warm_up),
    ]


def measure(case: Case, settings: EndToEndSettings) -> dict[str, Any]:
    """Every implementation's speed, peak memory and seconds by part."""
    work = case.ours[0]
    ours = "trainer" if case.trained else "ours"
    peer = ("TransfoXL", "theirs") if case.arch == "transformer_xl" else ("nn.LSTM", "torch_lstm")
    with contextlib.ExitStack() as stack:

        def implementation(module: str, python: str = sys.executable, backend: str = "auto") -> Process:
            return stack.enter_context(Process(python, module, case, {"PYTBPTT_BACKEND": backend}))

        implementations = {"pytbptt": implementation(ours), "reference ops": implementation(ours, backend="reference")}
        if case.arch == "awd_lstm":
            implementations[peer[0]] = implementation(peer[1])
        elif settings.peer_python:
            implementations[peer[0]] = implementation(peer[1], str(record.ROOT / settings.peer_python))
        parameters = {name: process.made["parameters"] for name, process in implementations.items()}
        if len(set(parameters.values())) > 1:
            raise RunError(f"{case.name}: found {parameters} parameters, expected the same model everywhere")
        seconds: dict[str, list[float]] = {name: [] for name in implementations}
        for process in implementations.values():
            process.run(work, case.warm_up)
        for _ in range(settings.rounds):
            for name, process in implementations.items():
                seconds[name].append(process.run(work, case.chunks)["seconds"])
        last = {name: process.run(work, case.chunks, parts=True) for name, process in implementations.items()}
        versions = {name: process.made["versions"] for name, process in implementations.items()}

    flops = model_flops(case) * (3 if case.trained else 1)
    peak = matmul_rate(case)
    results = {}
    for name, taken in seconds.items():
        speed = case.tokens_per_turn / statistics.median(taken)
        parts, compared = last[name]["parts"], zip(taken, seconds["pytbptt"], strict=True)
        results[name] = {
            "tokens_per_second": speed,
            "times_pytbptt": statistics.median(theirs / ours for theirs, ours in compared),
            "peak_bytes": last[name]["peak_bytes"],
            "model_flop_utilisation": flops * speed / peak,
            "shares": {part: parts.get(part, 0.0) / sum(parts.values()) for part in PARTS},
            "quartile_seconds": record.quartiles(taken),
        }
    return {
        "case": case.name,
        "summary": case.summary,
        "parameters": next(iter(parameters.values())),
        "tokens_per_turn": case.tokens_per_turn,
        "model_flops_per_token": flops,
        "matmul_flops_per_second": peak,
        "versions": versions,
        "implementations": results,
    }


def model_flops(case: Case) -> float:
    """Floating-point operations of a forward pass for each token: all products, attention's over what is visible."""

    def attention(query: Any, key: Any, *rest: Any, **options: Any) -> int:
        B, T, H, D = query
        M, window = (rest[4] or (0, 0))[1], rest[7]
        keys = sum(min(M + i + 1, window or M + T) for i in range(T))
        return 3 * 2 * B * H * D * keys  # query by key, query by position, weights by value

    def recurrence(gates: Any, weight_hh: Any, *rest: Any, **options: Any) -> int:
        return int(2 * gates[0] * gates[1] * weight_hh[0] * weight_hh[1])

    model = ARCHITECTURES[case.arch](vocab_size=case.vocab_size, **case.sizes).build().train(case.trained)
    tokens, targets = TokenStream(dataclasses.replace(case, device="cpu")).next()
    formulas = {torch.ops.pytbptt.rel_attention: attention, torch.ops.pytbptt.lstm: recurrence}
    memory = model.init_memory(case.batch_size) if case.trained else model.init_evaluation_memory(case.batch_size)
    with torch.no_grad():
        _, memory = model.loss(tokens, targets, memory)  # what is projected once for all chunks does not count
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            model.loss(tokens, targets, memory)
    return counter.get_total_flops() / tokens.numel()


def matmul_rate(case: Case) -> float:
    """Operations per second of one large product, the most of five: what utilisation is measured against."""
    n = 8192 if case.device == "cuda" else 2048
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    left, right = (torch.randn(n, n, device=case.device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        if case.device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def report(result: dict[str, Any]) -> None:
    """Print one case."""
    print(f"{result['case']}: {result['summary']}; {result['parameters']:,} parameters")
    for name, found in result["implementations"].items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in found["shares"].items() if share >= 0.005)
        print(
            f"  {name:<14} {found['tokens_per_second']:9,.0f} tokens/s, {found['times_pytbptt']:5.2f} times the first's"
            f" time, {found['peak_bytes'] / 2**30:5.2f} GiB, utilisation {found['model_flop_utilisation']:.0%}\n"
            f"{'':17}{shares}"
        )


def end_to_end(settings: EndToEndSettings) -> None:
    if EXTENSION.facts is None:
        raise InputError("the extension: found none, expected it to be built (make install)")
    if settings.rounds < 1 or settings.batch_size < 0:
        raise InputError(
            f"--rounds and --batch-size: found {settings.rounds} and {settings.batch_size}, expected at least 1 and 0"
        )
    if settings.peer_python and not (record.ROOT / settings.peer_python).exists():
        raise InputError(f'--peer-python: found no {settings.peer_python}, expected it from `make bench-peers`, or ""')
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise InputError("--device: found cuda, but this torch sees no GPU; expected cpu or auto")
    device = "cuda" if available and settings.device != "cpu" else "cpu"
    machine = record.describe()
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    results = []
    for preset in settings.preset:
        for case in cases(preset, settings, device):
            results.append(measure(case, settings))
            report(results[-1])
    record.write_own(settings.output, "end_to_end", machine, results)
    picture = Path(settings.output).with_suffix(".png")
    pictures.draw(pictures.draw_end_to_end, (settings.output,), record.ROOT / picture)
    print(picture)


if __name__ == "__main__":
    run("python -m benchmarks.end_to_end", EndToEndSettings, end_to_end, __doc__)
