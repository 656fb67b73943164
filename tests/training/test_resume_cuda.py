"""On a GPU: a run in float16 that goes on is the run that nothing interrupted, its loss scaling included.

Needs nothing of the other tests' fixtures, so that `make gpu-test` runs it with what a bare GPU machine has.
"""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for the same bits in every run
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from pytbptt.training.config import read_command_line
from pytbptt.training.run import train
from tests.training.resumable import SETTINGS, arguments, assert_same_run
from tests.training.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)


@pytest.mark.parametrize("arch", SETTINGS)
def test_fp16_and_its_scaler_resume_to_the_bit(tmp_path: Path, arch: str) -> None:
    write_zipf_corpus(tmp_path, 100, 8 * (8 * 40 + 3) + 1)
    mixed = ("--device", "cuda", "--fp16", "--deterministic", "--lr-scheduler", "constant")
    for folder, *more in (("alone",), ("run", "--max-update", "40"), ("run",)):
        train(read_command_line(arguments(str(tmp_path), arch, tmp_path / folder, *mixed, *more)))
    assert_same_run(tmp_path / "run", tmp_path / "alone")
