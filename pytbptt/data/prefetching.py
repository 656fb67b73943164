"""Prefetching: items computed in a background thread, and asynchronous copies to a GPU."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class _EndOfStream:
    """Sentinel, the last element of the queue: the source is exhausted, or failed with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(source: Iterable[Item], buffer_size: int) -> Generator[Item, None, None]:
    """Yields the items of `source`, up to `buffer_size` of them computed ahead in a thread.

    Exceptions of the source are re-raised at the same position. Closing or deleting the generator stops the thread.
    """
    ready: SimpleQueue[Item | _EndOfStream] = SimpleQueue()
    free_slots = threading.Semaphore(buffer_size)
    stopped = False

    def fill() -> None:
        error: BaseException | None = None
        try:
            items = iter(source)
            while free_slots.acquire() and not stopped:
                ready.put(next(items))
        except StopIteration:
            pass
        except BaseException as failure:
            error = failure
        ready.put(_EndOfStream(error))

    thread = threading.Thread(target=fill, name="pytbptt-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _EndOfStream):
                if item.error is not None:
                    raise item.error
                return
            free_slots.release()
            yield item
    finally:
        stopped = True
        free_slots.release()
        thread.join()


def to_device_async(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device`, without blocking the host if that is a GPU."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncTransfer:
    """Copies tensors to a GPU on a separate CUDA stream, in parallel with computation.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # PyTorch reuses 32 streams per priority round-robin; a different priority makes sure this is not a stream that
        # a CUDA graph is captured on.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def copy(self, tensors: list[Tensor]) -> Transfer:
        """Start copying tensors; returns immediately."""
        with torch.cuda.stream(self._stream):
            return Transfer([to_device_async(tensor, self.device) for tensor in tensors], self._stream.record_event())


@dataclass
class Transfer:
    """Tensors being copied to a GPU."""

    _tensors: list[Tensor]
    _ready: torch.cuda.Event

    def tensors(self) -> list[Tensor]:
        """The copies, for the current stream, which waits for them."""
        stream = torch.cuda.current_stream(self._tensors[0].device)
        stream.wait_event(self._ready)
        for tensor in self._tensors:
            # Keep the allocator from reusing the memory before this stream is done with it.
            tensor.record_stream(stream)
        return self._tensors
