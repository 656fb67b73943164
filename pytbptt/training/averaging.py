"""Averaged weights, for NT-ASGD."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytbptt.nn.attention import current_name


class WeightAverage:
    """NT-ASGD (Merity et al., "Regularizing and Optimizing LSTM Language Models", 2017, section 4).

    Plain SGD keeps updating the weights. Once validation stops improving, a running mean of the weights is kept as
    well, and `use_averaged_weights` replaces the weights by it for validation and generation.

    Args:
        model: its parameters are averaged.
        nonmono: at least 1; averaging starts when a validation loss is no better than the best loss before the last
            `nonmono` validations.
    """

    def __init__(self, model: nn.Module, nonmono: int) -> None:
        self.model = model
        self.nonmono = nonmono
        self.losses: list[float] = []
        self.updates = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        """How many updates are in the mean; on the device, so that counting one does not wait for it."""
        self.mean: dict[str, Tensor] | None = None

    def record_validation(self, loss: float) -> bool:
        """Record a validation loss; True if averaging starts now."""
        best_before = min(self.losses[: -self.nonmono], default=float("inf"))
        starts = self.mean is None and len(self.losses) > self.nonmono and loss > best_before
        self.losses.append(loss)
        if starts:
            self.mean = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return starts

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Add the weights to the mean if averaging has started and the update was `applied`, bool (): not skipped."""
        if self.mean is None:
            return
        self.updates += applied
        weight = applied / self.updates.clamp(min=1)
        for name, parameter in self.model.named_parameters():
            self.mean[name].lerp_(parameter, weight.to(parameter.dtype))

    @contextlib.contextmanager
    def use_averaged_weights(self) -> Iterator[None]:
        """The model has the averaged weights within the block, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.mean is None or self.updates == 0:
            return
        for name, parameter in self.model.named_parameters():
            current = parameter.clone()
            parameter.copy_(self.mean[name])
            self.mean[name] = current

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "updates": int(self.updates), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.updates.fill_(state["updates"])
        if state["mean"] is not None:
            parameters = dict(self.model.named_parameters())
            means = {name if name in parameters else current_name(name): mean for name, mean in state["mean"].items()}
            self.mean = {name: mean.to(parameters[name].device) for name, mean in means.items()}
