"""An update has static shapes and no host–device synchronisation; shown without a GPU, on the "meta" device.

A meta tensor has no values: reading one, or an operator whose output shape depends on values, raises. A copy from the
host to the GPU would synchronise too; it shows as a tensor on another device than meta.
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
from tests.common.trainer_setup import DROPOUT_AND_CUTOFF_FLAGS, make_settings

META = torch.device("meta")


class RequireDevice(TorchDispatchMode):
    """Fails on operators that read or return a tensor on another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, outputs)):
            if isinstance(leaf, torch.Tensor) and leaf.device != self.device:
                raise AssertionError(f"{func}: a tensor on {leaf.device}")
        return outputs


class FoundInfSGD(torch.optim.SGD):
    """SGD that skips the step if found_inf is 1, like fused optimizers, which do not support meta tensors."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= parameter.grad * (1 - self.found_inf)  # type: ignore[attr-defined]


def test_host_sync_is_detected() -> None:
    values = torch.zeros(3, device=META)
    for synchronize in (lambda: torch.tensor(1.0).to(META), lambda: values.nonzero(), lambda: float(values.sum())):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), RequireDevice(META):
            synchronize()


@pytest.mark.parametrize("arch", DROPOUT_AND_CUTOFF_FLAGS)
@pytest.mark.parametrize("flags", [(), ("--update-freq", 2, "--reset-on", "</s>", "--clip-norm", 0.1)])
def test_update_has_no_host_sync(
    corpus: str, tmp_path: Path, arch: str, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "mixed_precision", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("pytbptt.nn.adaptive.has_values", lambda tensor: True)  # as on a GPU
    monkeypatch.setattr(
        update, "make_optimizer", lambda model, settings: FoundInfSGD(model.parameters(), lr=1.0, fused=True)
    )
    settings = make_settings(corpus, tmp_path, arch, *DROPOUT_AND_CUTOFF_FLAGS[arch], *flags)
    trainer = Trainer(settings, load(corpus, "train"), None, DistributedContext(0, 1, META))
    chunks = next(trainer.updates())
    batches = [(chunk.tokens, chunk.reset, chunk.targets) for chunk in (chunk.to(META) for chunk in chunks)]
    assert trainer.step.capacity is not None
    capacity = trainer.step.capacity.fit([chunk.targets for chunk in chunks])
    with RequireDevice(META):
        trainer.step.compute_or_replay(trainer.step.bptt.states, batches, capacity)
    # Without a capacity the softmax counts each tail's targets on the device, which has to be detected.
    with pytest.raises((NotImplementedError, RuntimeError)), RequireDevice(META):
        trainer.step.compute_or_replay(trainer.step.bptt.states, batches, None)
