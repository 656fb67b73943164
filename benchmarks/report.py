"""Tables and pictures of what was measured: python -m benchmarks.report.

Writes the tables of PAGES between their marks, `<!-- report: FILE... key=a,b -->` and `<!-- end of report -->`, where
keys such as mode=backward keep rows whose value is among those named, and draws PICTURES. With --print, prints the
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
MARK = re.compile(r"(<!-- report:(?P<what>[^>]*)-->\n).*?(<!-- end of report -->)", re.DOTALL)
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
    """What a ratio of times (others' by ours) is to be at least."""

    op: str
    device: str
    sizes: tuple[str, ...]
    modes: tuple[str, ...]
    over: tuple[str, ...]
    """Implementations, the fastest of which counts."""
    least: float
    where: Callable[[dict[str, Result]], bool] = lambda rows: True
    """Which groups it is for, by their rows."""

    def verdict(self, key: Result, rows: dict[str, Result], times: dict[str, float]) -> str | None:
        applies = (
            (self.op, self.device) == (key["op"], key["device"])
            and any(fnmatchcase(key["size"], size) for size in self.sizes)
            and key["mode"] in self.modes
            and self.where(rows)
        )
        others = [times[name] for name in self.over if name in times]
        if not applies or not others or "fused" not in times:
            return None
        ratio = min(others) / times["fused"]
        over = "best other" if len(self.over) > 1 else _title(self.over[0])
        shown = f"{ratio:.2f}" if (ratio < self.least) == (round(ratio, 2) < self.least) else f"{ratio:.4f}"
        return f"{over} ≥ {self.least:g}: {'passed' if ratio >= self.least else 'missed'} ({shown})"


def _cudnn_persists(rows: dict[str, Result]) -> bool:
    return bool(rows.get("torch_lstm", {}).get("cudnn_persists"))


def _attention_on_cpu(size: str, forward: float, backward: float | None = None) -> list[Goal]:
    over = ("eager", "compiled_eager", "sdpa", "flex_attention")
    goals = [Goal("rel_attention", "cpu", (size,), ("forward",), over, forward)]
    return goals + ([Goal("rel_attention", "cpu", (size,), ("backward",), over, backward)] if backward else [])


LARGE, SEED = ("enwik8", "nvidia-*", "long"), ("seed-training", "seed-evaluation")
GOALS = [
    Goal("rel_attention", "cuda", LARGE, ("backward",), ("eager",), 5),
    Goal("rel_attention", "cuda", LARGE, ("backward",), ("flex_attention",), 2),
    Goal("rel_attention", "cuda", LARGE, ("backward",), ("flash_without_positions",), 0.55),
    Goal("rel_attention", "cuda", SEED, ("backward",), ("eager",), 2),
    Goal("rel_attention", "cuda", SEED, ("backward",), ("flex_attention",), 1.2),
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
MOST_MEMORY = {("rel_attention", "cpu"): 3.0}
"""Peak memory over that of output and gradients."""
MOST_FOR_RESETS = 1.05
WITHOUT_GOALS = ("tiny",)
LEGEND = (
    "Other columns are times as multiples of the fused op's. The floor, in ms, is what operations and bytes take at "
    "the rates of torch's own large product and copy. Memory is the peak beyond what was there, in brackets over that "
    "of output and gradients."
)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def tables(results: list[Result]) -> Iterator[str]:
    """Of the harness's rows: a table for each op and device, and beneath it what could not be timed."""
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
        where: dict[tuple[str, str, str], list[str]] = {}
        for row in (row for rows in groups.values() for row in rows.values() if "cannot" in row):
            where.setdefault((_title(row["name"]), MODES[row["mode"]], row["cannot"]), []).append(row["size"])
        reasons = [f"- {name}, {mode} ({', '.join(sizes)}): {why}" for (name, mode, why), sizes in where.items()]
        yield "\n".join([*lines, *([""] if reasons else []), *reasons])


def _cells(rows: dict[str, Result], timed: list[str], device: str) -> list[str]:
    key = next(iter(rows.values()))
    times = {name: row["milliseconds"] for name, row in rows.items() if "milliseconds" in row}
    shape = ", ".join(f"{name} {size}" for name, size in key["shape"].items())
    fused, ours = rows.get("fused", {}), times.get("fused")

    def ratio(time: float | None) -> str:
        if time is None:
            return ""
        return f"{time / ours:.2f}" if ours else f"{time:.4g} ms"

    others = [time for name, time in times.items() if not name.startswith("fused") and "bound" not in rows[name]]
    cells = [f"{key['size']} ({shape})", MODES[key["mode"]], key["dtype"], f"{ours:.4g}" if ours else ""]
    if device == "cuda":
        cells.append(f"{fused['launched_milliseconds']:.4g}" if "launched_milliseconds" in fused else "")
    cells.append(f"{key['floor_milliseconds']:.3g}" if "floor_milliseconds" in key else "")
    cells += [ratio(times.get(name)) for name in timed]
    cells += [ratio(min(others, default=None)), _memory(fused)]
    verdicts = [verdict for goal in GOALS if (verdict := goal.verdict(key, rows, times))]
    verdicts += _limits(key, fused, times)
    return [*cells, "" if key["size"] in WITHOUT_GOALS else "; ".join(verdicts)]


def _memory(fused: Result) -> str:
    if fused.get("peak_bytes") is None:
        return ""
    peak = f"{fused['peak_bytes'] / 2**20:.3g}"
    return f"{peak} ({fused['peak_bytes'] / fused['result_bytes']:.1f})" if fused.get("result_bytes") else peak


def _limits(key: Result, fused: Result, times: dict[str, float]) -> Iterator[str]:
    def verdict(what: str, found: float, most: float) -> str:
        return f"{what} ≤ {most:g}: {'passed' if found <= most else 'missed'} ({found:.2f})"

    most = MOST_MEMORY.get((key["op"], key["device"]))
    if most and fused.get("peak_bytes") is not None and key["shape"]["T"] > 1:
        yield verdict("memory", fused["peak_bytes"] / fused["result_bytes"], most)
    if key["device"] == "cuda" and "fused_with_resets" in times and "fused" in times:
        yield verdict("resets", times["fused_with_resets"] / times["fused"], MOST_FOR_RESETS)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def peers(contents: dict[str, Any]) -> str:
    """Tokens per second of whole models, and their peers' times as multiples of ours."""
    lines = [_line(["case", "what", "tokens/s", "time / ours", "goal"]), _line(["---"] * 5)]
    for result in contents["results"]:
        label = result["case"]
        for name, speed in result["tokens_per_second"].items():
            found = result["ratios"].get(name, {})
            goal = found.get("target")
            verdict = "" if goal is None else f"{goal:g}: {'passed' if found['median'] >= goal else 'missed'}"
            ratio = f"{found['median']:.2f}" if found else ""
            side, _, work = name.partition(".")
            lines.append(_line([f"`{label}`" if label else "", f"{side}, `{work}`", f"{speed:,.0f}", ratio, verdict]))
            label = ""
    return "\n".join(lines)


def end_to_end(contents: dict[str, Any]) -> str:
    """Whole recipes: speed, memory, utilisation, and where the time goes."""
    head = ["", "tokens/s", "time", "peak memory", "utilisation", "largest shares of the time"]
    lines = [_line(head), _line(["---"] * len(head))]
    for result in contents["results"]:
        for name, found in result["implementations"].items():
            largest = sorted(found["shares"].items(), key=lambda item: -item[1])[:4]
            lines.append(_line([
                f"{result['case']}, {name}", f"{found['tokens_per_second']:,.0f}", f"{found['times_pytbptt']:.2f}",
                f"{found['peak_bytes'] / 2**30:.1f} GiB", f"{found['model_flop_utilisation']:.0%}",
                ", ".join(f"{part} {share:.0%}" for part, share in largest if share >= 0.005),
            ]))  # fmt: skip
    return "\n".join(lines)


def heading(contents: dict[str, Any], path: str) -> str:
    """When, where, with what and how it was measured."""
    machine = contents["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']['torch']}"
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    if "gpu" in machine:
        where = f"one {machine['gpu']} (driver {machine.get('driver', 'unknown')})"
        versions += f", CUDA {machine.get('cuda')}, cuDNN {machine.get('cudnn')}"
    timed = sorted({result["timed"] for result in contents["results"] if "timed" in result})
    by = f", timed by {' and '.join(timed)}" if timed else ""
    return f"{contents['date']}, {where}, {versions}, commit {machine['commit']}: `{contents['command']}` ({path}){by}."


def render(path: str, keep: dict[str, set[str]]) -> str:
    """A file's heading and tables, of the harness's rows those whose values are among `keep`'s.

    Raises:
        InputError: a file that is none of ours.
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
        raise record.broken(path, error) from None


def render_marked(what: str) -> str:
    """The tables of what a mark names."""
    paths = [word for word in what.split() if "=" not in word]
    keep = {key: set(values.split(",")) for key, _, values in (w.partition("=") for w in what.split() if "=" in w)}
    return "\n\n".join(render(path, keep) for path in paths)


def rewritten(page: str) -> str:
    """A page's text with its tables made anew."""
    return MARK.sub(lambda found: f"{found[1]}\n{render_marked(found['what'])}\n\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--print", nargs="+", metavar="FILE", dest="files", help="print these files' tables instead")
    files = parser.parse_args().files
    try:
        if files:
            print("\n\n".join([LEGEND, *(render(str(Path(file).absolute()), {}) for file in files)]))
            return
        for page in PAGES:
            (record.ROOT / page).write_text(rewritten((record.ROOT / page).read_text()))
        for picture, (draw, paths) in PICTURES.items():
            pictures.draw(draw, paths, record.ROOT / picture)
    except InputError as error:
        raise SystemExit(f"python -m benchmarks.report: {error}") from None


if __name__ == "__main__":
    main()
