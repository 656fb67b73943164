"""fairseq checkpoints, with the model's flags in any of their formats, convert to a model with the same outputs."""

from pathlib import Path

import pytest
import torch

from pytbptt.conversion.source_checkpoint import read
from pytbptt.convert import from_fairseq
from pytbptt.errors import InputError
from pytbptt.nn import TransformerXL
from tests.common.conversion_cases import (
    FAIRSEQ_CASE,
    AnyNode,
    DictConfig,
    ListConfig,
    assert_transfo_xl_outputs,
    fairseq_checkpoint,
    load_transfo_xl,
)
from tests.common.external_models import temporary_modules


@pytest.mark.parametrize("config_format", ["args", "dict", "namespace", "omegaconf"])
def test_all_fairseq_checkpoint_formats_match(tmp_path: Path, config_format: str) -> None:
    with temporary_modules(omegaconf=[DictConfig, ListConfig, AnyNode]):
        torch.save(fairseq_checkpoint(config_format), tmp_path / "checkpoint_best.pt")
    found = read(tmp_path / "checkpoint_best.pt", {})
    assert found.project == "fairseq"
    assert isinstance(found.model, TransformerXL)
    _, _, hidden, log_prob = load_transfo_xl(FAIRSEQ_CASE)
    assert_transfo_xl_outputs(found.model, hidden, log_prob)
    assert found.model.config.initial_memory == "zeros"
    assert found.model.config.cutoffs == (5, 9)
    assert found.model.config.dropout == 0.1


def test_missing_or_inconsistent_flags_raise(tmp_path: Path) -> None:
    weights = fairseq_checkpoint("args")["model"]
    torch.save({"model": weights, "args": None}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="found neither cfg nor args"):
        read(tmp_path / "checkpoint.pt", {})
    with pytest.raises(InputError, match=r"expected .* by the configuration"):
        from_fairseq(weights, {"d_model": 8, "n_head": 2, "d_head": 4, "cutoffs": [5, 9]})
