"""AWD-LSTMs of awd-lstm-lm and fastai convert to a model with the same outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytbptt.conversion import awd_lstm
from pytbptt.conversion.source_checkpoint import read
from pytbptt.convert import from_awd_lstm, from_fastai
from pytbptt.errors import InputError
from pytbptt.nn import AWDLSTM
from tests.common.conversion_cases import make_awd_lstm
from tests.common.external_models import (
    AWD_LSTM_LM_MODULES,
    RNNModel,
    SplitCrossEntropyLoss,
    temporary_modules,
    with_random_weights,
)

CHUNKS = (3, 5, 1)


def log_prob(model: RNNModel, hidden: Tensor, splits: list[int], criterion: dict[str, Tensor]) -> Tensor:
    """As awd-lstm-lm's criterion, whose head ends with the splits' probabilities in reverse order."""
    logits = hidden @ model.decoder.weight.T + model.decoder.bias
    if not splits:
        return logits.log_softmax(1)
    edges = [*splits, 11]
    tail_logits = hidden @ criterion["tail_vectors"].T + criterion["tail_bias"]
    head = torch.cat([logits[:, : edges[0]], tail_logits], dim=1).log_softmax(1)
    tails = [head[:, -i, None] + logits[:, edges[i - 1] : edges[i]].log_softmax(1) for i in range(1, len(splits) + 1)]
    return torch.cat([head[:, : edges[0]], *tails], dim=1)


def assert_same_outputs(
    model: RNNModel, converted: Any, splits: list[int] | None = None, criterion: dict[str, Tensor] | None = None
) -> None:
    assert isinstance(converted, AWDLSTM)
    converted.eval()
    tokens = torch.randint(0, 11, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(0))
    memory, states = None, [None] * len(model.rnns)
    weights = model.state_dict()
    layers = []
    for n in range(len(model.rnns)):
        wrapped = f"rnns.{n}.module.weight_ih_l0" in weights
        prefix = f"rnns.{n}.module." if wrapped else f"rnns.{n}."
        layer_weights = {name: weights[f"{prefix}{name}_l0"] for name in ("weight_ih", "bias_ih", "bias_hh")}
        layer_weights["weight_hh"] = weights[f"{prefix}weight_hh_l0{'_raw' if wrapped else ''}"]
        layer = nn.LSTM(layer_weights["weight_ih"].shape[1], layer_weights["weight_hh"].shape[1])
        layer.load_state_dict({f"{name}_l0": tensor for name, tensor in layer_weights.items()})
        layers.append(layer)
    with torch.no_grad():
        for chunk in tokens.split(CHUNKS, dim=1):
            hidden = model.encoder(chunk.t())
            for n, layer in enumerate(layers):
                hidden, states[n] = layer(hidden, states[n])
            output, memory = converted(chunk, memory)
            torch.testing.assert_close(output, hidden.transpose(0, 1), rtol=0, atol=1e-5)
            expected = log_prob(model, hidden.transpose(0, 1).flatten(0, 1), splits or [], criterion or {})
            torch.testing.assert_close(converted.log_prob(output).flatten(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("splits", [[], [4], [3, 5, 8]])
@pytest.mark.parametrize("wdrop", [0.5, 0.0])
def test_pickled_awd_lstm_lm_outputs_match(tmp_path: Path, splits: list[int], wdrop: float) -> None:
    model, criterion = make_awd_lstm(wdrop), with_random_weights(SplitCrossEntropyLoss(4, splits))
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    with temporary_modules(**AWD_LSTM_LM_MODULES):
        torch.save([model, criterion, optimizer], tmp_path / "PTB.pt")
    found = read(tmp_path / "PTB.pt", {})
    assert found.project == "awd_lstm"
    assert_same_outputs(model, found.model, splits, criterion.state_dict())
    assert isinstance(found.model, AWDLSTM)
    assert (found.model.config.dropouti, found.model.config.weight_drop) == (0.65, wdrop)
    assert found.model.config.tie_weights


@pytest.mark.parametrize(
    "changes", [{}, {"tie_weights": False}, {"nlayers": 1}, {"nlayers": 1, "tie_weights": False, "wdrop": 0.0}]
)
def test_state_dict_outputs_match(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_awd_lstm(**changes)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert_same_outputs(model, read(tmp_path / "weights.pt", {}).model)
    assert_same_outputs(model, from_awd_lstm(model.state_dict()))


def to_fastai_names(model: RNNModel, version: int) -> dict[str, Tensor]:
    """The same weights under the names of fastai 1 or 2."""
    names = {
        "encoder.weight": "0.encoder.weight",
        "decoder.weight": "1.decoder.weight",
        "decoder.bias": "1.decoder.bias",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("module.weight_hh_l0"):
            if version == 1:  # which saves it as well as the raw one
                weights[f"0.{name}"] = tensor
            continue
        weights[names.get(name, f"0.{name.replace('module.weight_hh_l0_raw', 'weight_hh_l0_raw')}")] = tensor
    return {**weights, "0.encoder_dp.emb.weight": model.encoder.weight.detach()}


@pytest.mark.parametrize("version", [1, 2])
def test_fastai_state_dict_outputs_match(tmp_path: Path, version: int) -> None:
    model = make_awd_lstm()
    weights = to_fastai_names(model, version)
    torch.save({"model": weights, "opt": {"state": []}}, tmp_path / "lm.pth")
    found = read(tmp_path / "lm.pth", {})
    assert found.project == "fastai"
    assert_same_outputs(model, found.model)
    del weights["1.decoder.bias"]
    with torch.no_grad():
        model.decoder.bias.zero_()
    assert_same_outputs(model, from_fastai(weights))


def test_unsupported_awd_lstm_state_dict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = to_fastai_names(make_awd_lstm(), 2)
    with pytest.raises(InputError, match=r"found rnns.0.module.weight_ih_l0_reverse, expected no such weight"):
        from_fastai({**weights, "0.rnns.0.module.weight_ih_l0_reverse": torch.zeros(24, 4)})
    with pytest.raises(InputError, match=r"found no rnns.0.weight_ih_l0, expected the layers of an LSTM"):
        from_fastai({name: tensor for name, tensor in weights.items() if "rnns" not in name})
    with pytest.raises(InputError, match=r"found no encoder.weight"):
        from_fastai({"0.rnns.0.module.weight_ih_l0": torch.zeros(24, 4)})
    monkeypatch.setattr(awd_lstm, "ADAPTIVE_SOFTMAX_ABOVE", 10)
    with pytest.raises(InputError, match="11 words and no splits, expected the criterion"):
        from_awd_lstm(make_awd_lstm().state_dict())
