"""A model's weights are used through its modules: whatever tool swaps, wraps, hooks or shards them is seen at once."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from tiny_transformer_xl import draw_tokens, make
from torch import Tensor, func, nn

from pytbptt.nn import TransformerXL, TransformerXLConfig
from pytbptt.nn.awd_lstm import AWDLSTM, AWDLSTMConfig

PROJECTIONS = ("qkv_proj", "pos_proj", "out_proj")


def read(model: TransformerXL, projected: bool, chunks: int = 3) -> Tensor:
    """The output of a few chunks, so that both memories and every table of distances have been used."""
    memory = model.init_memory(3, projected=projected)
    outputs = []
    for chunk in draw_tokens(length=5 * chunks).split(5, dim=1):
        output, memory = model(chunk, memory)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


class Doubled(nn.Module):
    """Stands for an adapter: it has a layer's weight, which is not all that it applies."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input) + self.layer(input)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def wrap(attention: nn.Module, name: str) -> None:
    setattr(attention, name, Doubled(getattr(attention, name)))


def replace_forward(attention: nn.Module, name: str) -> None:
    layer = getattr(attention, name)
    forward = layer.forward
    layer.forward = lambda input: 2 * forward(input)


def copy_data(attention: nn.Module, name: str) -> None:
    weight = getattr(attention, name).weight
    weight.data.copy_(2 * weight.data)


def set_data(attention: nn.Module, name: str) -> None:
    weight = getattr(attention, name).weight
    weight.data = 2 * weight.data


TOOLS: dict[str, Callable[[nn.Module, str], object]] = {
    "adapter": wrap,
    "forward of its own": replace_forward,
    "parametrization": lambda attention, name: parametrize.register_parametrization(
        getattr(attention, name), "weight", Twice()
    ),
    "forward hook": lambda attention, name: getattr(attention, name).register_forward_hook(lambda *call: 2 * call[2]),
    "forward pre-hook": lambda attention, name: getattr(attention, name).register_forward_pre_hook(
        lambda module, inputs: (2 * inputs[0],)
    ),
    "data copied": copy_data,
    "data replaced": set_data,
}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("tool", TOOLS)
def test_whatever_doubles_a_projection_is_what_a_doubled_weight_is(tool: str, name: str, projected: bool) -> None:
    model, expected = make(), make()
    with torch.no_grad():
        read(model, projected)  # whatever is kept between calls is there
        for layer, doubled in zip(model.layers, expected.layers, strict=True):
            TOOLS[tool](layer.attention, name)
            getattr(doubled.attention, name).weight.mul_(2)
        torch.testing.assert_close(read(model, projected), read(expected, projected), rtol=0, atol=1e-12)
    if not projected:
        torch.testing.assert_close(read(model.train(), False), read(expected.train(), False), rtol=0, atol=1e-12)


def test_weights_given_for_one_call_serve_that_call_alone() -> None:
    model, other, tokens = make(), make(seed=9), draw_tokens()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            own = model(tokens)[0]
            for _ in range(2):
                found = func.functional_call(model, dict(other.named_parameters()), (tokens,))[0]
                assert torch.equal(found, other(tokens)[0])
            assert torch.equal(model(tokens)[0], own)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamically_quantized_layers_serve_memory_and_distances() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch quantizes nothing")
    model = make(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    coarse = copy.deepcopy(model)
    for layer, own in zip(quantized.layers, coarse.layers, strict=True):
        for name in PROJECTIONS:
            assert type(getattr(layer.attention, name)) is not nn.Linear
            getattr(own.attention, name).weight.data = getattr(layer.attention, name).weight().dequantize()
        for n in (0, 3):
            own.feed_forward[n].weight.data = layer.feed_forward[n].weight().dequantize()
    with torch.no_grad():
        exact, found, expected = read(model, False), read(quantized, False), read(coarse, False)
        kept = read(quantized, True)
    # The activations are rounded too, to 8 bits. What weights of 8 bits do is told apart from weights left out.
    spread = exact.std()
    assert (found - expected).abs().mean() < 0.05 * spread
    assert (kept - found).abs().mean() < 0.05 * spread


@pytest.mark.parametrize(
    "config",
    [
        TransformerXLConfig(vocab_size=11, n_layer=1, d_model=4, n_head=1, d_head=4, d_inner=4),
        AWDLSTMConfig(vocab_size=11, d_embed=4, d_hidden=4, n_layer=2),
    ],
)
def test_hooks_see_the_loss_of_a_model_and_its_softmax(config: object) -> None:
    """FullyShardedDataParallel gathers weights in such hooks, and offloading loads them."""
    model = config.build()
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: called.append(name))
    tokens = torch.randint(11, (2, 3))
    model.loss(tokens, tokens)
    assert called[0] == ""
    assert {"embedding", "layers.0", "softmax"} <= set(called)
    called.clear()
    model.log_prob(torch.zeros(2, 3, 4))
    assert called == ["softmax"]


class Holder(nn.Module):
    """A module of a user's own around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


TIED = {
    "transformer_xl": TransformerXLConfig(
        vocab_size=23, n_layer=2, d_model=8, n_head=2, d_head=4, d_inner=8, cutoffs=(5, 11), div_val=2, untie_bias=False
    ),
    "awd_lstm": AWDLSTMConfig(vocab_size=23, d_embed=6, d_hidden=7, n_layer=2, cutoffs=(5,)),
}


def ties(model: nn.Module) -> list[set[str]]:
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return [tie for tie in names.values() if len(tie) > 1]


@pytest.mark.parametrize("entries", ["shared", "copies", "one of each"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("config", TIED.values(), ids=TIED)
def test_tied_weights_stay_tied_from_meta(config: object, held: bool, entries: str) -> None:
    source = config.build()
    state = source.state_dict()
    if entries != "shared":
        state = {name: entry.clone() for name, entry in state.items()}
    if entries == "one of each":
        for tie in ties(source):
            for name in sorted(tie)[1:]:
                del state[name]
    with torch.device("meta"):
        model = config.build()
    root = Holder(model) if held else model
    prefix = "model." if held else ""
    root.load_state_dict({prefix + name: entry for name, entry in state.items()}, assign=True)
    assert ties(model) == ties(source) != []
    assert model.num_parameters() == source.num_parameters()
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)

    with torch.device("meta"):
        model = config.build()
    (Holder(model) if held else model).to_empty(device="cpu")
    assert ties(model) == ties(source)


def test_what_was_untied_stays_untied() -> None:
    model = TIED["awd_lstm"].build()
    model.softmax.weights[0] = nn.Parameter(model.softmax.weights[0].detach() + 1)
    state = {name: entry.clone() for name, entry in model.state_dict().items()}
    model.double().load_state_dict(state, assign=True)
    assert ties(model) == []
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_entries_of_one_weight_that_differ_are_refused() -> None:
    """The last one would have been loaded, and the first one gone without a word."""
    model = TIED["awd_lstm"].build()
    state = {name: entry.clone() for name, entry in model.state_dict().items()}
    state["softmax.weights.0"][3, 2] += 1
    refusal = "softmax.weights.0 and embedding.weights.0 are tied in this model, but their entries differ"
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=refusal):
            model.load_state_dict(state, assign=assign)


def test_torchscript_is_refused_in_one_line() -> None:
    for module in (make(), AWDLSTM(TIED["awd_lstm"]), Holder(make())):
        with pytest.raises(ValueError, match=r"^\w+: torch\.jit\.script cannot compile it, expected torch\.compile or"):
            torch.jit.script(module)
