"""salesforce/awd-lstm-lm and fastai's AWD_LSTM, whose weights differ in their names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.weights import build_and_load, config_value, int_list, strip_prefix
from pytbptt.errors import InputError
from pytbptt.nn import AWDLSTM, AWDLSTMConfig

ADAPTIVE_SOFTMAX_ABOVE = 75_000
"""The original's main.py uses an adaptive softmax for vocabularies larger than this."""


def from_awd_lstm(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    criterion: Mapping[str, Tensor] | None = None,
) -> AWDLSTM:
    """salesforce/awd-lstm-lm's model here: hidden states and log-probabilities are equal, token ids are the same.

    Args:
        state_dict: of an RNNModel of LSTMs.
        config: dropout, dropouth, dropouti, dropoute, wdrop and the criterion's splits. Sizes are inferred from the
            weights.
        criterion: the state_dict of its SplitCrossEntropyLoss, if that has splits.

    Raises:
        InputError: weights missing, left over or of another size (a QRNN's, for one), or a large vocabulary's
            without the criterion that goes with them.
    """
    config, criterion = config or {}, criterion or {}
    vocab_size = len(_get_tensor(state_dict, "encoder.weight", 2))
    cutoffs = int_list(config, "splits")
    if not cutoffs and vocab_size > ADAPTIVE_SOFTMAX_ABOVE:
        found = f"{vocab_size} words and no splits"
        raise InputError(f"configuration: found {found}, expected the criterion that main.py saves beside the model")
    if cutoffs and cutoffs[-1] >= vocab_size:
        raise InputError(f"configuration: splits: found {cutoffs}, expected them below the {vocab_size} words")
    weights = dict(state_dict)
    if "decoder.bias" in weights:  # tied, and left out by safetensors
        weights.setdefault("decoder.weight", weights["encoder.weight"])
    if cutoffs:  # the original orders the tail entries in reverse
        weights["tail_vectors"] = _get_tensor(criterion, "tail_vectors", 2).flip(0)
        weights["tail_bias"] = _get_tensor(criterion, "tail_bias", 1).flip(0)
    dropouts = {name: config.get(name) for name in ("dropout", "dropouth", "dropouti", "dropoute")}
    return _build_model(weights, {**dropouts, "weight_drop": config.get("wdrop")}, cutoffs)


def from_fastai(state_dict: Mapping[str, Tensor]) -> AWDLSTM:
    """fastai's language model of an AWD_LSTM here: hidden states and log-probabilities are equal, token ids the same.

    Args:
        state_dict: of get_language_model(AWD_LSTM, …), of fastai 0.7 to 2; or of its encoder alone, as save_encoder
            writes it: the decoder is then the encoder's table, as fastai ties them, with a bias of 0.

    Raises:
        InputError: weights missing, left over or of another size (of both directions, for one).
    """
    weights = {**state_dict} if is_fastai_encoder(state_dict) else strip_prefix(state_dict, "0.")
    for name, tensor in strip_prefix(state_dict, "1.decoder.").items():
        weights[f"decoder.{name}"] = tensor
    # fastai keeps a second copy of the embedding for embedding dropout.
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder_")}
    if "encoder.weight" in weights:
        weights.setdefault("decoder.weight", weights["encoder.weight"])
        weights.setdefault("decoder.bias", torch.zeros(len(weights["decoder.weight"])))
    return _build_model(
        weights, {"dropout": 0.1, "dropouth": 0.15, "dropouti": 0.25, "dropoute": 0.02, "weight_drop": 0.2}, ()
    )


def is_fastai_state_dict(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of fastai's model, or of its encoder alone."""
    return "0.encoder.weight" in weights or is_fastai_encoder(weights)


def is_fastai_encoder(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an encoder alone, as fastai's save_encoder writes them."""
    return "encoder.weight" in weights and not any(name.startswith("decoder.") for name in weights)


def is_salesforce_state_dict(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of salesforce/awd-lstm-lm's model."""
    return "encoder.weight" in weights and not is_fastai_encoder(weights)


def config_from_modules(model: Any, criterion: Any) -> dict[str, Any]:
    """The config for `from_awd_lstm`, read from a pickled RNNModel and criterion."""
    found = safe_unpickle.attributes(model)
    config = {name: found.get(name) for name in ("dropout", "dropouth", "dropouti", "dropoute")}
    config["wdrop"] = safe_unpickle.submodule(model, "rnns.0").get("dropout")
    splits = list(safe_unpickle.attributes(criterion).get("splits", ()))
    return {**{name: value for name, value in config.items() if type(value) is float}, "splits": splits[1:-1]}


def _build_model(weights: Mapping[str, Tensor], dropouts: Mapping[str, Any], cutoffs: tuple[int, ...]) -> AWDLSTM:
    encoder, decoder = _get_tensor(weights, "encoder.weight", 2), _get_tensor(weights, "decoder.weight", 2)
    n_layer = sum(name.startswith("rnns.") and name.endswith("weight_ih_l0") for name in weights)
    if n_layer == 0:
        raise InputError("weights: found no rnns.0.weight_ih_l0, expected the layers of an LSTM")
    names: dict[str, tuple[str, ...]] = {
        "embedding.weights.0": ("encoder.weight",),
        "softmax.weights.0": ("decoder.weight",),
        "softmax.biases.0": ("decoder.bias",),
        "softmax.cluster_weight": ("tail_vectors",),
        "softmax.cluster_bias": ("tail_bias",),
    }
    for n in range(n_layer):
        for parameter in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            names[f"layers.{n}.{parameter}"] = (f"rnns.{n}.module.{parameter}", f"rnns.{n}.{parameter}")
        # With weight drop, weight_hh_l0 holds the last masked copy, so prefer weight_hh_l0_raw.
        raw = (f"rnns.{n}.module.weight_hh_l0_raw", f"rnns.{n}.weight_hh_l0_raw")
        names[f"layers.{n}.weight_hh_l0"] = (*raw, f"rnns.{n}.module.weight_hh_l0", f"rnns.{n}.weight_hh_l0")
    inner = next((name for name in names["layers.0.weight_ih_l0"] if name in weights), "rnns.0.weight_ih_l0")
    config = AWDLSTMConfig(
        vocab_size=len(encoder),
        d_embed=encoder.shape[1],
        d_hidden=len(_get_tensor(weights, inner, 2)) // 4 if n_layer > 1 else decoder.shape[1],
        n_layer=n_layer,
        tie_weights=torch.equal(encoder, decoder),
        cutoffs=cutoffs,
        **{name: config_value(dropouts, name, float) for name, value in dropouts.items() if value is not None},
    )
    model = build_and_load(config, weights, lambda _: names)
    assert isinstance(model, AWDLSTM)
    return model


def _get_tensor(weights: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    if name not in weights or weights[name].dim() != dims:
        found = f"{name} {tuple(weights[name].shape)}" if name in weights else f"no {name}"
        raise InputError(f"weights: found {found}, expected it with {dims} dimensions")
    return weights[name]
