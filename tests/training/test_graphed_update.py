"""Updates as a CUDA graph repeats them, and where they are captured; without a GPU."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from pytbptt.errors import InputError, RunError
from pytbptt.nn.adaptive import TailCapacity
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training.resume import resume
from pytbptt.training.trainer import Trainer
from pytbptt.training.update import graph_unsupported_reason
from tests.recorded_graph import recorded  # noqa: F401 - a fixture
from tests.training.test_trainer import settings_for, trainer_for, weights

DROPOUT = {
    "awd_lstm": "--dropout 0.3 --dropouth 0.2 --dropouti 0.3 --dropoute 0.2 --weight-drop 0.4 --cutoffs 8 20".split(),
    "transformer_xl": "--dropout 0.2 --dropatt 0.2 --cutoffs 8 20 --div-val 2".split(),
}
UPDATES = 40


def graphed(trainer: Trainer) -> Trainer:
    """The trainer as it is on a GPU."""
    trainer.step.capacity = TailCapacity(trainer.model.softmax)
    trainer.step.on_device = CUDAGraphRunner(trainer.step.compute, trainer.distributed.device)
    for parameters in trainer.step.optimizer.param_groups:
        parameters["lr"] = torch.tensor(parameters["lr"], dtype=torch.float64)
    return trainer


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("arch", DROPOUT)
@pytest.mark.parametrize(
    "more",
    [
        ("--batch-size", 4),
        ("--batch-size", 2, "--update-freq", 2, "--bptt-chunks", 2),
        ("--optimizer", "sgd", "--momentum", 0.5, "--reset-on", "</s>"),
    ],
)
def test_replayed_updates_are_those_of_the_loop_to_the_bit(
    corpus: str, tmp_path: Path, arch: str, more: tuple[object, ...]
) -> None:
    """With dropout drawn anew each time, a learning rate that changes, several epochs, and a gradient that is lost."""
    words = (*DROPOUT[arch], *more, "--tokens-per-sample", 60, "--warmup-updates", 10, "--clip-norm", 0.1)
    trainers = [trainer_for(settings_for(corpus, tmp_path / name, arch, *words)) for name in ("one", "two")]
    graphed(trainers[1])
    for trainer in trainers:
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
        torch.manual_seed(5)
        asked = 0

        def count(*_: object) -> None:
            nonlocal asked
            asked += 1

        trainer.model.register_forward_hook(count)
        while trainer.progress.update < UPDATES:
            for chunks in trainer.updates():
                if trainer.progress.update == 9:  # a memory that spoils this update's gradient, and no other's
                    for tensor in _tensors(trainer.step.bptt.states):
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
                norm = trainer.update(chunks)
                assert bool(norm.isfinite()) == (trainer.progress.update != 10)
                if trainer.progress.update == UPDATES:
                    break
            else:
                trainer.step.reset_streams()
    one, two = trainers
    assert one.step.metrics.skips.tolist() == two.step.metrics.skips.tolist() == [1, 0]
    assert torch.equal(one.step.metrics.sums, two.step.metrics.sums)
    assert torch.equal(weights(one), weights(two))
    for mine, other in zip(_tensors(one.step.bptt.states), _tensors(two.step.bptt.states), strict=True):
        assert torch.equal(mine, other)
    chunks_each = trainer.settings.data.update_freq * trainer.settings.truncation.bptt_chunks
    assert asked < UPDATES * chunks_each / 2  # Python was, of the second trainer


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("optimizer", [("adam",), ("sgd",), ("sgd", "--momentum", 0.9)])
def test_a_first_update_may_be_lost_before_the_capture(
    corpus: str, tmp_path: Path, optimizer: tuple[object, ...]
) -> None:
    """As float16's scale often loses it."""
    words = (*DROPOUT["awd_lstm"], "--optimizer", *optimizer)
    one, two = [trainer_for(settings_for(corpus, tmp_path / name, "awd_lstm", *words)) for name in ("one", "two")]
    graphed(two)
    for trainer in (one, two):
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
        torch.manual_seed(5)
        spoilt = [torch.full_like(tensor, float("nan")) for tensor in _tensors(trainer.step.bptt.states)]
        structure = torch.utils._pytree.tree_structure(trainer.step.bptt.states)
        trainer.step.bptt.states = torch.utils._pytree.tree_unflatten(spoilt, structure)
        for chunks in islice(trainer.updates(), 6):
            trainer.update(chunks)
    assert one.step.metrics.skips.tolist() == two.step.metrics.skips.tolist() == [1, 0]
    assert torch.equal(weights(one), weights(two))


def test_a_run_that_goes_on_gives_tails_the_room_that_they_had(corpus: str, tmp_path: Path) -> None:
    """On a GPU, where products of other sizes may add up otherwise."""
    words = ("--cutoffs", 8, 20, "--batch-size", 16, "--tokens-per-sample", 40)
    one, two = [trainer_for(settings_for(corpus, tmp_path / name, "awd_lstm", *words)) for name in ("one", "two")]
    for trainer in (one, two):
        trainer.step.capacity = TailCapacity(trainer.model.softmax)
    one.step.capacity.fit([torch.full((16, 40), 9), torch.full((16, 40), 30)])  # type: ignore[union-attr]
    saved = one.state_dict()
    assert saved is not None
    resume(two, saved)
    assert two.step.capacity.capacities == one.step.capacity.capacities == [640, 640]  # type: ignore[union-attr]
    for other in ([None], [[1, 2], [3, 4]], []):  # of a CPU, of two processes, from before
        saved["progress"]["capacities"] = other
        two.step.capacity = TailCapacity(two.model.softmax)
        resume(two, saved)
        assert two.step.capacity.capacities == [0, 0]


def test_no_checkpoint_is_from_the_trouble(corpus: str, tmp_path: Path) -> None:
    """Updates were skipped on a GPU, and between two entries of the log nobody asked."""
    trainer = trainer_for(settings_for(corpus, tmp_path, "awd_lstm"))
    trainer.step.metrics.skips += 12
    with pytest.raises(RunError, match="not finite in 12 updates in a row"):
        trainer.save("checkpoint_last.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_tails_get_room_for_what_comes_and_keep_it(corpus: str, tmp_path: Path) -> None:
    words = ("--cutoffs", 8, 20, "--batch-size", 16, "--tokens-per-sample", 40)
    capacity = TailCapacity(trainer_for(settings_for(corpus, tmp_path, "awd_lstm", *words)).model.softmax)
    frequent = torch.zeros(16, 40, dtype=torch.int64)
    some, more = frequent.clone(), frequent.clone()
    some[0], more[:12] = 9, 30
    assert capacity.fit([frequent]) == (0, 0)
    assert capacity.fit([some, frequent]) == (40 + 10 + 64, 0)
    assert capacity.fit([frequent, more]) == (114, 480 + 120 + 40)  # all there are
    assert capacity.fit([frequent]) == (114, 640)


@pytest.mark.parametrize(
    ("words", "device", "world_size", "reason"),
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
def test_where_updates_are_captured(
    corpus: str, tmp_path: Path, words: tuple[object, ...], device: str, world_size: int, reason: str
) -> None:
    processes = DistributedContext(0, world_size, torch.device(device))
    settings = settings_for(corpus, tmp_path, "awd_lstm", *words)
    assert graph_unsupported_reason(settings, processes).startswith(reason)
    assert bool(graph_unsupported_reason(settings, processes)) == bool(reason)
    if reason and "--cuda-graph" not in words:
        settings = settings_for(corpus, tmp_path, "awd_lstm", *words, "--cuda-graph", "on")
        with pytest.raises(InputError, match=f"--cuda-graph: found on, but {reason}.*; expected auto or off"):
            graph_unsupported_reason(settings, processes)


def _tensors(states: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(states) if isinstance(leaf, torch.Tensor)]
