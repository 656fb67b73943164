"""What was found, as a table, as JSON, and as a command line."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.runtime.atomic import replace_file
from pytbptt.training.config import (
    BUILT_IN_CORPUS,
    TrainSettings,
    TruncationSettings,
    built_in_preset,
    flatten,
    read_command_line,
)
from pytbptt.truncation import TruncationBias
from pytbptt.tuning.context import ContextPoint, effective_context
from pytbptt.tuning.gain import Curve, compare
from pytbptt.tuning.memory import GIB, MemoryResult
from pytbptt.tuning.recommendation import Recommendation
from pytbptt.tuning.settings import AdviceOptions
from pytbptt.tuning.speed import SpeedPoint, knee
from pytbptt.tuning.stability import StabilityPoint

JSON, PICTURE = "advice.json", "advice.png"


@dataclass(frozen=True)
class Findings:
    """Everything that was measured; advice.json holds these fields."""

    arch: str
    parameters: int
    data: str
    device: str
    threads: int
    seed: int
    weights: str
    """Where those that were measured come from."""
    tolerance: float
    context: Sequence[ContextPoint]
    bias: TruncationBias
    memory: MemoryResult
    speed: Sequence[SpeedPoint]
    stability: Sequence[StabilityPoint]
    curves: Sequence[Curve]
    recommendation: Recommendation
    command: str
    seconds: dict[str, float]
    """What each measurement took."""


def command_line(settings: TrainSettings, recommendation: Recommendation) -> str:
    """The command that trains as the settings say, with what is recommended in their place.

    Where --save-dir holds a run, which as a rule cannot be carried on with other sizes, it names a folder within.
    """
    words = [] if settings.data.data == BUILT_IN_CORPUS else [settings.data.data]
    words += ["--arch", settings.arch]
    if settings.config:
        words += ["--config", settings.config]
    elif settings.preset and (
        settings.preset != built_in_preset(settings.arch) or settings.data.data != BUILT_IN_CORPUS
    ):
        words += ["--preset", settings.preset]
    changed: dict[str, Any] = {
        "tokens_per_sample": recommendation.tokens_per_sample,
        "batch_size": recommendation.batch_size,
    }
    if recommendation.mem_len is not None:
        changed["mem_len"] = recommendation.mem_len
    save_dir = Path(settings.checkpoint.save_dir)
    if (save_dir / checkpoints.LAST).exists():
        changed["save_dir"] = str(save_dir / f"bptt-{recommendation.tokens_per_sample}")
    base = flatten(read_command_line(words))
    aside = {"data", "arch", "preset", "config", "vocab_size", *(f.name for f in dataclasses.fields(AdviceOptions))}
    aside |= {f.name for f in dataclasses.fields(TruncationSettings)}  # what was measured is without
    for name, value in flatten(settings).items():
        if name not in aside and name not in changed and value != base[name]:
            words += _flag(name, value)
    for name, value in changed.items():
        words += _flag(name, value)
    return shlex.join(["python", "-m", "pytbptt.train", *words])


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


def write_json(findings: Findings, path: Path) -> None:
    """All findings; null stands for what is infinite or not a number."""
    content = dataclasses.asdict(findings)
    content["knee"] = dataclasses.asdict(knee(findings.speed))
    content["gain"] = [dataclasses.asdict(point) for point in compare(findings.curves)] if findings.curves else []
    replace_file(path, json.dumps(_finite(content), indent=1).encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_findings(findings: Findings, folder: Path) -> None:
    """For the reader."""
    minutes = sum(findings.seconds.values()) / 60
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in findings.seconds.items() if seconds)
    print(f"{findings.arch}, {findings.parameters:,} parameters; weights: {findings.weights}")
    print(f"measured in {minutes:.1f} minutes on {findings.device}, {findings.threads} threads ({parts})\n")
    print("\n".join(_by_bptt(findings)))
    print("\n".join(["", *_by_batch_size(findings.speed)]))
    if findings.context:
        print("\n".join(["", *_by_context(findings.context)]))
    if findings.curves:
        print("\n".join(["", *_by_training(findings.curves)]))
    print("\n".join(["", *_on_memory(findings.memory)]))
    print(f"\n{folder / PICTURE}, {folder / JSON}")
    print("\nWhy:")
    for reason in findings.recommendation.reasons:
        print(f"- {reason}")
    print(f"\n{findings.command}")


def _by_bptt(findings: Findings) -> list[str]:
    """Memory, speed, stability and bias for each bptt."""
    streams = findings.recommendation.batch_size
    speeds: dict[int, float] = {}
    for measured in findings.speed:
        speeds[measured.bptt] = max(speeds.get(measured.bptt, 0.0), measured.tokens_per_second)
    biases = dict(zip(findings.bias.lengths, findings.bias.bias, strict=True))
    rows = [["bptt", "GiB", "most tokens/s", "gradient norm", "spread", "not finite", "bias", "95% interval"]]
    for point in findings.stability:
        bias = biases.get(point.bptt)
        chosen = "*" if point.bptt == findings.recommendation.tokens_per_sample else ""
        rows.append(
            [
                f"{chosen}{point.bptt}",
                f"{findings.memory.model.peak(point.bptt, streams) / GIB:.2f}",
                f"{speeds[point.bptt]:,.0f}" if point.bptt in speeds else "-",
                f"{point.mean:.3g}",
                f"{point.spread:.0%}" if math.isfinite(point.spread) else "-",
                f"{point.not_finite} of {point.updates}",
                f"{bias.value:.3f}" if bias else "-",
                f"{bias.low:.3f} to {bias.high:.3f}" if bias else "-",
            ]
        )
    return [
        f"memory with {streams} streams, as fitted; speed with whatever number of streams is fastest:",
        *_table(rows),
        _decay_in_words(findings.bias),
    ]


def _decay_in_words(bias: TruncationBias) -> str:
    decay, half = bias.decay, bias.lags[len(bias.lags) // 2]
    if decay.value == 0:
        furthest = max((lag for lag, norm in zip(bias.lags, bias.norms, strict=True) if norm.value > 0), default=0)
        return f"no gradient reaches further back than {furthest} tokens"
    return (
        f"beyond {half} tokens the gradient's norm shrinks by a factor of {decay.value:.4f} ({decay.low:.4f} to "
        f"{decay.high:.4f}) for each token further back"
    )


def _by_batch_size(speed: Sequence[SpeedPoint]) -> list[str]:
    bptts = sorted({point.bptt for point in speed})
    marked = knee(speed)
    speeds = {(point.batch_size, point.bptt): f"{point.tokens_per_second:,.0f}" for point in speed}
    speeds[marked.batch_size, marked.bptt] = "*" + speeds[marked.batch_size, marked.bptt]
    rows = [["streams", *(f"bptt {bptt}" for bptt in bptts)]]
    for streams in sorted({point.batch_size for point in speed}):
        rows.append([str(streams), *(speeds.get((streams, bptt), "") for bptt in bptts)])
    return ["tokens/s (* the knee: the smallest update within a tenth of the fastest):", *_table(rows)]


def _by_context(context: Sequence[ContextPoint]) -> list[str]:
    longest, effective = context[-1], effective_context(context)
    rows = [["tokens seen", "loss", "above the longest", "of the hardest tenth", "above the longest"]]
    for point in context:
        rows.append(
            [
                f"{'*' if point.length == effective else ''}{point.length}",
                f"{point.loss:.4f}",
                f"{point.loss / longest.loss - 1:+.1%}",
                f"{point.hardest:.4f}",
                f"{point.hardest / longest.hardest - 1:+.1%}",
            ]
        )
    return ["nats per held-out token where each layer sees so many tokens (* the effective context):", *_table(rows)]


def _by_training(curves: Sequence[Curve]) -> list[str]:
    rows = [["bptt", "streams", "tokens", "loss at equal tokens", "loss at equal time"]]
    for curve, point in zip(curves, compare(curves), strict=True):
        numbers = [f"{curve.bptt}", f"{curve.batch_size}", f"{curve.tokens[-1]:,}"]
        rows.append([*numbers, f"{point.at_equal_tokens:.4f}", f"{point.at_equal_time:.4f}"])
    common, minutes = min(curve.tokens[-1] for curve in curves), curves[0].seconds[-1] / 60
    return [
        f"nats per held-out token after training on from there for {common:,} tokens, and for {minutes:.1f} minutes:",
        *_table(rows),
    ]


def _on_memory(memory: MemoryResult) -> list[str]:
    model, checked, largest = memory.model, memory.held_out, memory.largest
    tried = "measured" if largest.peak is not None else "by the fit, not tried"
    return [
        f"memory: {model.fixed / GIB:.2f} GiB + {model.per_stream / 1024:.1f} KiB a stream + "
        f"{model.per_token / 1024:.1f} KiB a token; {memory.held_out_error:+.1%} off at bptt {checked.bptt} x "
        f"{checked.batch_size}, which was not fitted",
        f"largest within {memory.limit / GIB:.2f} GiB: bptt {largest.bptt:,} x {largest.batch_size} ({tried})",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
