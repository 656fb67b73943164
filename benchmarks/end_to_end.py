"""Speed and peak memory of presets in training and evaluation, and the time of each part of the model.

Compares pytbptt with the same model on reference ops and with a peer from benchmarks/peers: transformers' TransfoXL, or
AWD-LSTM on torch.nn.LSTM. Each runs in its own process, on tokens that follow Zipf's law. They are timed in turn, so
that other load on the machine slows all of them alike. The time of each part is from a further run with the profiler.
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
    """What a preset does not set: the vocabulary of its data, and how its model is evaluated."""

    vocab_size: int
    streams: int
    """Streams in training on a GPU."""
    streams_on_cpu: int
    evaluation: dict[str, Any]
    """Settings of the model that differ in evaluation."""
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
    """Presets to measure."""
    batch_size: int = 0
    """Streams in training; 0: those of the preset on a GPU, 1 to 20 on a CPU."""
    rounds: int = 5
    """Timed runs of every implementation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    bf16: bool = False
    """Mixed precision in bfloat16, for all implementations."""
    peer_python: str = "benchmarks/peers/.venv/bin/python"
    """The Python of the environment that `make bench-peers` creates, relative to the repository's root; "": without
    TransfoXL."""
    output: str = "benchmarks/results/end-to-end.json"
    """File for the results, relative to the repository's root; the plot is written beside it."""


def cases(preset: Preset, settings: EndToEndSettings, device: str) -> list[Case]:
    """A preset's case for training and that for evaluation."""
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
    """Speed, peak memory and shares of the time by part of every implementation."""
    work = case.ours[0]
    module = "trainer" if case.trained else "ours"
    peer = ("TransfoXL", "theirs") if case.arch == "transformer_xl" else ("nn.LSTM", "torch_lstm")
    with contextlib.ExitStack() as stack:

        def start(module: str, python: str = sys.executable, backend: str = "auto") -> Process:
            return stack.enter_context(Process(python, module, case, {"PYTBPTT_BACKEND": backend}))

        implementations = {"pytbptt": start(module), "reference ops": start(module, backend="reference")}
        if case.arch == "awd_lstm":
            implementations[peer[0]] = start(peer[1])
        elif settings.peer_python:
            implementations[peer[0]] = start(peer[1], str(record.ROOT / settings.peer_python))
        parameters = {name: process.model_info["parameters"] for name, process in implementations.items()}
        if len(set(parameters.values())) > 1:
            raise RunError(f"{case.name}: found {parameters} parameters, expected the same model everywhere")
        seconds: dict[str, list[float]] = {name: [] for name in implementations}
        for process in implementations.values():
            process.run(work, case.warm_up)
        for _ in range(settings.rounds):
            for name, process in implementations.items():
                seconds[name].append(process.run(work, case.chunks)["seconds"])
        profiled = {name: process.run(work, case.chunks, parts=True) for name, process in implementations.items()}
        versions = {name: process.model_info["versions"] for name, process in implementations.items()}

    flops = model_flops(case) * (3 if case.trained else 1)
    peak = matmul_rate(case)
    results = {}
    for name, times in seconds.items():
        speed = case.tokens_per_turn / statistics.median(times)
        parts, rounds = profiled[name]["parts"], zip(times, seconds["pytbptt"], strict=True)
        results[name] = {
            "tokens_per_second": speed,
            "times_pytbptt": statistics.median(time / pytbptt_time for time, pytbptt_time in rounds),
            "peak_bytes": profiled[name]["peak_bytes"],
            "model_flop_utilisation": flops * speed / peak,
            "shares": {part: parts.get(part, 0.0) / sum(parts.values()) for part in PARTS},
            "quartile_seconds": record.quartiles(times),
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
    """Floating-point operations per token of a forward pass: all products, in attention over the visible keys."""

    def attention(query: Any, key: Any, *rest: Any, **options: Any) -> int:
        B, T, H, D = query
        M, window = (rest[4] or (0, 0))[1], rest[7]
        keys = sum(min(M + i + 1, window or M + T) for i in range(T))
        return 3 * 2 * B * H * D * keys  # products: query and key, query and position, weights and value

    def recurrence(gates: Any, weight_hh: Any, *rest: Any, **options: Any) -> int:
        return int(2 * gates[0] * gates[1] * weight_hh[0] * weight_hh[1])

    model = ARCHITECTURES[case.arch](vocab_size=case.vocab_size, **case.sizes).build().train(case.trained)
    tokens, targets = TokenStream(dataclasses.replace(case, device="cpu")).next()
    formulas = {torch.ops.pytbptt.rel_attention: attention, torch.ops.pytbptt.lstm: recurrence}
    memory = model.init_memory(case.batch_size) if case.trained else model.init_evaluation_memory(case.batch_size)
    with torch.no_grad():
        _, memory = model.loss(tokens, targets, memory)  # cached projections do not count
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            model.loss(tokens, targets, memory)
    return counter.get_total_flops() / tokens.numel()


def matmul_rate(case: Case) -> float:
    """Operations per second of a large product, the best of five: utilisation is relative to it."""
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
    """Prints one case."""
    print(f"{result['case']}: {result['summary']}; {result['parameters']:,} parameters")
    for name, values in result["implementations"].items():
        shares = ", ".join(f"{part} {share:.0%}" for part, share in values["shares"].items() if share >= 0.005)
        print(
            f"  {name:<14} {values['tokens_per_second']:9,.0f} tokens/s, {values['times_pytbptt']:5.2f} times pytbptt's"
            f" time, {values['peak_bytes'] / 2**30:5.2f} GiB, utilisation {values['model_flop_utilisation']:.0%}\n"
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
        raise InputError("--device: found cuda, but torch finds no GPU; expected cpu or auto")
    device = "cuda" if available and settings.device != "cpu" else "cpu"
    machine = record.describe_machine()
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    results = []
    for preset in settings.preset:
        for case in cases(preset, settings, device):
            results.append(measure(case, settings))
            report(results[-1])
    record.write_program_results(settings.output, "end_to_end", machine, results)
    picture = Path(settings.output).with_suffix(".png")
    pictures.draw(pictures.draw_end_to_end, (settings.output,), record.ROOT / picture)
    print(picture)


if __name__ == "__main__":
    run("python -m benchmarks.end_to_end", EndToEndSettings, end_to_end, __doc__)
