"""Training when processes are killed, disks fill up, files change or memory runs out: checkpoints stay valid."""

import os
import random
import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from pytbptt.checkpoint import LAST_CHECKPOINT, read
from pytbptt.checkpoint.writer import LOCK
from pytbptt.errors import InputError, RunError
from pytbptt.training.config import read_command_line
from pytbptt.training.metrics_log import METRICS_FILE, read_metrics
from pytbptt.training.run import train
from pytbptt.training.trainer import Trainer
from tests.common.resume_runs import assert_runs_equal, train_arguments
from tests.common.subprocesses import start_program

pytestmark = pytest.mark.fault


def is_locked_by(save_dir: Path, pid: int | None) -> bool:
    return (save_dir / LOCK).exists() and (save_dir / LOCK).read_text() == str(pid)


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["awd_lstm", "transformer_xl"])
def test_random_kills_do_not_change_result(
    corpus: str, tmp_path: Path, uninterrupted_run: Callable[..., Path], arch: str, kills: int
) -> None:
    """Some kills fall into a save, because every second update saves. The first kill comes after the first metrics
    entry, each later one after a random time of up to 1.5 times as long.
    """
    rng, save_dir = random.Random(kills), tmp_path / "killed"
    flags = ("--save-interval-updates", "2")
    arguments = train_arguments(corpus, arch, save_dir, *flags)
    seconds_to_entry = 0.0
    for _ in range(kills):
        program = start_program("train", *arguments)
        while program.process.is_alive() and not is_locked_by(save_dir, program.process.pid):
            time.sleep(0.001)
        start = time.monotonic()
        if not seconds_to_entry:
            metrics = save_dir / METRICS_FILE
            while program.process.is_alive() and not (metrics.exists() and read_metrics(metrics)):
                time.sleep(0.01)
            seconds_to_entry = time.monotonic() - start
        else:
            program.process.join(rng.uniform(0.0, 1.5 * seconds_to_entry))
        program.kill()
    train(read_command_line(arguments))
    assert_runs_equal(save_dir, uninterrupted_run(arch, *flags))


def test_full_disk_keeps_last_checkpoint(corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(read_command_line(train_arguments(corpus, "awd_lstm", folder, "--max-update", "10")))
    limit = (folder / LAST_CHECKPOINT).stat().st_size // 2
    ended = start_program("train", *train_arguments(corpus, "awd_lstm", folder), max_file_bytes=limit).finish()
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"python -m pytbptt.train: could not save {folder / LAST_CHECKPOINT}: File too large; "
        f"the previous checkpoint is intact: {folder / LAST_CHECKPOINT}"
    )
    assert torch.load(folder / LAST_CHECKPOINT, weights_only=True)["progress"]["update"] == 10


def test_unwritable_save_dir_raises_before_training(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # root may write everywhere: pretend not to be root
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="no permission to write"):
        train(read_command_line(train_arguments(corpus, "awd_lstm", tmp_path)))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_last_checkpoint_falls_back_to_previous(
    corpus: str,
    tmp_path: Path,
    uninterrupted_run: Callable[..., Path],
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, constant = tmp_path / "run", ("--lr-scheduler", "constant")  # other schedules depend on --max-update
    train(read_command_line(train_arguments(corpus, "transformer_xl", folder, *constant, "--max-update", "33")))
    content = bytearray((folder / LAST_CHECKPOINT).read_bytes())
    if damage == "truncated":
        del content[-len(content) // 3 :]
    else:
        content[len(content) // 3] ^= 1
    (folder / LAST_CHECKPOINT).write_bytes(content)
    capsys.readouterr()
    train(read_command_line(train_arguments(corpus, "transformer_xl", folder, *constant)))
    stderr = capsys.readouterr().err
    assert f"falling back to {folder / 'checkpoint_30.pt'}" in stderr
    assert f"resuming from update 30 in {folder}" in stderr
    assert_runs_equal(folder, uninterrupted_run("transformer_xl", *constant))


def test_mtime_change_of_data_is_ignored(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Trainer.updates

    def touch_after_three(trainer: Trainer):  # type: ignore[no-untyped-def]
        chunks = updates(trainer)
        yield from islice(chunks, 3)
        os.utime(data / "train.bin", (1, 1))
        yield from chunks

    data = tmp_path / "data-bin"
    shutil.copytree(corpus, data)
    monkeypatch.setattr(Trainer, "updates", touch_after_three)
    train(read_command_line(train_arguments(str(data), "awd_lstm", tmp_path / "run", "--max-update", "6")))
    assert read(tmp_path / "run" / LAST_CHECKPOINT)["progress"]["update"] == 6


def test_truncated_data_file_stops_training(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data-bin"
    data.mkdir()
    for path in Path(corpus).iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    updates = Trainer.updates

    def truncate_after_three(trainer: Trainer):  # type: ignore[no-untyped-def]
        chunks = updates(trainer)
        yield from islice(chunks, 3)
        os.truncate(data / "train.bin", 100)
        yield from chunks

    monkeypatch.setattr(Trainer, "updates", truncate_after_three)
    arguments = train_arguments(str(data), "awd_lstm", tmp_path / "run", "--max-epoch", "5")
    with pytest.raises(RunError, match=r"train\.bin: found it changed since it was opened"):
        train(read_command_line(arguments))


def test_out_of_memory_suggests_smaller_batch(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "update", out_of_memory)
    with pytest.raises(RunError) as error:
        train(read_command_line(train_arguments(corpus, "awd_lstm", tmp_path / "run", "--batch-size", "9")))
    assert str(error.value) == (
        "out of memory: --batch-size 9 x --tokens-per-sample 8 did not fit: --batch-size 3 --update-freq 6 computes "
        "the same with 1/3 of the activations; the last checkpoint is intact"
    )
