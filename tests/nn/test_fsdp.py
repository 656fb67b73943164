"""Training sharded over two processes, with fully_shard or FullyShardedDataParallel, matches a single process."""

import copy
import datetime
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytbptt.nn import LSTM, AWDLSTMConfig, TransformerXLConfig
from pytbptt.nn.language_model import LanguageModel
from tests.common.subprocesses import FORKSERVER

CONFIGS = {
    "transformer_xl": TransformerXLConfig(
        vocab_size=40,
        n_layer=2,
        d_model=8,
        n_head=2,
        d_head=4,
        d_inner=12,
        mem_len=6,
        cutoffs=(10, 20),
        div_val=2,
        pre_norm=True,
        init_std=0.3,
    ),
    "awd_lstm": AWDLSTMConfig(
        vocab_size=40,
        d_embed=8,
        d_hidden=10,
        n_layer=2,
        cutoffs=(10, 20),
        dropout=0,
        dropouth=0,
        dropouti=0,
        dropoute=0,
        weight_drop=0,
    ),
}
STREAMS, LENGTH = 2, 5
"""Streams per process, and tokens per chunk."""


def shard_root(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def shard_layers(model: Any) -> None:
    """As torch's tutorial does, but the root's weights are resharded after its forward pass, too."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)


def random_tokens(step: int) -> Tensor:
    return torch.randint(40, (2 * STREAMS, LENGTH), generator=torch.Generator().manual_seed(step))


def check_fsdp2_training(config: Any, shard: Callable[[Any], None], rank: int) -> None:
    unsharded = config.build().double()
    model = copy.deepcopy(unsharded)
    shard(model)
    local = slice(rank * STREAMS, (rank + 1) * STREAMS)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, unsharded)]
    memory = unsharded_memory = None
    for step in range(4):
        tokens, targets = random_tokens(step), random_tokens(step).roll(-1, 1)
        result, memory = model.loss(tokens[local], targets[local], memory)
        expected, unsharded_memory = unsharded.loss(tokens, targets, unsharded_memory)
        mean = result.objective.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.objective.detach(), rtol=0, atol=1e-10)
        for optimizer, objective in zip(optimizers, (result.objective, expected.objective), strict=True):
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()
    check_evaluation(model.eval(), unsharded.eval(), memory, unsharded_memory, local)


def check_evaluation(
    model: LanguageModel, unsharded: LanguageModel, memory: Any, unsharded_memory: Any, local: slice
) -> None:
    tokens = random_tokens(9)
    with torch.no_grad():
        found, expected = model(tokens[local], memory)[0], unsharded(tokens, unsharded_memory)[0][local]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        result, _ = model.loss(tokens, tokens)
        torch.testing.assert_close(result.nll, unsharded.loss(tokens, tokens)[0].nll, rtol=0, atol=1e-9)
        projected = unsharded.init_memory(2 * STREAMS, projected=True) if hasattr(memory, "hidden") else None
        found, expected = ([], [])
        for outputs, module in ((found, model), (expected, unsharded)):
            memory = projected
            for step in range(3):
                output, memory = module(random_tokens(step), memory)
                outputs.append(output)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Loss(nn.Module):
    """Computes the loss in the forward pass, as FullyShardedDataParallel gathers weights for that alone."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Any:
        return self.model.loss(*arguments)


def check_fsdp1_training(config: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    unsharded = config.build()
    wrapped = FullyShardedDataParallel(Loss(copy.deepcopy(unsharded)), device_id=torch.device("cpu"))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (wrapped, unsharded)]
    memories = [None, None]
    for step in range(3):
        objectives = []
        for n, loss in enumerate((wrapped, unsharded.loss)):
            result, memories[n] = loss(random_tokens(step), random_tokens(step), memories[n])
            objectives.append(result.objective)
        torch.testing.assert_close(*objectives, rtol=0, atol=1e-5)
        for optimizer, objective in zip(optimizers, objectives, strict=True):
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()


def check_lstm_layer(method: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    reference = nn.LSTM(3, 4, 2, dtype=torch.float32)
    layer: Any = LSTM(3, 4, 2)
    layer.load_state_dict(reference.state_dict())
    if method == "fully_shard":
        fully_shard(layer)
    else:
        layer = FullyShardedDataParallel(
            layer, device_id=torch.device("cpu"), use_orig_params=method == "use_orig_params"
        )
    input = torch.randn(LENGTH, 2, 3)
    for _ in range(2):
        found, expected = layer(input)[0], reference(input)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        found.sum().backward()


def cases() -> dict[str, Callable[[int], None]]:
    """The checks by name; each is called with the rank."""
    checks: dict[str, Callable[[int], None]] = {}
    for name, config in CONFIGS.items():
        for shard in (shard_root, shard_layers):
            checks[f"{name}, {shard.__name__}"] = lambda rank, config=config, shard=shard: check_fsdp2_training(
                config, shard, rank
            )
        checks[f"{name}, FSDP1"] = lambda rank, config=config: check_fsdp1_training(config)
    for method in ("fully_shard", "use_orig_params", "flat parameters"):
        checks[f"LSTM, {method}"] = lambda rank, method=method: check_lstm_layer(method)
    return checks


def run_cases(rank: int, folder: Path, names: Iterable[str]) -> None:
    """Runs the cases as this rank of two, and writes the first failure's traceback, or nothing, to the file `rank`."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    failure = ""
    for name in names:
        torch.manual_seed(0)
        try:
            cases()[name](rank)
        except Exception:
            failure = f"{name}: {traceback.format_exc()}"
            break
    (folder / f"{rank}.part").write_text(failure)
    os.replace(folder / f"{rank}.part", folder / str(rank))
    if not failure:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("module", ["transformer_xl", "awd_lstm", "LSTM"])
def test_fsdp_training_matches_single_process(module: str, tmp_path: Path) -> None:
    names = [name for name in cases() if name.startswith(module)]
    assert len(names) == 3
    processes = [FORKSERVER.Process(target=run_cases, args=(rank, tmp_path, names)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        process.kill()
        process.join()
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == ""
