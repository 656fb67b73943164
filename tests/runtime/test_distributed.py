"""What processes send one another: every gradient once, while the backward pass goes on, rounded if so wished."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytbptt.runtime.distributed import compress_hook
from tests.nn.tiny_transformer_xl import draw_tokens, make


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A job of this process alone: it sends to itself what several send to one another."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Loss(nn.Module):
    """As the trainer's objective, on a model whose embedding is the softmax's."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make(dtype=torch.float32, cutoffs=(5, 11))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, tokens)[0].objective


def test_every_gradient_is_sent_once_and_most_of_them_during_the_backward_pass() -> None:
    objective, events = Loss(), []
    parallel = DistributedDataParallel(objective, bucket_cap_mb=0.002, gradient_as_bucket_view=True)

    def send(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append(bucket.buffer().numel())
        return compress_hook(torch.float32, bucket)

    parallel.register_comm_hook(None, send)
    for _ in range(2):  # the buckets are made in the order of the first backward pass
        events.clear()
        objective.model.layers[0].attention.content_bias.register_hook(lambda grad: events.append("first layer"))
        parallel(draw_tokens()).backward()
    sent = [event for event in events if event != "first layer"]
    assert sum(sent) == objective.model.num_parameters()  # a tied weight once
    assert events.index("first layer") >= len(sent) // 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_gradients_are_the_gradients_rounded(dtype: torch.dtype) -> None:
    alone, objective, tokens = Loss(), Loss(), draw_tokens()
    alone(tokens).backward()
    parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    parallel.register_comm_hook(dtype, compress_hook)
    parallel(tokens).backward()
    for one, other in zip(objective.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad.to(dtype).float(), rtol=0, atol=0)
