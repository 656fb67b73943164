"""Conversion from and to Hugging Face TransfoXL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle, weight_files
from pytbptt.conversion.weights import build_and_load, config_value, int_list
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL, TransformerXLConfig

VOCABULARY_FILES = ("vocab.pkl", "vocab.bin", "vocab.pt", "vocab.txt")
IGNORED_KEY_SUFFIXES = ("inv_freq",)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 267735,
    "cutoffs": [20000, 40000, 200000],
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "div_val": 4,
    "pre_lnorm": False,
    "n_layer": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "proj_share_all_but_first": True,
    "attn_type": 0,
    "sample_softmax": -1,
    "dropout": 0.1,
    "dropatt": 0.0,
    "untie_r": True,
    "init": "normal",
    "init_range": 0.01,
    "proj_init_std": 0.01,
    "init_std": 0.02,
    "layer_norm_epsilon": 1e-5,
}
"""TransfoXLConfig's defaults; config.json omits values equal to them."""


def from_transfo_xl(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> TransformerXL:
    """The same model here: hidden states and log-probabilities are equal, token ids are the same.

    Args:
        state_dict: of a TransfoXLLMHeadModel; tied weights may be left out, as safetensors leaves them.
        config: its configuration as a dict (config.to_dict(), or config.json); what is left out has transformers'
            default. Projection tying that proj_share_all_but_first cannot express is not kept: those projections become
            separate parameters.

    Returns:
        The model, in float32, with initial_memory "zeros": TransfoXL attends to a memory of zeros at the start.

    Raises:
        InputError: weights missing, left over or of another size, or a configuration that is not supported.
    """
    known = {**DEFAULTS, **config, "vocab_size": config.get("vocab_size", config.get("n_token", 267735))}
    check_has_softmax(state_dict)
    # Early versions of transformers called it tie_weight.
    tie_weights = all(config_value(known, name, bool, True) for name in ("tie_word_embeddings", "tie_weight"))
    for name, expected in (("attn_type", 0), ("layer_norm_epsilon", 1e-5)):
        if known[name] != expected:
            raise InputError(f"configuration: {name}: found {known[name]}, expected {expected}")
    if config_value(known, "sample_softmax", int) > 0:
        raise InputError("configuration: sample_softmax: found a sampled softmax, expected the adaptive one")
    cutoffs = int_list(known, "cutoffs")
    shared = [False] + [True] * len(cutoffs)
    ties = known.get("tie_projs") or []
    if not isinstance(ties, list | tuple) or not all(type(tie) is bool for tie in ties):
        raise InputError(f"configuration: tie_projs: found {repr(ties)[:60]}, expected a list of true and false")
    tied = list(ties or (shared if config_value(known, "proj_share_all_but_first", bool) else []))
    weights = _tie_weights(state_dict, tie_weights, tied, config_value(known, "div_val", int))
    model_config = TransformerXLConfig(
        **{name: config_value(known, name, int) for name in ("vocab_size", "n_layer", "d_model", "n_head", "d_head")},
        **{name: config_value(known, name, int) for name in ("d_inner", "d_embed", "mem_len", "clamp_len", "div_val")},
        **{name: config_value(known, name, float) for name in ("dropout", "dropatt", "init_range", "init_std")},
        proj_init_std=config_value(known, "proj_init_std", float),
        same_length=config_value(known, "same_length", bool),
        pre_norm=config_value(known, "pre_lnorm", bool),
        untie_bias=config_value(known, "untie_r", bool),
        cutoffs=cutoffs,
        tie_weights=tie_weights,
        proj_share_all_but_first=tied == shared,
        initial_memory="zeros",
        init=known["init"],
    )
    model = build_and_load(
        model_config, weights, lambda model: original_names(model, "transformer."), IGNORED_KEY_SUFFIXES
    )
    assert isinstance(model, TransformerXL)
    return model


def check_has_softmax(weights: Mapping[str, Tensor]) -> None:
    """Check that the weights include the softmax: those of a TransfoXLModel or a classifier do not.

    Raises:
        InputError: there are no crit.* weights.
    """
    if not any(name.startswith("crit.") for name in weights):
        raise InputError(
            "weights: found no crit.* (the softmax), expected a TransfoXLLMHeadModel's, not a TransfoXLModel's"
        )


def to_transfo_xl(model: TransformerXL) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert to a state_dict and config for TransfoXLLMHeadModel(TransfoXLConfig(**config)).

    TransfoXL always attends to a memory of zeros at the start; a model whose initial_memory is "empty" gives other
    numbers there until the memory is full.

    Args:
        model: any TransformerXL; the returned tensors share its storage.

    Returns:
        The state_dict and the configuration.
    """
    config, edges = model.config, model.softmax.edges
    weights: dict[str, Tensor] = {}
    for name, source_names in original_names(model, "transformer.").items():
        weights.update(dict.fromkeys(source_names, model.state_dict()[name]))
    if config.untie_bias:
        del weights["transformer.r_w_bias"], weights["transformer.r_r_bias"]
    exponents = torch.arange(0.0, config.d_model, 2.0) / config.d_model
    weights["transformer.pos_emb.inv_freq"] = 1 / (10000**exponents)
    return weights, {
        **{name: getattr(config, name) for name in ("vocab_size", "n_layer", "d_model", "n_head", "d_head", "d_inner")},
        **{name: getattr(config, name) for name in ("mem_len", "clamp_len", "same_length", "div_val", "init")},
        **{name: getattr(config, name) for name in ("dropout", "dropatt", "init_range", "init_std", "proj_init_std")},
        "d_embed": config.d_embed or config.d_model,
        "cutoffs": edges[1:-1],
        "pre_lnorm": config.pre_norm,
        "untie_r": config.untie_bias,
        "proj_share_all_but_first": config.tie_weights and config.proj_share_all_but_first,
        "tie_word_embeddings": config.tie_weights,
        "layer_norm_epsilon": 1e-5,
    }


def read_directory(directory: Path) -> tuple[safe_unpickle.FileContents, dict[str, Any]]:
    """Weights and configuration of a directory that save_pretrained wrote.

    Raises:
        InputError: no readable config.json, no weight file, or another model type.
    """
    path = directory / "config.json"
    config = weight_files.read_json(path, "a model's configuration")
    if (model_type := config.get("model_type", "transfo-xl")) != "transfo-xl":
        raise InputError(f"{path}: found model_type {model_type}, expected transfo-xl")
    for name in weight_files.WEIGHT_FILES:
        if (directory / name).exists():
            return weight_files.read(directory / name), config
    raise InputError(f"{directory}: found no weights, expected {' or '.join(weight_files.WEIGHT_FILES)}")


def original_names(model: TransformerXL, prefix: str) -> dict[str, tuple[str, ...]]:
    """For every name in a model's state_dict the names that TransfoXL and kimiyoung/transformer-xl have for it.

    Args:
        model: a TransformerXL of pytbptt.
        prefix: prefix of all names except the softmax's.
    """
    names: dict[str, tuple[str, ...]] = {}
    for i in range(len(model.embedding.weights)):
        names[f"embedding.weights.{i}"] = (f"{prefix}word_emb.emb_layers.{i}.weight",)
        names[f"softmax.weights.{i}"] = (f"crit.out_layers.{i}.weight",)
        names[f"softmax.biases.{i}"] = (f"crit.out_layers.{i}.bias",)
    for i in range(len(model.embedding.projections)):
        names[f"embedding.projections.{i}"] = (f"{prefix}word_emb.emb_projs.{i}",)
    for i in range(len(model.softmax.projections)):
        names[f"softmax.projections.{i}"] = (f"crit.out_projs.{i}",)
    if model.softmax.cluster_weight is not None:
        names["softmax.cluster_weight"] = ("crit.cluster_weight",)
        names["softmax.cluster_bias"] = ("crit.cluster_bias",)
    for n in range(model.config.n_layer):
        layer, source_layer = f"layers.{n}.", f"{prefix}layers.{n}."
        for projection, source in (("qkv_proj", "qkv_net"), ("pos_proj", "r_net"), ("out_proj", "o_net")):
            names[f"{layer}attention.{projection}.weight"] = (f"{source_layer}dec_attn.{source}.weight",)
        for bias, source in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
            names[f"{layer}attention.{bias}"] = (f"{source_layer}dec_attn.{source}", f"{prefix}{source}")
        for parameter in ("weight", "bias"):
            names[f"{layer}attention_norm.{parameter}"] = (f"{source_layer}dec_attn.layer_norm.{parameter}",)
            names[f"{layer}feed_forward_norm.{parameter}"] = (f"{source_layer}pos_ff.layer_norm.{parameter}",)
            for i in (0, 3):
                names[f"{layer}feed_forward.{i}.{parameter}"] = (f"{source_layer}pos_ff.CoreNet.{i}.{parameter}",)
    return names


def _tie_weights(
    state_dict: Mapping[str, Tensor], tie_weights: bool, tie_projections: list[bool], div_val: int
) -> dict[str, Tensor]:
    """The state_dict after what TransfoXLLMHeadModel.tie_weights() does.

    Raises:
        InputError: tied parameters have different values, so one of them would be silently lost.
    """
    weights = dict(state_dict)
    ties: dict[str, str] = {}
    for name in state_dict:
        _, embedding, suffix = name.partition("transformer.word_emb.emb_layers.")
        if tie_weights and embedding:
            ties[f"crit.out_layers.{suffix}"] = name
    for i, tied in enumerate(tie_projections):
        source = f"transformer.word_emb.emb_projs.{0 if div_val == 1 else i}"
        if tied and source in weights:
            ties[f"crit.out_projs.{i}"] = source
    for name, source in ties.items():
        existing = weights.get(name, weights[source])
        if existing.shape == weights[source].shape and not torch.equal(existing, weights[source]):
            found = f"{name} unlike {source}"
            raise InputError(
                f"configuration: found {found}, expected them tied or tie_word_embeddings (tie_projs) false"
            )
        weights[name] = weights[source]
    return weights
