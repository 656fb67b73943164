"""Runs the GPU code paths without a GPU, in a copy of the project in which "cuda" means the CPU.

    python -m tests.common.fake_cuda FOLDER

The copy has "cpu" for the string "cuda", and this module for torch.cuda: it reports one GPU, its CUDA graphs are those
of tests/common/fake_cuda_graph.py, and its streams are synchronous. The tests marked gpu, the benchmarks and the
trainer's GPU code run there with the CPU kernels. The CUDA kernels themselves are not tested.
"""

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.common.fake_cuda_graph import FakeCUDAGraph, OpRecorder, Stream as FakeStream

COPIED_FOLDERS = ("pytbptt", "tests", "benchmarks", "csrc")
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".venv", "results")
SUBSTITUTIONS = (
    (re.compile(r'\.type (==|!=) "cpu"'), r'.type \1 "host"'),  # so that the GPU code runs: no device has this type
    (re.compile(r"\btorch\.cuda\."), "fake_cuda."),
    (re.compile(r"\btorch\.cuda\b(?=[,)])"), "fake_cuda"),  # the module itself, as an argument
    (re.compile(r"\.cuda\(\)"), '.to("cpu")'),
    (re.compile(r'(["\'])cuda(:\d+|:\{[a-z]+\})?\1'), r"\1cpu\1"),
    (re.compile(r'f"cuda:\{index\}"'), '"cpu"'),
    (re.compile(r"\.is_cuda\b"), ".is_cpu"),
    (re.compile(r'EXTENSION\.facts\["cuda_architectures"\]'), '"9.0a"'),
    (re.compile(r'shutil\.which\("nvcc"\)'), "None"),  # a CPU cannot run what it compiles
    (re.compile(r"^UPDATES = 600\b", re.MULTILINE), "UPDATES = 60"),  # a CPU is slower
    (re.compile(r"\bfor _ in range\((20|50|100)\)"), "for _ in range(2)"),
    # Sizes in benchmarks/floors.py, whose rates do not matter here.
    (re.compile(r"\b8192, 2\*\*30, 3\b"), "64, 2**16, 1"),
    (re.compile("cpu:gloo,cuda:nccl"), "gloo"),
    (re.compile(r"\.record_stream\(stream\)"), ".dim()"),
)


def make_copy(root: Path, target: Path) -> None:
    """Copies the project at `root`; the copy runs from its own folder, with `python -m`."""
    this = Path(__file__).resolve()
    for folder in COPIED_FOLDERS:
        shutil.copytree(root / folder, target / folder, ignore=NOT_COPIED)
    for file in ("pyproject.toml", "Makefile"):
        shutil.copy(root / file, target)
    for path in target.rglob("*.py"):
        if path.name in (this.name, "fake_cuda_graph.py"):
            continue
        text = path.read_text(encoding="utf-8")
        changed = text
        for pattern, replacement in SUBSTITUTIONS:
            changed = pattern.sub(replacement, changed)
        if "fake_cuda." in changed or "fake_cuda," in changed:
            changed = re.sub(
                r"^import torch$", "import torch\nfrom tests.common import fake_cuda", changed, count=1, flags=re.M
            )
        if changed != text:
            path.write_text(changed, encoding="utf-8")


# Replacements of torch.cuda's functions and classes.

CUDAGraph = FakeCUDAGraph
_capturing = False


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def get_device_name(device: object = None) -> str:
    return str(FAKE_PROPERTIES.name)


FAKE_PROPERTIES = SimpleNamespace(  # of an H100, with less memory
    name="fake GPU",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232_448,
    regs_per_multiprocessor=65_536,
    total_memory=2**33,
)


def get_device_properties(device: object = None) -> SimpleNamespace:
    return FAKE_PROPERTIES


def get_device_capability(device: object = None) -> tuple[int, int]:
    return 9, 0


def mem_get_info(device: object = None) -> tuple[int, int]:
    # So little that the tests of the largest tensors skip themselves.
    return 2**33, 2**33


def synchronize(device: object = None) -> None:
    pass


set_device = set_sync_debug_mode = reset_peak_memory_stats = _sleep = synchronize


def set_per_process_memory_fraction(fraction: float, device: object = None) -> None:
    pass


def memory_allocated(device: object = None) -> int:
    return 0


max_memory_allocated = memory_allocated


def get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


class Stream(FakeStream):
    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        super().__init__(device)

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self) -> "Event":
        return Event()


def current_stream(device: object = None) -> Stream:
    return Stream()


def stream(stream: Stream) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self._recorded = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        self._recorded = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end._recorded - self._recorded)


def is_current_stream_capturing() -> bool:
    return _capturing


@contextlib.contextmanager
def graph(graph: CUDAGraph, stream: Stream | None = None, **options: Any) -> Iterator[None]:
    global _capturing
    _capturing = True
    try:
        with OpRecorder(graph.calls):
            yield
    finally:
        _capturing = False


if __name__ == "__main__":
    make_copy(Path(__file__).resolve().parents[2], Path(sys.argv[1]))
