"""Plots metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytbptt.errors import InputError
from pytbptt.runtime.atomic import atomic_write
from pytbptt.runtime.extras import import_extra
from pytbptt.training.metrics_log import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Plot loss, gradient norm and learning rate of one or more runs against their updates, as a PNG.

    Args:
        runs: folders with a metrics.jsonl.
        output: path of the PNG.

    Raises:
        InputError: a folder without metrics.
    """
    import_extra("matplotlib").use("Agg")
    plt = import_extra("matplotlib.pyplot")

    histories = {run: _load_metrics(run) for run in runs}
    entries = [entry for history in histories.values() for entry in history]
    per_byte = all("bits_per_byte" in entry and "incomparable" not in entry for entry in entries)
    unit = "bits_per_byte" if per_byte else "bits"
    figure, (loss, norm, rate) = plt.subplots(
        3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    for number, (run, history) in enumerate(histories.items()):
        colour = f"C{number}"
        train = [entry for entry in history if entry["split"] == "train"]
        valid = [entry for entry in history if entry["split"] == "valid"]
        steps = [entry["step"] for entry in train]
        loss.plot(steps, _values(train, unit), color=colour, alpha=0.4, linewidth=1, label=f"{run.name}: train")
        loss.plot(
            [entry["step"] for entry in valid],
            _values(valid, unit),
            color=colour,
            marker="o",
            markersize=3,
            label=f"{run.name}: valid",
        )
        norm.plot(steps, _values(train, "grad_norm"), color=colour, linewidth=1)
        rate.plot(steps, _values(train, "lr"), color=colour)
    _limit_y_axis(loss, _values(entries, unit))
    loss.set_ylabel("bits per byte" if per_byte else "bits per token")
    norm.set_ylabel("gradient norm")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("updates")
    loss.legend()
    for axes in (loss, norm, rate):
        axes.grid(alpha=0.3)
    with atomic_write(output) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _values(entries: list[dict[str, Any]], key: str) -> list[float]:
    return [float("nan") if entry[key] is None else entry[key] for entry in entries]


def _limit_y_axis(axes: Any, values: list[float]) -> None:
    """Cut off the highest 3 % of the values, which are those of the first entries."""
    finite = sorted(value for value in values if value == value)
    if finite:
        highest = finite[int(0.97 * (len(finite) - 1))]
        margin = 0.05 * (highest - finite[0]) or 0.1
        axes.set_ylim(finite[0] - margin, highest + margin)


def _load_metrics(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{run}: found no {METRICS_FILE}, expected the --save-dir of a run")
    return read_metrics(path)
