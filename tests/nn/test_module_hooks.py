"""Models use their weights through modules, so that hooks, adapters, parametrizations and tying take effect."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, func, nn

from pytbptt.nn import TransformerXL, TransformerXLConfig
from pytbptt.nn.awd_lstm import AWDLSTM, AWDLSTMConfig
from tests.common.tiny_transformer_xl import make_model, random_tokens

PROJECTIONS = ("qkv_proj", "pos_proj", "out_proj")


def run_chunks(model: TransformerXL, projected: bool, chunks: int = 3) -> Tensor:
    """The output of enough chunks to use the memory and the cached position projections."""
    memory = model.init_memory(3, projected=projected)
    outputs = []
    for chunk in random_tokens(length=5 * chunks).split(5, dim=1):
        output, memory = model(chunk, memory)
        outputs.append(output)
    return torch.cat(outputs, dim=1)


class DoublingAdapter(nn.Module):
    """Stands for an adapter such as LoRA: its `weight` is the layer's, but its forward pass adds to the layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input) + self.layer(input)


class DoubleParametrization(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def add_adapter(attention: nn.Module, name: str) -> None:
    setattr(attention, name, DoublingAdapter(getattr(attention, name)))


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


WEIGHT_DOUBLERS: dict[str, Callable[[nn.Module, str], object]] = {
    "adapter": add_adapter,
    "replaced forward": replace_forward,
    "parametrization": lambda attention, name: parametrize.register_parametrization(
        getattr(attention, name), "weight", DoubleParametrization()
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
@pytest.mark.parametrize("doubler", WEIGHT_DOUBLERS)
def test_hooks_adapters_parametrizations_apply_to_projections(doubler: str, name: str, projected: bool) -> None:
    model, expected = make_model(), make_model()
    with torch.no_grad():
        run_chunks(model, projected)  # fills any cache
        for layer, expected_layer in zip(model.layers, expected.layers, strict=True):
            WEIGHT_DOUBLERS[doubler](layer.attention, name)
            getattr(expected_layer.attention, name).weight.mul_(2)
        torch.testing.assert_close(run_chunks(model, projected), run_chunks(expected, projected), rtol=0, atol=1e-12)
    if not projected:
        torch.testing.assert_close(
            run_chunks(model.train(), False), run_chunks(expected.train(), False), rtol=0, atol=1e-12
        )


def test_functional_call_does_not_leak() -> None:
    model, other, tokens = make_model(), make_model(seed=9), random_tokens()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            output = model(tokens)[0]
            for _ in range(2):
                found = func.functional_call(model, dict(other.named_parameters()), (tokens,))[0]
                assert torch.equal(found, other(tokens)[0])
            assert torch.equal(model(tokens)[0], output)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamically_quantized_model_uses_quantized_weights() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantization engine")
    model = make_model(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dequantized = copy.deepcopy(model)
    for layer, expected_layer in zip(quantized.layers, dequantized.layers, strict=True):
        for name in PROJECTIONS:
            assert type(getattr(layer.attention, name)) is not nn.Linear
            getattr(expected_layer.attention, name).weight.data = getattr(layer.attention, name).weight().dequantize()
        for n in (0, 3):
            expected_layer.feed_forward[n].weight.data = layer.feed_forward[n].weight().dequantize()
    with torch.no_grad():
        expected, found = run_chunks(dequantized, False), run_chunks(quantized, False)
        projected = run_chunks(quantized, True)
        std = run_chunks(model, False).std()
    # The activations are quantized to 8 bits, too. An unused projection would change the output by far more.
    assert (found - expected).abs().mean() < 0.05 * std
    assert (projected - found).abs().mean() < 0.05 * std


@pytest.mark.parametrize(
    "config",
    [
        TransformerXLConfig(vocab_size=11, n_layer=1, d_model=4, n_head=1, d_head=4, d_inner=4),
        AWDLSTMConfig(vocab_size=11, d_embed=4, d_hidden=4, n_layer=2),
    ],
)
def test_forward_pre_hooks_run_for_loss_and_log_prob(config: object) -> None:
    """FullyShardedDataParallel gathers weights in such hooks, and CPU offloading loads them."""
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


class WrapperModule(nn.Module):
    """A user's module that contains a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


TIED_CONFIGS = {
    "transformer_xl": TransformerXLConfig(
        vocab_size=23, n_layer=2, d_model=8, n_head=2, d_head=4, d_inner=8, cutoffs=(5, 11), div_val=2, untie_bias=False
    ),
    "awd_lstm": AWDLSTMConfig(vocab_size=23, d_embed=6, d_hidden=7, n_layer=2, cutoffs=(5,)),
}


def tied_parameter_names(model: nn.Module) -> list[set[str]]:
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return [tied for tied in names.values() if len(tied) > 1]


@pytest.mark.parametrize("entries", ["tied", "cloned", "first name only"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("config", TIED_CONFIGS.values(), ids=TIED_CONFIGS)
def test_tied_weights_stay_tied_from_meta(config: object, wrapped: bool, entries: str) -> None:
    source = config.build()
    state = source.state_dict()
    if entries != "tied":
        state = {name: entry.clone() for name, entry in state.items()}
    if entries == "first name only":
        for tied in tied_parameter_names(source):
            for name in sorted(tied)[1:]:
                del state[name]
    with torch.device("meta"):
        model = config.build()
    root = WrapperModule(model) if wrapped else model
    prefix = "model." if wrapped else ""
    root.load_state_dict({prefix + name: entry for name, entry in state.items()}, assign=True)
    assert tied_parameter_names(model) == tied_parameter_names(source) != []
    assert model.num_parameters() == source.num_parameters()
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)

    with torch.device("meta"):
        model = config.build()
    (WrapperModule(model) if wrapped else model).to_empty(device="cpu")
    assert tied_parameter_names(model) == tied_parameter_names(source)


def test_untied_weights_stay_untied_after_load() -> None:
    model = TIED_CONFIGS["awd_lstm"].build()
    model.softmax.weights[0] = nn.Parameter(model.softmax.weights[0].detach() + 1)
    state = {name: entry.clone() for name, entry in model.state_dict().items()}
    model.double().load_state_dict(state, assign=True)
    assert tied_parameter_names(model) == []
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_loading_different_entries_for_tied_weights_raises() -> None:
    """Otherwise the last entry would silently replace the first."""
    model = TIED_CONFIGS["awd_lstm"].build()
    state = {name: entry.clone() for name, entry in model.state_dict().items()}
    state["softmax.weights.0"][3, 2] += 1
    message = "softmax.weights.0 and embedding.weights.0 are tied in this model, but their entries differ"
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, assign=assign)


def test_torchscript_raises_one_line_error() -> None:
    for module in (make_model(), AWDLSTM(TIED_CONFIGS["awd_lstm"]), WrapperModule(make_model())):
        with pytest.raises(ValueError, match=r"^\w+: torch\.jit\.script cannot compile it, expected torch\.compile or"):
            torch.jit.script(module)
