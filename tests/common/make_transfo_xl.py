"""Stores the outputs of transformers' TransfoXL, with which the conversion's tests compare theirs:

    benchmarks/peers/.venv/bin/python tests/common/make_transfo_xl.py tests/conversion/transfo_xl.npz

That environment has transformers and no pytbptt, the tests' environment has pytbptt and no transformers. So the weights
are not stored: both sides generate them from their names and the seed.
"""

import argparse
import json
import warnings
import zlib

import numpy as np
import torch

SIZES = {
    "vocab_size": 13,
    "cutoffs": [5, 9],
    "d_model": 8,
    "d_embed": 8,
    "n_head": 2,
    "d_head": 3,
    "d_inner": 10,
    "n_layer": 2,
    "mem_len": 5,
    "clamp_len": -1,
    "same_length": False,
    "div_val": 1,
}
CASES = {
    "default": {},
    "no cutoffs": {"cutoffs": []},
    "div_val 2": {"div_val": 2},
    "div_val 2, untied projections": {"div_val": 2, "proj_share_all_but_first": False},
    "div_val 2, untied weights and projections": {
        "div_val": 2,
        "tie_word_embeddings": False,
        "proj_share_all_but_first": False,
    },
    "projected": {"d_embed": 4},
    "projected, untied projections": {"d_embed": 4, "proj_share_all_but_first": False},
    "projected, no cutoffs": {"d_embed": 4, "cutoffs": []},
    "all projections tied": {"d_embed": 4, "tie_projs": [True, True, True]},
    "untied weights": {"tie_word_embeddings": False},
    "pre-norm": {"pre_lnorm": True, "div_val": 2},
    "pre-norm, same length": {"pre_lnorm": True, "same_length": True},
    "shared biases": {"untie_r": False},
    "clamped": {"clamp_len": 3},
    "clamped, same length": {"clamp_len": 3, "same_length": True, "div_val": 2},
    "memory shorter than a chunk": {"mem_len": 2, "same_length": True},
    "no memory": {"mem_len": 0},
}
CHUNKS = (4, 3, 1, 5)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32, seeded by the name; large enough that every part of the model affects its output."""
    values = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape) * 0.4
    return torch.tensor(values + name.endswith("layer_norm.weight"), dtype=torch.float32)


def random_tokens(seed: int) -> torch.Tensor:
    """int64 (2, sum of CHUNKS)."""
    return torch.tensor(np.random.RandomState(seed).randint(0, SIZES["vocab_size"], (2, sum(CHUNKS))))


def main(output: str, seed: int) -> None:
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel, __version__

    assert __version__ == "4.35.2", f"found transformers {__version__}, expected 4.35.2 (benchmarks/peers)"
    arrays, cases = {}, {}
    for case, changes in CASES.items():
        config = TransfoXLConfig(**{**SIZES, "cutoffs": list(SIZES["cutoffs"]), **changes})
        model = TransfoXLLMHeadModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(random_weight(name, tuple(parameter.shape), seed))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        source = {}  # a tied weight is generated from its first name
        for name, parameter in parameters.items():
            source.setdefault(parameter, name)
        weights = {
            name: [source[parameters[name]] if name in parameters else "", list(tensor.shape)]
            for name, tensor in model.state_dict().items()
        }
        # float32, as transformers masks float32 scores with the least number of the model's dtype.
        hidden, log_prob, mems = [], [], None
        for chunk in random_tokens(seed).split(CHUNKS, dim=1):
            with torch.no_grad():
                result = model(chunk, mems=mems, output_hidden_states=True)
            mems = result.mems
            hidden.append(result.hidden_states[-1])
            log_prob.append(result.prediction_scores)
        arrays[f"{case}: hidden"] = torch.cat(hidden, dim=1).numpy()
        arrays[f"{case}: log_prob"] = torch.cat(log_prob, dim=1).numpy()
        cases[case] = {"config": config.to_diff_dict(), "weights": weights}
    np.savez_compressed(output, cases=np.frombuffer(json.dumps(cases).encode(), dtype=np.uint8), **arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # transformers' own deprecations
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.output, arguments.seed)
