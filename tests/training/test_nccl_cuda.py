"""On a GPU: gradients exchanged by NCCL, as far as one GPU can show it: a job of one process."""

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

from pytbptt.checkpoint import LAST
from pytbptt.checkpoint.writer import LOCK
from tests.training.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

UPDATES = 600  # more than a GPU makes before it is killed
SETTINGS = (
    "--arch transformer_xl --d-model 64 --n-head 2 --d-head 32 --d-inner 96 --n-layer 2 --mem-len 24 --cutoffs 40 120 "
    "--batch-size 8 --tokens-per-sample 24 --lr 0.001 --save-interval-updates 20 --log-interval 100 "
    f"--fp16 --deterministic --max-update {UPDATES}"
)
LIMIT = 120  # seconds of one run


def start(data: Path, save_dir: Path, hook: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    program = ["-m", "pytbptt.train", str(data), *SETTINGS.split()]
    chosen = ["--ddp-comm-hook", hook, "--save-dir", str(save_dir), "--device", "cuda"]
    environment = os.environ | {"PYTBPTT_FORCE_DDP": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.Popen(
        [*torchrun, *program, *chosen],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    printed, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, printed
    return printed


@pytest.mark.parametrize("hook", ["none", "fp16"])
def test_a_killed_job_of_one_process_resumes_to_the_bit(tmp_path: Path, hook: str) -> None:
    write_zipf_corpus(tmp_path, 300, 8 * (24 * 15 + 7) + 1)
    printed = finish(start(tmp_path, tmp_path / "whole", hook))
    assert "processes exchange gradients" in printed  # so DistributedDataParallel was there

    killed, deadline = start(tmp_path, tmp_path / "killed", hook), time.monotonic() + LIMIT
    while not (tmp_path / "killed" / LAST).exists():
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    os.kill(int((tmp_path / "killed" / LOCK).read_text()), signal.SIGKILL)  # the process itself; torchrun sees it die
    killed.communicate(timeout=LIMIT)
    checkpoint = torch.load(tmp_path / "killed" / LAST, weights_only=True)
    assert checkpoint["progress"]["update"] < UPDATES
    finish(start(tmp_path, tmp_path / "killed", hook))

    found, expected = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("killed", "whole"))
    for name, weight in expected["model"].items():
        assert torch.equal(found["model"][name], weight), name
