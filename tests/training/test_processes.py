"""Several processes train, validate and evaluate as one does."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pytbptt.checkpoint import LAST
from pytbptt.training.logging import METRICS, read_metrics

SETTINGS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2 --dropout 0 --dropouth 0 --dropouti 0 "
    "--dropoute 0 --weight-drop 0 --bptt-variation awd --cutoffs 20 40",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 9 "
    "--dropout 0 --cutoffs 20 40",
}
COMMON = (
    "--tokens-per-sample 8 --max-update 50 --lr 0.003 --clip-norm 0.25 --log-interval 10 --batch-size-valid 3 "
    "--validate-interval-updates 25 --log-format json --device cpu"
)


def run_together(count: int, arguments: Sequence[str], timeout: float = 200) -> list[str]:
    """What each of `count` processes prints; all are killed if one fails, or if they take longer than `timeout`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=timeout) for process in job]
    finally:
        for process in job:
            process.kill()
    for process, (_, errors) in zip(job, printed, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in printed]


@pytest.mark.parametrize("arch", SETTINGS)
def test_two_processes_two_groups_and_twice_the_batch_train_the_same(
    corpus: str, tmp_path: Path, program: Callable[..., subprocess.CompletedProcess[str]], arch: str
) -> None:
    """To the error of summing float32 in another order over 50 updates of Adam."""

    def arguments(save_dir: str, sizes: str) -> list[str]:
        return f"pytbptt.train {corpus} {SETTINGS[arch]} {COMMON} {sizes} --save-dir {tmp_path / save_dir}".split()

    outputs = run_together(2, arguments("processes", "--batch-size 3"))
    assert outputs[0]
    assert outputs[1] == ""  # the first process speaks for all
    run_together(1, arguments("groups", "--batch-size 3 --update-freq 2"))
    run_together(1, arguments("batch", "--batch-size 6"))

    expected = torch.load(tmp_path / "batch" / LAST, weights_only=True)
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "batch" / METRICS)]
    for other in ("processes", "groups"):
        found = torch.load(tmp_path / other / LAST, weights_only=True)
        torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=2e-4)
        torch.testing.assert_close(found["memory"], expected["memory"], rtol=0, atol=2e-4)
        assert found["progress"]["tokens"] == expected["progress"]["tokens"]
        entries = read_metrics(tmp_path / other / METRICS)
        assert [entry["loss"] for entry in entries] == pytest.approx(losses, abs=1e-4)
    assert len(losses) == 5 + 2

    evaluation = f"pytbptt.eval {corpus} --path {tmp_path / 'batch' / LAST} --batch-size 5 --device cpu".split()
    shared, alone = run_together(2, evaluation)[0], run_together(1, evaluation)[0]
    assert "Loss (base 2)" in alone
    assert shared.splitlines()[-1] == alone.splitlines()[-1]
