"""Weights are found in wrapped, prefixed and sharded checkpoints; incomplete or ambiguous ones raise."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytbptt.conversion.source_checkpoint import read
from pytbptt.convert import from_awd_lstm, from_fastai, from_kimiyoung, from_transfo_xl
from pytbptt.errors import InputError
from tests.common.conversion_cases import (
    KIMIYOUNG_CASES,
    KIMIYOUNG_SIZES,
    load_transfo_xl,
    make_awd_lstm,
    make_kimiyoung,
)
from tests.common.external_models import with_random_weights


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


CONTAINERS = {
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {"state": {}}},
    "Lightning": lambda weights: {"state_dict": {f"model.{name}": value for name, value in weights.items()}},
    "DeepSpeed": lambda weights: {"module": weights, "dp_world_size": 2},
    "prefix": lambda weights: {f"module.{name}": value for name, value in weights.items()},
    "prefixes": lambda weights: {f"module._orig_mod.net.{name}": value for name, value in weights.items()},
    "nested": lambda weights: {"checkpoint": {"model": weights}, "args": Namespace(lr=1)},
    "other entries": lambda weights: {**weights, "epoch": 3, "best": None},
    "parameters": lambda weights: {name: nn.Parameter(value) for name, value in weights.items()},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_wrapped_and_prefixed_weights_load_equal_model(tmp_path: Path, container: str, legacy: bool) -> None:
    transfo_xl, config, _, _ = load_transfo_xl("default")
    model = make_kimiyoung("default")
    awd = make_awd_lstm().state_dict()
    fastai = {f"{'1' if name.startswith('decoder') else '0'}.{name}": value for name, value in awd.items()}
    for name, weights, settings, expected in (
        ("transfo_xl", transfo_xl, config, from_transfo_xl(transfo_xl, config)),
        ("kimiyoung", model.state_dict(), KIMIYOUNG_SIZES, from_kimiyoung(model.state_dict(), KIMIYOUNG_SIZES)),
        ("awd_lstm", awd, {}, from_awd_lstm(awd)),
        ("fastai", fastai, {}, from_fastai(fastai)),
    ):
        path = tmp_path / name
        torch.save(CONTAINERS[container](weights), path, _use_new_zipfile_serialization=not legacy)
        found = read(path, settings)
        assert found.project == name
        assert_same(found.model, expected)


def test_16_bit_weights_are_converted_to_float32(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in make_awd_lstm().state_dict().items()}
    torch.save(weights, tmp_path / "half.pt")
    model = read(tmp_path / "half.pt", {}).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.embedding.weights[0], weights["encoder.weight"].float())


def test_ambiguous_prefix_raises(tmp_path: Path) -> None:
    weights = {f"model.{name}": value for name, value in make_awd_lstm().state_dict().items()}
    torch.save({"state_dict": {**weights, "criterion.weight": torch.ones(2)}}, tmp_path / "mixed.pt")
    with pytest.raises(InputError, match=r"found weights of model\.\* and criterion\.weight beside them, expected all"):
        read(tmp_path / "mixed.pt", {})


def write_shards(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Writes a directory as save_pretrained(max_shard_size=…); returns weights, configuration and index."""
    weights, config, _, _ = load_transfo_xl("clamped, same length")
    (folder / "config.json").write_text(json.dumps({"model_type": "transfo-xl", **config}))
    names, stem = sorted(weights), "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-0000{1 + n % 3}-of-00003.{kind}" for n, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: weights[name].clone() for name in names if weight_map[name] == shard}
        if kind == "safetensors":
            pytest.importorskip("safetensors.torch", reason="needs the package safetensors").save_file(
                part, folder / shard
            )
        else:
            torch.save(part, folder / shard)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weights, config, index


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_sharded_weights_load_equal_model(tmp_path: Path, kind: str) -> None:
    weights, config, index = write_shards(tmp_path, kind)
    expected = from_transfo_xl(weights, config)
    assert_same(read(tmp_path, {}).model, expected)
    assert_same(read(index, config).model, expected)


def test_incomplete_shards_raise(tmp_path: Path) -> None:
    _, config, index = write_shards(tmp_path, "bin")
    complete = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(complete.items()))
    for weight_map, message in (
        ({}, "found no weight_map"),
        ({name: 3}, "found shard 3, expected the name of a file beside it"),
        ({name: "../other.bin"}, r"found shard '\.\./other\.bin', expected the name of a file"),
        ({name: "nowhere.bin"}, r"found no \S+nowhere\.bin, expected every shard that it names"),
        (
            {name: shard, "transformer.other": shard},
            f"found no transformer.other in its shards, expected it in {shard}",
        ),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=message):
            read(tmp_path, config)
    index.write_text(json.dumps({"weight_map": complete}))
    torch.save([1], tmp_path / shard)
    with pytest.raises(InputError, match=rf"{shard}: found a list, expected a state_dict"):
        read(tmp_path, config)
    index.write_text("[]")
    with pytest.raises(InputError, match="found a list, expected the index"):
        read(tmp_path, config)


def test_missing_softmax_weights_raise(tmp_path: Path) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    base = {name.removeprefix("transformer."): value for name, value in weights.items() if "crit" not in name}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl", **config}))
    torch.save(base, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(
            InputError, match=r"^weights: found no crit\.\* \(the softmax\), expected a TransfoXLLMHeadMod"
        ):
            read(source, config)


@pytest.mark.parametrize("key", ["tie_weight", "tie_word_embeddings"])
def test_tie_weight_false_is_respected(key: str) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    config = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    untied = {name: value + 1 if name.startswith("crit.out_layers") else value for name, value in weights.items()}
    model = from_transfo_xl(untied, {**config, key: False})
    assert not torch.equal(model.embedding.weights[0], model.softmax.weights[0])
    assert torch.equal(model.softmax.weights[0], untied["crit.out_layers.0.weight"])
    with pytest.raises(InputError, match=r"found crit\.out_layers\.0\.weight unlike transformer\.word_emb"):
        from_transfo_xl(untied, config)


def test_encoder_only_checkpoint_loads_with_zero_bias(tmp_path: Path) -> None:
    complete = make_awd_lstm().state_dict()
    encoder = {name: value for name, value in complete.items() if not name.startswith("decoder")}
    torch.save({**encoder, "encoder_dp.emb.weight": encoder["encoder.weight"]}, tmp_path / "encoder.pth")
    found = read(tmp_path / "encoder.pth", {})
    assert found.project == "fastai"
    assert found.warning.startswith("found only an encoder, as save_encoder writes it")
    assert found.model.config.tie_weights
    assert not found.model.softmax.biases[0].any()
    expected = from_awd_lstm(complete)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)) or name == "softmax.biases.0"


def test_tied_weights_omitted_by_safetensors_are_restored(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
    weights = make_awd_lstm().state_dict()
    kept = {name: value.clone() for name, value in weights.items() if name != "decoder.weight"}
    safetensors.save_file(kept, tmp_path / "model.safetensors")
    assert_same(read(tmp_path / "model.safetensors", {}).model, from_awd_lstm(weights))


def to_nvidia_names(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A MemTransformerLM's weights under NVIDIA's names, where the softmax has lists of weights and of biases."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        head, _, rest = name.partition("crit.out_layers.")
        index, _, kind = rest.partition(".")
        if rest:
            renamed[f"{head}crit.out_layers_{kind}{'es' if kind == 'bias' else 's'}.{index}"] = value
        elif not name.startswith("crit.out_projs.") or not config["tie_projs"][int(name.rsplit(".", 1)[1])]:
            renamed[name] = value
    for name, value in weights.items():
        if name.startswith("word_emb.emb_projs."):
            renamed[f"crit.shared_out_projs.{name.rsplit('.', 1)[1]}"] = value
    return renamed


@pytest.mark.parametrize("case", [case for case in KIMIYOUNG_CASES if "same length" not in case])
def test_nvidia_checkpoint_loads_equal_model(tmp_path: Path, case: str) -> None:
    model = make_kimiyoung(case)
    config = {
        "tie_projs": (False,) * 3,
        "tie_weight": True,
        "same_length": False,
        **KIMIYOUNG_SIZES,
        **KIMIYOUNG_CASES[case],
    }
    state = {
        "args": Namespace(work_dir="LM-TFM"),
        "model_config": {**config, "dtype": None, "tgt_len": 4, "ext_len": 0, "attn_type": 0, "sample_softmax": -1},
        "model_state": to_nvidia_names(model.state_dict(), config),
        "optimizer_state": {"state": {}},
        "vocab": Namespace(idx2sym=["<eos>"]),
        "amp_state": None,
        "epoch": 1,
    }
    torch.save(state, tmp_path / "checkpoint_best.pt")
    found = read(tmp_path / "checkpoint_best.pt", {})
    assert found.project == "nvidia"
    assert_same(found.model, from_kimiyoung(model.state_dict(), config))


def test_nvidia_same_length_adds_one_to_mem_len(tmp_path: Path) -> None:
    model = make_kimiyoung("clamped, same length")
    config = {"tie_projs": (False,) * 3, **KIMIYOUNG_SIZES, **KIMIYOUNG_CASES["clamped, same length"]}
    state = {"model_config": config, "model_state": to_nvidia_names(model.state_dict(), config)}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert read(tmp_path / "checkpoint.pt", {}).model.config.mem_len == KIMIYOUNG_SIZES["mem_len"] + 1


def test_cyclic_objects_raise(tmp_path: Path) -> None:
    module = with_random_weights(nn.Sequential(nn.Linear(2, 2)))
    module.add_module("child", module)
    torch.save(module, tmp_path / "loop.pt")
    loop: dict[str, Any] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "dict.pt")
    for name in ("loop.pt", "dict.pt"):
        with pytest.raises(InputError, match=rf"{name}: found .*, expected a checkpoint"):
            read(tmp_path / name, {})
