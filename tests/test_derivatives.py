"""Derivatives of every op and module under every autograd transform are correct to rounding, or raise one-line errors.

Reverse mode is checked against central differences, and all other transforms against reverse mode. To add an op or
module, add an entry to CASES.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from pytbptt import ops
from pytbptt.nn import (
    AWDLSTM,
    LSTM,
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    AWDLSTMConfig,
    TransformerXL,
    TransformerXLConfig,
)
from pytbptt.ops import dispatch

Case = tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]
"""A scalar function and its float64 inputs by name."""


def make_inputs(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) * 0.5 for name, shape in shapes.items()}


def scalar_objective(output: Any) -> Tensor:
    """A sum with non-uniform weights, so that outputs whose plain sum is constant, as softmax's, have gradients."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point()]
    return sum(
        (leaf.square() * torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sum()
        for leaf in leaves
    )


def lstm() -> Case:
    reset = torch.rand(3, 2) < 0.4
    inputs = make_inputs(gates=(3, 2, 16), weight_hh=(16, 4), h0=(2, 4), c0=(2, 4))
    return lambda inputs: scalar_objective(ops.lstm(**inputs, reset=reset)), inputs


def rel_attention() -> Case:
    B, T, M, H, D = 2, 3, 4, 2, 5
    shapes = dict.fromkeys(("query", "key", "value"), (B, T, H, D)) | {"position": (M + 1, H, D)}
    shapes |= dict.fromkeys(("content_bias", "position_bias"), (H, D))
    shapes |= dict.fromkeys(("memory_key", "memory_value"), (B, M, H, D))
    first_key = torch.tensor([[0, 2, 3], [5, 7, 1]], dtype=torch.int32)  # stream 1's query 1 sees no key
    options: dict[str, Any] = {"first_key": first_key, "window": 4, "dropout_p": 0.3, "seed": torch.tensor([7])}
    return lambda inputs: scalar_objective(ops.rel_attention(**inputs, **options)), make_inputs(**shapes)


def module_case(module: nn.Module, *arguments: Any, **keywords: Any) -> Case:
    """A module's output as a function of its parameters and floating-point arguments."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    positions = [
        n for n, argument in enumerate(arguments) if torch.is_tensor(argument) and argument.is_floating_point()
    ]
    inputs = {f"argument {n}": arguments[n] for n in positions}

    def function(inputs: dict[str, Tensor]) -> Tensor:
        positional = tuple(inputs.get(f"argument {n}", argument) for n, argument in enumerate(arguments))
        weights = {name: inputs[name] for name in parameters}
        output = func.functional_call(module, weights, positional, keywords)
        return output[0].objective if "targets" in keywords else scalar_objective(output)

    return function, parameters | inputs


TOKENS, RESET = torch.tensor([[3, 1, 30, 12, 3], [9, 0, 21, 3, 8]]), torch.tensor([[0, 0, 1, 0, 0]] * 2).bool()


def transformer_xl(**changes: Any) -> TransformerXL:
    sizes = {"vocab_size": 31, "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 4}
    return TransformerXL(TransformerXLConfig(**{**sizes, "cutoffs": (7, 15), "div_val": 2, **changes}))


def awd_lstm() -> AWDLSTM:
    return AWDLSTM(AWDLSTMConfig(vocab_size=31, d_embed=5, d_hidden=7, n_layer=2, cutoffs=(7, 15)))


def memory_after_chunk(model: Any) -> Any:
    with torch.no_grad():
        return model.double().eval()(TOKENS.flip(1))[1]


def softmax() -> AdaptiveSoftmax:
    return AdaptiveSoftmax(31, 8, 8, (7, 15), 2)


HIDDEN = make_inputs(hidden=(2, 5, 8))["hidden"]
CASES: dict[str, Callable[[], Case]] = {
    "ops.lstm": lstm,
    "ops.rel_attention": rel_attention,
    "LSTM": lambda: module_case(LSTM(3, 4, 2), make_inputs(input=(5, 2, 3))["input"], reset=RESET.t()),
    "AdaptiveEmbedding": lambda: module_case(AdaptiveEmbedding(31, 8, 8, (7, 15), 2), TOKENS),
    "AdaptiveSoftmax.nll": lambda: module_case(softmax(), HIDDEN, TOKENS.masked_fill(RESET, -100), "none"),
    "AdaptiveSoftmax.log_prob": lambda: module_case(softmax(), HIDDEN),
    "TransformerXL": lambda: module_case(transformer_xl(pre_norm=True), TOKENS, None, RESET, detach=False),
    "TransformerXL.loss": lambda: module_case(
        model := transformer_xl(), TOKENS, memory_after_chunk(model), targets=TOKENS
    ),
    "AWDLSTM": lambda: module_case(awd_lstm(), TOKENS, None, RESET, detach=False),
    "AWDLSTM.loss": lambda: module_case(model := awd_lstm(), TOKENS, memory_after_chunk(model), RESET, targets=TOKENS),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.fixture(autouse=True)
def ignore_fallback_warnings() -> Any:
    """tests/ops/test_dispatch.py tests the warnings of the fallback to the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_tangents(inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, dtype=x.dtype, generator=generator) for name, x in inputs.items()}


def perturbed(inputs: dict[str, Tensor], tangents: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    return {name: x + step * tangents[name] for name, x in inputs.items()}


def directional_derivative(gradients: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    return sum(((gradients[name] * tangents[name]).sum() for name in tangents), torch.zeros((), dtype=torch.float64))


def reverse_mode_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch.autograd.grad, with the fused ops."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gradients = torch.autograd.grad(function(leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


STEP = 1e-5
"""The truncation error of central differences is STEP² / 6 times a third derivative of some hundreds at most, and their
rounding error 1e-15 times some tens over STEP: about 1e-8 each."""


def assert_close_to_differences(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_reverse_mode_matches_finite_differences(case: Case) -> None:
    function, inputs = case
    tangents = random_tangents(inputs)
    forward, backward = (function(perturbed(inputs, tangents, step)) for step in (STEP, -STEP))
    difference = (forward - backward) / (2 * STEP)
    assert difference.abs() > 1e-2
    assert_close_to_differences(directional_derivative(reverse_mode_gradients(function, inputs), tangents), difference)


FIRST_ORDER_TRANSFORMS = {
    "jvp": lambda function, inputs, tangents: func.jvp(function, (inputs,), (tangents,))[1],
    "linearize": lambda function, inputs, tangents: func.linearize(function, inputs)[1](tangents),
    "jacfwd": lambda function, inputs, tangents: directional_derivative(func.jacfwd(function)(inputs), tangents),
    "grad": lambda function, inputs, tangents: directional_derivative(func.grad(function)(inputs), tangents),
    "vjp": lambda function, inputs, tangents: directional_derivative(
        func.vjp(function, inputs)[1](torch.ones((), dtype=torch.float64))[0], tangents
    ),
    "jacrev": lambda function, inputs, tangents: directional_derivative(func.jacrev(function)(inputs), tangents),
}


@pytest.mark.parametrize("transform", FIRST_ORDER_TRANSFORMS)
def test_first_order_transforms_match_reverse_mode(case: Case, transform: str) -> None:
    function, inputs = case
    tangents = random_tangents(inputs)
    if transform == "jacfwd":  # it needs a tangent per element, so only the smallest tensor is differentiated
        gradients = reverse_mode_gradients(function, inputs)
        name = min((name for name in inputs if gradients[name].any()), key=lambda name: inputs[name].numel())
        constants, full_function = {key: x for key, x in inputs.items() if key != name}, function

        def function(inputs: dict[str, Tensor]) -> Tensor:
            return full_function({**constants, **inputs})

        inputs, tangents = {name: inputs[name]}, {name: tangents[name]}
    assert_equal_to_rounding(
        FIRST_ORDER_TRANSFORMS[transform](function, inputs, tangents),
        directional_derivative(reverse_mode_gradients(function, inputs), tangents),
    )


def test_dual_level_tangent_matches_reverse_mode(case: Case) -> None:
    function, inputs = case
    tangents = random_tangents(inputs)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, tangents[name]) for name, x in inputs.items()}
        tangent = forward_ad.unpack_dual(function(duals)).tangent
        assert tangent is not None
        assert_equal_to_rounding(tangent, directional_derivative(reverse_mode_gradients(function, inputs), tangents))


def double_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    first = torch.autograd.grad(function(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(
        directional_derivative(dict(zip(leaves, first, strict=True)), tangents),
        list(leaves.values()),
        materialize_grads=True,
    )
    return directional_derivative(dict(zip(leaves, second, strict=True)), random_tangents(inputs, seed=2))


SECOND_ORDER_TRANSFORMS = {
    "forward over reverse": lambda function, inputs, tangents: directional_derivative(
        func.jvp(func.grad(function), (inputs,), (tangents,))[1], random_tangents(inputs, seed=2)
    ),
    "reverse over reverse": lambda function, inputs, tangents: directional_derivative(
        func.grad(lambda inputs: directional_derivative(func.grad(function)(inputs), tangents))(inputs),
        random_tangents(inputs, seed=2),
    ),
    "reverse over forward": lambda function, inputs, tangents: directional_derivative(
        func.grad(lambda inputs: func.jvp(function, (inputs,), (tangents,))[1])(inputs), random_tangents(inputs, seed=2)
    ),
    "double backward": double_backward,
}


@pytest.mark.parametrize("transform", SECOND_ORDER_TRANSFORMS)
def test_second_derivatives_match_differences_of_gradients(case: Case, transform: str) -> None:
    function, inputs = case
    tangents, other = random_tangents(inputs), random_tangents(inputs, seed=2)
    forward, backward = (
        directional_derivative(reverse_mode_gradients(function, perturbed(inputs, tangents, step)), other)
        for step in (STEP, -STEP)
    )
    with ops.backend("reference"):
        second_derivative = SECOND_ORDER_TRANSFORMS[transform](function, inputs, tangents)
    assert_close_to_differences(second_derivative, (forward - backward) / (2 * STEP))


CASES_WITHOUT_FUSED_OP = ("AdaptiveEmbedding", "AdaptiveSoftmax.nll", "AdaptiveSoftmax.log_prob")


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so no fused op")
@pytest.mark.parametrize("name", [name for name in CASES if name not in CASES_WITHOUT_FUSED_OP])
def test_double_backward_through_a_fused_op_raises(name: str) -> None:
    function, inputs = CASES[name]()
    message = r"has no second derivative; the reference has one: pytbptt\.ops\.backend\('reference'\)$"
    with pytest.raises(RuntimeError, match=message):
        double_backward(function, inputs, random_tangents(inputs))


@pytest.mark.parametrize("name", CASES_WITHOUT_FUSED_OP)
def test_double_backward_without_a_fused_op_works_with_any_backend(name: str) -> None:
    function, inputs = CASES[name]()
    tangents = random_tangents(inputs)
    actual = double_backward(function, inputs, tangents)
    assert_equal_to_rounding(actual, SECOND_ORDER_TRANSFORMS["forward over reverse"](function, inputs, tangents))


def test_vmap_of_values_and_gradients_matches_single_samples(case: Case) -> None:
    function, inputs = case
    samples = [perturbed(inputs, random_tangents(inputs, seed), 0.1) for seed in range(3)]
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in inputs}
    values, gradients = func.vmap(function)(stacked), func.vmap(func.grad(function))(stacked)
    for n, sample in enumerate(samples):
        assert_equal_to_rounding(values[n], function(sample))
        for name, gradient in reverse_mode_gradients(function, sample).items():
            assert_equal_to_rounding(gradients[name][n], gradient)


@pytest.mark.parametrize("make", [transformer_xl, awd_lstm])
def test_dropout_differs_between_samples_under_vmap(make: Callable[..., nn.Module]) -> None:
    changes = {"dropout": 0.5, "dropatt": 0.5} if make is transformer_xl else {}
    model = make(**changes).train()

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return func.functional_call(model, parameters, (tokens,), {"targets": tokens})[0].objective

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    per_sample = func.vmap(func.grad(loss), in_dims=(None, 0), randomness="different")
    gradients = per_sample(parameters, TOKENS[:1].expand(4, 1, -1))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(not torch.equal(gradients["softmax.biases.0"][0], other) for other in gradients["softmax.biases.0"][1:])


RAW_INPUTS = {"lstm": (3, 2, 16), "rel_attention": (2, 3, 2, 4)}


def raw_op(op: str) -> Callable[[Tensor], Tensor]:
    """torch.ops.pytbptt's op as a function of its first tensor."""
    if op == "lstm":
        others = make_inputs(weight_hh=(16, 4), h0=(2, 4), c0=(2, 4)).values()
        return lambda x: torch.ops.pytbptt.lstm(x, *others, None, True, False)[0]
    chunk, bias = (2, 3, 2, 4), (2, 4)
    others = make_inputs(key=chunk, value=chunk, position=(3, 2, 4), content_bias=bias, position_bias=bias).values()
    return lambda x: torch.ops.pytbptt.rel_attention(x, *others, *[None] * 4, 0.5, 0.0, None, True, False)[0]


def in_dual_level(function: Callable[..., Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x)))


def backward_of_dual_tensor(function: Callable[..., Tensor], x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = function(x)
    with forward_ad.dual_level():
        return torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


UNSUPPORTED_TRANSFORMS = {
    "grad": lambda function, x: func.grad(lambda x: function(x).sum())(x),
    "jvp": lambda function, x: func.jvp(function, (x,), (x,)),
    "jvp with requires_grad": lambda function, x: func.jvp(function, (x.clone().requires_grad_(),), (x,)),
    "dual level": in_dual_level,
    "backward of a dual tensor": backward_of_dual_tensor,
    "vmap of grad": lambda function, x: func.vmap(func.grad(lambda x: function(x).sum()))(torch.stack([x, x])),
}


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so no raw op")
@pytest.mark.parametrize("transform", UNSUPPORTED_TRANSFORMS)
@pytest.mark.parametrize("op", RAW_INPUTS)
def test_raw_op_raises_for_unsupported_transforms(op: str, transform: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^torch\.ops\.pytbptt\.{op}(_backward)?: it does not support [^\n]*$"):
        UNSUPPORTED_TRANSFORMS[transform](raw_op(op), make_inputs(x=RAW_INPUTS[op])["x"])


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so no backend fused")
def test_backend_fused_error_for_func_transform() -> None:
    function, inputs = lstm()
    with ops.backend("fused"), pytest.raises(RuntimeError, match=r"^lstm: the fused op cannot be used: it does not"):
        func.grad(function)(inputs)
