"""Report of the measurements: table, JSON_FILE, plot and command line."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytbptt import checkpoint as checkpoints
from pytbptt.runtime.atomic import atomic_write, atomic_write_bytes
from pytbptt.runtime.extras import import_extra
from pytbptt.training.config import (
    BUILT_IN_CORPUS,
    TrainSettings,
    TruncationSettings,
    built_in_preset,
    flatten,
    read_command_line,
)
from pytbptt.truncation import Interval, TruncationBias
from pytbptt.tuning.context import ContextPoint, effective_context
from pytbptt.tuning.cost import GIB, MemoryResult, SpeedPoint, knee
from pytbptt.tuning.gradient import StabilityPoint
from pytbptt.tuning.recommendation import Recommendation

JSON_FILE, PLOT_FILE = "advice.json", "advice.png"
MAX_ROWS = 5
"""Maximum number of rows in the printed table."""


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
    """Source of the measured weights."""
    tolerance: float
    context: Sequence[ContextPoint]
    bias: TruncationBias
    memory: MemoryResult
    speed: Sequence[SpeedPoint]
    stability: Sequence[StabilityPoint]
    recommendation: Recommendation
    command: str
    seconds: dict[str, float]
    """What each measurement took."""


def command_line(settings: TrainSettings, recommendation: Recommendation, exclude: set[str]) -> str:
    """The training command with the recommended values.

    `exclude`: names of settings to leave out. If --save-dir holds a run, the command uses a subdirectory, because a run
    cannot normally be resumed with other sizes.
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
    if (save_dir / checkpoints.LAST_CHECKPOINT).exists():
        changed["save_dir"] = str(save_dir / f"bptt-{recommendation.tokens_per_sample}")
    base = flatten(read_command_line(words))
    exclude = exclude | {"data", "arch", "preset", "config", "vocab_size"}
    exclude |= {f.name for f in dataclasses.fields(TruncationSettings)}  # the measurements ignore these settings
    exclude |= changed.keys()
    different = {
        name: value for name, value in flatten(settings).items() if name not in exclude and value != base[name]
    }
    for name, value in {**different, **changed}.items():
        flag, values = name.replace("_", "-"), value if isinstance(value, tuple) else (value,)
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", *map(str, values)]
    return shlex.join(["python", "-m", "pytbptt.train", *words])


def write_json(findings: Findings, path: Path) -> None:
    """Write all findings; null stands for infinite values and NaN."""
    content = dataclasses.asdict(findings)
    content["knee"] = dataclasses.asdict(knee(findings.speed))
    atomic_write_bytes(path, json.dumps(_finite(content), indent=1).encode() + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_findings(findings: Findings, folder: Path) -> None:
    """Print a summary of at most 15 lines."""
    minutes = sum(findings.seconds.values()) / 60
    print(f"{findings.arch}, {findings.parameters:,} parameters; weights: {findings.weights}; {minutes:.1f} minutes")
    print("\n".join(_table(findings)))
    for reason in findings.recommendation.reasons:
        print(f"- {reason}")
    print(f"{folder / PLOT_FILE} and {folder / JSON_FILE} have the details. To train with these settings:")
    print(findings.command)


def _table(findings: Findings) -> list[str]:
    """Table rows for the bptts nearest to the recommended one, at the recommended batch size."""
    chosen, streams = findings.recommendation.tokens_per_sample, findings.recommendation.batch_size
    speeds = {point.bptt: point.tokens_per_second for point in findings.speed if point.batch_size == streams}
    biases = dict(zip(findings.bias.lengths, findings.bias.bias, strict=True))
    rows = [["bptt", "bias", "95% interval", "gradient norm", "not finite", "tokens/s", "GiB"]]
    nearest = sorted(findings.stability, key=lambda point: abs(math.log2(point.bptt / chosen)))[:MAX_ROWS]
    for point in sorted(nearest, key=lambda point: point.bptt):
        bias = biases.get(point.bptt)
        rows.append(
            [
                f"{'*' if point.bptt == chosen else ''}{point.bptt}",
                f"{bias.value:.3f}" if bias else "-",
                f"{bias.low:.3f} to {bias.high:.3f}" if bias else "-",
                f"{point.mean:.3g}",
                f"{point.not_finite} of {point.updates}",
                f"{speeds[point.bptt]:,.0f}" if point.bptt in speeds else "-",
                f"{findings.memory.model.peak(point.bptt, streams) / GIB:.2f}",
            ]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def plot(findings: Findings, output: Path) -> None:
    """Plot each measurement in a panel of one PNG."""
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")
    panels = [_memory, _speed, _stability, _decay, _bias, *([_context] if findings.context else [])]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    for panel, ax in zip(panels, axes.flat, strict=False):
        panel(ax, findings)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(
        f"{findings.arch}, {findings.parameters:,} parameters, {findings.data}; {findings.weights}", fontsize=10
    )
    with atomic_write(output) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def _memory(axes: Any, findings: Findings) -> None:
    memory = findings.memory
    for label, points in {"measured, fitted": memory.fitted, "not fitted": (memory.held_out,)}.items():
        tokens = [point.bptt * point.batch_size for point in points]
        axes.plot(tokens, [(point.peak or math.nan) / GIB for point in points], "o", label=label)
        fit = [memory.model.peak(point.bptt, point.batch_size) / GIB for point in points]
        axes.plot(tokens, fit, "+", color="black", label="the fit" if points is memory.fitted else None)
    axes.set(xlabel="bptt x streams", ylabel="peak memory, GiB", title="memory", ylim=(0, None))


def _speed(axes: Any, findings: Findings) -> None:
    for streams in sorted({point.batch_size for point in findings.speed}):
        row = [point for point in findings.speed if point.batch_size == streams]
        speeds = [point.tokens_per_second for point in row]
        axes.plot([point.bptt for point in row], speeds, marker="o", markersize=3, label=f"{streams} streams")
    marked = knee(findings.speed)
    axes.plot(marked.bptt, marked.tokens_per_second, "*", color="black", markersize=12, label="knee")
    _bptt_axis(axes, findings)
    axes.set(ylabel="tokens/s", title="speed", ylim=(0, None))


def _stability(axes: Any, findings: Findings) -> None:
    points = findings.stability
    std = [point.mean * point.spread for point in points]
    axes.errorbar([point.bptt for point in points], [point.mean for point in points], std, marker="o", capsize=3)
    if bad := [point.bptt for point in points if point.not_finite]:
        axes.plot(bad, [0] * len(bad), "x", color="C3", label="not finite")
    _bptt_axis(axes, findings)
    axes.set(ylabel="gradient norm, mean ± std", title="stability", ylim=(0, None))


def _decay(axes: Any, findings: Findings) -> None:
    _with_interval(axes, findings.bias.lags, findings.bias.norms)
    axes.set(xlabel="lag, tokens", ylabel="norm of d loss / d state", title="decay of the gradient", yscale="log")


def _bias(axes: Any, findings: Findings) -> None:
    _with_interval(axes, findings.bias.lengths, findings.bias.bias)
    axes.axhline(findings.tolerance, color="grey", linestyle="--", linewidth=1, label="tolerance")
    axes.axvline(findings.recommendation.tokens_per_sample, color="C2", linewidth=1, label="recommended")
    _bptt_axis(axes, findings)
    axes.set(ylabel="relative bias", title="bias of truncation", yscale="log")


def _context(axes: Any, findings: Findings) -> None:
    points, longest = findings.context, findings.context[-1]
    lengths = [point.length for point in points]
    axes.plot(lengths, [point.loss / longest.loss for point in points], marker="o", label="all targets")
    axes.plot(lengths, [point.hardest / longest.hardest for point in points], marker="o", label="the hardest tenth")
    axes.axvline(effective_context(points), color="grey", linestyle="--", linewidth=1, label="effective context")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens seen in each layer", ylabel="loss / loss with the longest", title="context")


def _with_interval(axes: Any, x: Sequence[int], values: Sequence[Interval]) -> None:
    axes.plot(x, [value.value for value in values], marker="o", markersize=3)
    axes.fill_between(x, [value.low for value in values], [value.high for value in values], alpha=0.3)


def _bptt_axis(axes: Any, findings: Findings) -> None:
    bptts = [point.bptt for point in findings.stability]
    axes.set_xscale("log", base=2)
    axes.set_xticks(bptts, map(str, bptts))
    axes.set_xlabel("bptt")
