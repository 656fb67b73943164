"""Plots of results: time and memory of rel_attention by T and M, ratios of whole models, time per part of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.peers.parts import OTHER

SWEEP_LABELS = {"fused": "pytbptt, fused", "eager": "eager PyTorch", "sdpa": "SDPA, positions as its mask"}
MEMORY_GOAL = 3.0
Contents = dict[str, Any]
Draw = Callable[[list[Contents], Path], None]


def draw(draw_files: Draw, paths: tuple[str, ...], target: Path) -> None:
    """Draws files of results into a PNG.

    Raises:
        InputError: a file without such results.
    """
    import matplotlib

    matplotlib.use("Agg")
    files = [record.read(path) for path in paths]
    try:
        draw_files(files, target)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise record.malformed(", ".join(paths), error) from None


def draw_ops_and_peers(files: list[Contents], target: Path) -> None:
    """Rows: rel_attention's time, its memory, whole models. Columns: by T, by M."""
    import matplotlib.pyplot as plt

    sweep, models = files
    figure = plt.figure(figsize=(10, 10.8), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    panels = [[figure.add_subplot(grid[row, column]) for column in range(2)] for row in range(2)]
    _draw_sweep(panels, sweep)
    _draw_peers(figure.add_subplot(grid[2, :]), models)
    figure.savefig(target, dpi=120)


def _draw_sweep(axes: list[list[Any]], contents: Contents) -> None:
    results = [r for r in contents["results"] if r["size"].startswith("sweep-") and r["mode"] == "backward"]
    labels = {"T": "T, tokens of the chunk", "M": "M, tokens of memory"}
    for column, (varied, other) in enumerate((("T", "M"), ("M", "T"))):
        fixed = _most_frequent([r["shape"][other] for r in results])
        for number, (name, label) in enumerate(SWEEP_LABELS.items()):
            points = [r for r in results if r["name"] == name and r["shape"][other] == fixed and "milliseconds" in r]
            points.sort(key=lambda r: r["shape"][varied])
            sizes = [r["shape"][varied] for r in points]
            style = {"color": f"C{number}", "marker": "o", "markersize": 4, "label": label}
            axes[0][column].plot(sizes, [r["milliseconds"] for r in points], **style)
            axes[1][column].plot(sizes, [r["peak_bytes"] / r["result_bytes"] for r in points], **style)
        shape = results[0]["shape"]
        axes[0][column].set_ylabel("ms, forward and backward")
        axes[0][column].set_title(
            f"B {shape['B']}, H {shape['H']}, D {shape['D']}, {other} {fixed}; {_machine_label(contents)}"
        )
        axes[1][column].set_ylabel("peak memory / (output + gradients)")
        axes[1][column].axhline(MEMORY_GOAL, color="grey", linestyle="--", linewidth=1, label="goal")
        for panel in (axes[0][column], axes[1][column]):
            panel.set_xlabel(labels[varied])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend()


def _most_frequent(values: list[int]) -> int:
    return max(set(values), key=values.count)


def _draw_peers(axes: Any, contents: Contents) -> None:
    """A bar for every ratio, and a line at its goal."""
    ratios = [(f"{r['case']}\n{name}", ratio) for r in contents["results"] for name, ratio in r["ratios"].items()]
    positions = range(len(ratios))
    bars = axes.bar(positions, [ratio["median"] for _, ratio in ratios], width=0.5, color="C0")
    axes.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontweight="bold")
    goals = {position: ratio["target"] for position, (_, ratio) in enumerate(ratios) if ratio["target"] is not None}
    ends = [position - 0.35 for position in goals], [position + 0.35 for position in goals]
    axes.hlines(list(goals.values()), *ends, color="grey", linestyle="--", label="goal")
    axes.set_xticks(positions, [name for name, _ in ratios])
    axes.set_ylabel("time / that of pytbptt as it runs")
    axes.set_title(f"whole models beside transformers' TransfoXL; {_machine_label(contents)}")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _machine_label(contents: Contents) -> str:
    machine = contents["machine"]
    return f"threads {machine['threads']}, {machine['instruction_set']['pytbptt']}"


def draw_end_to_end(files: list[Contents], target: Path) -> None:
    """A stacked bar of microseconds per token for every implementation of every case."""
    import matplotlib.pyplot as plt

    (contents,) = files
    results, machine = contents["results"], contents["machine"]
    width = 1.4 + 3.2 * len(results)
    figure, panels = plt.subplots(1, len(results), figsize=(width, 5.2), layout="constrained", squeeze=False)
    parts = list(next(iter(results[0]["implementations"].values()))["shares"])
    used = [part for part in parts if any(c["shares"][part] for r in results for c in r["implementations"].values())]
    for axes, result in zip(panels[0], results, strict=True):
        names = list(result["implementations"])
        bottoms = [0.0] * len(names)
        for part in used:
            heights = [1e6 / r["tokens_per_second"] * r["shares"][part] for r in result["implementations"].values()]
            colour = "lightgrey" if part == OTHER else f"C{parts.index(part)}"
            axes.bar(range(len(names)), heights, bottom=bottoms, width=0.7, label=part, color=colour)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for position, (name, top) in enumerate(zip(names, bottoms, strict=True)):
            speed = result["implementations"][name]["tokens_per_second"]
            axes.text(position, top, f"{speed:,.0f}/s", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)
        axes.set_title(f"{result['case']}\n{result['summary']}", fontsize=9)
        axes.margins(y=0.08)
    panels[0][0].set_ylabel("µs per token (lower is better); above the bars tokens/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8)
    figure.suptitle(f"{machine.get('gpu', machine['cpu'])}, threads {machine['threads']}", fontsize=10)
    figure.savefig(target, dpi=120)
