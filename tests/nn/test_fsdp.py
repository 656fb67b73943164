"""Weights cut up between two processes, by either of torch's ways, train as whole ones do in one process."""

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
from tests.processes import SERVER

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
"""Streams of each process, and tokens of a chunk."""


def cut_root(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def cut_layers(model: Any) -> None:
    """As torch's tutorial does; the root's weights are let go after its forward, too."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)


def tokens_of(step: int) -> Tensor:
    return torch.randint(40, (2 * STREAMS, LENGTH), generator=torch.Generator().manual_seed(step))


def trains_as_one_process(config: Any, cut: Callable[[Any], None], rank: int) -> None:
    whole = config.build().double()
    model = copy.deepcopy(whole)
    cut(model)
    mine = slice(rank * STREAMS, (rank + 1) * STREAMS)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, whole)]
    memory = whole_memory = None
    for step in range(4):
        tokens, targets = tokens_of(step), tokens_of(step).roll(-1, 1)
        result, memory = model.loss(tokens[mine], targets[mine], memory)
        expected, whole_memory = whole.loss(tokens, targets, whole_memory)
        mean = result.objective.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.objective.detach(), rtol=0, atol=1e-10)
        for optimizer, objective in zip(optimizers, (result.objective, expected.objective), strict=True):
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()
    evaluates_as_one_process(model.eval(), whole.eval(), memory, whole_memory, mine)


def evaluates_as_one_process(
    model: LanguageModel, whole: LanguageModel, memory: Any, whole_memory: Any, mine: slice
) -> None:
    tokens = tokens_of(9)
    with torch.no_grad():
        found, expected = model(tokens[mine], memory)[0], whole(tokens, whole_memory)[0][mine]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        result, _ = model.loss(tokens, tokens)
        torch.testing.assert_close(result.nll, whole.loss(tokens, tokens)[0].nll, rtol=0, atol=1e-9)
        projected = whole.init_memory(2 * STREAMS, projected=True) if hasattr(memory, "hidden") else None
        found, expected = ([], [])
        for outputs, one in ((found, model), (expected, whole)):
            carried = projected
            for step in range(3):
                output, carried = one(tokens_of(step), carried)
                outputs.append(output)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Loss(nn.Module):
    """What FullyShardedDataParallel wraps: its forward pass is the loss."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Any:
        return self.model.loss(*arguments)


def trains_under_the_older_wrapper(config: Any, rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole = config.build()
    wrapped = FullyShardedDataParallel(Loss(copy.deepcopy(whole)), device_id=torch.device("cpu"))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (wrapped, whole)]
    memories = [None, None]
    for step in range(3):
        objectives = []
        for n, loss in enumerate((wrapped, whole.loss)):
            result, memories[n] = loss(tokens_of(step), tokens_of(step), memories[n])
            objectives.append(result.objective)
        torch.testing.assert_close(*objectives, rtol=0, atol=1e-5)
        for optimizer, objective in zip(optimizers, objectives, strict=True):
            objective.backward()
            optimizer.step()
            optimizer.zero_grad()


def serves_a_layer(way: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    whole = nn.LSTM(3, 4, 2, dtype=torch.float32)
    layer: Any = LSTM(3, 4, 2)
    layer.load_state_dict(whole.state_dict())
    if way == "fully_shard":
        fully_shard(layer)
    else:
        layer = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=way == "original")
    input = torch.randn(LENGTH, 2, 3)
    for _ in range(2):
        found, expected = layer(input)[0], whole(input)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        found.sum().backward()


def cases() -> dict[str, Callable[[int], None]]:
    found: dict[str, Callable[[int], None]] = {}
    for name, config in CONFIGS.items():
        for cut in (cut_root, cut_layers):
            found[f"{name}, {cut.__name__}"] = lambda rank, config=config, cut=cut: trains_as_one_process(
                config, cut, rank
            )
        found[f"{name}, older"] = lambda rank, config=config: trains_under_the_older_wrapper(config, rank)
    for way in ("fully_shard", "original", "flat"):
        found[f"LSTM, {way}"] = lambda rank, way=way: serves_a_layer(way)
    return found


def run(rank: int, folder: Path, names: Iterable[str]) -> None:
    """Every case in turn, in this process of two; writes what failed, or nothing, to a file of its own."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    failed = ""
    for name in names:
        torch.manual_seed(0)
        try:
            cases()[name](rank)
        except Exception:
            failed = f"{name}: {traceback.format_exc()}"
            break
    (folder / f"{rank}.part").write_text(failed)
    os.replace(folder / f"{rank}.part", folder / str(rank))
    if not failed:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("what", ["transformer_xl", "awd_lstm", "LSTM"])
def test_cut_up_weights_train_as_whole_ones(what: str, tmp_path: Path) -> None:
    names = [name for name in cases() if name.startswith(what)]
    assert len(names) == 3
    processes = [SERVER.Process(target=run, args=(rank, tmp_path, names)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        process.kill()
        process.join()
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == ""
