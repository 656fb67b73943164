"""Tables of what benchmarks.gpu and benchmarks.gpu_lstm measured: python -m benchmarks.gpu_tables FILE...

They go between two marks in README.md and benchmarks/README.md, with the goals of an H200 and whether they were met.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from pytbptt.errors import InputError

BEGIN, END = "<!-- benchmarks.gpu_tables writes from here -->", "<!-- to here -->"
BOUND = "flash without positions"


SEED = ("seed, training", "seed, evaluation")
"""Sizes whose goals are lower."""


def write(paths: list[str], root: Path = record.ROOT) -> None:
    """Put the results of such files into both pages under `root`.

    Raises:
        InputError: a file without results of either program.
    """
    files = {path: record.read(path, ("gpu", "gpu_lstm")) for path in paths}
    for page, whole in (("README.md", False), ("benchmarks/README.md", True)):
        tables = [table for path, contents in files.items() if (table := render(contents, path, whole))]
        before, _, rest = (root / page).read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        joined = "\n\n".join(tables)
        (root / page).write_text(f"{before}{BEGIN}\n\n{joined}\n\n{END}{after}")


def render(contents: dict[str, Any], path: str, whole: bool) -> str:
    """Where it was measured, and a line for each result; unless `whole`, for the trained ones in bfloat16 alone, if
    there are any."""
    machine = contents["machine"]
    results = [r for r in contents["results"] if whole or (r["mode"] != "forward" and r["dtype"] == "bfloat16")]
    if not results:
        return ""
    lines = [
        f"Measured on {contents['date']} on one {machine['gpu']} (driver {machine['driver']}), "
        f"torch {machine['torch']}, CUDA {machine['cuda']}, commit {machine['commit']} "
        f"(`{contents['command']}`, {path}).",
        "",
    ]
    if contents["kind"] == "gpu":
        lines += [
            "| sizes | | dtype | fused, ms | floor | eager / fused | Flex / fused | best other / fused | flash / fused "
            "| peak MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        return "\n".join([*lines, *map(_attention, results)])
    lines += [
        "| T, B, H | layers | | dtype | fused, ms | floor | cuDNN / fused | persists | 3% resets / fused | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_lstm, results)])


def _attention(result: dict[str, Any]) -> str:
    measured, label = result["measured"], [result["size"], result["mode"], result["dtype"]]
    times = _times(measured)
    if "fused" not in times:
        return _row([*label, measured["fused"]["cannot"], *[""] * 6])
    others = [time for name, time in times.items() if not name.startswith("fused") and name != BOUND]
    goals = (None, None, None)
    if result["mode"] == "forward+backward":
        goals = (2.0, 1.2, None) if result["size"] in SEED else (5.0, 2.0, 0.55)
    return _row([
        *label, f"{times['fused']:.3f}", _floor(result),
        _ratio(times.get("eager"), times["fused"], goals[0]),
        _ratio(times.get("flex_attention"), times["fused"], goals[1]),
        _ratio(min(others, default=None), times["fused"], None),
        _ratio(times.get(BOUND), times["fused"], goals[2]),
        f"{measured['fused']['peak_bytes'] / 2**20:.0f}",
    ])  # fmt: skip


def _lstm(result: dict[str, Any]) -> str:
    measured = result["measured"]
    sizes = ", ".join(map(str, result["T,B,H"])) if "T,B,H" in result else result["recipe"]
    label = [sizes, str(result.get("layers", "")), result["mode"], result["dtype"]]
    times = _times(measured)
    if "fused" not in times:
        return _row([*label, measured["fused"]["cannot"], "", "", "", "", ""])
    persists, goal = result.get("cudnn_persists"), None
    if result["mode"] == "forward+backward" and (persists or result["dtype"] == "bfloat16"):
        goal = 0.9 if persists else 1.5
    return _row([
        *label, f"{times['fused']:.3f}", _floor(result),
        _ratio(times.get("cudnn"), times["fused"], goal),
        {True: "yes", False: "no", None: ""}[persists],
        _ratio(times.get("fused, 3% resets"), times["fused"], None),
        f"{measured['fused']['peak_bytes'] / 2**20:.0f}",
    ])  # fmt: skip


def _times(measured: dict[str, Any]) -> dict[str, float]:
    return {name: one["milliseconds"] for name, one in measured.items() if "milliseconds" in one}


def _floor(result: dict[str, Any]) -> str:
    return f"{result['floor_milliseconds']:.3f}" if "floor_milliseconds" in result else ""


def _ratio(other: float | None, ours: float, goal: float | None) -> str:
    if other is None:
        return ""
    verdict = "" if goal is None else f" (goal {goal:g}: {'passed' if other / ours >= goal else 'missed'})"
    return f"{other / ours:.2f}{verdict}"


def _row(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    try:
        write(sys.argv[1:])
    except InputError as error:
        raise SystemExit(f"python -m benchmarks.gpu_tables: {error}") from None
