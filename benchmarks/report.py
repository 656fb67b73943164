"""Tables and plots of results: python -m benchmarks.report.

Updates the tables of PAGES between the markers `<!-- report: FILE... key=a,b -->` and `<!-- end of report -->`, where
key=a,b keeps the rows with one of these values, such as mode=backward, and draws PICTURES. With --print, prints the
tables of files instead.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import pictures, record
from pytbptt.errors import InputError

PAGES = ("README.md", "benchmarks/README.md")
PICTURES: dict[str, tuple[Callable[[list[dict[str, Any]], Path], None], tuple[str, ...]]] = {
    "benchmarks/results/results.png": (
        pictures.draw_ops_and_peers,
        ("benchmarks/results/sweep.json", "benchmarks/results/peers.json"),
    ),
    "benchmarks/results/end-to-end.png": (pictures.draw_end_to_end, ("benchmarks/results/end-to-end.json",)),
}
MARKER = re.compile(r"(<!-- report:(?P<text>[^>]*)-->\n).*?(<!-- end of report -->)", re.DOTALL)
TITLES = {
    "compiled_eager": "compiled eager",
    "sdpa": "SDPA",
    "flex_attention": "FlexAttention",
    "flash_without_positions": "flash without positions",
    "torch_lstm": "`torch.nn.LSTM`",
    "fused_with_resets": "3 % resets",
    "fused_padded": "padded products",
    "flashrnn": "FlashRNN, recurrence alone",
    "per_step_loop": "step by step",
    "split_at_every_reset": "split at resets",
    "torch_lstm_without_resets": "`torch.nn.LSTM`, no resets",
    "torchrl_pad": "TorchRL pad",
    "torchrl_scan": "TorchRL scan",
    "torchrl_triton": "TorchRL triton",
}
MODES = {"forward": "forward", "backward": "with backward", "update": "update"}
Result = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A minimum for the ratio of times, others' to the fused op's."""

    op: str
    device: str
    sizes: tuple[str, ...]
    modes: tuple[str, ...]
    others: tuple[str, ...]
    """Implementations, of which the fastest counts."""
    min_ratio: float
    applies: Callable[[dict[str, Result]], bool] = lambda rows: True
    """Whether it is a goal for a group with these rows."""

    def verdict(self, key: Result, rows: dict[str, Result], times: dict[str, float]) -> str | None:
        applies = (
            (self.op, self.device) == (key["op"], key["device"])
            and any(fnmatchcase(key["size"], size) for size in self.sizes)
            and key["mode"] in self.modes
            and self.applies(rows)
        )
        other_times = [times[name] for name in self.others if name in times]
        if not applies or not other_times or "fused" not in times:
            return None
        ratio = min(other_times) / times["fused"]
        label = "best other" if len(self.others) > 1 else _title(self.others[0])
        # More digits where rounding would show a missed goal as met, or the reverse.
        rounds_correctly = (ratio < self.min_ratio) == (round(ratio, 2) < self.min_ratio)
        shown = f"{ratio:.2f}" if rounds_correctly else f"{ratio:.4f}"
        return f"{label} ≥ {self.min_ratio:g}: {'passed' if ratio >= self.min_ratio else 'missed'} ({shown})"


def _cudnn_persists(rows: dict[str, Result]) -> bool:
    return bool(rows.get("torch_lstm", {}).get("cudnn_persists"))


def _attention_on_cpu(size: str, forward: float, backward: float | None = None) -> list[Goal]:
    others = ("eager", "compiled_eager", "sdpa", "flex_attention")
    goals = [Goal("rel_attention", "cpu", (size,), ("forward",), others, forward)]
    return goals + ([Goal("rel_attention", "cpu", (size,), ("backward",), others, backward)] if backward else [])


LARGE_SIZES, FAIRSEQ_SIZES = ("enwik8", "nvidia-*", "long"), ("seed-training", "seed-evaluation")
GOALS = [
    Goal("rel_attention", "cuda", LARGE_SIZES, ("backward",), ("eager",), 5),
    Goal("rel_attention", "cuda", LARGE_SIZES, ("backward",), ("flex_attention",), 2),
    Goal("rel_attention", "cuda", LARGE_SIZES, ("backward",), ("flash_without_positions",), 0.55),
    Goal("rel_attention", "cuda", FAIRSEQ_SIZES, ("backward",), ("eager",), 2),
    Goal("rel_attention", "cuda", FAIRSEQ_SIZES, ("backward",), ("flex_attention",), 1.2),
    Goal("lstm", "cuda", ("*",), ("backward",), ("torch_lstm",), 1.5, lambda rows: not _cudnn_persists(rows)),
    Goal("lstm", "cuda", ("*",), ("backward",), ("torch_lstm",), 0.9, _cudnn_persists),
    *_attention_on_cpu("seed-4-streams", 3.5, 2.8),
    *_attention_on_cpu("enwik8-2-streams", 5.5, 4.5),
    *_attention_on_cpu("seed-evaluation", 2.6, 2.0),
    *_attention_on_cpu("bytes", 3.2, 2.6),
    *_attention_on_cpu("seed-decoding", 3),
    Goal("lstm", "cpu", ("*",), ("forward", "backward"), ("torch_lstm",), 1),
    Goal("lstm with weight drop", "cpu", ("*",), ("forward", "backward"), ("torch_lstm",), 1.3),
]
MAX_MEMORY_RATIO = {("rel_attention", "cpu"): 3.0}
"""Peak memory relative to the size of output and gradients."""
MAX_RESET_RATIO = 1.05
SIZES_WITHOUT_GOALS = ("tiny",)
LEGEND = (
    "Other columns are times relative to the fused op's. The floor, in ms, is the roofline time of operations and "
    "bytes at the rates of a large product and copy in torch. Memory is the peak beyond what was allocated before, in "
    "brackets relative to the size of output and gradients."
)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def tables(results: list[Result]) -> Iterator[str]:
    """A table for each op and device in the harness's results, followed by what could not be timed."""
    by_op: dict[tuple[str, str], dict[tuple[str, ...], dict[str, Result]]] = {}
    for result in results:
        group = (result["size"], result["dtype"], result["mode"])
        by_op.setdefault((result["op"], result["device"]), {}).setdefault(group, {})[result["name"]] = result
    for (op, device), groups in by_op.items():
        names = list(dict.fromkeys(name for rows in groups.values() for name in rows if name != "fused"))
        timed = [n for n in names if any("milliseconds" in rows.get(n, {}) for rows in groups.values())]
        head = [op, "", "dtype", "fused, ms", "floor", *map(_title, timed), "best other", "memory, MiB", "goals"]
        if device == "cuda":
            head.insert(4, "launched")
        lines = [_line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(rows, timed, device)) for rows in groups.values()]
        failures: dict[tuple[str, str, str], list[str]] = {}
        for row in (row for rows in groups.values() for row in rows.values() if "cannot" in row):
            failures.setdefault((_title(row["name"]), MODES[row["mode"]], row["cannot"]), []).append(row["size"])
        reasons = [f"- {name}, {mode} ({', '.join(sizes)}): {why}" for (name, mode, why), sizes in failures.items()]
        yield "\n".join([*lines, *([""] if reasons else []), *reasons])


def _cells(rows: dict[str, Result], timed: list[str], device: str) -> list[str]:
    key = next(iter(rows.values()))
    times = {name: row["milliseconds"] for name, row in rows.items() if "milliseconds" in row}
    shape = ", ".join(f"{name} {size}" for name, size in key["shape"].items())
    fused, fused_time = rows.get("fused", {}), times.get("fused")

    def ratio(time: float | None) -> str:
        if time is None:
            return ""
        return f"{time / fused_time:.2f}" if fused_time else f"{time:.4g} ms"

    others = [time for name, time in times.items() if not name.startswith("fused") and "bound" not in rows[name]]
    cells = [f"{key['size']} ({shape})", MODES[key["mode"]], key["dtype"], f"{fused_time:.4g}" if fused_time else ""]
    if device == "cuda":
        cells.append(f"{fused['launched_milliseconds']:.4g}" if "launched_milliseconds" in fused else "")
    cells.append(f"{key['floor_milliseconds']:.3g}" if "floor_milliseconds" in key else "")
    cells += [ratio(times.get(name)) for name in timed]
    cells += [ratio(min(others, default=None)), _memory(fused)]
    verdicts = [verdict for goal in GOALS if (verdict := goal.verdict(key, rows, times))]
    verdicts += _limits(key, fused, times)
    return [*cells, "" if key["size"] in SIZES_WITHOUT_GOALS else "; ".join(verdicts)]


def _memory(fused: Result) -> str:
    if fused.get("peak_bytes") is None:
        return ""
    peak = f"{fused['peak_bytes'] / 2**20:.3g}"
    return f"{peak} ({fused['peak_bytes'] / fused['result_bytes']:.1f})" if fused.get("result_bytes") else peak


def _limits(key: Result, fused: Result, times: dict[str, float]) -> Iterator[str]:
    def verdict(label: str, ratio: float, limit: float) -> str:
        return f"{label} ≤ {limit:g}: {'passed' if ratio <= limit else 'missed'} ({ratio:.2f})"

    limit = MAX_MEMORY_RATIO.get((key["op"], key["device"]))
    if limit and fused.get("peak_bytes") is not None and key["shape"]["T"] > 1:
        yield verdict("memory", fused["peak_bytes"] / fused["result_bytes"], limit)
    if key["device"] == "cuda" and "fused_with_resets" in times and "fused" in times:
        yield verdict("resets", times["fused_with_resets"] / times["fused"], MAX_RESET_RATIO)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def peers(contents: dict[str, Any]) -> str:
    """A table of whole models: tokens per second, and times relative to pytbptt's."""
    lines = [_line(["case", "what", "tokens/s", "time / ours", "goal"]), _line(["---"] * 5)]
    for result in contents["results"]:
        label = result["case"]
        for name, speed in result["tokens_per_second"].items():
            compared = result["ratios"].get(name, {})
            goal = compared.get("target")
            verdict = "" if goal is None else f"{goal:g}: {'passed' if compared['median'] >= goal else 'missed'}"
            ratio = f"{compared['median']:.2f}" if compared else ""
            side, _, work = name.partition(".")
            lines.append(_line([f"`{label}`" if label else "", f"{side}, `{work}`", f"{speed:,.0f}", ratio, verdict]))
            label = ""
    return "\n".join(lines)


def end_to_end(contents: dict[str, Any]) -> str:
    """A table of presets: speed, memory, utilisation and the largest shares of the time."""
    head = ["", "tokens/s", "time", "peak memory", "utilisation", "largest shares of the time"]
    lines = [_line(head), _line(["---"] * len(head))]
    for result in contents["results"]:
        for name, values in result["implementations"].items():
            largest = sorted(values["shares"].items(), key=lambda item: -item[1])[:4]
            lines.append(_line([
                f"{result['case']}, {name}", f"{values['tokens_per_second']:,.0f}", f"{values['times_pytbptt']:.2f}",
                f"{values['peak_bytes'] / 2**30:.1f} GiB", f"{values['model_flop_utilisation']:.0%}",
                ", ".join(f"{part} {share:.0%}" for part, share in largest if share >= 0.005),
            ]))  # fmt: skip
    return "\n".join(lines)


def heading(contents: dict[str, Any], path: str) -> str:
    """Date, machine, versions and command of a measurement."""
    machine = contents["machine"]
    hardware = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']['torch']}"
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    if "gpu" in machine:
        hardware = f"one {machine['gpu']} (driver {machine.get('driver', 'unknown')})"
        versions += f", CUDA {machine.get('cuda')}, cuDNN {machine.get('cudnn')}"
    timed = sorted({result["timed"] for result in contents["results"] if "timed" in result})
    by = f", timed by {' and '.join(timed)}" if timed else ""
    return (
        f"{contents['date']}, {hardware}, {versions}, commit {machine['commit']}: `{contents['command']}` ({path}){by}."
    )


def render(path: str, keep: dict[str, set[str]]) -> str:
    """A file's heading and tables. Of the harness's rows only those with the values in `keep`.

    Raises:
        InputError: a file without such results.
    """
    contents = record.read(path)
    path = str(Path(path).relative_to(record.ROOT)) if Path(path).is_relative_to(record.ROOT) else path
    try:
        if contents["kind"] == "peers":
            parts = [peers(contents)]
        elif contents["kind"] == "end_to_end":
            parts = [end_to_end(contents)]
        else:
            chosen = [r for r in contents["results"] if all(r[name] in values for name, values in keep.items())]
            parts = list(tables(chosen))
        return "\n\n".join([heading(contents, path), *parts])
    except (KeyError, TypeError, AttributeError) as error:
        raise record.malformed(path, error) from None


def render_marker(text: str) -> str:
    """The tables of a marker's files and keys."""
    paths = [word for word in text.split() if "=" not in word]
    keep = {key: set(values.split(",")) for key, _, values in (w.partition("=") for w in text.split() if "=" in w)}
    return "\n\n".join(render(path, keep) for path in paths)


def update_tables(page: str) -> str:
    """A page's text with its tables made from the results."""
    return MARKER.sub(lambda match: f"{match[1]}\n{render_marker(match['text'])}\n\n{match[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--print", nargs="+", metavar="FILE", dest="files", help="print these files' tables instead")
    files = parser.parse_args().files
    try:
        if files:
            print("\n\n".join([LEGEND, *(render(str(Path(file).absolute()), {}) for file in files)]))
            return
        for page in PAGES:
            (record.ROOT / page).write_text(update_tables((record.ROOT / page).read_text()))
        for picture, (draw, paths) in PICTURES.items():
            pictures.draw(draw, paths, record.ROOT / picture)
    except InputError as error:
        raise SystemExit(f"python -m benchmarks.report: {error}") from None


if __name__ == "__main__":
    main()
