"""The average of the weights over updates, for NT-ASGD."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """NT-ASGD (Merity et al., "Regularizing and Optimizing LSTM Language Models", 2017, section 4).

    The weights go on by plain SGD; from the validation on that triggers it, their running mean is kept, and
    `swapped_in` puts it in their place for validation and generation.

    Args:
        model: whose parameters are averaged.
        nonmono: validations, at least 1; averaging begins when the newest loss is no better than the best of
            those before the last `nonmono`.
    """

    def __init__(self, model: nn.Module, nonmono: int) -> None:
        self.model = model
        self.nonmono = nonmono
        self.losses: list[float] = []
        self.updates = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        """How many are in the mean, counted where the weights are: whether one was made need not be asked."""
        self.mean: dict[str, Tensor] | None = None

    def validated(self, loss: float) -> bool:
        """Take a validation's loss; True if averaging begins with it."""
        best_before = min(self.losses[: -self.nonmono], default=float("inf"))
        begins = self.mean is None and len(self.losses) > self.nonmono and loss > best_before
        self.losses.append(loss)
        if begins:
            self.mean = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return begins

    @torch.no_grad()
    def update(self, made: Tensor) -> None:
        """Take the weights into the mean, once averaging has begun; not if the update was not `made`, bool ()."""
        if self.mean is None:
            return
        self.updates += made
        share = made / self.updates.clamp(min=1)
        for name, parameter in self.model.named_parameters():
            self.mean[name].lerp_(parameter, share.to(parameter.dtype))

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The mean in place of the weights, for as long as the context lasts."""
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
            weights = parameter.clone()
            parameter.copy_(self.mean[name])
            self.mean[name] = weights

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "updates": int(self.updates), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])
        self.updates.fill_(state["updates"])
        if state["mean"] is not None:
            parameters = dict(self.model.named_parameters())
            self.mean = {name: mean.to(parameters[name].device) for name, mean in state["mean"].items()}
