"""kimiyoung/transformer-xl's model and its conversion compute the same; so does its pickled module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pytbptt.conversion import safe_unpickle
from pytbptt.conversion.original import read
from pytbptt.convert import from_kimiyoung
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL
from tests.conversion.external_models import KIMIYOUNG, MemTransformerLM, importable, randomised

SIZES: dict[str, Any] = {
    "n_token": 13,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 8,
    "d_head": 3,
    "d_inner": 10,
    "mem_len": 4,
    "d_embed": 8,
    "cutoffs": [5, 9],
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no cutoffs": {"cutoffs": []},
    "div_val 2": {"div_val": 2, "tie_projs": (False, True, True)},
    "div_val 2, projections of its own": {"div_val": 2},
    "projected": {"d_embed": 4, "tie_projs": (False, True, True)},
    "projected, one tail tied": {"d_embed": 4, "tie_projs": (False, True, False)},
    "tables of its own": {"tie_weight": False, "div_val": 2},
    "pre-norm": {"pre_lnorm": True, "div_val": 2, "tie_projs": (False, True, True)},
    "clamped, same length": {"clamp_len": 2, "same_length": True},
    "memory shorter than a chunk": {"mem_len": 2, "clamp_len": 3},
}
CHUNKS = (3, 4, 1, 2)


def original(case: str) -> MemTransformerLM:
    model: MemTransformerLM = randomised(MemTransformerLM(**{**SIZES, **CASES[case]}))
    return model


def assert_equal(model: MemTransformerLM, converted: TransformerXL) -> None:
    tokens = torch.randint(0, 13, (sum(CHUNKS),), generator=torch.Generator().manual_seed(0))
    theirs: list[Tensor] = [torch.empty(0, 8) for _ in range(2)]
    ours = None
    converted.eval()
    with torch.no_grad():
        for chunk in tokens.split(CHUNKS):
            expected, theirs = model.read(chunk, theirs)
            hidden, ours = converted(chunk.view(1, -1), ours)
            torch.testing.assert_close(hidden[0], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(converted.log_prob(hidden)[0], model.log_prob(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "zipped"), [*((case, True) for case in CASES), ("div_val 2", False)])
def test_a_pickled_module_gives_the_originals_numbers(tmp_path: Path, case: str, zipped: bool) -> None:
    model = original(case)
    with importable(**KIMIYOUNG):
        torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "model.pt", {})
    assert found.project == "kimiyoung"
    assert "mem_transformer.MemTransformerLM" in found.blocked_globals
    assert isinstance(found.model, TransformerXL)
    assert_equal(model, found.model)


def test_a_state_dict_needs_its_configuration(tmp_path: Path) -> None:
    model = original("clamped, same length")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="found weights alone, expected --config"):
        read(tmp_path / "weights.pt", {})
    config = {**SIZES, **CASES["clamped, same length"]}
    assert_equal(model, read(tmp_path / "weights.pt", config).model)  # type: ignore[arg-type]
    assert_equal(model, from_kimiyoung(model.state_dict(), config))
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "parallel.pt")
    assert_equal(model, read(tmp_path / "parallel.pt", config).model)  # type: ignore[arg-type]


def test_what_the_module_was_made_of_is_found(tmp_path: Path) -> None:
    model = original("pre-norm")
    with importable(**KIMIYOUNG):
        torch.save(model, tmp_path / "model.pt")
    config = read(tmp_path / "model.pt", {"mem_len": 9}).model.config
    assert (config.mem_len, config.dropout, config.dropatt) == (9, 0.1, 0.2)  # type: ignore[union-attr]
    assert config.proj_share_all_but_first  # type: ignore[union-attr]
    assert config.tie_weights
    assert config.initial_memory == "empty"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["attn_type", "ext_len", "sample_softmax"])
def test_other_kinds_of_the_model_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: found"):
        from_kimiyoung(original("plain").state_dict(), {**SIZES, name: 2})


def test_the_module_of_a_record_has_the_state_dict_that_it_had(tmp_path: Path) -> None:
    model = original("div_val 2")
    with importable(**KIMIYOUNG):
        torch.save(model, tmp_path / "model.pt")
    found = safe_unpickle.state_dict(safe_unpickle.read(tmp_path / "model.pt").value)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
