"""Tables of what benchmarks.gpu measured, put between two marks in README.md and benchmarks/README.md."""

from pathlib import Path
from typing import Any

from benchmarks import record

BEGIN, END = "<!-- benchmarks.gpu writes from here -->", "<!-- to here -->"
BOUND = "flash without positions"


def write(path: str, root: Path = record.ROOT) -> None:
    """Put the results of a file that benchmarks.gpu wrote into both pages under `root`."""
    contents = record.read(path, ("gpu",))
    few = [r for r in contents["results"] if r["mode"] != "forward" and r["dtype"] == "bfloat16"]
    for page, results in (("README.md", few), ("benchmarks/README.md", contents["results"])):
        before, _, rest = (root / page).read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        (root / page).write_text(f"{before}{BEGIN}\n\n{render(contents, path, results)}\n\n{END}{after}")


def render(contents: dict[str, Any], path: str, results: list[dict[str, Any]]) -> str:
    """Where it was measured, and a line for each result."""
    machine = contents["machine"]
    lines = [
        f"Measured on {contents['date']} on one {machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"commit {machine['commit']} (`{contents['command']}`, {path}).",
        "",
        "| sizes | | dtype | fused, ms | eager / fused | best other / fused | flash / fused | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *map(_line, results)])


def _line(result: dict[str, Any]) -> str:
    measured = result["measured"]
    times = {name: one["milliseconds"] for name, one in measured.items() if "milliseconds" in one}
    if "fused" not in times:
        return f"| {result['size']} | {result['mode']} | {result['dtype']} | {measured['fused']['cannot']} | | | | |"
    ours = times["fused"]
    others = [time for name, time in times.items() if name not in ("fused", BOUND)]
    columns = [
        result["size"],
        result["mode"],
        result["dtype"],
        f"{ours:.3f}",
        f"{times['eager'] / ours:.2f}" if "eager" in times else "",
        f"{min(others) / ours:.2f}" if others else "",
        f"{times[BOUND] / ours:.2f}" if BOUND in times else "",
        f"{measured['fused']['peak_bytes'] / 2**20:.0f}",
    ]
    return f"| {' | '.join(columns)} |"
