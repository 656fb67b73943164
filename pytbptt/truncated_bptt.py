"""The update step of truncated backpropagation through time, for any module that carries a state."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pytbptt.errors import InputError
from pytbptt.runtime.device import free_to_read

Pair = tuple[Any, Any]
"""A chunk's inputs and targets, pytrees of tensors."""


class Forward(NamedTuple):
    """What reading some chunks gave."""

    loss: Tensor
    """(), mean over the chunks' time steps."""
    outputs: list[Any]
    """The module's outputs for them, in their order; a chunk that the next window begins in comes in two pieces."""


class TruncatedBPTT:
    """Truncated backpropagation through time for any module `forward(input, state) -> (output, state)`.

    It carries the state from chunk to chunk of the stream, and cuts the gradient where the variant says::

        bptt = pytbptt.TruncatedBPTT(model, torch.optim.Adam(model.parameters()), nn.functional.mse_loss)
        for inputs, targets in stream:  # k1 time steps each, in order
            loss = bptt.update((inputs, targets))

    * gradients over the chunk itself, k2 = k1: as above;
    * over k2 > k1 steps, k1 of them new: `context=k2 - k1`. The steps before the chunk are read again, from the state
      before them, with today's weights; only the chunk is scored;
    * over n chunks, one update for all: `bptt.update(*chunks)` with n of them.

    An update whose gradient is not finite changes no weight, and a state that is not finite by then begins anew. With
    PyTorch's fused optimizers (but for the step that makes SGD's momentum), and states given to `begin` that are shaped
    as the model's, the host does not wait for a GPU to find that out.

    Where another framework makes the steps (Lightning, Accelerate), `forward` gives it the loss to differentiate.

    Args:
        model: takes the input and the state, and gives an output and the next state; a state is any pytree of tensors,
            None before the first chunk unless `begin` says otherwise.
        optimizer: makes the steps; None if only `forward` is used.
        loss: `loss(output, target)`, a mean over time steps, (). None: the model scores itself; where there is
            something to score it is called as `model(input, state, target)`, and its output has the loss as
            `objective`.
        context: time steps before each chunk that gradients flow back through. May be changed between updates: what it
            grows by is kept from then on.
        groups: accumulation groups, streams of their own with states of their own, whose mean gradient makes a step.
        time_dim: dimension of inputs and targets that is time; only with a context are they cut along it.
        clip_norm: largest norm of the whole gradient; 0 leaves it as it is.
        autocast: mixed precision of the forward pass.
        scaler: of float16's losses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        loss: Callable[[Any, Any], Tensor] | None,
        *,
        context: int = 0,
        groups: int = 1,
        time_dim: int = 0,
        clip_norm: float = 0.0,
        autocast: torch.autocast | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        numbers = (
            ("context", context, 0),
            ("groups", groups, 1),
            ("time_dim", time_dim, 0),
            ("clip_norm", clip_norm, 0),
        )
        for name, value, least in numbers:
            if value < least:
                raise InputError(f"TruncatedBPTT: {name}: found {value}, expected at least {least}")
        self.model, self.optimizer, self.context = model, optimizer, context
        self._loss, self._time_dim, self._clip_norm = loss, time_dim, clip_norm
        self.autocast: contextlib.AbstractContextManager[Any] = autocast or contextlib.nullcontext()
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.states: list[Any] = [None] * groups
        """Each group's state: before its kept inputs, which is where the next window begins."""
        self.kept: list[Any] = [None] * groups
        """Each group's inputs between that state and the next chunk, up to `context` steps; None for none."""
        self._initial: list[Any] = [None] * groups

    def begin(self, states: Sequence[Any] | None = None) -> None:
        """Begin new streams: from these states, one for each group, or None as before the very first chunk.

        From these a group begins anew as well, where its state is lost in an update whose gradient is not finite.

        Raises:
            InputError: something else than a list of as many states as there are groups, a state itself for one.
        """
        groups = len(self.states)
        if states is not None and (isinstance(states, Tensor) or len(states) != groups):
            found = "a tensor" if isinstance(states, Tensor) else str(len(states))
            raise InputError(f"TruncatedBPTT: states: found {found}, expected a list of {groups}, one for each group")
        self._initial = list(states) if states is not None else [None] * groups
        self.states, self.kept = list(self._initial), [None] * groups

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, for a checkpoint beside the model's and the optimizer's: every group's state, kept
        inputs and initial state, and the scaler. A dict for torch.save; the tensors are the ones in use."""
        return {
            "states": list(self.states),
            "kept": list(self.kept),
            "initial": list(self._initial),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: of another number of groups.
        """
        groups = len(self.states)
        if len(state["states"]) != groups:
            raise InputError(f"TruncatedBPTT: state_dict: found {len(state['states'])} groups, expected {groups}")
        self.states, self.kept, self._initial = (list(state[name]) for name in ("states", "kept", "initial"))
        if self.scaler.is_enabled() and state["scaler"]:  # one that had no scaler begins with a new one
            self.scaler.load_state_dict(state["scaler"])

    def update(self, *chunks: Pair) -> Tensor:
        """Read chunks that follow one another, and make one step; the loss () of before it, detached.

        Raises:
            InputError: as `forward`; more than one group, each of which `accumulate` reads before `step`.
        """
        if len(self.states) != 1:
            raise InputError(f"TruncatedBPTT: update: found {len(self.states)} groups, expected accumulate and step")
        loss = self.accumulate(*chunks).loss
        self.step()
        return loss

    def accumulate(self, *chunks: Pair, group: int = 0) -> Forward:
        """`forward` and backward: adds the group's share of the gradient. The loss comes back detached."""
        read = self.forward(*chunks, group=group)
        self.scaler.scale(read.loss / len(self.states)).backward()  # type: ignore[no-untyped-call]
        return Forward(read.loss.detach(), read.outputs)

    def step(self) -> Tensor:
        """Clip the accumulated gradient, step, and drop it; its norm (), not finite if no step was made."""
        optimizer = self.optimizer
        if optimizer is None:
            raise InputError("TruncatedBPTT: step: found no optimizer, expected one (or that only forward is called)")
        self.scaler.unscale_(optimizer)
        parameters = [parameter for each in optimizer.param_groups for parameter in each["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm or float("inf"))
        skipped = ~norm.isfinite()
        if _skips_by_itself(optimizer):
            vars(optimizer).update(grad_scale=None, found_inf=skipped.float())
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]  # as GradScaler does
        elif not skipped:
            optimizer.step()
        self.states = [
            _anew_if_lost(state, initial, skipped) for state, initial in zip(self.states, self._initial, strict=True)
        ]
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def forward(self, *chunks: Pair, group: int = 0) -> Forward:
        """Read chunks that follow one another, the first in its context, and move the group's state on.

        The gradient of the loss reaches from the last chunk to the beginning of the window and no further.

        Raises:
            InputError: no chunk, or something else than a pair of inputs and targets; inputs without a tensor that has
                time steps.
        """
        if not chunks or any(not isinstance(chunk, tuple | list) or len(chunk) != 2 for chunk in chunks):
            found = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
            raise InputError(f"TruncatedBPTT: found {found}, expected pairs (inputs, targets)")
        state, kept = self.states[group], self.kept[group]
        new = sum(self._length(inputs) for inputs, _ in chunks)
        old = 0 if kept is None else self._length(kept)
        begin = max(0, old + new - self.context)  # of the next window, in this one
        following, place = state, 0
        losses, outputs = [], []
        for inputs, targets, scored in self._pieces(kept, chunks, begin):
            with self.autocast:
                if not scored:
                    _, state = self.model(inputs, state)
                else:
                    loss, output, state = self._score(inputs, targets, state)
                    losses.append(loss * (self._length(inputs) / new))
                    outputs.append(output)
            place += self._length(inputs)
            if place == begin:
                following = pytree.tree_map_only(Tensor, Tensor.detach, state)
        self.states[group] = following
        self.kept[group] = self._latest(kept, chunks, old + new - begin)
        return Forward(torch.stack(losses).sum(), outputs)

    def _score(self, inputs: Any, targets: Any, state: Any) -> tuple[Tensor, Any, Any]:
        """Loss, output and next state of a piece."""
        if self._loss is None:
            output, state = self.model(inputs, state, targets)
            return output.objective, output, state
        output, state = self.model(inputs, state)
        return self._loss(output, targets), output, state

    def _pieces(self, kept: Any, chunks: Sequence[Pair], begin: int) -> Iterator[tuple[Any, Any, bool]]:
        """The window in order: inputs, targets and whether they are scored, cut where the next window begins."""
        place = 0
        before = [] if kept is None else [(kept, None, False)]
        for inputs, targets, scored in before + [(*chunk, True) for chunk in chunks]:
            length = self._length(inputs)
            if place < begin < place + length:
                for part in (slice(0, begin - place), slice(begin - place, length)):
                    yield self._cut(inputs, part), self._cut(targets, part), scored
            else:
                yield inputs, targets, scored
            place += length

    def _latest(self, kept: Any, chunks: Sequence[Pair], length: int) -> Any:
        """The last `length` steps of the inputs, detached; None for none."""
        if length == 0:
            return None
        parts = ([] if kept is None else [kept]) + [inputs for inputs, _ in chunks]
        joined = pytree.tree_map(self._join, *parts)
        total = self._length(joined)
        return self._cut(joined, slice(total - length, total))

    def _join(self, *values: Any) -> Any:
        return torch.cat(values, self._time_dim).detach() if isinstance(values[0], Tensor) else values[0]

    def _cut(self, value: Any, part: slice) -> Any:
        where = (slice(None),) * self._time_dim + (part,)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor[where], value)

    def _length(self, inputs: Any) -> int:
        """Time steps."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors:
            found = type(inputs).__name__
            raise InputError(f"TruncatedBPTT: inputs: found no tensor in a {found}, expected tensors with time steps")
        shape = tuple(tensors[0].shape)
        if self._time_dim >= len(shape) or shape[self._time_dim] == 0:
            raise InputError(
                f"TruncatedBPTT: inputs: found shape {shape}, expected time steps in dimension {self._time_dim}"
            )
        return shape[self._time_dim]


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step reads on the device, as `found_inf`, that nothing is to be changed: PyTorch's fused ones do.

    But SGD's makes momentum that is not there yet, and a skipped step would leave it as it found the memory.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(
        group.get("fused")
        and (not group.get("momentum") or all(p.grad is None or p in optimizer.state for p in group["params"]))
        for group in optimizer.param_groups
    )


def _anew_if_lost(state: Any, initial: Any, skipped: Tensor) -> Any:
    """`initial` in place of a state that is not finite, if the update was skipped, bool ().

    The device chooses where the two differ in values alone; the host where they differ otherwise, or reading is free.
    """
    leaves, structure = pytree.tree_flatten(state)
    initial_leaves, initial_structure = pytree.tree_flatten(initial)
    pairs = list(zip(leaves, initial_leaves, strict=False))
    finite = (leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor))
    if free_to_read(skipped) or structure != initial_structure or not all(_differ_in_values(*pair) for pair in pairs):
        return initial if skipped and not all(finite) else state
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return state
    lost = skipped & ~torch.stack(list(finite)).all()
    with torch.no_grad():
        chosen = [torch.where(lost, new.to(old.dtype), old) if isinstance(old, Tensor) else old for old, new in pairs]
    return pytree.tree_unflatten(chosen, structure)


def _differ_in_values(old: Any, new: Any) -> bool:
    """Whether two leaves of states, if they differ, do so in values that are on the device."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.device == new.device
    return old is new or bool(old == new)
