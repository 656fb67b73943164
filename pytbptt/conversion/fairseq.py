"""fairseq's examples/truncated_bptt: its checkpoints hold a TransfoXL and the flags it was trained with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.transfo_xl import from_transfo_xl
from pytbptt.conversion.weights import int_list, strip_prefix
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL

PREFIX = "decoder.model."
DEFAULT_ARGS: dict[str, Any] = {
    "cutoffs": [20000, 40000, 200000],
    "d_model": 500,
    "n_head": 10,
    "d_head": 50,
    "d_inner": 1000,
    "div_val": 1,
    "n_layer": 12,
    "mem_len": 0,
    "clamp_len": -1,
    "same_length": False,
    "dropout": 0.0,
    "dropatt": 0.0,
}
"""fairseq's defaults of the model's arguments."""


def from_fairseq(state_dict: Mapping[str, Tensor], flags: Mapping[str, Any]) -> TransformerXL:
    """The same model here: hidden states and log-probabilities are equal, token ids are the same.

    Args:
        state_dict: the checkpoint's "model".
        flags: the model's flags as fairseq calls them (n_layer, d_model …); what is left out has fairseq's default.

    Returns:
        The model, in float32, with initial_memory "zeros".

    Raises:
        InputError: weights missing, left over or of another size.
    """
    config = {name: flags.get(name, default) for name, default in DEFAULT_ARGS.items()}
    weights = strip_prefix(state_dict, PREFIX)
    biases = [tensor for name, tensor in weights.items() if name.startswith("crit.out_layers.") and "bias" in name]
    vocab_size = sum(len(bias) for bias in biases)
    cutoffs = [cutoff for cutoff in int_list(config, "cutoffs") if cutoff < vocab_size]
    return from_transfo_xl(
        weights, {**config, "cutoffs": cutoffs, "vocab_size": vocab_size, "d_embed": config["d_model"]}
    )


def is_checkpoint(value: Any) -> bool:
    """Whether these are the contents of a checkpoint of fairseq's TransfoXL."""
    model = value.get("model") if isinstance(value, dict) else None
    return (
        isinstance(model, dict) and safe_unpickle.is_state_dict(model) and any(str(n).startswith(PREFIX) for n in model)
    )


def model_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments, from cfg.model (dict, Namespace or OmegaConf) or, in older checkpoints, args.

    Raises:
        InputError: neither is there.
    """
    for source in (_to_container(checkpoint.get("cfg")), {"model": checkpoint.get("args")}):
        model = _to_container(source.get("model")) if isinstance(source, dict) else None
        if isinstance(model, dict):
            return {name: _to_container(model[name]) for name in DEFAULT_ARGS if name in model}
    raise InputError("configuration: found neither cfg nor args in the checkpoint, expected the flags of the training")


def _to_container(value: Any) -> Any:
    """The dict, list or scalar that a Namespace or a node of OmegaConf stands for."""
    fields = safe_unpickle.attributes(value)
    if "_content" in fields:
        return _to_container(fields["_content"])
    if "_val" in fields:
        return fields["_val"]
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        container = {name: _to_container(entry) for name, entry in pairs}
        return container if isinstance(value, dict) else list(container.values())
    return dict(fields) if fields else value
