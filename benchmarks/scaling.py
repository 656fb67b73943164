"""Training speed of one and two processes on a CPU, and the bytes that they send per update."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from pytbptt.errors import InputError, RunError
from pytbptt.runtime.cli import run

STREAMS = 16
INTERVAL = 5  # updates
MODELS = {
    "awd_lstm": "--arch awd_lstm --tokens-per-sample 64 --d-embed 128 --d-hidden 512 --n-layer 1 --dropout 0 "
    "--dropouth 0 --dropouti 0 --dropoute 0 --weight-drop 0 --alpha 0 --beta 0 --no-tie-weights",
    "transformer_xl": "--arch transformer_xl --tokens-per-sample 128 --mem-len 128 --d-model 256 --n-layer 6 "
    "--n-head 4 --d-head 64 --d-inner 1024 --dropout 0.1",
}
LAYOUTS = {
    "1 process, 1 thread": (1, 1, "none"),
    "1 process, 2 threads": (1, 2, "none"),
    "2 processes, 1 thread each": (2, 1, "none"),
    "2 processes, sending bf16": (2, 1, "bf16"),
}
COMMON = "python-stdlib --preset python-stdlib --no-test --sample-tokens 0 --log-format json --device cpu --lr 0.001"


@dataclass
class ScalingSettings:
    updates: int = 40
    """Updates per run, of which the first are not timed."""
    rounds: int = 3
    """Runs of every layout."""
    output: str = "benchmarks/results/scaling.json"
    """File for the results, relative to the repository's root."""


def train(model: str, processes: int, threads: int, hook: str, updates: int) -> tuple[float, float]:
    """Tokens per second of all processes together, and megabytes sent over the loopback interface per update."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        distributed = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
        free.close()
        words = (
            f"-m pytbptt.train {COMMON} {MODELS[model]} --batch-size {STREAMS // processes} --max-update {updates + 1} "
            f"--ddp-comm-hook {hook}"
        )
        words += f" --log-interval {INTERVAL} --save-interval-updates 0 --validate-interval-updates 1000000"
        running = [
            subprocess.Popen(
                [sys.executable, *words.split(), "--save-dir", folder],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={
                    **os.environ,
                    **distributed,
                    "RANK": str(n),
                    "LOCAL_RANK": str(n),
                    "OMP_NUM_THREADS": str(threads),
                },
            )
            for n in range(processes)
        ]
        try:
            log = _read_log(Path(folder) / "metrics.jsonl", updates // INTERVAL, running[0])
        finally:
            for process in running:
                process.kill()
                process.wait()
    speeds = [entry["tokens_per_second"] for entry, _ in log[1:]]
    sent = (log[-1][1] - log[0][1]) / (log[-1][0]["step"] - log[0][0]["step"])
    return statistics.median(speeds), sent / 1e6


def _read_log(metrics: Path, entries: int, process: subprocess.Popen[bytes]) -> list[tuple[dict[str, Any], int]]:
    """Waits for the log's entries; returns each with the bytes that the loopback interface had sent by then."""
    log: list[tuple[dict[str, Any], int]] = []
    while len(log) < entries:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        log += [(json.loads(line), _loopback_bytes()) for line in lines[len(log) : entries]]
        if process.poll() not in (None, 0):
            raise RunError(f"a training process failed with status {process.returncode}")
        time.sleep(0.002)
    return log


def _loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def measure(settings: ScalingSettings) -> None:
    if settings.updates < 3 * INTERVAL or settings.rounds < 1:
        raise InputError(f"--updates and --rounds: expected at least {3 * INTERVAL} and 1")
    machine, results = record.describe_machine(), []
    for model in MODELS:
        runs = [
            {name: train(model, *layout, settings.updates) for name, layout in LAYOUTS.items()}
            for _ in range(settings.rounds)
        ]
        for name, (processes, threads, hook) in LAYOUTS.items():
            baseline = [by_layout["1 process, 1 thread"][0] for by_layout in runs]
            speeds, sent = zip(*(by_layout[name] for by_layout in runs), strict=True)
            ratio = statistics.median(speed / base for speed, base in zip(speeds, baseline, strict=True))
            results.append(
                {
                    "model": model,
                    "processes": processes,
                    "threads": threads,
                    "ddp_comm_hook": hook,
                    "tokens_per_second": statistics.median(speeds),
                    "ratio_to_one_thread": ratio,
                    "megabytes_sent_per_update": statistics.median(sent),
                }
            )
            print(
                f"{model:<15} {name:<27} {statistics.median(speeds):9,.0f} tokens/s, {ratio:5.2f} times one thread, "
                f"{statistics.median(sent):7.2f} MB sent per update"
            )
    record.write_program_results(settings.output, "scaling", machine, results)


if __name__ == "__main__":
    run("python -m benchmarks.scaling", ScalingSettings, measure, __doc__)
