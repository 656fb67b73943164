"""transformers' TransfoXL converts to a model with the same outputs, and back to the same state_dict."""

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.convert import from_transfo_xl, to_transfo_xl
from pytbptt.errors import InputError
from tests.common import make_transfo_xl
from tests.common.conversion_cases import assert_transfo_xl_outputs, load_transfo_xl
from tests.common.make_transfo_xl import CASES

GENERATOR = Path(make_transfo_xl.__file__)
TRANSFORMERS_PYTHON = GENERATOR.parents[2] / "benchmarks" / "peers" / ".venv" / "bin" / "python"


@pytest.mark.parametrize("case", CASES)
def test_outputs_match_transformers(case: str) -> None:
    weights, config, hidden, log_prob = load_transfo_xl(case)
    assert_transfo_xl_outputs(from_transfo_xl(weights, config), hidden, log_prob)


def test_matches_transformers_with_other_random_weights(tmp_path: Path) -> None:
    python = sys.executable if find_spec("transformers") else str(TRANSFORMERS_PYTHON)
    if not Path(python).exists():
        pytest.skip("needs transformers==4.35.2: make bench-peers installs it into benchmarks/peers/.venv")
    outputs = tmp_path / "outputs.npz"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, GENERATOR, outputs, "--seed", "7"], check=True, capture_output=True, env=environment)
    for case in CASES:
        weights, config, hidden, log_prob = load_transfo_xl(case, outputs, seed=7)
        assert_transfo_xl_outputs(from_transfo_xl(weights, config), hidden, log_prob, seed=7)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_state_dict_and_config(case: str) -> None:
    weights, config, hidden, log_prob = load_transfo_xl(case)
    state_dict, found = to_transfo_xl(from_transfo_xl(weights, config))
    assert state_dict.keys() == weights.keys()
    for name, tensor in state_dict.items():
        assert torch.equal(tensor, weights[name]), name
    expected = {name: value for name, value in config.items() if name in found}
    if case == "all projections tied":  # which no option of TransformerXL says, so that it has them untied
        expected["proj_share_all_but_first"] = False
    assert {name: found[name] for name in expected} == expected
    assert_transfo_xl_outputs(from_transfo_xl(state_dict, found), hidden, log_prob)


def test_weights_omitted_by_safetensors_are_tied() -> None:
    weights, config, hidden, log_prob = load_transfo_xl("div_val 2")
    for name in ("crit.out_layers.0.weight", "crit.out_layers.1.weight", "crit.out_projs.2"):
        del weights[name]
    assert_transfo_xl_outputs(from_transfo_xl(weights, config), hidden, log_prob)


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
def test_inconsistent_config_raises(changes: Mapping[str, Any], message: str) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    with pytest.raises(InputError, match=message.replace("attention", "dec_attn")):
        from_transfo_xl(weights, {**config, **changes})
