"""On a GPU: updates and evaluation in CUDA graphs equal eager ones bitwise, and neither synchronises with the host.

Uses no fixtures of conftest.py, so that `make gpu-test` can run it on a machine with few packages (--noconftest).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from pytbptt.data import evaluation_chunks, load
from pytbptt.evaluation.scoring import Scorer
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import read_command_line
from pytbptt.training.trainer import Trainer
from tests.common.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

WORDS = 304  # all sizes are multiples of 8; others would be padded in graphs only, and results would differ
SIZES = {
    "awd_lstm": "--d-embed 64 --d-hidden 136 --n-layer 2".split(),
    "transformer_xl": "--d-model 64 --n-head 2 --d-head 32 --d-inner 96 --n-layer 2 --mem-len 24 --div-val 2".split(),
}
DROPOUT = {
    False: {"awd_lstm": "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --weight-drop 0".split()},
    True: {"transformer_xl": "--dropout 0.2 --dropatt 0.2".split()},
}


def make_trainer(folder: Path, arch: str, dropout: bool, *flags: str) -> Trainer:
    """An epoch is 15 chunks of 24 tokens and one of 7."""
    write_zipf_corpus(folder, WORDS, 8 * (24 * 15 + 7) + 1)
    arguments = [str(folder), "--arch", arch, *SIZES[arch], *DROPOUT[dropout].get(arch, []), "--cutoffs", "40", "120"]
    arguments += ["--save-dir", str(folder / "run"), "--batch-size", "8", "--tokens-per-sample", "24", "--lr", "0.01"]
    settings = read_command_line([*arguments, "--device", "cuda", "--deterministic", *flags])
    return Trainer(settings, load(str(folder)), None, DistributedContext(0, 1, torch.device("cuda", 0)))


def train(trainer: Trainer, updates: int) -> tuple[torch.Tensor, list[float]]:
    """The weights after these updates, and the gradient norm of each."""
    norms = []
    while trainer.progress.update < updates:
        for chunks in trainer.updates():
            norms.append(trainer.update(chunks).clone())
            if trainer.progress.update == updates:
                break
        else:
            trainer.step.reset_streams()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, torch.stack(norms).tolist()


@pytest.mark.parametrize("precision", [(), ("--bf16",), ("--fp16",)])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("arch", SIZES)
def test_graphed_updates_bitwise_equal_eager(
    tmp_path: Path, arch: str, dropout: bool, precision: tuple[str, ...]
) -> None:
    """Over two epoch ends with a shorter last chunk; the generator state of dropout advances across replays."""
    graphed, eager = (
        train(make_trainer(tmp_path, arch, dropout, *precision, "--cuda-graph", mode), 40) for mode in ("on", "off")
    )
    assert torch.equal(graphed[0], eager[0])
    np.testing.assert_array_equal(graphed[1], eager[1])  # NaN for updates skipped by float16's gradient scaler
    finite = [norm for norm in graphed[1] if np.isfinite(norm)]
    assert len(set(finite)) == len(finite) > 30


@pytest.mark.parametrize("cuda_graph", ["on", "off"])
@pytest.mark.parametrize("arch", SIZES)
def test_update_has_no_host_sync_on_gpu(tmp_path: Path, arch: str, cuda_graph: str) -> None:
    trainer = make_trainer(tmp_path, arch, True, "--cuda-graph", cuda_graph, "--bf16", "--clip-norm", "0.25")
    updates = trainer.updates()
    for _ in range(3):  # the first creates the optimizer's state, the second is captured
        trainer.update(next(updates))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            trainer.update(next(updates))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    updates.close()
    assert trainer.step.metrics.skips.tolist() == [0, 0]


@pytest.mark.parametrize("arch", SIZES)
def test_graphed_evaluation_bitwise_equal_without_sync(tmp_path: Path, arch: str) -> None:
    trainer = make_trainer(tmp_path, arch, False)
    trainer.model.eval()
    totals = []
    for graphed in (True, False):
        scorer = Scorer(trainer.model, trainer.distributed.device, graphed)
        try:
            with torch.no_grad():
                chunks = evaluation_chunks(trainer.train_tokens, 4, 16, warm_up=32, reset_on=None)
                for n, chunk in enumerate(chunks):
                    torch.cuda.set_sync_debug_mode("error" if n > 3 else "default")
                    scorer.read(chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        totals.append(torch.stack(scorer.totals()))
    assert torch.equal(*totals)
    assert int(totals[0][1]) == len(trainer.train_tokens)
