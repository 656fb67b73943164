"""Data-parallel training, validation, resuming and evaluation give the results of a single process."""

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

from pytbptt.checkpoint import LAST_CHECKPOINT
from pytbptt.checkpoint.writer import LOCK
from pytbptt.training.metrics_log import METRICS_FILE, read_metrics
from tests.common.subprocesses import run_ranks, start_ranks

MODEL_FLAGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --dropout 0 --dropouth 0 --dropouti 0 "
    "--dropoute 0 --weight-drop 0 --bptt-variation awd --cutoffs 20 46 --reset-on </s>",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0 --cutoffs 20 46 --div-val 2",
}
COMMON_FLAGS = (
    "--tokens-per-sample 6 --max-update 50 --lr 0.003 --clip-norm 0.25 --log-interval 10 --batch-size-valid 3 "
    "--validate-interval-updates 25 --log-format json --device cpu"
)


def train_arguments(corpus: str, arch: str, save_dir: Path, flags: str) -> list[str]:
    return f"{corpus} {MODEL_FLAGS[arch]} {COMMON_FLAGS} {flags} --save-dir {save_dir}".split()


def load_run(save_dir: Path) -> tuple[dict[str, Any], list[float]]:
    losses = [entry["loss"] for entry in read_metrics(save_dir / METRICS_FILE)]
    return torch.load(save_dir / LAST_CHECKPOINT, weights_only=True), losses


def assert_runs_close(actual: Path, expected: Path, tolerance: float) -> None:
    (checkpoint, losses), (expected_checkpoint, expected_losses) = load_run(actual), load_run(expected)
    for part in ("model", "memory"):
        torch.testing.assert_close(checkpoint[part], expected_checkpoint[part], rtol=0, atol=tolerance)
    assert losses == pytest.approx(expected_losses, abs=tolerance)
    assert checkpoint["progress"]["tokens"] == expected_checkpoint["progress"]["tokens"]


@pytest.mark.parametrize("arch", MODEL_FLAGS)
def test_layouts_give_same_result(corpus: str, tmp_path: Path, arch: str) -> None:
    """In float64, so that only the order of summation can make a difference, and with so few rows that most processes
    have no word of the adaptive softmax's last tail in a chunk."""
    layouts = {
        "batch": (1, "--batch-size 4"),
        "groups": (1, "--batch-size 1 --update-freq 4"),
        "two": (2, "--batch-size 1 --update-freq 2"),
        "four": (4, "--batch-size 1"),
    }
    for name, (world_size, flags) in layouts.items():
        arguments = train_arguments(corpus, arch, tmp_path / name, flags)
        outputs = run_ranks("train", world_size, *arguments, dtype=torch.float64)
        assert outputs[0]
        assert not any(outputs[1:])  # only rank 0 prints
    assert len(load_run(tmp_path / "batch")[1]) == 5 + 2
    for name in layouts:
        assert_runs_close(tmp_path / name, tmp_path / "batch", 1e-10)

    eval_arguments = f"{corpus} --path {tmp_path / 'batch' / LAST_CHECKPOINT} --batch-size 5 --device cpu".split()
    two_ranks, one_rank = (run_ranks("eval", world_size, *eval_arguments)[0] for world_size in (2, 1))
    assert "Loss (base 2)" in one_rank
    assert two_ranks.splitlines()[-1] == one_rank.splitlines()[-1]


@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        ("awd_lstm", "--bptt-backward 15"),
        ("transformer_xl", "--bptt-chunks 2"),
        ("transformer_xl", "--bptt-adaptive --bptt-backward 24 --bptt-tolerance 0.005 --bptt-interval 5"),
    ],
)
def test_bptt_variants_resume_in_another_layout(corpus: str, tmp_path: Path, arch: str, variant: str) -> None:
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    common = f"{variant} --lr-scheduler constant --max-update"
    layouts = ((single, 1, "4 --update-freq 1", 30), (sharded, 2, "2", 15), (sharded, 1, "1 --update-freq 4", 30))
    for folder, world_size, batch_size, updates in layouts:
        arguments = train_arguments(corpus, arch, folder, f"{common} {updates} --batch-size {batch_size}")
        run_ranks("train", world_size, *arguments, dtype=torch.float64)
    for part in ("model", "memory"):
        torch.testing.assert_close(load_run(sharded)[0][part], load_run(single)[0][part], rtol=0, atol=1e-10)
    assert load_run(sharded)[0]["progress"]["kept"] == load_run(single)[0]["progress"]["kept"]


@pytest.mark.parametrize("arch", MODEL_FLAGS)
def test_resume_in_another_layout_of_same_streams(corpus: str, tmp_path: Path, arch: str) -> None:
    """Every stream continues at its position, with its memory."""
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    run_ranks("train", 1, *train_arguments(corpus, arch, single, "--batch-size 4"), dtype=torch.float64)
    for world_size, flags, lines in ((2, "--batch-size 2", 1), (1, "--batch-size 1 --update-freq 4", 3)):
        arguments = train_arguments(corpus, arch, sharded, flags)
        ranks = start_ranks("train", [arguments] * world_size, dtype=torch.float64)
        ranks[0].wait_for_lines(sharded / METRICS_FILE, lines)
        for rank in ranks:
            rank.send(signal.SIGTERM)
        for ended in [rank.finish() for rank in ranks]:
            assert ended.returncode == 0, ended.stderr
    assert load_run(sharded)[0]["progress"]["update"] < 50
    arguments = train_arguments(corpus, arch, sharded, "--batch-size 1 --update-freq 2")
    run_ranks("train", 2, *arguments, dtype=torch.float64)
    assert_runs_close(sharded, single, 1e-10)


def test_bf16_comm_hook_changes_losses_little(corpus: str, tmp_path: Path) -> None:
    for hook in ("none", "bf16"):
        flags = f"--batch-size 2 --ddp-comm-hook {hook}"
        run_ranks("train", 2, *train_arguments(corpus, "transformer_xl", tmp_path / hook, flags))
    (exact, losses), (rounded, rounded_losses) = load_run(tmp_path / "none"), load_run(tmp_path / "bf16")
    assert rounded_losses == pytest.approx(losses, abs=0.02)
    assert any(not torch.equal(rounded["model"][key], value) for key, value in exact["model"].items())


@pytest.mark.fault
def test_ranks_with_different_flags_are_rejected(corpus: str, tmp_path: Path) -> None:
    arguments = train_arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size 2")
    ranks = start_ranks("train", [arguments, [*arguments, "--lr", "0.1"]])
    for ended in [rank.finish() for rank in ranks]:
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1] == (
            "python -m pytbptt.train: --lr: found 0.1 on rank 1, expected 0.003 as on rank 0"
        )


@pytest.mark.fault
def test_ranks_with_different_data_are_rejected(corpus: str, tmp_path: Path) -> None:
    """As two machines that have different files at the same path."""
    folders = tmp_path / "rank-0", tmp_path / "rank-1"
    for folder in folders:
        shutil.copytree(corpus, folder / "data-bin")
    shutil.copy(folders[1] / "data-bin" / "valid.bin", folders[1] / "data-bin" / "train.bin")
    shutil.copy(folders[1] / "data-bin" / "valid.idx", folders[1] / "data-bin" / "train.idx")
    arguments = train_arguments("data-bin", "awd_lstm", tmp_path / "run", "--batch-size 2")
    for ended in [rank.finish() for rank in start_ranks("train", [arguments] * 2, folders=folders)]:
        assert ended.returncode == 2, ended.stderr
        assert "data-bin/train: contents: found " in ended.stderr.splitlines()[-1]


@pytest.mark.fault
def test_stopped_rank_is_waited_for(corpus: str, tmp_path: Path) -> None:
    arguments = train_arguments(corpus, "awd_lstm", tmp_path / "stopped", "--batch-size 2")
    ranks = start_ranks("train", [arguments] * 2, dtype=torch.float64)
    for lines in (1, 3):
        ranks[0].wait_for_lines(tmp_path / "stopped" / METRICS_FILE, lines)
        ranks[1].send(signal.SIGSTOP)
        time.sleep(1)
        ranks[1].send(signal.SIGCONT)
    for ended in [rank.finish() for rank in ranks]:
        assert ended.returncode == 0, ended.stderr
    single = tmp_path / "single"
    run_ranks("train", 1, *train_arguments(corpus, "awd_lstm", single, "--batch-size 4"), dtype=torch.float64)
    assert_runs_close(tmp_path / "stopped", single, 1e-10)


@pytest.mark.fault
@pytest.mark.slow
def test_torchrun_restart_resumes(corpus: str, tmp_path: Path) -> None:
    """Even with --restart, which applies to the first start only."""
    run = tmp_path / "run"
    flags = "--batch-size 2 --save-interval-updates 10 --max-update 400 --restart"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "-m", "pytbptt.train", *train_arguments(corpus, "awd_lstm", run, flags)]
    with open(tmp_path / "errors", "w") as errors:
        job = subprocess.Popen(torchrun, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while job.poll() is None and not (run / LAST_CHECKPOINT).exists():
            time.sleep(0.01)
        os.kill(int((run / LOCK).read_text()), signal.SIGKILL)  # rank 0
        assert job.wait(timeout=200) == 0
    assert "resuming from update" in (tmp_path / "errors").read_text()
    checkpoint, losses = load_run(run)
    assert checkpoint["progress"]["update"] == 400
    assert len(losses) == 40 + 16  # each exactly once


@pytest.mark.fault
def test_killed_rank_ends_other_ranks_with_one_line_error(corpus: str, tmp_path: Path) -> None:
    arguments = train_arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size 2 --max-update 100000")
    ranks = start_ranks("train", [arguments] * 2)
    ranks[0].wait_for_lines(tmp_path / "run" / METRICS_FILE, 2)
    ranks[1].kill()
    ended = ranks[0].finish(timeout=30)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "python -m pytbptt.train: rank 0: peer process exited; its own message says why"
    )
