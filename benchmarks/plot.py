"""Draw results: rel_attention's time and memory against T and M, and the ratios of whole models to their peers."""

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import tyro

from benchmarks import record
from pytbptt.command import run
from pytbptt.errors import InputError

LABELS = {"fused": "pytbptt, fused", "eager": "eager PyTorch", "sdpa": "SDPA, positions as its mask"}
MEMORY_GOAL = 3.0


@dataclass
class PlotSettings:
    results: tyro.conf.Positional[tuple[str, ...]] = ("benchmarks/results/sweep.json", "benchmarks/results/peers.json")
    """Files that benchmarks.sweep and benchmarks.peers wrote."""
    output: str = "benchmarks/results/results.png"
    """The picture, a PNG."""


def plot(settings: PlotSettings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contents = [record.read(path, ("sweep", "peers")) for path in settings.results]
    rows = sum(2 if content["kind"] == "sweep" else 1 for content in contents)
    figure = plt.figure(figsize=(10, 3.6 * rows), layout="constrained")
    grid, row = figure.add_gridspec(rows, 2), 0
    for path, content in zip(settings.results, contents, strict=True):
        try:
            if content["kind"] == "sweep":
                draw_sweep([[figure.add_subplot(grid[row + r, c]) for c in range(2)] for r in range(2)], content)
                row += 2
            else:
                draw_peers(figure.add_subplot(grid[row, :]), content)
                row += 1
        except (KeyError, TypeError, AttributeError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else f"a value of another type ({error})"
            raise InputError(
                f"{path}: found {found}, expected what python -m benchmarks.{content['kind']} writes"
            ) from None
    figure.savefig(record.ROOT / settings.output, dpi=120)
    print(settings.output)


def draw_sweep(axes: list[list[Any]], content: dict[str, Any]) -> None:
    """Time above and memory below, against T on the left and against M on the right."""
    sizes = content["machine"]["sizes"]
    fixed = {"T": ("M", sizes["M_where_T_grows"]), "M": ("T", sizes["T_where_M_grows"])}
    what = {"T": "T, tokens of the chunk", "M": "M, tokens of memory"}
    for column, (grows, (other, value)) in enumerate(fixed.items()):
        time_axes, memory_axes = axes[0][column], axes[1][column]
        for number, (name, label) in enumerate(LABELS.items()):
            points = [r for r in content["results"] if r["name"] == name and r[other] == value]
            points.sort(key=itemgetter(grows))
            places = [point[grows] for point in points]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": label}
            time_axes.plot(places, [point["median_seconds"] * 1e3 for point in points], **style)
            memory_axes.plot(places, [point["memory"] for point in points], **style)
        time_axes.set_ylabel("ms, forward and backward")
        time_axes.set_title(f"B {sizes['B']}, H {sizes['H']}, D {sizes['D']}, {other} {value}; {_where(content)}")
        memory_axes.set_ylabel("peak memory / (output + gradients)")
        memory_axes.axhline(MEMORY_GOAL, color="grey", linestyle="--", linewidth=1, label="goal")
        for panel in (time_axes, memory_axes):
            panel.set_xlabel(what[grows])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend()


def draw_peers(axes: Any, content: dict[str, Any]) -> None:
    """A bar for every ratio, and a mark where it was aimed at."""
    ratios = [
        (f"{result['case']}\n{name}", ratio)
        for result in content["results"]
        for name, ratio in result["ratios"].items()
    ]
    places = range(len(ratios))
    bars = axes.bar(places, [ratio["median"] for _, ratio in ratios], width=0.5, color="C0")
    axes.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontweight="bold")
    goals = {place: ratio["target"] for place, (_, ratio) in enumerate(ratios) if ratio["target"] is not None}
    axes.hlines(
        list(goals.values()),
        [place - 0.35 for place in goals],
        [place + 0.35 for place in goals],
        color="grey",
        linestyle="--",
        label="goal",
    )
    axes.set_xticks(places, [name for name, _ in ratios])
    axes.set_ylabel("time / that of pytbptt as it runs")
    axes.set_title(f"whole models beside transformers' TransfoXL; {_where(content)}")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _where(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return f"threads {machine['threads']}, {machine['instruction_set']['pytbptt']}"


if __name__ == "__main__":
    run("python -m benchmarks.plot", PlotSettings, plot, __doc__)
