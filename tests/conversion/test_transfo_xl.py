"""transformers' TransfoXL and its conversion compute the same, there and back."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pytbptt.convert import from_transfo_xl, to_transfo_xl
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL
from tests.conversion.make_transfo_xl import CASES, CHUNKS, tokens, weight

COMMITTED = Path(__file__).with_name("transfo_xl.npz")
MAKER = Path(__file__).with_name("make_transfo_xl.py")
PEERS = MAKER.parents[2] / "benchmarks" / "peers" / ".venv" / "bin" / "python"
TOLERANCE = 1e-5  # both sides compute in float32; measured: 3e-6


def load(case: str, path: Path = COMMITTED, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor]:
    """The state_dict and configuration of a case, and the hidden states and log-probabilities that TransfoXL gave."""
    with np.load(path) as arrays:
        made = json.loads(bytes(arrays["cases"]))[case]
        hidden, log_prob = (torch.from_numpy(arrays[f"{case}: {kind}"]) for kind in ("hidden", "log_prob"))
    named = {name: weight(source, tuple(shape), seed) for name, (source, shape) in made["weights"].items() if source}
    exponents = torch.arange(0.0, 8, 2.0) / 8
    return {**named, "transformer.pos_emb.inv_freq": 1 / 10000**exponents}, made["config"], hidden, log_prob


def run(model: TransformerXL, seed: int = 0) -> tuple[Tensor, Tensor]:
    model.eval()
    memory, hidden = None, []
    with torch.no_grad():
        for chunk in tokens(seed).split(CHUNKS, dim=1):
            output, memory = model(chunk, memory)
            hidden.append(output)
        return torch.cat(hidden, dim=1), model.log_prob(torch.cat(hidden, dim=1))


def assert_equal(model: TransformerXL, hidden: Tensor, log_prob: Tensor, seed: int = 0) -> None:
    found_hidden, found_log_prob = run(model, seed)
    torch.testing.assert_close(found_hidden, hidden, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found_log_prob, log_prob, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_log_probabilities_are_transformers(case: str) -> None:
    weights, config, hidden, log_prob = load(case)
    assert_equal(from_transfo_xl(weights, config), hidden, log_prob)


def test_transformers_gives_these_numbers_for_other_weights_too(tmp_path: Path) -> None:
    python = sys.executable if find_spec("transformers") else str(PEERS)
    if not Path(python).exists():
        pytest.skip("needs transformers==4.35.2: make bench-peers installs it into benchmarks/peers/.venv")
    fresh = tmp_path / "fresh.npz"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, MAKER, fresh, "--seed", "7"], check=True, capture_output=True, env=environment)
    for case in CASES:
        weights, config, hidden, log_prob = load(case, fresh, seed=7)
        assert_equal(from_transfo_xl(weights, config), hidden, log_prob, seed=7)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_gives_the_same_state_dict_and_configuration(case: str) -> None:
    weights, config, hidden, log_prob = load(case)
    state_dict, back = to_transfo_xl(from_transfo_xl(weights, config))
    assert state_dict.keys() == weights.keys()
    for name, tensor in state_dict.items():
        assert torch.equal(tensor, weights[name]), name
    sizes = {name: value for name, value in config.items() if name in back}
    if case == "all projections tied":  # which the model here cannot say: it has three of its own
        sizes["proj_share_all_but_first"] = False
    assert {name: back[name] for name in sizes} == sizes
    assert_equal(from_transfo_xl(state_dict, back), hidden, log_prob)


def test_weights_that_safetensors_leaves_out_are_tied() -> None:
    weights, config, hidden, log_prob = load("div_val 2")
    for name in ("crit.out_layers.0.weight", "crit.out_layers.1.weight", "crit.out_projs.2"):
        del weights[name]
    assert_equal(from_transfo_xl(weights, config), hidden, log_prob)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_type": 2}, "attn_type: found 2, expected 0"),
        ({"n_layer": 3}, "found no transformer.layers.2.attention"),
        ({"n_layer": 1}, "found transformer.layers.1."),
        ({"d_inner": 11}, r"CoreNet.0.weight \(10, 8\), expected \(11, 8\)"),
        ({"d_head": "3"}, "d_head: found '3', expected int"),
        ({"cutoffs": [5, 9, "x"]}, "cutoffs: found .* expected a list of integers"),
        ({"d_inner": 10**12}, r"CoreNet.0.weight \(10, 8\), expected \(10{12}, 8\)"),
        ({"n_layer": 10**12}, "n_layer: found 10{12}, expected no more than"),
        ({"layer_norm_epsilon": 1e-12}, "layer_norm_epsilon: found 1e-12"),
        ({"tie_projs": 1}, "tie_projs: found 1, expected a list of true and false"),
        ({"d_inner": 10**30}, "found invalid sizes"),
    ],
)
def test_what_does_not_fit_is_named(changes: Mapping[str, Any], message: str) -> None:
    weights, config, _, _ = load("plain")
    with pytest.raises(InputError, match=message.replace("attention", "dec_attn")):
        from_transfo_xl(weights, {**config, **changes})
