"""The findings as a picture."""

from pathlib import Path
from typing import Any

from pytbptt.runtime.atomic import replacing
from pytbptt.runtime.extras import import_extra
from pytbptt.tuning.context import effective_context
from pytbptt.tuning.gain import Curve
from pytbptt.tuning.memory import GIB
from pytbptt.tuning.report import Findings
from pytbptt.tuning.speed import knee


def draw(findings: Findings, output: Path) -> None:
    """A panel for each measurement, as a PNG."""
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")

    panels = [_memory, _speed, _stability, _decay, _bias]
    panels += [_context] if findings.context else []
    panels += [_training_tokens, _training_time] if findings.curves else []
    rows = (len(panels) + 2) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.6 * rows), layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes.flat, strict=False):
        panel(place, findings)
        place.grid(alpha=0.3)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(
        f"{findings.arch}, {findings.parameters:,} parameters, {findings.data}; {findings.weights}", fontsize=10
    )
    with replacing(output) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def _memory(axes: Any, findings: Findings) -> None:
    memory = findings.memory
    groups = {"measured, fitted": memory.fitted, "not fitted": (memory.held_out,), "largest tried": (memory.largest,)}
    for label, points in groups.items():
        tried = [(point.bptt * point.batch_size, point.peak / GIB) for point in points if point.peak is not None]
        if tried:
            axes.plot(*zip(*tried, strict=True), "o", label=label)
        fitted = [memory.model.peak(point.bptt, point.batch_size) / GIB for point in points if point.peak is not None]
        axes.plot([tokens for tokens, _ in tried], fitted, "+", color="black", label="_")
    axes.plot([], [], "+", color="black", label="the fit")
    if memory.largest.peak is not None:
        axes.axhline(memory.limit / GIB, color="grey", linestyle="--", linewidth=1, label="limit")
    axes.set(xlabel="bptt x streams", ylabel="peak memory, GiB", title="memory")
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="lower right")


def _speed(axes: Any, findings: Findings) -> None:
    for streams in sorted({point.batch_size for point in findings.speed}):
        row = [point for point in findings.speed if point.batch_size == streams]
        axes.plot(
            [point.bptt for point in row],
            [point.tokens_per_second for point in row],
            marker="o",
            markersize=3,
            label=f"{streams} streams",
        )
    marked = knee(findings.speed)
    axes.plot(marked.bptt, marked.tokens_per_second, "*", color="black", markersize=12, label="knee")
    _bptt_axis(axes, findings)
    axes.set(ylabel="tokens/s", title="speed")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _stability(axes: Any, findings: Findings) -> None:
    points = findings.stability
    axes.errorbar(
        [point.bptt for point in points],
        [point.mean for point in points],
        [point.mean * point.spread for point in points],
        marker="o",
        capsize=3,
    )
    bad = [point for point in points if point.not_finite]
    axes.plot([point.bptt for point in bad], [0] * len(bad), "x", color="C3", label="not finite")
    _bptt_axis(axes, findings)
    axes.set(ylabel="gradient norm, mean ± spread", title="stability")
    axes.set_ylim(bottom=0)


def _decay(axes: Any, findings: Findings) -> None:
    bias = findings.bias
    axes.plot(bias.lags, [norm.value for norm in bias.norms])
    axes.fill_between(bias.lags, [norm.low for norm in bias.norms], [norm.high for norm in bias.norms], alpha=0.3)
    axes.set_yscale("log")
    axes.set(xlabel="lag, tokens", ylabel="norm of d loss / d state", title="decay of the gradient")


def _bias(axes: Any, findings: Findings) -> None:
    bias = findings.bias
    axes.plot(bias.lengths, [each.value for each in bias.bias], marker="o")
    axes.fill_between(bias.lengths, [each.low for each in bias.bias], [each.high for each in bias.bias], alpha=0.3)
    axes.axhline(findings.tolerance, color="grey", linestyle="--", linewidth=1, label="tolerance")
    axes.axvline(findings.recommendation.tokens_per_sample, color="C2", linewidth=1, label="recommended")
    _bptt_axis(axes, findings)
    axes.set_yscale("log")
    axes.set(ylabel="relative bias", title="bias of truncation")
    axes.legend(fontsize=8)


def _context(axes: Any, findings: Findings) -> None:
    points = findings.context
    lengths = [point.length for point in points]
    longest = points[-1]
    axes.plot(lengths, [point.loss / longest.loss for point in points], marker="o", label="all targets")
    axes.plot(lengths, [point.hardest / longest.hardest for point in points], marker="o", label="the hardest tenth")
    axes.axvline(effective_context(points), color="grey", linestyle="--", linewidth=1, label="effective context")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens seen in each layer", ylabel="loss / loss with the longest", title="context")
    axes.legend(fontsize=8)


def _training_tokens(axes: Any, findings: Findings) -> None:
    for curve in findings.curves:
        axes.plot([tokens / 1000 for tokens in curve.tokens], curve.losses, **_of_curve(curve))
    axes.set(xlabel="thousands of tokens", ylabel="nats per held-out token", title="training on, by tokens")
    axes.legend(fontsize=8)


def _training_time(axes: Any, findings: Findings) -> None:
    for curve in findings.curves:
        axes.plot(curve.seconds, curve.losses, **_of_curve(curve))
    axes.set(xlabel="seconds", ylabel="nats per held-out token", title="training on, by time")
    axes.legend(fontsize=8)


def _of_curve(curve: Curve) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3, "label": f"bptt {curve.bptt}, {curve.batch_size} streams"}


def _bptt_axis(axes: Any, findings: Findings) -> None:
    bptts = [point.bptt for point in findings.stability]
    axes.set_xscale("log", base=2)
    axes.set_xticks(bptts, map(str, bptts))
    axes.set_xlabel("bptt")
