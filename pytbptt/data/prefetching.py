"""An iterator computed ahead by a thread."""

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """The last thing in the queue: the source is exhausted, or failed with ``error``."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(source: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """Yields the items of ``source``, up to ``depth`` of them computed ahead in a thread.

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
