"""Split texts into blocks at safe positions and map them over worker processes in order."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, TypeVar

from pytbptt.data.text_files import TextFile
from pytbptt.errors import InputError, RunError

Result = TypeVar("Result")

BLOCK_BYTES = 4 << 20
MAX_WORKERS = 61 if sys.platform == "win32" else sys.maxsize  # Windows' limit on handles in one wait
MAX_PENDING_PER_WORKER = 2  # submitted blocks per worker whose results are not consumed yet; bounds memory
BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)+")


@dataclass(frozen=True)
class Block:
    """Bytes `start` to `stop` of a text file; `is_last` if it is the last block."""

    file: TextFile
    start: int
    stop: int
    is_last: bool

    def read(self) -> bytes:
        """The block's bytes; RunError if the file shrank meanwhile."""
        with open(self.file.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if len(data) != self.stop - self.start:
            raise RunError(
                f"{self.file.name}: found its end at byte {self.start + len(data)}, expected it not to change"
            )
        return data

    def text(self) -> str:
        """The block's text; InputError with the offset of the first byte that is not UTF-8."""
        data = self.read()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.file.name}: found a byte at {self.start + error.start} (0x{data[error.start]:02x}) that is not "
                "UTF-8, expected UTF-8 text (--bytes takes anything)"
            ) from None


def split_blocks(
    text: TextFile, *, allow_mid_word: bool, keep_blank_runs: bool, size: int | None = None
) -> Iterator[Block]:
    """Split a text into blocks of about `size` bytes (4 MiB), after the last newline that fits.

    A line longer than a block is split before a space; without one, between characters if `allow_mid_word`, else after
    the line. With `keep_blank_runs`, runs of blank lines are not split. Block boundaries depend only on the text, so
    output does not depend on the number of workers.
    """
    size = BLOCK_BYTES if size is None else size
    with open(text.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = text.start
        while start < text.stop:
            stop = start + size
            if stop < text.stop:
                newline = data.rfind(b"\n", start, stop) + 1
                if newline:
                    blank_run = BLANK_LINES.match(data, newline) if keep_blank_runs else None
                    stop = blank_run.end() if blank_run else newline
                elif (space := data.rfind(b" ", start + 1, stop)) > 0:
                    stop = space
                elif allow_mid_word:
                    candidates = range(stop, max(start, stop - 4), -1)  # a character has at most 4 bytes
                    inside = (*range(0x80, 0xC0), ord("\n"))  # UTF-8 continuation bytes, and the \n of \r\n
                    stop = next((position for position in candidates if data[position] not in inside), stop)
                else:
                    stop = data.find(b"\n", stop) + 1 or text.stop
            stop = min(stop, text.stop)
            yield Block(text, start, stop, stop == text.stop)
            start = stop


class WorkerPool:
    """A pool of worker processes with an ordered map; count 1 runs in this process.

    `initializer(*initargs)` runs in every worker first. Closing (or leaving the context) ends the workers.
    """

    def __init__(self, count: int, initializer: Callable[..., None], initargs: tuple[Any, ...] = ()) -> None:
        self._count = min(count, MAX_WORKERS)
        self._pool: ProcessPoolExecutor | None = None
        if self._count == 1:
            initializer(*initargs)
            return
        # Fork on Linux, where it is fast; elsewhere it is not safe, and spawned workers must re-import everything.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._pool = ProcessPoolExecutor(self._count, context, _init_worker, (initializer, initargs))

    def map(self, function: Callable[[Block], Result], blocks: Iterable[Block]) -> Iterator[tuple[Block, Result]]:
        """Yields every block with its result, in order, with a bounded number of blocks in flight."""
        if self._pool is None:
            for block in blocks:
                yield block, function(block)
            return
        pending: deque[tuple[Block, Future[Result]]] = deque()
        try:
            for block in blocks:
                pending.append((block, self._pool.submit(function, block)))
                if len(pending) >= MAX_PENDING_PER_WORKER * self._count:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise RunError("a worker process died (out of memory?); fewer --workers need less") from None
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _init_worker(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which stops the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # tokenizers' threads do not survive a fork, and the workers already use all cores
    )
    initializer(*initargs)


def _exit_with_parent() -> None:
    # Exit if the parent is killed; otherwise workers would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
