"""Every derivative that torch offers, through every op and module: right to rounding, or refused in one line.

The directional derivative by torch's own reverse mode is held to central differences, everything else to that. Another
op or module joins by one entry of CASES.
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
"""A function to a scalar, and the float64 tensors that it is differentiated by."""


def draw(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) * 0.5 for name, shape in shapes.items()}


def weighted(output: Any) -> Tensor:
    """All of an output in one number, nothing of it by itself: sums of softmaxes, say, would lose their derivatives."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point()]
    return sum(
        (leaf.square() * torch.linspace(-1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sum()
        for leaf in leaves
    )


def lstm() -> Case:
    reset = torch.rand(3, 2) < 0.4
    inputs = draw(gates=(3, 2, 16), weight_hh=(16, 4), h0=(2, 4), c0=(2, 4))
    return lambda given: weighted(ops.lstm(**given, reset=reset)), inputs


def rel_attention() -> Case:
    B, T, M, H, D = 2, 3, 4, 2, 5
    shapes = dict.fromkeys(("query", "key", "value"), (B, T, H, D)) | {"position": (M + 1, H, D)}
    shapes |= dict.fromkeys(("content_bias", "position_bias"), (H, D))
    shapes |= dict.fromkeys(("memory_key", "memory_value"), (B, M, H, D))
    first_key = torch.tensor([[0, 2, 3], [5, 7, 1]], dtype=torch.int32)  # the second's second query sees no key
    options: dict[str, Any] = {"first_key": first_key, "window": 4, "dropout_p": 0.3, "seed": torch.tensor([7])}
    return lambda given: weighted(ops.rel_attention(**given, **options)), draw(**shapes)


def of_module(module: nn.Module, *arguments: Any, **keywords: Any) -> Case:
    """A module's result as a function of its parameters and of its floating-point arguments."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    places = [n for n, argument in enumerate(arguments) if torch.is_tensor(argument) and argument.is_floating_point()]
    inputs = {f"argument {n}": arguments[n] for n in places}

    def function(given: dict[str, Tensor]) -> Tensor:
        taken = [given.get(f"argument {n}", argument) for n, argument in enumerate(arguments)]
        own = {name: given[name] for name in parameters}
        output = func.functional_call(module, own, tuple(taken), keywords)
        return output[0].objective if "targets" in keywords else weighted(output)

    return function, parameters | inputs


TOKENS, RESET = torch.tensor([[3, 1, 30, 12, 3], [9, 0, 21, 3, 8]]), torch.tensor([[0, 0, 1, 0, 0]] * 2).bool()


def transformer_xl(**changes: Any) -> TransformerXL:
    sizes = {"vocab_size": 31, "n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 12, "mem_len": 4}
    return TransformerXL(TransformerXLConfig(**{**sizes, "cutoffs": (7, 15), "div_val": 2, **changes}))


def awd_lstm() -> AWDLSTM:
    return AWDLSTM(AWDLSTMConfig(vocab_size=31, d_embed=5, d_hidden=7, n_layer=2, cutoffs=(7, 15)))


def after_a_chunk(model: Any) -> Any:
    with torch.no_grad():
        return model.double().eval()(TOKENS.flip(1))[1]


def softmax() -> AdaptiveSoftmax:
    return AdaptiveSoftmax(31, 8, 8, (7, 15), 2)


HIDDEN = draw(hidden=(2, 5, 8))["hidden"]
CASES: dict[str, Callable[[], Case]] = {
    "ops.lstm": lstm,
    "ops.rel_attention": rel_attention,
    "LSTM": lambda: of_module(LSTM(3, 4, 2), draw(input=(5, 2, 3))["input"], reset=RESET.t()),
    "AdaptiveEmbedding": lambda: of_module(AdaptiveEmbedding(31, 8, 8, (7, 15), 2), TOKENS),
    "AdaptiveSoftmax.nll": lambda: of_module(softmax(), HIDDEN, TOKENS.masked_fill(RESET, -100), "none"),
    "AdaptiveSoftmax.log_prob": lambda: of_module(softmax(), HIDDEN),
    "TransformerXL": lambda: of_module(transformer_xl(pre_norm=True), TOKENS, None, RESET, detach=False),
    "TransformerXL.loss": lambda: of_module(model := transformer_xl(), TOKENS, after_a_chunk(model), targets=TOKENS),
    "AWDLSTM": lambda: of_module(awd_lstm(), TOKENS, None, RESET, detach=False),
    "AWDLSTM.loss": lambda: of_module(model := awd_lstm(), TOKENS, after_a_chunk(model), RESET, targets=TOKENS),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


@pytest.fixture(autouse=True)
def silent() -> Any:
    """That the reference serves has been said in tests/ops/test_dispatch.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def directions(inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, dtype=x.dtype, generator=generator) for name, x in inputs.items()}


def moved(inputs: dict[str, Tensor], way: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    return {name: x + step * way[name] for name, x in inputs.items()}


def along(gradients: dict[str, Tensor], way: dict[str, Tensor]) -> Tensor:
    return sum(((gradients[name] * way[name]).sum() for name in way), torch.zeros((), dtype=torch.float64))


def by_autograd(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient by torch's reverse mode, with the fused ops."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    found = torch.autograd.grad(function(leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


STEP = 1e-5
"""Central differences are off by STEP² / 6 times a third derivative, here some hundreds at most, and by the rounding of
the function, 1e-15 times some tens, over STEP: 1e-8 either way."""


def assert_derivative(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_reverse_mode_is_what_differences_say(case: Case) -> None:
    function, inputs = case
    way = directions(inputs)
    differences = (function(moved(inputs, way, STEP)) - function(moved(inputs, way, -STEP))) / (2 * STEP)
    assert differences.abs() > 1e-2
    assert_derivative(along(by_autograd(function, inputs), way), differences)


FIRST = {
    "jvp": lambda function, inputs, way: func.jvp(function, (inputs,), (way,))[1],
    "linearize": lambda function, inputs, way: func.linearize(function, inputs)[1](way),
    "jacfwd": lambda function, inputs, way: along(func.jacfwd(function)(inputs), way),
    "grad": lambda function, inputs, way: along(func.grad(function)(inputs), way),
    "vjp": lambda function, inputs, way: along(
        func.vjp(function, inputs)[1](torch.ones((), dtype=torch.float64))[0], way
    ),
    "jacrev": lambda function, inputs, way: along(func.jacrev(function)(inputs), way),
}


@pytest.mark.parametrize("transform", FIRST)
def test_every_first_derivative_is_that_of_reverse_mode(case: Case, transform: str) -> None:
    function, inputs = case
    way = directions(inputs)
    if transform == "jacfwd":  # as many tangents as elements: those of one tensor are enough
        gradients = by_autograd(function, inputs)
        name = min((name for name in inputs if gradients[name].any()), key=lambda name: inputs[name].numel())
        rest, whole = {key: x for key, x in inputs.items() if key != name}, function
        function, inputs, way = lambda given: whole({**rest, **given}), {name: inputs[name]}, {name: way[name]}
    assert_same(FIRST[transform](function, inputs, way), along(by_autograd(function, inputs), way))


def test_a_level_of_forward_mode_has_the_tangent(case: Case) -> None:
    function, inputs = case
    way = directions(inputs)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, way[name]) for name, x in inputs.items()}
        tangent = forward_ad.unpack_dual(function(duals)).tangent
        assert tangent is not None
        assert_same(tangent, along(by_autograd(function, inputs), way))


def double_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor], way: dict[str, Tensor]) -> Tensor:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    once = torch.autograd.grad(function(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
    twice = torch.autograd.grad(
        along(dict(zip(leaves, once, strict=True)), way), list(leaves.values()), materialize_grads=True
    )
    return along(dict(zip(leaves, twice, strict=True)), directions(inputs, seed=2))


SECOND = {
    "forward over reverse": lambda function, inputs, way: along(
        func.jvp(func.grad(function), (inputs,), (way,))[1], directions(inputs, seed=2)
    ),
    "reverse over reverse": lambda function, inputs, way: along(
        func.grad(lambda given: along(func.grad(function)(given), way))(inputs), directions(inputs, seed=2)
    ),
    "reverse over forward": lambda function, inputs, way: along(
        func.grad(lambda given: func.jvp(function, (given,), (way,))[1])(inputs), directions(inputs, seed=2)
    ),
    "double backward": double_backward,
}


@pytest.mark.parametrize("transform", SECOND)
def test_every_second_derivative_is_what_differences_of_the_first_say(case: Case, transform: str) -> None:
    function, inputs = case
    way, other = directions(inputs), directions(inputs, seed=2)
    ahead, behind = (along(by_autograd(function, moved(inputs, way, step)), other) for step in (STEP, -STEP))
    with ops.backend("reference"):
        assert_derivative(SECOND[transform](function, inputs, way), (ahead - behind) / (2 * STEP))


WITHOUT_AN_OP = ("AdaptiveEmbedding", "AdaptiveSoftmax.nll", "AdaptiveSoftmax.log_prob")


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so no fused op")
@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_AN_OP])
def test_double_backward_through_a_fused_op_is_refused(name: str) -> None:
    function, inputs = CASES[name]()
    refusal = r"has no second derivative; the reference has one: pytbptt\.ops\.backend\('reference'\)$"
    with pytest.raises(RuntimeError, match=refusal):
        double_backward(function, inputs, directions(inputs))


@pytest.mark.parametrize("name", WITHOUT_AN_OP)
def test_double_backward_without_an_op_needs_no_reference(name: str) -> None:
    function, inputs = CASES[name]()
    way = directions(inputs)
    found = double_backward(function, inputs, way)
    assert_same(found, SECOND["forward over reverse"](function, inputs, way))


def test_per_sample_gradients_and_ensembles_are_those_of_each_alone(case: Case) -> None:
    function, inputs = case
    several = [moved(inputs, directions(inputs, seed), 0.1) for seed in range(3)]
    stacked = {name: torch.stack([one[name] for one in several]) for name in inputs}
    values, gradients = func.vmap(function)(stacked), func.vmap(func.grad(function))(stacked)
    for n, one in enumerate(several):
        assert_same(values[n], function(one))
        for name, gradient in by_autograd(function, one).items():
            assert_same(gradients[name][n], gradient)


@pytest.mark.parametrize("make", [transformer_xl, awd_lstm])
def test_dropout_is_drawn_for_every_sample_under_vmap(make: Callable[..., nn.Module]) -> None:
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


def raw(op: str) -> Callable[[Tensor], Tensor]:
    """The compiled op itself, as a function of its first tensor."""
    if op == "lstm":
        others = draw(weight_hh=(16, 4), h0=(2, 4), c0=(2, 4)).values()
        return lambda x: torch.ops.pytbptt.lstm(x, *others, None, True, False)[0]
    chunk, bias = (2, 3, 2, 4), (2, 4)
    others = draw(key=chunk, value=chunk, position=(3, 2, 4), content_bias=bias, position_bias=bias).values()
    return lambda x: torch.ops.pytbptt.rel_attention(x, *others, *[None] * 4, 0.5, 0.0, None, True, False)[0]


def in_dual_level(function: Callable[..., Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x)))


def backward_of_a_tangent(function: Callable[..., Tensor], x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = function(x)
    with forward_ad.dual_level():
        return torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


REFUSED = {
    "grad": lambda function, x: func.grad(lambda x: function(x).sum())(x),
    "jvp": lambda function, x: func.jvp(function, (x,), (x,)),
    "jvp of what requires a gradient": lambda function, x: func.jvp(function, (x.clone().requires_grad_(),), (x,)),
    "dual level": in_dual_level,
    "backward of a tangent": backward_of_a_tangent,
    "vmap of grad": lambda function, x: func.vmap(func.grad(lambda x: function(x).sum()))(torch.stack([x, x])),
}


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so no raw op")
@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("op", RAW_INPUTS)
def test_the_raw_op_refuses_in_one_line(op: str, transform: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^torch\.ops\.pytbptt\.{op}(_backward)?: it does not support [^\n]*$"):
        REFUSED[transform](raw(op), draw(x=RAW_INPUTS[op])["x"])


@pytest.mark.skipif(dispatch.EXTENSION.facts is None, reason="no compiled extension, so backend fused serves nothing")
def test_backend_fused_says_what_it_cannot_do() -> None:
    function, inputs = lstm()
    with ops.backend("fused"), pytest.raises(RuntimeError, match=r"^lstm: the fused op cannot be used: it does not"):
        func.grad(function)(inputs)
