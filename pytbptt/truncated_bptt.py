"""The update step of truncated backpropagation through time, for any recurrent module."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pytbptt.errors import InputError
from pytbptt.runtime.device import can_read_on_host
from pytbptt.runtime.renamed import Renamed

InputTargetPair = tuple[Any, Any]
"""A chunk's inputs and targets, pytrees of tensors."""


class ForwardResult(NamedTuple):
    """The result of a forward pass over some chunks."""

    loss: Tensor
    """(), mean over the chunks' time steps."""
    outputs: list[Any]
    """The module's outputs in order, one per chunk; two for a chunk in whose middle the next context starts."""


class TruncatedBPTT:
    """Truncated backpropagation through time for any module `forward(input, state) -> (output, state)`.

    It carries the state from chunk to chunk of a stream, and detaches it where the variant says::

        bptt = pytbptt.TruncatedBPTT(model, torch.optim.Adam(model.parameters()), nn.functional.mse_loss)
        for inputs, targets in stream:  # k1 time steps each, in order
            loss = bptt.update((inputs, targets))

    * gradients over the chunk only, k2 = k1: as above;
    * over k2 > k1 steps, k1 of them new: `context=k2 - k1`. The k2 - k1 steps before the chunk are read again, from the
      state before them and with the current weights; only the chunk is scored;
    * over n chunks, with one update for all of them: `bptt.update(*chunks)`.

    An update whose gradient is not finite changes no weight, and a state that is not finite then is reset to the
    initial one. The host need not wait for a GPU to find that out if the optimizer is one of PyTorch's fused ones
    (except for the step that creates SGD's momentum) and `reset_state` was given states of the model's shapes.

    Where another framework makes the steps (Lightning, Accelerate), `forward` returns the loss to differentiate.

    Args:
        model: takes the input and the state, and returns an output and the next state; a state is any pytree of
            tensors, and None before the first chunk unless `reset_state` sets it.
        optimizer: makes the steps; None if only `forward` is used.
        loss: `loss(output, target)`, a mean over time steps, (). None: the model computes its loss itself: for chunks
            that are scored it is called as `model(input, state, target)`, and the loss is its output's `objective`.
        context: time steps before each chunk that gradients flow back through. May be changed between updates; a longer
            context fills up as further chunks are read.
        groups: accumulation groups, each with streams and a state of its own; an update uses their mean gradient.
        time_dim: the time dimension of inputs and targets, along which a context splits them.
        clip_norm: largest norm of the whole gradient; 0: no clipping.
        autocast: mixed precision of the forward pass.
        scaler: loss scaling for float16.
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
        for name, value, minimum in numbers:
            if value < minimum:
                raise InputError(f"TruncatedBPTT: {name}: found {value}, expected at least {minimum}")
        self.model, self.optimizer, self.context = model, optimizer, context
        self._loss, self._time_dim, self._clip_norm = loss, time_dim, clip_norm
        self.autocast: contextlib.AbstractContextManager[Any] = autocast or contextlib.nullcontext()
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.states: list[Any] = [None] * groups
        """Each group's state before its context inputs, from where the next forward pass starts."""
        self.context_inputs: list[Any] = [None] * groups
        """Each group's inputs between that state and the next chunk, up to `context` steps; None if there are none."""
        self._initial: list[Any] = [None] * groups

    def reset_state(self, states: Sequence[Any] | None = None) -> None:
        """Start new streams from these states, one for each group; None: as before the very first chunk.

        A state that is not finite after a skipped update is reset to the group's state given here, too.

        Raises:
            InputError: not a list with one state for each group, but, for instance, a state itself.
        """
        groups = len(self.states)
        if states is not None and (isinstance(states, Tensor) or len(states) != groups):
            found = "a tensor" if isinstance(states, Tensor) else str(len(states))
            raise InputError(f"TruncatedBPTT: states: found {found}, expected a list of {groups}, one for each group")
        self._initial = list(states) if states is not None else [None] * groups
        self.states, self.context_inputs = list(self._initial), [None] * groups

    begin, kept = Renamed("reset_state"), Renamed("context_inputs")

    def state_dict(self) -> dict[str, Any]:
        """The position of the streams, to save beside the model's and the optimizer's state: every group's state, kept
        inputs and initial state, and the scaler. The tensors are not copied."""
        return {
            "states": list(self.states),
            "kept": list(self.context_inputs),
            "initial": list(self._initial),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: the state has another number of groups.
        """
        groups = len(self.states)
        if len(state["states"]) != groups:
            raise InputError(f"TruncatedBPTT: state_dict: found {len(state['states'])} groups, expected {groups}")
        self.states, self.context_inputs, self._initial = (list(state[name]) for name in ("states", "kept", "initial"))
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the scaler was disabled
            self.scaler.load_state_dict(state["scaler"])

    def update(self, *chunks: InputTargetPair) -> Tensor:
        """Forward and backward over consecutive chunks, and one optimizer step; returns the loss (), detached.

        Raises:
            InputError: as `forward`; there is more than one group: call `accumulate` for each, then `step`.
        """
        if len(self.states) != 1:
            raise InputError(f"TruncatedBPTT: update: found {len(self.states)} groups, expected accumulate and step")
        loss = self.accumulate(*chunks).loss
        self.step()
        return loss

    def accumulate(self, *chunks: InputTargetPair, group: int = 0) -> ForwardResult:
        """`forward` and backward: adds the group's share of the gradient. The returned loss is detached."""
        result = self.forward(*chunks, group=group)
        self.scaler.scale(result.loss / len(self.states)).backward()  # type: ignore[no-untyped-call]
        return ForwardResult(result.loss.detach(), result.outputs)

    def step(self) -> Tensor:
        """Clip the accumulated gradient, make an optimizer step, and clear it; returns the norm () before clipping,
        which is not finite if the step was skipped."""
        optimizer = self.optimizer
        if optimizer is None:
            raise InputError("TruncatedBPTT: step: found no optimizer, expected one (or that only forward is called)")
        self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm or float("inf"))
        skipped = ~norm.isfinite()
        if _supports_found_inf(optimizer):
            vars(optimizer).update(grad_scale=None, found_inf=skipped.float())
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]  # as GradScaler does
        elif not skipped:
            optimizer.step()
        self.states = [
            _reset_nonfinite_state(state, initial, skipped)
            for state, initial in zip(self.states, self._initial, strict=True)
        ]
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def forward(self, *chunks: InputTargetPair, group: int = 0) -> ForwardResult:
        """Read the context and then consecutive chunks, and advance the group's state.

        The gradient of the loss flows back to the start of the context and no further.

        Raises:
            InputError: no chunk; a chunk that is not a pair of inputs and targets; inputs without a tensor with time
                steps.
        """
        if not chunks or any(not isinstance(chunk, tuple | list) or len(chunk) != 2 for chunk in chunks):
            found = ", ".join(type(chunk).__name__ for chunk in chunks) or "nothing"
            raise InputError(f"TruncatedBPTT: found {found}, expected pairs (inputs, targets)")
        state, context_inputs = self.states[group], self.context_inputs[group]
        new = sum(self._length(inputs) for inputs, _ in chunks)
        old = 0 if context_inputs is None else self._length(context_inputs)
        next_start = max(0, old + new - self.context)  # where the next forward pass starts, within this one's steps
        next_state, position = state, 0
        losses, outputs = [], []
        for inputs, targets, scored in self._segments(context_inputs, chunks, next_start):
            with self.autocast:
                if not scored:
                    _, state = self.model(inputs, state)
                else:
                    loss, output, state = self._score(inputs, targets, state)
                    losses.append(loss * (self._length(inputs) / new))
                    outputs.append(output)
            position += self._length(inputs)
            if position == next_start:
                next_state = pytree.tree_map_only(Tensor, Tensor.detach, state)
        self.states[group] = next_state
        self.context_inputs[group] = self._last_inputs(context_inputs, chunks, old + new - next_start)
        return ForwardResult(torch.stack(losses).sum(), outputs)

    def _score(self, inputs: Any, targets: Any, state: Any) -> tuple[Tensor, Any, Any]:
        """Loss, output and next state of a segment."""
        if self._loss is None:
            output, state = self.model(inputs, state, targets)
            return output.objective, output, state
        output, state = self.model(inputs, state)
        return self._loss(output, targets), output, state

    def _segments(
        self, context_inputs: Any, chunks: Sequence[InputTargetPair], split_at: int
    ) -> Iterator[tuple[Any, Any, bool]]:
        """Context and chunks in order: inputs, targets and whether they are scored, split at step `split_at`."""
        position = 0
        context = [] if context_inputs is None else [(context_inputs, None, False)]
        for inputs, targets, scored in context + [(*chunk, True) for chunk in chunks]:
            length = self._length(inputs)
            if position < split_at < position + length:
                for part in (slice(0, split_at - position), slice(split_at - position, length)):
                    yield self._slice(inputs, part), self._slice(targets, part), scored
            else:
                yield inputs, targets, scored
            position += length

    def _last_inputs(self, context_inputs: Any, chunks: Sequence[InputTargetPair], length: int) -> Any:
        """The last `length` steps of the inputs, detached; None if that is 0."""
        if length == 0:
            return None
        parts = ([] if context_inputs is None else [context_inputs]) + [inputs for inputs, _ in chunks]
        joined = pytree.tree_map(self._concatenate, *parts)
        total = self._length(joined)
        return self._slice(joined, slice(total - length, total))

    def _concatenate(self, *values: Any) -> Any:
        return torch.cat(values, self._time_dim).detach() if isinstance(values[0], Tensor) else values[0]

    def _slice(self, value: Any, part: slice) -> Any:
        index = (slice(None),) * self._time_dim + (part,)
        return pytree.tree_map_only(Tensor, lambda tensor: tensor[index], value)

    def _length(self, inputs: Any) -> int:
        """Number of time steps."""
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


def _supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer skips a step on the device if `found_inf` is set, as PyTorch's fused optimizers do.

    Not where SGD still has to create its momentum buffers: a skipped step would leave them uninitialised.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(
        group.get("fused")
        and (not group.get("momentum") or all(p.grad is None or p in optimizer.state for p in group["params"]))
        for group in optimizer.param_groups
    )


def _reset_nonfinite_state(state: Any, initial: Any, skipped: Tensor) -> Any:
    """`initial` if the state is not finite and the update was `skipped`, bool (); otherwise `state`.

    Chosen on the device if the two differ in values only; on the host if their shapes differ or nothing has to wait.
    """
    leaves, structure = pytree.tree_flatten(state)
    initial_leaves, initial_structure = pytree.tree_flatten(initial)
    pairs = list(zip(leaves, initial_leaves, strict=False))
    finite = (leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor))
    if can_read_on_host(skipped) or structure != initial_structure or not all(_same_shape(*pair) for pair in pairs):
        return initial if skipped and not all(finite) else state
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return state
    lost = skipped & ~torch.stack(list(finite)).all()
    with torch.no_grad():
        chosen = [torch.where(lost, new.to(old.dtype), old) if isinstance(old, Tensor) else old for old, new in pairs]
    return pytree.tree_unflatten(chosen, structure)


def _same_shape(old: Any, new: Any) -> bool:
    """Whether two leaves of states are tensors of the same shape and device, or else equal."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.device == new.device
    return old is new or bool(old == new)
