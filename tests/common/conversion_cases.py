"""Models and checkpoints of other projects that several conversion tests convert."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytbptt.nn import TransformerXL
from tests.common.external_models import MemTransformerLM, RNNModel, with_random_weights
from tests.common.make_transfo_xl import CHUNKS, random_tokens, random_weight

TRANSFO_XL_OUTPUTS = Path(__file__).parents[1] / "conversion" / "transfo_xl.npz"
TRANSFO_XL_TOLERANCE = 1e-5  # both sides compute in float32; measured: 3e-6

KIMIYOUNG_SIZES: dict[str, Any] = {
    "n_token": 13,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 8,
    "d_head": 3,
    "d_inner": 10,
    "mem_len": 4,
    "d_embed": 8,
    "cutoffs": [5, 9],
}
KIMIYOUNG_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no cutoffs": {"cutoffs": []},
    "div_val 2": {"div_val": 2, "tie_projs": (False, True, True)},
    "div_val 2, untied projections": {"div_val": 2},
    "projected": {"d_embed": 4, "tie_projs": (False, True, True)},
    "projected, one tail tied": {"d_embed": 4, "tie_projs": (False, True, False)},
    "untied weights": {"tie_weight": False, "div_val": 2},
    "pre-norm": {"pre_lnorm": True, "div_val": 2, "tie_projs": (False, True, True)},
    "clamped, same length": {"clamp_len": 2, "same_length": True},
    "memory shorter than a chunk": {"mem_len": 2, "clamp_len": 3},
}

FAIRSEQ_CASE = "clamped, same length"
"""The case of make_transfo_xl.CASES whose weights fairseq_checkpoint has."""


def make_awd_lstm(wdrop: float = 0.5, tie_weights: bool = True, ninp: int = 4, nlayers: int = 3) -> RNNModel:
    model: RNNModel = with_random_weights(
        RNNModel(ntoken=11, ninp=ninp, nhid=6, nlayers=nlayers, wdrop=wdrop, tie_weights=tie_weights)
    )
    return model


def make_kimiyoung(case: str) -> MemTransformerLM:
    model: MemTransformerLM = with_random_weights(MemTransformerLM(**{**KIMIYOUNG_SIZES, **KIMIYOUNG_CASES[case]}))
    return model


def load_transfo_xl(
    case: str, path: Path = TRANSFO_XL_OUTPUTS, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor]:
    """A case's state_dict and configuration, and the hidden states and log-probabilities of transformers' model."""
    with np.load(path) as arrays:
        stored = json.loads(bytes(arrays["cases"]))[case]
        hidden, log_prob = (torch.from_numpy(arrays[f"{case}: {kind}"]) for kind in ("hidden", "log_prob"))
    weights = {
        name: random_weight(source, tuple(shape), seed) for name, (source, shape) in stored["weights"].items() if source
    }
    exponents = torch.arange(0.0, 8, 2.0) / 8
    return {**weights, "transformer.pos_emb.inv_freq": 1 / 10000**exponents}, stored["config"], hidden, log_prob


def assert_transfo_xl_outputs(model: TransformerXL, hidden: Tensor, log_prob: Tensor, seed: int = 0) -> None:
    """The model's outputs for the generator's chunks are those of transformers' model."""
    model.eval()
    memory, outputs = None, []
    with torch.no_grad():
        for chunk in random_tokens(seed).split(CHUNKS, dim=1):
            output, memory = model(chunk, memory)
            outputs.append(output)
        found = torch.cat(outputs, dim=1)
        torch.testing.assert_close(found, hidden, rtol=0, atol=TRANSFO_XL_TOLERANCE)
        torch.testing.assert_close(model.log_prob(found), log_prob, rtol=0, atol=TRANSFO_XL_TOLERANCE)


class DictConfig:
    """As omegaconf's: the values are nodes."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._metadata, self._parent, self._content = None, None, content


class ListConfig:
    def __init__(self, content: list[Any]) -> None:
        self._metadata, self._parent, self._content = None, None, content


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._metadata, self._parent, self._val = None, None, value


def omegaconf_node(value: Any) -> Any:
    if isinstance(value, dict):
        return DictConfig({name: omegaconf_node(entry) for name, entry in value.items()})
    if isinstance(value, list):
        return ListConfig([omegaconf_node(entry) for entry in value])
    return AnyNode(value)


def fairseq_checkpoint(config_format: str) -> dict[str, Any]:
    """A checkpoint with the model's flags as "args", "dict", "namespace" or "omegaconf"."""
    weights, config, _, _ = load_transfo_xl(FAIRSEQ_CASE)
    flags = {name: config[name] for name in ("d_model", "n_head", "d_head", "d_inner", "n_layer", "mem_len", "div_val")}
    flags.update(cutoffs=[5, 9, 200000], clamp_len=3, same_length=True, dropout=0.1, checkpoint_activations=False)
    checkpoint: dict[str, Any] = {
        "args": argparse.Namespace(arch="transformer_xl", **flags) if config_format == "args" else None,
        "model": {f"decoder.model.{name}": tensor for name, tensor in weights.items()},
        "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 3}],
        "extra_state": {"epoch": 1},
    }
    if config_format != "args":
        cfg: dict[str, Any] = {"task": {"tokens_per_sample": 64}, "model": {"_name": "transformer_xl", **flags}}
        if config_format == "namespace":
            cfg["model"] = argparse.Namespace(**cfg["model"])
        checkpoint["cfg"] = omegaconf_node(cfg) if config_format == "omegaconf" else cfg
    return checkpoint
