"""kimiyoung/transformer-xl, the authors' own implementation: its model.pt is a whole pickled module."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.transfo_xl import IGNORED_KEY_SUFFIXES, original_names
from pytbptt.conversion.weights import build_and_load, config_value, int_list
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL, TransformerXLConfig


def from_kimiyoung(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> TransformerXL:
    """The same model here: hidden states and log-probabilities are equal, token ids are the same.

    Args:
        state_dict: of a MemTransformerLM.
        config: its arguments by name: n_token, n_layer, n_head, d_model, d_head, d_inner, mem_len and, where they
            differ from train.py's defaults, d_embed, cutoffs, div_val, pre_lnorm, same_length, clamp_len, dropout,
            dropatt. Weight tying is inferred from equal weights.

    Returns:
        The model, in float32, with initial_memory "empty".

    Raises:
        InputError: weights missing, left over or of another size, or a configuration that is not supported.
    """
    for name in ("attn_type", "ext_len"):
        if config.get(name, 0) != 0:
            raise InputError(f"configuration: {name}: found {config[name]}, expected 0")
    if config_value(config, "sample_softmax", int, -1) > 0:
        raise InputError("configuration: sample_softmax: found a sampled softmax, expected the adaptive one")
    d_model, div_val = config_value(config, "d_model", int), config_value(config, "div_val", int, 1)
    cutoffs = int_list(config, "cutoffs")
    num_clusters = len(cutoffs) + 1
    model_config = TransformerXLConfig(
        vocab_size=config_value(config, "n_token", int),
        **{name: config_value(config, name, int) for name in ("n_layer", "n_head", "d_head", "d_inner", "mem_len")},
        **{name: config_value(config, name, float, 0.0) for name in ("dropout", "dropatt")},
        d_model=d_model,
        d_embed=config_value(config, "d_embed", int, d_model),
        clamp_len=config_value(config, "clamp_len", int, -1),
        same_length=config_value(config, "same_length", bool, False),
        pre_norm=config_value(config, "pre_lnorm", bool, False),
        untie_bias=False,
        cutoffs=cutoffs,
        div_val=div_val,
        tie_weights=all(
            _is_tied(state_dict, f"word_emb.emb_layers.{i}.weight", f"crit.out_layers.{i}.weight")
            for i in range(1 if div_val == 1 else num_clusters)
        ),
        proj_share_all_but_first=all(
            _is_tied(state_dict, f"word_emb.emb_projs.{0 if div_val == 1 else i}", f"crit.out_projs.{i}")
            for i in range(1, num_clusters)
        ),
        initial_memory="empty",
    )
    weights = dict(state_dict)
    for name in ("crit.cluster_weight", "crit.cluster_bias"):
        if name in weights:  # tail i is the head's i-th entry from the end there
            weights[name] = weights[name].flip(0)
    model = build_and_load(model_config, weights, lambda model: original_names(model, ""), IGNORED_KEY_SUFFIXES)
    assert isinstance(model, TransformerXL)
    return model


def from_nvidia(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> TransformerXL:
    """The model of NVIDIA's DeepLearningExamples here; as `from_kimiyoung`, whose model it is.

    Args:
        state_dict: its checkpoint's "model_state".
        config: its checkpoint's "model_config".
    """
    weights = dict(state_dict)
    for name in state_dict:
        for source_prefix, parameter in (("crit.out_layers_weights.", "weight"), ("crit.out_layers_biases.", "bias")):
            if name.startswith(source_prefix):
                weights[f"crit.out_layers.{name.removeprefix(source_prefix)}.{parameter}"] = weights.pop(name)
    shared = [weights.pop(name) for name in sorted(state_dict) if name.startswith("crit.shared_out_projs.")]
    ties = config.get("tie_projs") or []
    for i, tied in enumerate(ties if isinstance(ties, list | tuple) else []):
        if tied and shared:
            weights[f"crit.out_projs.{i}"] = shared[min(i, len(shared) - 1)]
    if config.get("same_length") is True:  # with same_length NVIDIA's model attends to one key more
        config = {**config, "mem_len": config_value(config, "mem_len", int) + 1}
    return from_kimiyoung(weights, config)


def is_nvidia_checkpoint(value: Any) -> bool:
    """Whether these are the contents of a checkpoint of NVIDIA's DeepLearningExamples."""
    return isinstance(value, dict) and isinstance(value.get("model_config"), dict) and "model_state" in value


def is_mem_transformer(module: Any) -> bool:
    """Whether a pickled module is a MemTransformerLM."""
    return {"n_token", "n_layer", "mem_len", "attn_type"} <= safe_unpickle.attributes(module).keys()


def config_from_module(module: Any) -> dict[str, Any]:
    """A pickled MemTransformerLM's arguments, as `from_kimiyoung` takes them."""
    found = safe_unpickle.attributes(module)
    embedding = safe_unpickle.submodule(module, "word_emb")
    layer = safe_unpickle.submodule(module, "layers.0")
    attention = safe_unpickle.submodule(module, "layers.0.dec_attn")
    feed_forward = safe_unpickle.submodule(module, "layers.0.pos_ff")
    config = {
        **{name: found.get(name) for name in ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_embed")},
        **{name: found.get(name) for name in ("mem_len", "ext_len", "clamp_len", "same_length", "attn_type")},
        "sample_softmax": found.get("sample_softmax", -1),
        "div_val": embedding.get("div_val"),
        "cutoffs": list(embedding.get("cutoffs", ()))[:-1],  # the last is the vocabulary's size
        "d_inner": feed_forward.get("d_inner"),
        "pre_lnorm": attention.get("pre_lnorm"),
        "dropout": attention.get("dropout"),
        "dropatt": safe_unpickle.submodule(module, "layers.0.dec_attn.dropatt").get("p") if layer else None,
    }
    return {name: value for name, value in config.items() if value is not None}


def _is_tied(weights: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether both parameters are there, with equal values."""
    return one in weights and other in weights and torch.equal(weights[one], weights[other])
