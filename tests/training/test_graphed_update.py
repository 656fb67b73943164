"""Updates in (fake) CUDA graphs equal eager ones, and when updates are captured."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from pytbptt.errors import InputError, RunError
from pytbptt.nn.adaptive import TailCapacity
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.resume import resume
from pytbptt.training.trainer import Trainer
from pytbptt.training.update import graph_unsupported_reason
from tests.common.trainer_setup import DROPOUT_AND_CUTOFF_FLAGS, flat_weights, make_settings, make_trainer

UPDATES = 40


def enable_cuda_graph(trainer: Trainer) -> None:
    """What the trainer does on a GPU."""
    trainer.step.capacity = TailCapacity(trainer.model.softmax)
    trainer.step.compute_or_replay = CUDAGraphRunner(trainer.step.compute, trainer.distributed.device)
    for group in trainer.step.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)


def tensors_in(states: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(states) if isinstance(leaf, torch.Tensor)]


@pytest.mark.usefixtures("fake_cuda_graphs")
@pytest.mark.parametrize("arch", DROPOUT_AND_CUTOFF_FLAGS)
@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", 4),
        ("--batch-size", 2, "--update-freq", 2, "--bptt-chunks", 2),
        ("--optimizer", "sgd", "--momentum", 0.5, "--reset-on", "</s>"),
    ],
)
def test_replayed_updates_bitwise_equal_eager(
    corpus: str, tmp_path: Path, arch: str, flags: tuple[object, ...]
) -> None:
    """With dropout, a changing learning rate, more than one epoch, and one update whose gradient is not finite."""
    common = ("--tokens-per-sample", 60, "--warmup-updates", 10, "--clip-norm", 0.1)
    flags = (*DROPOUT_AND_CUTOFF_FLAGS[arch], *flags, *common)
    eager, graphed = [make_trainer(make_settings(corpus, tmp_path / name, arch, *flags)) for name in ("one", "two")]
    enable_cuda_graph(graphed)
    for trainer in (eager, graphed):
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
        torch.manual_seed(5)
        forward_calls = 0

        def count(*_: object) -> None:
            nonlocal forward_calls
            forward_calls += 1

        trainer.model.register_forward_hook(count)
        while trainer.progress.update < UPDATES:
            for chunks in trainer.updates():
                if trainer.progress.update == 9:  # NaN in the memory: this update is skipped, and no other
                    for tensor in tensors_in(trainer.step.bptt.states):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
                norm = trainer.update(chunks)
                assert bool(norm.isfinite()) == (trainer.progress.update != 10)
                if trainer.progress.update == UPDATES:
                    break
            else:
                trainer.step.reset_streams()
    assert eager.step.metrics.skips.tolist() == graphed.step.metrics.skips.tolist() == [1, 0]
    assert torch.equal(eager.step.metrics.sums, graphed.step.metrics.sums)
    assert torch.equal(flat_weights(eager), flat_weights(graphed))
    states = tensors_in(graphed.step.bptt.states), tensors_in(eager.step.bptt.states)
    for actual, expected in zip(*states, strict=True):
        assert torch.equal(actual, expected)
    chunks_per_update = graphed.settings.data.update_freq * graphed.settings.truncation.bptt_chunks
    assert forward_calls < UPDATES * chunks_per_update / 2  # of `graphed`: most updates were replays


@pytest.mark.usefixtures("fake_cuda_graphs")
@pytest.mark.parametrize("optimizer", [("adam",), ("sgd",), ("sgd", "--momentum", 0.9)])
def test_skipped_first_update_leaves_graph_equal_to_eager(
    corpus: str, tmp_path: Path, optimizer: tuple[object, ...]
) -> None:
    """As float16's gradient scaler often does, because its initial scale is large."""
    flags = (*DROPOUT_AND_CUTOFF_FLAGS["awd_lstm"], "--optimizer", *optimizer)
    eager, graphed = [
        make_trainer(make_settings(corpus, tmp_path / name, "awd_lstm", *flags)) for name in ("one", "two")
    ]
    enable_cuda_graph(graphed)
    for trainer in (eager, graphed):
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
        torch.manual_seed(5)
        nans = [torch.full_like(tensor, float("nan")) for tensor in tensors_in(trainer.step.bptt.states)]
        structure = pytree.tree_structure(trainer.step.bptt.states)
        trainer.step.bptt.states = pytree.tree_unflatten(nans, structure)
        for chunks in islice(trainer.updates(), 6):
            trainer.update(chunks)
    assert eager.step.metrics.skips.tolist() == graphed.step.metrics.skips.tolist() == [1, 0]
    assert torch.equal(flat_weights(eager), flat_weights(graphed))


def test_tail_capacity_is_restored_on_resume(corpus: str, tmp_path: Path) -> None:
    """For bitwise equality: on a GPU, matrix products of other sizes may sum in another order."""
    flags = ("--cutoffs", 8, 20, "--batch-size", 16, "--tokens-per-sample", 40)
    original, resumed = [
        make_trainer(make_settings(corpus, tmp_path / name, "awd_lstm", *flags)) for name in ("one", "two")
    ]
    for trainer in (original, resumed):
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
    original.step.capacity.fit([torch.full((16, 40), 9), torch.full((16, 40), 30)])  # type: ignore[union-attr]
    state = original.state_dict()
    assert state is not None
    resume(resumed, state)
    capacities = resumed.step.capacity.capacities  # type: ignore[union-attr]
    assert capacities == original.step.capacity.capacities == [640, 640]  # type: ignore[union-attr]
    for other in ([None], [[1, 2], [3, 4]], []):  # trained on a CPU, by two processes, by an older version
        state["progress"]["capacities"] = other
        resumed.step.capacity = TailCapacity(resumed.model.softmax)
        resume(resumed, state)
        assert resumed.step.capacity.capacities == [0, 0]


def test_no_checkpoint_after_skipped_updates(corpus: str, tmp_path: Path) -> None:
    """The device counts skipped updates; the host reads the count when it logs and when it saves."""
    trainer = make_trainer(make_settings(corpus, tmp_path, "awd_lstm"))
    trainer.step.metrics.skips += 12
    with pytest.raises(RunError, match="not finite in 12 updates in a row"):
        trainer.save("checkpoint_last.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_tail_capacity_grows_and_never_shrinks(corpus: str, tmp_path: Path) -> None:
    flags = ("--cutoffs", 8, 20, "--batch-size", 16, "--tokens-per-sample", 40)
    capacity = TailCapacity(make_trainer(make_settings(corpus, tmp_path, "awd_lstm", *flags)).model.softmax)
    head_only = torch.zeros(16, 40, dtype=torch.int64)
    first_tail, second_tail = head_only.clone(), head_only.clone()
    first_tail[0], second_tail[:12] = 9, 30
    assert capacity.fit([head_only]) == (0, 0)
    assert capacity.fit([first_tail, head_only]) == (40 + 10 + 64, 0)
    assert capacity.fit([head_only, second_tail]) == (114, 480 + 120 + 40)  # at most all 640 targets
    assert capacity.fit([head_only]) == (114, 640)


@pytest.mark.parametrize(
    ("flags", "device", "world_size", "reason"),
    [
        ((), "cuda", 1, ""),
        (("--cuda-graph", "on"), "cuda", 1, ""),
        (("--update-freq", 2, "--bptt-chunks", 2), "cuda", 1, ""),
        ((), "cpu", 1, "there is no GPU"),
        (("--cuda-graph", "off"), "cuda", 1, "--cuda-graph off"),
        ((), "cuda", 2, "processes exchange gradients"),
        (("--bptt-variation", "awd"), "cuda", 1, "--bptt-variation awd draws another length"),
        (("--bptt-backward", 20), "cuda", 1, "--bptt-backward reads tokens again"),
    ],
)
def test_runs_without_cuda_graph_have_a_reason(
    corpus: str, tmp_path: Path, flags: tuple[object, ...], device: str, world_size: int, reason: str
) -> None:
    distributed = DistributedContext(0, world_size, torch.device(device))
    settings = make_settings(corpus, tmp_path, "awd_lstm", *flags)
    assert graph_unsupported_reason(settings, distributed).startswith(reason)
    assert bool(graph_unsupported_reason(settings, distributed)) == bool(reason)
    if reason and "--cuda-graph" not in flags:
        settings = make_settings(corpus, tmp_path, "awd_lstm", *flags, "--cuda-graph", "on")
        with pytest.raises(InputError, match=f"--cuda-graph: found on, but {reason}.*; expected auto or off"):
            graph_unsupported_reason(settings, distributed)
