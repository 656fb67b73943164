"""Names of before release 0.1 still work: keys of a state_dict, submodules, attributes."""

import importlib
import inspect
import pkgutil
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import pytbptt
from pytbptt.nn import LSTM, AdaptiveSoftmax, TransformerXLConfig
from pytbptt.runtime.renamed import Renamed
from pytbptt.training.averaging import WeightAverage
from tests.common.tiny_transformer_xl import make_model, random_tokens

FORMER_NAMES = {"qkv_proj": "qkv_net", "pos_proj": "r_net", "out_proj": "o_net"}


def to_former_names(name: str) -> str:
    return ".".join(FORMER_NAMES.get(part, part) for part in name.split("."))


class Wrapper(nn.Module):
    """Its own submodule has one of the former names, which must stay."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.r_net = make_model(seed)


@pytest.mark.parametrize("wrap", [lambda seed: make_model(seed), Wrapper], ids=["model", "wrapper named r_net"])
def test_state_dicts_with_former_and_current_keys_load(wrap):
    source, tokens = wrap(1), random_tokens()
    state = source.state_dict()
    prefix = "r_net." if isinstance(source, Wrapper) else ""
    former = {prefix + to_former_names(name.removeprefix(prefix)): value for name, value in state.items()}
    assert former.keys() != state.keys()
    for saved in (state, former):
        target = wrap(2)
        target.load_state_dict(saved)
        for one, other in zip(source.parameters(), target.parameters(), strict=True):
            assert torch.equal(one, other)
    model = target.r_net if prefix else target
    assert torch.equal(model(tokens)[0], (source.r_net if prefix else source)(tokens)[0])


def test_averaged_weights_with_former_keys_load():
    model = make_model()
    average = WeightAverage(model, nonmono=1)
    for loss in (1.0, 2.0, 3.0):
        average.record_validation(loss)
    assert average.mean is not None
    state = average.state_dict()
    state["mean"] = {to_former_names(name): mean for name, mean in state["mean"].items()}
    restored = WeightAverage(model, nonmono=1)
    restored.load_state_dict(state)
    assert restored.mean is not None
    assert all(torch.equal(restored.mean[name], average.mean[name]) for name in average.mean)


def test_projections_are_read_and_replaced_by_their_former_names():
    attention = make_model().layers[0].attention
    for current, former in FORMER_NAMES.items():
        with pytest.warns(DeprecationWarning, match=f"{former} is {current} now"):
            assert getattr(attention, former) is getattr(attention, current)
    attention.r_net = replacement = nn.Linear(16, 10, bias=False)
    assert attention.pos_proj is replacement
    assert "r_net" not in dict(attention.named_modules())


def test_renamed_attribute_is_read_and_written_with_a_warning():
    class Old:
        new = 1
        old = Renamed("new")

    instance = Old()
    with pytest.warns(DeprecationWarning, match=r"Old\.old is new now"):
        instance.old = 2
    with pytest.warns(DeprecationWarning, match="will be removed after release 0.1"):
        assert (instance.old, Old.old, instance.new) == (2, 1, 2)


def classes_of_pytbptt() -> list[type]:
    modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(pytbptt.__path__, "pytbptt.")]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return sorted((cls for cls in found if cls.__module__.startswith("pytbptt.")), key=str)


def test_every_former_name_has_a_current_one():
    renamed = [
        (cls, value) for cls in classes_of_pytbptt() for value in vars(cls).values() if isinstance(value, Renamed)
    ]
    assert len(renamed) > 20
    for cls, value in renamed:
        fields = getattr(cls, "__dataclass_fields__", {})
        assert hasattr(cls, value.name) or value.name in fields or value.name in inspect.getsource(cls), value.message


def test_scans_of_all_attributes_do_not_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will be removed after release 0.1")
        for value in (make_model(), LSTM(2, 3), TransformerXLConfig(), pytbptt.data.TextFormat("file")):
            inspect.getmembers(value)
            mock.create_autospec(value)
        torch.jit.trace(LSTM(2, 3), torch.randn(4, 1, 2), check_trace=False)


@pytest.mark.parametrize(
    ("make", "former", "current"),
    [
        (lambda: TransformerXLConfig(), "changed", "replace"),
        (lambda: make_model(), "knows_chunks", "is_chunk_dependent"),
        (lambda: LSTM(2, 3), "run_layer", "forward_layer"),
        (lambda: AdaptiveSoftmax(31, 8, 8, (7, 15), 2), "sizes", "cluster_sizes"),
        (lambda: pytbptt.TruncatedBPTT(nn.Identity(), None, None), "begin", "reset_state"),
        (lambda: pytbptt.data.TextFormat("file"), "with_resets", "with_reset_on"),
        (lambda: pytbptt.data.TextFormat, "from_state", "from_state_dict"),
        (lambda: pytbptt.data.Vocabulary.bytes(), "never_targets", "non_text_ids"),
    ],
)
def test_former_attribute_names_warn_and_work(make, former, current):
    owner = make()
    with pytest.warns(DeprecationWarning, match=f"{former} is {current} now"):
        assert getattr(owner, former) == getattr(owner, current)
