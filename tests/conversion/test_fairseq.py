"""fairseq's checkpoints hold TransfoXL's weights under a prefix, and flags in one of three forms."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.conversion.original import read
from pytbptt.convert import from_fairseq
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL
from tests.conversion.external_models import importable
from tests.conversion.test_transfo_xl import assert_equal, load

CASE = "clamped, same length"


class DictConfig:
    """As omegaconf's: values lie in nodes."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._metadata, self._parent, self._content = None, None, content


class ListConfig:
    def __init__(self, content: list[Any]) -> None:
        self._metadata, self._parent, self._content = None, None, content


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._metadata, self._parent, self._val = None, None, value


def node(value: Any) -> Any:
    if isinstance(value, dict):
        return DictConfig({name: node(entry) for name, entry in value.items()})
    return ListConfig([node(entry) for entry in value]) if isinstance(value, list) else AnyNode(value)


def checkpoint(form: str) -> dict[str, Any]:
    weights, config, _, _ = load(CASE)
    flags = {name: config[name] for name in ("d_model", "n_head", "d_head", "d_inner", "n_layer", "mem_len", "div_val")}
    flags.update(cutoffs=[5, 9, 200000], clamp_len=3, same_length=True, dropout=0.1, checkpoint_activations=False)
    result: dict[str, Any] = {
        "args": argparse.Namespace(arch="transformer_xl", **flags) if form == "args" else None,
        "model": {f"decoder.model.{name}": tensor for name, tensor in weights.items()},
        "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 3}],
        "extra_state": {"epoch": 1},
    }
    if form != "args":
        cfg: dict[str, Any] = {"task": {"tokens_per_sample": 64}, "model": {"_name": "transformer_xl", **flags}}
        if form == "a namespace":
            cfg["model"] = argparse.Namespace(**cfg["model"])
        result["cfg"] = node(cfg) if form == "omegaconf" else cfg
    return result


@pytest.mark.parametrize("form", ["args", "a dict", "a namespace", "omegaconf"])
def test_checkpoints_of_every_age_give_the_originals_numbers(tmp_path: Path, form: str) -> None:
    with importable(omegaconf=[DictConfig, ListConfig, AnyNode]):
        torch.save(checkpoint(form), tmp_path / "checkpoint_best.pt")
    found = read(tmp_path / "checkpoint_best.pt", {})
    assert found.project == "fairseq"
    assert isinstance(found.model, TransformerXL)
    _, _, hidden, log_prob = load(CASE)
    assert_equal(found.model, hidden, log_prob)
    assert found.model.config.initial_memory == "zeros"
    assert found.model.config.cutoffs == (5, 9)
    assert found.model.config.dropout == 0.1


def test_flags_that_are_missing_or_wrong_are_named(tmp_path: Path) -> None:
    weights = checkpoint("args")["model"]
    torch.save({"model": weights, "args": None}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="found neither cfg nor args"):
        read(tmp_path / "checkpoint.pt", {})
    with pytest.raises(InputError, match=r"expected .* by the configuration"):
        from_fairseq(weights, {"d_model": 8, "n_head": 2, "d_head": 4, "cutoffs": [5, 9]})
