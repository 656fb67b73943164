"""On a GPU: DistributedDataParallel with NCCL resumes bitwise. One rank, because one GPU is enough for that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from pytbptt.checkpoint import LAST_CHECKPOINT
from pytbptt.checkpoint.writer import LOCK
from tests.common.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

UPDATES = 600  # enough that the run is killed before its end
FLAGS = (
    "--arch transformer_xl --d-model 64 --n-head 2 --d-head 32 --d-inner 96 --n-layer 2 --mem-len 24 --cutoffs 40 120 "
    "--batch-size 8 --tokens-per-sample 24 --lr 0.001 --save-interval-updates 20 --log-interval 100 "
    f"--fp16 --deterministic --max-update {UPDATES}"
)
TIMEOUT = 120  # seconds for one run


def start(data: Path, save_dir: Path, hook: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    program = ["-m", "pytbptt.train", str(data), *FLAGS.split()]
    flags = ["--ddp-comm-hook", hook, "--save-dir", str(save_dir), "--device", "cuda"]
    environment = os.environ | {"PYTBPTT_FORCE_DDP": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.Popen(
        [*torchrun, *program, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0, output
    return output


@pytest.mark.parametrize("hook", ["none", "fp16"])
def test_killed_job_resumes_bitwise_equal(tmp_path: Path, hook: str) -> None:
    write_zipf_corpus(tmp_path, 300, 8 * (24 * 15 + 7) + 1)
    output = finish(start(tmp_path, tmp_path / "uninterrupted", hook))
    assert "processes exchange gradients" in output  # shows that DistributedDataParallel was used

    killed, deadline = start(tmp_path, tmp_path / "killed", hook), time.monotonic() + TIMEOUT
    while not (tmp_path / "killed" / LAST_CHECKPOINT).exists():
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint was saved"
        time.sleep(0.01)
    os.kill(int((tmp_path / "killed" / LOCK).read_text()), signal.SIGKILL)  # rank 0 itself; torchrun notices its end
    killed.communicate(timeout=TIMEOUT)
    checkpoint = torch.load(tmp_path / "killed" / LAST_CHECKPOINT, weights_only=True)
    assert checkpoint["progress"]["update"] < UPDATES
    finish(start(tmp_path, tmp_path / "killed", hook))

    actual, expected = (
        torch.load(tmp_path / name / LAST_CHECKPOINT, weights_only=True) for name in ("killed", "uninterrupted")
    )
    for name, weight in expected["model"].items():
        assert torch.equal(actual["model"][name], weight), name
