"""On a GPU: updates and evaluation as CUDA graphs against the same ones kernel by kernel, and nobody waits in either.

Needs nothing of the other tests' fixtures, so that `make gpu-test` runs it with what a bare GPU machine has.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for the same bits in every run
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from pytbptt.data import evaluation_chunks, load
from pytbptt.evaluation.scoring import Scorer
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.config import read_command_line
from pytbptt.training.trainer import Trainer
from tests.training.zipf_corpus import write_zipf_corpus

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

WORDS = 304  # all sizes are multiples of 8: a graph's products are padded where they are not
SIZES = {
    "awd_lstm": "--d-embed 64 --d-hidden 136 --n-layer 2".split(),
    "transformer_xl": "--d-model 64 --n-head 2 --d-head 32 --d-inner 96 --n-layer 2 --mem-len 24 --div-val 2".split(),
}
DROPOUT = {
    False: {"awd_lstm": "--dropout 0 --dropouth 0 --dropouti 0 --dropoute 0 --weight-drop 0".split()},
    True: {"transformer_xl": "--dropout 0.2 --dropatt 0.2".split()},
}


def trainer(folder: Path, arch: str, dropout: bool, *words: str) -> Trainer:
    """On tokens drawn by Zipf's law, in chunks of 24, the last of 7."""
    write_zipf_corpus(folder, WORDS, 8 * (24 * 15 + 7) + 1)
    arguments = [str(folder), "--arch", arch, *SIZES[arch], *DROPOUT[dropout].get(arch, []), "--cutoffs", "40", "120"]
    arguments += ["--save-dir", str(folder / "run"), "--batch-size", "8", "--tokens-per-sample", "24", "--lr", "0.01"]
    settings = read_command_line([*arguments, "--device", "cuda", "--deterministic", *words])
    return Trainer(settings, load(str(folder)), None, DistributedContext(0, 1, torch.device("cuda", 0)))


def updates(one: Trainer, count: int) -> tuple[torch.Tensor, list[float]]:
    """The weights after so many updates, and each one's norm of the gradient."""
    norms = []
    while one.progress.update < count:
        for chunks in one.updates():
            norms.append(one.update(chunks).clone())
            if one.progress.update == count:
                break
        else:
            one.step.reset_streams()
    weights = torch.cat([parameter.detach().flatten() for parameter in one.model.parameters()])
    return weights, torch.stack(norms).tolist()


@pytest.mark.parametrize("precision", [(), ("--bf16",), ("--fp16",)])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("arch", SIZES)
def test_a_replayed_update_is_that_of_the_loop_to_the_bit(
    tmp_path: Path, arch: str, dropout: bool, precision: tuple[str, ...]
) -> None:
    """Over an epoch's end and its short chunk; dropout goes on where a replay left it."""
    found = [updates(trainer(tmp_path, arch, dropout, *precision, "--cuda-graph", way), 40) for way in ("on", "off")]
    (weights, norms), (others, other_norms) = found
    assert torch.equal(weights, others)
    np.testing.assert_array_equal(norms, other_norms)  # NaN where float16's scale lost an update
    made = [norm for norm in norms if np.isfinite(norm)]
    assert len(set(made)) == len(made) > 30


@pytest.mark.parametrize("way", ["on", "off"])
@pytest.mark.parametrize("arch", SIZES)
def test_nobody_waits_for_the_gpu_in_an_update(tmp_path: Path, arch: str, way: str) -> None:
    one = trainer(tmp_path, arch, True, "--cuda-graph", way, "--bf16", "--clip-norm", "0.25")
    remaining = one.updates()
    for _ in range(3):  # the first makes the optimizer's state, the second is captured
        one.update(next(remaining))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            one.update(next(remaining))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    remaining.close()
    assert one.step.metrics.skips.tolist() == [0, 0]


@pytest.mark.parametrize("arch", SIZES)
def test_evaluation_replays_to_the_bit_and_waits_for_nothing(tmp_path: Path, arch: str) -> None:
    one = trainer(tmp_path, arch, False)
    one.model.eval()
    sums = []
    for graphed in (True, False):
        scorer = Scorer(one.model, one.distributed.device, graphed)
        try:
            with torch.no_grad():
                for n, chunk in enumerate(evaluation_chunks(one.train_tokens, 4, 16, warm_up=32, reset_on=None)):
                    torch.cuda.set_sync_debug_mode("error" if n > 3 else "default")
                    scorer.read(chunk)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        sums.append(torch.stack(scorer.totals()))
    assert torch.equal(*sums)
    assert int(sums[0][1]) == len(one.train_tokens)
