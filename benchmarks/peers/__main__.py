"""Time pytbptt's Transformer-XL beside transformers' TransfoXL, turn by turn.

Each side is a process of its own, in an environment of its own, and only one of them works at a time. A round gives
every implementation one turn over the same tokens; the ratio is the median over rounds of their times within the round,
so that what else the machine does slows all alike. Processor time is reported too.
"""

import statistics
import sys
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import record
from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.process import Process
from pytbptt.errors import InputError, RunError
from pytbptt.runtime.cli import run


@dataclass
class PeersSettings:
    cases: tuple[Literal["evaluation", "training-small", "training-long"], ...] = tuple(CASES)  # type: ignore[assignment]
    """What to measure."""
    rounds: int = 11
    """Turns of every implementation."""
    peer_python: str = "benchmarks/peers/.venv/bin/python"
    """The interpreter of the peers' environment, seen from the repository's root; `make bench-peers` makes it."""
    output: str = "benchmarks/results/peers.json"
    """Where the results go, seen from there too."""


def measure(case: Case, rounds: int, peer_python: str) -> dict[str, Any]:
    """Both sides' times and the ratios of one case."""
    with Process(sys.executable, "ours", case) as ours, Process(peer_python, "theirs", case) as theirs:
        implementations = {f"ours.{work}": (ours, work) for work in case.ours}
        implementations |= {f"theirs.{work}": (theirs, work) for work in case.theirs}
        if ours.made["parameters"] != theirs.made["parameters"]:
            found = f"{ours.made['parameters']} and {theirs.made['parameters']}"
            raise RunError(f"{case.name}: found {found} parameters, expected the same model on both sides")
        seconds: dict[str, list[float]] = {name: [] for name in implementations}
        processor_seconds: dict[str, list[float]] = {name: [] for name in implementations}
        for process, work in implementations.values():
            process.run(work, case.warm_up)
        for _ in range(rounds):
            for name, (process, work) in implementations.items():
                answer = process.run(work, case.chunks)
                seconds[name].append(answer["seconds"])
                processor_seconds[name].append(answer["processor_seconds"])
        versions = {"ours": ours.made["versions"], "theirs": theirs.made["versions"]}
        threads = {"ours": ours.made["threads"], "theirs": theirs.made["threads"]}

    compared = f"ours.{case.ours[0]}"

    def ratio(name: str) -> dict[str, Any]:
        def by_round(times: dict[str, list[float]]) -> list[float]:
            return [theirs / ours for ours, theirs in zip(times[compared], times[name], strict=True)]

        rounds, target = by_round(seconds), case.theirs.get(name.removeprefix("theirs."))
        median = statistics.median(rounds)
        return {
            "median": median,
            "processor_median": statistics.median(by_round(processor_seconds)),
            "target": target,
            "met": target is None or median >= target,
            "quartiles": record.quartiles(rounds),
        }

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "case": case.name,
        "summary": case.summary,
        "parameters": ours.made["parameters"],
        "versions": versions,
        "threads": threads,
        "tokens_per_turn": case.tokens_per_turn,
        "tokens_per_second": {name: case.tokens_per_turn / median for name, median in medians.items()},
        "median_seconds": medians,
        "quartile_seconds": {name: record.quartiles(times) for name, times in seconds.items()},
        "ratios": {name: ratio(name) for name in implementations if name != compared},
    }


def report(result: dict[str, Any]) -> None:
    """Print one case's medians and ratios."""
    print(f"{result['case']}: {result['summary']}; {result['parameters']:,} parameters")
    for name, median in result["median_seconds"].items():
        speed = result["tokens_per_second"][name]
        line = f"  {name:<20} {median * 1e3:8.0f} ms a turn {speed:10,.0f} tokens/s"
        if ratio := result["ratios"].get(name):
            aim = f" (aim {ratio['target']}: {'met' if ratio['met'] else 'MISSED'})" if ratio["target"] else ""
            line += f"   {ratio['median']:5.2f} times the first{aim}, {ratio['processor_median']:.2f} in processor time"
        print(line)


def peers(settings: PeersSettings) -> None:
    python = record.ROOT / settings.peer_python
    if not python.exists():
        raise InputError(f"--peer-python: found no {settings.peer_python}, expected it from `make bench-peers`")
    if settings.rounds < 1:
        raise InputError(f"--rounds: found {settings.rounds}, expected at least 1")
    machine = record.describe()
    results = []
    for name in settings.cases:
        results.append(measure(CASES[name], settings.rounds, str(python)))
        report(results[-1])
    record.write_own(settings.output, "peers", machine, results)


if __name__ == "__main__":
    run("python -m benchmarks.peers", PeersSettings, peers, __doc__)
