"""The processes of a distributed job: rank, world size, device, and the collectives that training needs."""

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

# What the errors of gloo and NCCL say when the peer process of a connection has exited.
PEER_LOST_PATTERN = re.compile(
    r"Connection (closed|reset) by|Broken pipe|remote process exited|NCCL communicator was aborted"
)

_groups_kept_alive: list[Any] = []


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, world size and device; world size 1 without torchrun."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def uses_ddp(self) -> bool:
        """Whether updates use DistributedDataParallel: with several processes, and with one that torchrun started if
        PYTBPTT_FORCE_DDP is set, so that NCCL can be tried and measured on one GPU."""
        forced = os.environ.get("PYTBPTT_FORCE_DDP", "") not in ("", "0")
        return self.world_size > 1 or (forced and dist.is_initialized())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the CPU; waits for the GPU if the tensor is on one."""
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.cpu()

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    def assert_same_across_ranks(self, values: Mapping[str, Any]) -> None:
        """Check that named values are equal on all ranks.

        Raises:
            InputError: on every rank, if the value of one differs from rank 0's.
        """
        if self.world_size == 1:
            return
        by_rank: list[Any] = [None] * self.world_size
        dist.all_gather_object(by_rank, dict(values))
        for rank, found in enumerate(by_rank):
            for name, expected in by_rank[0].items():
                if found[name] != expected:
                    raise InputError(f"{name}: found {found[name]} on rank {rank}, expected {expected} as on rank 0")

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank gets the same answer."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))))

    def gather(self, value: Any) -> list[Any] | None:
        """On rank 0 every rank's value, in the order of ranks; None on the other ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main_process else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def choose_device(name: str) -> torch.device:
    """The device that this process uses for --device auto, cpu or cuda."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device: found cuda, but this torch sees no GPU; expected cpu or auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def compute_dtype(device: torch.device, *, fp16: bool, bf16: bool) -> torch.dtype:
    """The dtype of a model's matrix products; float32 where float16 is asked for without a GPU."""
    if fp16 and device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if bf16 else torch.float32


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a 16-bit dtype; disabled for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def compress_hook(
    dtype: torch.dtype,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # not in torch's __all__
) -> torch.futures.Future[torch.Tensor]:
    """Communication hook of DistributedDataParallel: all-reduces the mean gradient in a 16-bit dtype.

    torch's own bf16_compress_hook requires NCCL, although gloo can send bfloat16 as well.
    """
    rounded = bucket.buffer().div(dist.get_world_size()).to(dtype)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None  # because of async_op=True

    def decompress(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        buffer: torch.Tensor = bucket.buffer()
        return buffer.copy_(future.value()[0])

    mean: torch.futures.Future[torch.Tensor] = work.get_future().then(decompress)
    return mean


@contextlib.contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """This process's DistributedContext; initialises the process group if torchrun started the process."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield DistributedContext(0, 1, chosen)
        return
    store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # On one machine torchrun keeps its store across restarts, with the addresses of the processes that died in it.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    # CPU tensors always use gloo: to send them by NCCL would make the host wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield DistributedContext(rank, world_size, chosen)
    except BaseException as error:
        # Whoever drops the last reference to the group joins the group's thread while holding Python's lock. That
        # thread may itself need the lock to drop unfinished work: after an error, DistributedDataParallel was the last
        # to drop it and hung. So the group is kept until the process exits.
        _groups_kept_alive.append(dist.group.WORLD)
        if not (isinstance(error, RuntimeError) and PEER_LOST_PATTERN.search(str(error))):
            raise
        raise RunError(f"rank {rank}: peer process exited; its own message says why") from None
    finally:
        dist.destroy_process_group()
