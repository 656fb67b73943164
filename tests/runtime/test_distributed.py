"""Gradients in DistributedDataParallel: sent once, during the backward pass, and rounded to 16 bits on request."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytbptt.runtime.distributed import compress_hook
from tests.common.tiny_transformer_xl import make_model, random_tokens


@pytest.fixture(autouse=True)
def _single_rank_group() -> Iterator[None]:
    """A process group of this process only, which sends its gradients to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Loss(nn.Module):
    """A model and its loss in one module, as in the trainer; the embedding and the softmax share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model(dtype=torch.float32, cutoffs=(5, 11))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens, tokens)[0].objective


def test_gradients_are_sent_once_and_overlap_with_backward_pass() -> None:
    objective, events = Loss(), []
    parallel = DistributedDataParallel(objective, bucket_cap_mb=0.002, gradient_as_bucket_view=True)

    def send(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append(bucket.buffer().numel())
        return compress_hook(torch.float32, bucket)

    parallel.register_comm_hook(None, send)
    for _ in range(2):  # DDP rebuilds its buckets after the first backward pass
        events.clear()
        objective.model.layers[0].attention.content_bias.register_hook(lambda grad: events.append("first layer"))
        parallel(random_tokens()).backward()
    sent = [event for event in events if event != "first layer"]
    assert sum(sent) == objective.model.num_parameters()  # counts the tied weight once
    assert events.index("first layer") >= len(sent) // 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_comm_hook_rounds_gradients(dtype: torch.dtype) -> None:
    reference, objective, tokens = Loss(), Loss(), random_tokens()
    reference(tokens).backward()
    parallel = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    parallel.register_comm_hook(dtype, compress_hook)
    parallel(tokens).backward()
    for actual, expected in zip(objective.parameters(), reference.parameters(), strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert actual.grad.dtype == torch.float32
        torch.testing.assert_close(actual.grad, expected.grad.to(dtype).float(), rtol=0, atol=0)
