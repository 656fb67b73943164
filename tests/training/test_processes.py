"""Several processes train, validate, resume and evaluate as one does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.checkpoint import LAST
from pytbptt.checkpoint.writer import LOCK
from pytbptt.training.metrics_log import METRICS, read_metrics
from tests.processes import run_job, start_job

SETTINGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --dropout 0 --dropouth 0 --dropouti 0 "
    "--dropoute 0 --weight-drop 0 --bptt-variation awd --cutoffs 20 46 --reset-on </s>",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0 --cutoffs 20 46 --div-val 2",
}
COMMON = (
    "--tokens-per-sample 6 --max-update 50 --lr 0.003 --clip-norm 0.25 --log-interval 10 --batch-size-valid 3 "
    "--validate-interval-updates 25 --log-format json --device cpu"
)


def arguments(corpus: str, arch: str, save_dir: Path, sizes: str) -> list[str]:
    return f"{corpus} {SETTINGS[arch]} {COMMON} {sizes} --save-dir {save_dir}".split()


def outcome(save_dir: Path) -> tuple[dict[str, Any], list[float]]:
    losses = [entry["loss"] for entry in read_metrics(save_dir / METRICS)]
    return torch.load(save_dir / LAST, weights_only=True), losses


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    (one, losses), (other, expected_losses) = outcome(found), outcome(expected)
    for part in ("model", "memory"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=tolerance)
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert one["progress"]["tokens"] == other["progress"]["tokens"]


@pytest.mark.parametrize("arch", SETTINGS)
def test_processes_groups_and_a_larger_batch_are_the_same(corpus: str, tmp_path: Path, arch: str) -> None:
    """In float64, where the order of summation is all that is left to differ, and with rows so few that most processes
    have no word of the last tail in a chunk."""
    layouts = {
        "batch": (1, "--batch-size 4"),
        "groups": (1, "--batch-size 1 --update-freq 4"),
        "two": (2, "--batch-size 1 --update-freq 2"),
        "four": (4, "--batch-size 1"),
    }
    for name, (count, sizes) in layouts.items():
        outputs = run_job("train", count, *arguments(corpus, arch, tmp_path / name, sizes), dtype=torch.float64)
        assert outputs[0]
        assert not any(outputs[1:])  # the first process speaks for all
    assert len(outcome(tmp_path / "batch")[1]) == 5 + 2
    for name in layouts:
        assert_same_run(tmp_path / name, tmp_path / "batch", 1e-10)

    evaluation = f"{corpus} --path {tmp_path / 'batch' / LAST} --batch-size 5 --device cpu".split()
    shared, alone = (run_job("eval", count, *evaluation)[0] for count in (2, 1))
    assert "Loss (base 2)" in alone
    assert shared.splitlines()[-1] == alone.splitlines()[-1]


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("awd_lstm", "--bptt-backward 15"),
        ("transformer_xl", "--bptt-chunks 2"),
        ("transformer_xl", "--bptt-adaptive --bptt-backward 24 --bptt-tolerance 0.005 --bptt-interval 5"),
    ],
)
def test_the_variants_of_truncation_are_the_same_in_every_layout_and_go_on_in_another(
    corpus: str, tmp_path: Path, arch: str, variant: str
) -> None:
    divided, whole = tmp_path / "divided", tmp_path / "whole"
    common = f"{variant} --lr-scheduler constant --max-update"
    layouts = ((whole, 1, "4 --update-freq 1", 30), (divided, 2, "2", 15), (divided, 1, "1 --update-freq 4", 30))
    for folder, count, sizes, updates in layouts:
        words = arguments(corpus, arch, folder, f"{common} {updates} --batch-size {sizes}")
        run_job("train", count, *words, dtype=torch.float64)
    for part in ("model", "memory"):
        torch.testing.assert_close(outcome(divided)[0][part], outcome(whole)[0][part], rtol=0, atol=1e-10)
    assert outcome(divided)[0]["progress"]["kept"] == outcome(whole)[0]["progress"]["kept"]


@pytest.mark.parametrize("arch", SETTINGS)
def test_a_run_goes_on_in_another_layout_of_the_same_streams(corpus: str, tmp_path: Path, arch: str) -> None:
    """Every stream from where it stood, with its own memory."""
    divided, whole = tmp_path / "divided", tmp_path / "whole"
    run_job("train", 1, *arguments(corpus, arch, whole, "--batch-size 4"), dtype=torch.float64)
    for count, sizes, lines in ((2, "--batch-size 2", 1), (1, "--batch-size 1 --update-freq 4", 3)):
        job = start_job("train", [arguments(corpus, arch, divided, sizes)] * count, dtype=torch.float64)
        job[0].wait_for_lines(divided / METRICS, lines)
        for program in job:
            program.send(signal.SIGTERM)
        for ended in [program.finish() for program in job]:
            assert ended.returncode == 0, ended.stderr
    assert outcome(divided)[0]["progress"]["update"] < 50
    run_job("train", 2, *arguments(corpus, arch, divided, "--batch-size 1 --update-freq 2"), dtype=torch.float64)
    assert_same_run(divided, whole, 1e-10)


def test_gradients_sent_in_16_bits_train_nearly_the_same(corpus: str, tmp_path: Path) -> None:
    for name in ("none", "bf16"):
        words = arguments(corpus, "transformer_xl", tmp_path / name, f"--batch-size 2 --ddp-comm-hook {name}")
        run_job("train", 2, *words)
    (exact, losses), (rounded, rounded_losses) = outcome(tmp_path / "none"), outcome(tmp_path / "bf16")
    assert rounded_losses == pytest.approx(losses, abs=0.02)
    assert any(not torch.equal(rounded["model"][key], value) for key, value in exact["model"].items())


@pytest.mark.fault
def test_processes_that_disagree_are_refused_at_the_start(corpus: str, tmp_path: Path) -> None:
    common = arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size 2")
    job = start_job("train", [common, [*common, "--lr", "0.1"]])
    for ended in [program.finish() for program in job]:
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1] == (
            "python -m pytbptt.train: --lr: found 0.1 on rank 1, expected 0.003 as on rank 0"
        )


@pytest.mark.fault
def test_processes_with_other_data_are_refused_at_the_start(corpus: str, tmp_path: Path) -> None:
    """The same path on two machines, say, with something else behind it."""
    folders = tmp_path / "here", tmp_path / "there"
    for folder in folders:
        shutil.copytree(corpus, folder / "data-bin")
    shutil.copy(folders[1] / "data-bin" / "valid.bin", folders[1] / "data-bin" / "train.bin")
    shutil.copy(folders[1] / "data-bin" / "valid.idx", folders[1] / "data-bin" / "train.idx")
    words = arguments("data-bin", "awd_lstm", tmp_path / "run", "--batch-size 2")
    for ended in [program.finish() for program in start_job("train", [words] * 2, folders=folders)]:
        assert ended.returncode == 2, ended.stderr
        assert "data-bin/train: contents: found " in ended.stderr.splitlines()[-1]


@pytest.mark.fault
def test_a_slow_process_is_waited_for(corpus: str, tmp_path: Path) -> None:
    words = arguments(corpus, "awd_lstm", tmp_path / "slow", "--batch-size 2")
    job = start_job("train", [words] * 2, dtype=torch.float64)
    for lines in (1, 3):
        job[0].wait_for_lines(tmp_path / "slow" / METRICS, lines)
        job[1].send(signal.SIGSTOP)
        time.sleep(1)
        job[1].send(signal.SIGCONT)
    for ended in [program.finish() for program in job]:
        assert ended.returncode == 0, ended.stderr
    run_job("train", 1, *arguments(corpus, "awd_lstm", tmp_path / "alone", "--batch-size 4"), dtype=torch.float64)
    assert_same_run(tmp_path / "slow", tmp_path / "alone", 1e-10)


@pytest.mark.fault
@pytest.mark.slow
def test_torchrun_begins_again_from_the_last_checkpoint(corpus: str, tmp_path: Path) -> None:
    """Even with --restart in its command."""
    run = tmp_path / "run"
    words = arguments(corpus, "awd_lstm", run, "--batch-size 2 --save-interval-updates 10 --max-update 400 --restart")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "-m", "pytbptt.train", *words]
    with open(tmp_path / "errors", "w") as errors:
        job = subprocess.Popen(torchrun, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while job.poll() is None and not (run / LAST).exists():
            time.sleep(0.01)
        os.kill(int((run / LOCK).read_text()), signal.SIGKILL)  # the first process
        assert job.wait(timeout=200) == 0
    assert "resuming from update" in (tmp_path / "errors").read_text()
    checkpoint, losses = outcome(run)
    assert checkpoint["progress"]["update"] == 400
    assert len(losses) == 40 + 16  # none missing, none twice


@pytest.mark.fault
def test_a_process_that_dies_ends_the_others_with_one_line(corpus: str, tmp_path: Path) -> None:
    words = arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size 2")
    job = start_job("train", [[*words, "--max-update", "100000"]] * 2)
    job[0].wait_for_lines(tmp_path / "run" / METRICS, 2)
    job[1].kill()
    ended = job[0].finish(timeout=30)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "python -m pytbptt.train: rank 0: peer process exited; its own message says why"
    )
