"""Where the time of a run goes: embedding, projections, attention, loss, optimizer, by ranges around functions.

A range marks what a function does in the forward pass; what the backward pass does for it is found by the sequence
numbers that the profiler gives to both. On a GPU the kernels' own time counts, and nothing waits for it in between.
No pytbptt here.
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
"""A module, class or other object, the name of its function, and the part that the function's time belongs to, except
for what lies in a further range within."""


def mark(ranges: Sequence[Range]) -> None:
    """Put the ranges around their functions, for good."""
    for owner, name, part in ranges:
        setattr(owner, name, _within(getattr(owner, name), PREFIX + part))


def _within(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return marked


def seconds_by_part(run: Callable[[], None]) -> dict[str, float]:
    """Run it; how long each part took, and under OTHER the rest of the time on the clock."""
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
    """Every sequence number's part. Several events have the same until one makes a node of it: that is the last."""
    parts = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and _backward(event) is None:
            parts[event.sequence_nr] = _part(event, {})
    return parts


def _part(event: FunctionEvent, forward: dict[int, str]) -> str:
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith(PREFIX):
            return parent.name.removeprefix(PREFIX)
        parent = parent.cpu_parent
    backward = _backward(event)
    return OTHER if backward is None else forward.get(backward.sequence_nr, OTHER)


def _backward(event: FunctionEvent) -> FunctionEvent | None:
    """The node of the backward pass that an event is part of, if it is."""
    parent: FunctionEvent | None = event
    while parent is not None and not parent.name.startswith(NODE):
        parent = parent.cpu_parent
    return parent
