"""Proof, without a GPU, that an update has static shapes and that nobody waits for the device in it.

On "meta" a tensor has a shape and no values: to ask for one, or for a shape that depends on one, raises. What would be
copied to the GPU in the middle of an update, which waits as well, is a tensor elsewhere.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pytbptt.data import load
from pytbptt.runtime.distributed import DistributedContext
from pytbptt.training import update
from pytbptt.training.trainer import Trainer
from tests.training.test_graphed_update import DROPOUT
from tests.training.test_trainer import settings_for

META = torch.device("meta")


class OnlyOn(TorchDispatchMode):
    """Refuses operators on tensors of another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        results = function(*arguments, **(keywords or {}))
        for leaf in pytree.tree_leaves((arguments, keywords, results)):
            if isinstance(leaf, torch.Tensor) and leaf.device != self.device:
                raise AssertionError(f"{function}: a tensor on {leaf.device}")
        return results


class ObeysTheDevice(torch.optim.SGD):
    """In place of a fused optimizer, none of which runs on "meta"."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= parameter.grad * (1 - self.found_inf)  # type: ignore[attr-defined]


def test_what_waits_is_noticed() -> None:
    values = torch.zeros(3, device=META)
    for waits in (lambda: torch.tensor(1.0).to(META), lambda: values.nonzero(), lambda: float(values.sum())):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), OnlyOn(META):
            waits()


@pytest.mark.parametrize("arch", DROPOUT)
@pytest.mark.parametrize("more", [(), ("--update-freq", 2, "--reset-on", "</s>", "--clip-norm", 0.1)])
def test_an_update_never_waits_for_the_device(
    corpus: str, tmp_path: Path, arch: str, more: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "mixed_precision", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("pytbptt.nn.adaptive.has_values", lambda tensor: True)  # as on the GPU that meta stands for
    monkeypatch.setattr(
        update, "make_optimizer", lambda model, settings: ObeysTheDevice(model.parameters(), lr=1.0, fused=True)
    )
    settings = settings_for(corpus, tmp_path, arch, *DROPOUT[arch], *more)
    trainer = Trainer(settings, load(corpus, "train"), None, DistributedContext(0, 1, META))
    chunks = next(trainer.updates())
    read = [(chunk.tokens, chunk.reset, chunk.targets) for chunk in (chunk.to(META) for chunk in chunks)]
    assert trainer.step.capacity is not None
    capacity = trainer.step.capacity.fit([chunk.targets for chunk in chunks])
    with OnlyOn(META):
        trainer.step.on_device(trainer.step.bptt.states, read, capacity)
    with pytest.raises((NotImplementedError, RuntimeError)), OnlyOn(META):  # as it would if the softmax counted
        trainer.step.on_device(trainer.step.bptt.states, read, None)
