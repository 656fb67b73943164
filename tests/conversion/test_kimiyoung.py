"""Models of kimiyoung/transformer-xl, pickled or as a state_dict, convert to a model with the same outputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.source_checkpoint import read
from pytbptt.convert import from_kimiyoung
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL
from tests.common.conversion_cases import KIMIYOUNG_CASES, KIMIYOUNG_SIZES, make_kimiyoung
from tests.common.external_models import KIMIYOUNG_MODULES, MemTransformerLM, temporary_modules

CHUNKS = (3, 4, 1, 2)


def assert_same_outputs(model: MemTransformerLM, converted: TransformerXL) -> None:
    tokens = torch.randint(0, 13, (sum(CHUNKS),), generator=torch.Generator().manual_seed(0))
    expected_memory: list[Tensor] = [torch.empty(0, 8) for _ in range(2)]
    memory = None
    converted.eval()
    with torch.no_grad():
        for chunk in tokens.split(CHUNKS):
            expected, expected_memory = model.forward_chunk(chunk, expected_memory)
            hidden, memory = converted(chunk.view(1, -1), memory)
            torch.testing.assert_close(hidden[0], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(converted.log_prob(hidden)[0], model.log_prob(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "zipped"), [*((case, True) for case in KIMIYOUNG_CASES), ("div_val 2", False)])
def test_pickled_module_outputs_match(tmp_path: Path, case: str, zipped: bool) -> None:
    model = make_kimiyoung(case)
    with temporary_modules(**KIMIYOUNG_MODULES):
        torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "model.pt", {})
    assert found.project == "kimiyoung"
    assert "mem_transformer.MemTransformerLM" in found.blocked_globals
    assert isinstance(found.model, TransformerXL)
    assert_same_outputs(model, found.model)


def test_state_dict_requires_config(tmp_path: Path) -> None:
    model = make_kimiyoung("clamped, same length")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="found only weights, expected --config"):
        read(tmp_path / "weights.pt", {})
    config = {**KIMIYOUNG_SIZES, **KIMIYOUNG_CASES["clamped, same length"]}
    assert_same_outputs(model, read(tmp_path / "weights.pt", config).model)  # type: ignore[arg-type]
    assert_same_outputs(model, from_kimiyoung(model.state_dict(), config))
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "parallel.pt")
    assert_same_outputs(model, read(tmp_path / "parallel.pt", config).model)  # type: ignore[arg-type]


def test_config_is_recovered_from_pickled_module(tmp_path: Path) -> None:
    model = make_kimiyoung("pre-norm")
    with temporary_modules(**KIMIYOUNG_MODULES):
        torch.save(model, tmp_path / "model.pt")
    config = read(tmp_path / "model.pt", {"mem_len": 9}).model.config
    assert (config.mem_len, config.dropout, config.dropatt) == (9, 0.1, 0.2)  # type: ignore[union-attr]
    assert config.proj_share_all_but_first  # type: ignore[union-attr]
    assert config.tie_weights
    assert config.initial_memory == "empty"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["attn_type", "ext_len", "sample_softmax"])
def test_unsupported_kimiyoung_options_raise(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: found"):
        from_kimiyoung(make_kimiyoung("default").state_dict(), {**KIMIYOUNG_SIZES, name: 2})


def test_state_dict_of_opaque_module_matches(tmp_path: Path) -> None:
    model = make_kimiyoung("div_val 2")
    with temporary_modules(**KIMIYOUNG_MODULES):
        torch.save(model, tmp_path / "model.pt")
    found = safe_unpickle.state_dict(safe_unpickle.read(tmp_path / "model.pt").value)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
