"""On a GPU: a run in float16 resumes bitwise equal to an uninterrupted one, its gradient scaler included.

Uses no fixtures of conftest.py, so that `make gpu-test` can run it on a machine with few packages (--noconftest).
"""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from pytbptt.training.config import read_command_line
from pytbptt.training.run import train
from tests.common.resume_runs import MODEL_FLAGS, assert_runs_equal, train_arguments
from tests.common.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)


@pytest.mark.parametrize("arch", MODEL_FLAGS)
def test_fp16_run_and_grad_scaler_resume_bitwise_equal(tmp_path: Path, arch: str) -> None:
    write_zipf_corpus(tmp_path, 100, 8 * (8 * 40 + 3) + 1)
    flags = ("--device", "cuda", "--fp16", "--deterministic", "--lr-scheduler", "constant")
    for folder, *extra in (("uninterrupted",), ("resumed", "--max-update", "40"), ("resumed",)):
        train(read_command_line(train_arguments(str(tmp_path), arch, tmp_path / folder, *flags, *extra)))
    assert_runs_equal(tmp_path / "resumed", tmp_path / "uninterrupted")
