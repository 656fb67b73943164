"""Times pytbptt's Transformer-XL and transformers' TransfoXL in turn.

Each runs in its own process and environment, one at a time. In a round every implementation reads the same tokens once.
The ratio is the median over rounds of the ratio of times within a round, so that other load on the machine slows all of
them alike. CPU time is reported too.
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
    """Cases to measure."""
    rounds: int = 11
    """Timed runs of every implementation."""
    peer_python: str = "benchmarks/peers/.venv/bin/python"
    """The Python of the environment that `make bench-peers` creates, relative to the repository's root."""
    output: str = "benchmarks/results/peers.json"
    """File for the results, relative to the repository's root."""


def measure(case: Case, rounds: int, peer_python: str) -> dict[str, Any]:
    """Times and ratios of one case."""
    with Process(sys.executable, "ours", case) as ours, Process(peer_python, "theirs", case) as theirs:
        implementations = {f"ours.{work}": (ours, work) for work in case.ours}
        implementations |= {f"theirs.{work}": (theirs, work) for work in case.theirs}
        if ours.model_info["parameters"] != theirs.model_info["parameters"]:
            counts = f"{ours.model_info['parameters']} and {theirs.model_info['parameters']}"
            raise RunError(f"{case.name}: found {counts} parameters, expected the same model")
        seconds: dict[str, list[float]] = {name: [] for name in implementations}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in implementations}
        for process, work in implementations.values():
            process.run(work, case.warm_up)
        for _ in range(rounds):
            for name, (process, work) in implementations.items():
                answer = process.run(work, case.chunks)
                seconds[name].append(answer["seconds"])
                cpu_seconds[name].append(answer["cpu_seconds"])
        versions = {"ours": ours.model_info["versions"], "theirs": theirs.model_info["versions"]}
        threads = {"ours": ours.model_info["threads"], "theirs": theirs.model_info["threads"]}

    baseline = f"ours.{case.ours[0]}"

    def ratio(name: str) -> dict[str, Any]:
        def by_round(times: dict[str, list[float]]) -> list[float]:
            return [theirs / ours for ours, theirs in zip(times[baseline], times[name], strict=True)]

        rounds, target = by_round(seconds), case.theirs.get(name.removeprefix("theirs."))
        median = statistics.median(rounds)
        return {
            "median": median,
            "processor_median": statistics.median(by_round(cpu_seconds)),
            "target": target,
            "met": target is None or median >= target,
            "quartiles": record.quartiles(rounds),
        }

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "case": case.name,
        "summary": case.summary,
        "parameters": ours.model_info["parameters"],
        "versions": versions,
        "threads": threads,
        "tokens_per_turn": case.tokens_per_turn,
        "tokens_per_second": {name: case.tokens_per_turn / median for name, median in medians.items()},
        "median_seconds": medians,
        "quartile_seconds": {name: record.quartiles(times) for name, times in seconds.items()},
        "ratios": {name: ratio(name) for name in implementations if name != baseline},
    }


def report(result: dict[str, Any]) -> None:
    """Prints one case's medians and ratios."""
    print(f"{result['case']}: {result['summary']}; {result['parameters']:,} parameters")
    for name, median in result["median_seconds"].items():
        speed = result["tokens_per_second"][name]
        line = f"  {name:<20} {median * 1e3:8.0f} ms per run {speed:10,.0f} tokens/s"
        if ratio := result["ratios"].get(name):
            target = f" (target {ratio['target']}: {'met' if ratio['met'] else 'MISSED'})" if ratio["target"] else ""
            line += f"   {ratio['median']:5.2f} times the first{target}, {ratio['processor_median']:.2f} in CPU time"
        print(line)


def peers(settings: PeersSettings) -> None:
    python = record.ROOT / settings.peer_python
    if not python.exists():
        raise InputError(f"--peer-python: found no {settings.peer_python}, expected it from `make bench-peers`")
    if settings.rounds < 1:
        raise InputError(f"--rounds: found {settings.rounds}, expected at least 1")
    machine = record.describe_machine()
    results = []
    for name in settings.cases:
        results.append(measure(CASES[name], settings.rounds, str(python)))
        report(results[-1])
    record.write_program_results(settings.output, "peers", machine, results)


if __name__ == "__main__":
    run("python -m benchmarks.peers", PeersSettings, peers, __doc__)
