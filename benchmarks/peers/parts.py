"""Profiles a run by parts of the model: embedding, projections, attention, loss, optimizer.

Functions are wrapped in record_function ranges. The backward pass of a part is found by the profiler's sequence
numbers, which forward and backward ops share. On a GPU the time of kernels counts, without synchronisation between
them. Does not import pytbptt, which the peer's environment lacks.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "part: "
OTHER = "other"
NODE = "autograd::engine::evaluate_function: "

Range = tuple[Any, str, str]
"""An object, the name of its function, and the part that the function belongs to, except for nested ranges."""


def mark(ranges: Sequence[Range]) -> None:
    """Wraps the functions permanently."""
    for owner, name, part in ranges:
        setattr(owner, name, _in_range(getattr(owner, name), PREFIX + part))


def _in_range(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return wrapper


def seconds_by_part(run: Callable[[], None]) -> dict[str, float]:
    """The seconds of each part in a run, with the rest of the wall-clock time under OTHER."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    parts: dict[str, float] = defaultdict(float)
    forward = _forward_parts(events)
    for event in events:
        part = _part(event, forward)
        if part != OTHER:
            parts[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    parts[OTHER] = max(0.0, elapsed - sum(parts.values()))
    return dict(parts)


def _forward_parts(events: Sequence[FunctionEvent]) -> dict[int, str]:
    """Parts by sequence number. Of several events with one number, the last has created the autograd node."""
    parts = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and _backward_node(event) is None:
            parts[event.sequence_nr] = _part(event, {})
    return parts


def _part(event: FunctionEvent, forward: dict[int, str]) -> str:
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith(PREFIX):
            return parent.name.removeprefix(PREFIX)
        parent = parent.cpu_parent
    backward = _backward_node(event)
    return OTHER if backward is None else forward.get(backward.sequence_nr, OTHER)


def _backward_node(event: FunctionEvent) -> FunctionEvent | None:
    """The event of the autograd node that contains an event of the backward pass, else None."""
    parent: FunctionEvent | None = event
    while parent is not None and not parent.name.startswith(NODE):
        parent = parent.cpu_parent
    return parent
