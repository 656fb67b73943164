"""The processes of one job and their devices: who they are, and what they add up."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pytbptt.errors import InputError, RunError

# What gloo and NCCL say when the other side of a connection is gone.
LOST = re.compile(r"Connection (closed|reset) by|Broken pipe|remote process exited|NCCL communicator was aborted")

_left_by_errors: list[Any] = []  # process groups that live as long as Python does


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without it."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def exchanges_gradients(self) -> bool:
        """Whether updates go through DistributedDataParallel: of several processes, and of one that torchrun started
        where PYTBPTT_FORCE_DDP is set, so that one GPU can try NCCL and measure what it costs."""
        forced = os.environ.get("PYTBPTT_FORCE_DDP", "") not in ("", "0")
        return self.world_size > 1 or (forced and dist.is_initialized())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the CPU; only for a tensor on a GPU does it wait for that."""
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.cpu()

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, values: Mapping[str, Any]) -> None:
        """Compare named values of all processes.

        Raises:
            InputError: on every process, if one has another value than the first.
        """
        if self.world_size == 1:
            return
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, dict(values))
        for rank, its_own in enumerate(everyones):
            for name, expected in everyones[0].items():
                if its_own[name] != expected:
                    raise InputError(
                        f"{name}: found {its_own[name]} in process {rank}, expected {expected} as in process 0"
                    )

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same answer on all."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))))

    def gather(self, value: Any) -> list[Any] | None:
        """Every process's value, in the order of ranks, on the first process; None on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on all."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device of this process."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device: found cuda, but this torch sees no GPU; expected cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def products_dtype(device: torch.device, *, fp16: bool, bf16: bool) -> torch.dtype:
    """The dtype that a model's products are made in: float16 without a GPU is float32."""
    if fp16 and device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if bf16 else torch.float32


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a 16-bit dtype; to float32, none."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def mean_rounded_to(
    dtype: torch.dtype,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # not in torch's __all__
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook of DistributedDataParallel: the mean gradient of all processes, sent in 16 bits.

    (torch's own for bfloat16 asks for NCCL, although gloo sends it as well.)
    """
    rounded = bucket.buffer().div(dist.get_world_size()).to(dtype)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None  # it is what async_op gives

    def widened(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        buffer: torch.Tensor = bucket.buffer()
        return buffer.copy_(future.value()[0])

    mean: torch.futures.Future[torch.Tensor] = work.get_future().then(widened)
    return mean


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the other processes that torchrun started, if it did, for as long as the context lasts."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, chosen)
        return
    store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # On one machine torchrun keeps its store when it starts the processes again, and in it the addresses of those
        # that have died.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    # What the host knows goes by gloo in either case: NCCL would have it wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield Processes(rank, world_size, chosen)
    except BaseException as error:
        # Who drops the group last joins its thread and does not let go of Python's lock meanwhile, for which the thread
        # may wait to drop what was on its way. As the error left it, DistributedDataParallel was the last, and hung.
        _left_by_errors.append(dist.group.WORLD)
        if not (isinstance(error, RuntimeError) and LOST.search(str(error))):
            raise
        raise RunError(f"process {rank}: lost another process, whose own message says why") from None
    finally:
        dist.destroy_process_group()
