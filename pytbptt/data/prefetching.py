"""Chunks ahead of their use: computed by a thread, and on their way to a GPU."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class _End:
    """The last thing in the queue: the source is exhausted, or failed with `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(source: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """Yields the items of `source`, up to `depth` of them computed ahead in a thread.

    An exception of the source is raised here, in its place. Closing the generator, or dropping it, ends the thread.
    """
    ready: SimpleQueue[Item | _End] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = False

    def fill() -> None:
        error: BaseException | None = None
        try:
            items = iter(source)
            while room.acquire() and not stopped:
                ready.put(next(items))
        except StopIteration:
            pass
        except BaseException as failure:
            error = failure
        ready.put(_End(error))

    thread = threading.Thread(target=fill, name="pytbptt-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item
    finally:
        stopped = True
        room.release()
        thread.join()


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; the host does not wait until a GPU has it."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Copier:
    """Copies to a GPU on a stream of its own, beside what that computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # PyTorch hands out 32 streams of each priority in turn: none of these is one that a CUDA graph is captured on.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def copy(self, tensors: list[Tensor]) -> Copy:
        """Begin to copy tensors; nobody waits."""
        with torch.cuda.stream(self._stream):
            return Copy([sent(tensor, self.device) for tensor in tensors], self._stream.record_event())


@dataclass
class Copy:
    """Tensors that a GPU is about to have."""

    _tensors: list[Tensor]
    _ready: torch.cuda.Event

    def tensors(self) -> list[Tensor]:
        """The copies, for the current stream, which waits for them."""
        stream = torch.cuda.current_stream(self._tensors[0].device)
        stream.wait_event(self._ready)
        for tensor in self._tensors:
            tensor.record_stream(stream)  # their memory is not given to another copy before this stream is through
        return self._tensors
