"""The loss in blocks of outputs against torch's, whose logits are all there."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from pytbptt.nn import cross_entropy
from pytbptt.nn.cross_entropy import linear_cross_entropy
from tests import tolerances

E = 6
WEIGHTS = [9, 3, 14]  # rows; those of the last one are outputs of two softmaxes
SOFTMAXES = [[(0, 0, 9), (1, 0, 3)], [(2, 0, 5)], [(2, 5, 14)]]
ROWS = [7, 0, 5]


@pytest.fixture(params=[1, 4, 100])
def outputs_at_once(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "OUTPUT_BLOCK_SIZE", {"cpu": request.param})


def problem(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(rows, E, dtype=dtype, requires_grad=True) for rows in WEIGHTS]
    biases = [torch.randn(rows, dtype=dtype, requires_grad=True) for rows in WEIGHTS]
    inputs = [torch.randn(rows, E, dtype=dtype, requires_grad=True) for rows in ROWS]
    targets = [torch.randint(5, (rows,)) for rows in ROWS]
    targets[0][2:5] = torch.tensor([-100, 11, 8])  # unscored, and both sides of where a softmax's ranges meet
    return inputs, targets, weights, biases


def by_torch(inputs, targets, weights, biases):
    nlls = []
    for rows, wanted, ranges in zip(inputs, targets, SOFTMAXES, strict=True):
        weight = torch.cat([weights[n][a:b] for n, a, b in ranges])
        bias = torch.cat([biases[n][a:b] for n, a, b in ranges])
        nlls.append(F.cross_entropy(F.linear(rows, weight, bias), wanted, reduction="none"))
    return nlls


@pytest.mark.usefixtures("outputs_at_once")
def test_loss_and_gradients_are_those_of_all_logits():
    inputs, targets, weights, biases = problem(torch.float64)
    leaves = [*inputs, *weights, *biases]
    found = linear_cross_entropy(inputs, targets, weights, biases, SOFTMAXES)
    expected = by_torch(inputs, targets, weights, biases)
    torch.testing.assert_close(list(found), expected, rtol=0, atol=1e-12)
    ways = [torch.randn_like(nll) for nll in expected]
    first, again, wanted = (
        torch.autograd.grad(nlls, leaves, ways, retain_graph=True) for nlls in (found, found, expected)
    )
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, first, rtol=0, atol=0)  # the graph is as it was before its first use


def test_checkpointing_forms_it_anew():
    inputs, targets, weights, biases = problem(torch.float64)
    leaves = [*inputs, *weights, *biases]

    def loss(*leaves):
        return sum(nll.sum() for nll in linear_cross_entropy(inputs, targets, weights, biases, SOFTMAXES))

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_plain_torchs(dtype):
    """At a size where sums are long; tests/tolerances.py says how."""
    torch.manual_seed(0)
    exact = [torch.randn(300, 64), torch.randn(5000, 64), torch.randn(5000)]
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in exact]
    targets = torch.randint(5000, (300,))

    def ours(rows, weight, bias):
        return linear_cross_entropy([rows], [targets], [weight], [bias], [[(0, 0, 5000)]])[0]

    def torchs(rows, weight, bias):
        logits = F.linear(rows, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def outcome(loss, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
        nll = loss(*leaves)
        results = [nll.detach(), *torch.autograd.grad(nll.sum(), leaves)]
        return [dict(zip(("nll", "input", "weight", "bias"), results, strict=True))]

    assert_as_exact(outcome(ours, dtype), outcome(torchs, torch.float64), lambda: outcome(torchs, dtype), dtype)


def assert_as_exact(found, exact, plain, dtype):
    baselines = []
    for order in range(2):
        with tolerances.TermByTerm(order):
            baselines.append(plain())
    tolerances.assert_as_exact_as_baseline(found, exact, baselines, torch.finfo(dtype).eps)


@pytest.mark.parametrize("train", [False, True])
def test_no_more_logits_than_one_block_are_ever_there(monkeypatch, train):
    monkeypatch.setattr(cross_entropy, "LOGITS_BLOCK_SIZE", {"cpu": 40 * 256})
    weight, bias, inputs = torch.randn(4000, E), torch.randn(4000), torch.randn(40, E)
    for tensor in (weight, bias, inputs):
        tensor.requires_grad_(train)
    largest = Largest()
    with largest:
        (nll,) = linear_cross_entropy([inputs], [torch.arange(40)], [weight], [bias], [[(0, 0, 4000)]])
        if train:
            nll.sum().backward()
    assert largest.elements == (4000 * E if train else 40 * 256)  # that of the weight's gradient


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation gave, views aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.usefixtures("outputs_at_once")
def test_under_autocast_the_products_are_16_bit_and_the_gradients_are_not():
    inputs, targets, weights, biases = problem(torch.float32)
    leaves = [*inputs, *weights, *biases]

    def outcome(loss, *softmaxes):
        nlls = loss(inputs, targets, weights, biases, *softmaxes)
        grads = torch.autograd.grad(sum(nll.sum() for nll in nlls), leaves)
        assert {result.dtype for result in (*nlls, *grads)} == {torch.float32}
        return [{str(n): result.detach() for n, result in enumerate((*nlls, *grads))}]

    def in_16_bits():
        with torch.autocast("cpu", torch.bfloat16):
            return outcome(by_torch)

    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(linear_cross_entropy, SOFTMAXES)
    assert_as_exact(found, outcome(by_torch), in_16_bits, torch.bfloat16)
    assert not torch.equal(found[0]["0"], outcome(linear_cross_entropy, SOFTMAXES)[0]["0"])
