"""linear_cross_entropy, which computes the logits in blocks, matches torch with all logits in memory."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from pytbptt.nn import cross_entropy
from pytbptt.nn.cross_entropy import linear_cross_entropy
from tests.common import error_bounds

E = 6
WEIGHT_ROWS = [9, 3, 14]  # the last weight is shared by two softmaxes
SOFTMAXES = [[(0, 0, 9), (1, 0, 3)], [(2, 0, 5)], [(2, 5, 14)]]
ROWS = [7, 0, 5]


@pytest.fixture(params=[1, 4, 100])
def output_block_size(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "OUTPUT_BLOCK_SIZE", {"cpu": request.param})


def make_inputs(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(rows, E, dtype=dtype, requires_grad=True) for rows in WEIGHT_ROWS]
    biases = [torch.randn(rows, dtype=dtype, requires_grad=True) for rows in WEIGHT_ROWS]
    inputs = [torch.randn(rows, E, dtype=dtype, requires_grad=True) for rows in ROWS]
    targets = [torch.randint(5, (rows,)) for rows in ROWS]
    targets[0][2:5] = torch.tensor([-100, 11, 8])  # ignored, and the targets at the boundary of two ranges
    return inputs, targets, weights, biases


def torch_cross_entropy(inputs, targets, weights, biases):
    nlls = []
    for rows, rows_targets, ranges in zip(inputs, targets, SOFTMAXES, strict=True):
        weight = torch.cat([weights[n][a:b] for n, a, b in ranges])
        bias = torch.cat([biases[n][a:b] for n, a, b in ranges])
        nlls.append(F.cross_entropy(F.linear(rows, weight, bias), rows_targets, reduction="none"))
    return nlls


@pytest.mark.usefixtures("output_block_size")
def test_loss_and_gradients_match_torch():
    inputs, targets, weights, biases = make_inputs(torch.float64)
    leaves = [*inputs, *weights, *biases]
    found = linear_cross_entropy(inputs, targets, weights, biases, SOFTMAXES)
    expected = torch_cross_entropy(inputs, targets, weights, biases)
    torch.testing.assert_close(list(found), expected, rtol=0, atol=1e-12)
    grad_outputs = [torch.randn_like(nll) for nll in expected]
    first, second, expected_grads = (
        torch.autograd.grad(nlls, leaves, grad_outputs, retain_graph=True) for nlls in (found, found, expected)
    )
    torch.testing.assert_close(first, expected_grads, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, first, rtol=0, atol=0)  # the first backward pass did not change the graph


def test_gradients_match_under_activation_checkpointing():
    inputs, targets, weights, biases = make_inputs(torch.float64)
    leaves = [*inputs, *weights, *biases]

    def loss(*leaves):
        return sum(nll.sum() for nll in linear_cross_entropy(inputs, targets, weights, biases, SOFTMAXES))

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_within_torch_baseline(dtype):
    """At a size where sums are long; tests/common/error_bounds.py derives the bound."""
    torch.manual_seed(0)
    tensors = [torch.randn(300, 64), torch.randn(5000, 64), torch.randn(5000)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    targets = torch.randint(5000, (300,))

    def blockwise_loss(rows, weight, bias):
        return linear_cross_entropy([rows], [targets], [weight], [bias], [[(0, 0, 5000)]])[0]

    def torch_loss(rows, weight, bias):
        logits = F.linear(rows, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")

    def loss_and_gradients(loss, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        nll = loss(*leaves)
        results = [nll.detach(), *torch.autograd.grad(nll.sum(), leaves)]
        return [dict(zip(("nll", "input", "weight", "bias"), results, strict=True))]

    assert_error_within_baseline(
        loss_and_gradients(blockwise_loss, dtype),
        loss_and_gradients(torch_loss, torch.float64),
        lambda: loss_and_gradients(torch_loss, dtype),
        dtype,
    )


def assert_error_within_baseline(found, reference, compute_baseline, dtype):
    baselines = []
    for order in range(2):
        with error_bounds.SequentialSumMode(order):
            baselines.append(compute_baseline())
    error_bounds.assert_error_within_baseline(found, reference, baselines, torch.finfo(dtype).eps)


@pytest.mark.parametrize("train", [False, True])
def test_peak_logits_are_one_block(monkeypatch, train):
    monkeypatch.setattr(cross_entropy, "LOGITS_BLOCK_SIZE", {"cpu": 40 * 256})
    weight, bias, inputs = torch.randn(4000, E), torch.randn(4000), torch.randn(40, E)
    for tensor in (weight, bias, inputs):
        tensor.requires_grad_(train)
    mode = MaxTensorSizeMode()
    with mode:
        (nll,) = linear_cross_entropy([inputs], [torch.arange(40)], [weight], [bias], [[(0, 0, 4000)]])
        if train:
            nll.sum().backward()
    # In training, the gradient of the weight is the largest tensor.
    assert mode.max_elements == (4000 * E if train else 40 * 256)


class MaxTensorSizeMode(TorchDispatchMode):
    """Records the number of elements of the largest result of an operation, except views."""

    max_elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.max_elements = max(self.max_elements, result.numel())
        return result


@pytest.mark.usefixtures("output_block_size")
def test_autocast_computes_products_in_16_bits_and_gradients_in_float32():
    inputs, targets, weights, biases = make_inputs(torch.float32)
    leaves = [*inputs, *weights, *biases]

    def loss_and_gradients(loss, *softmaxes):
        nlls = loss(inputs, targets, weights, biases, *softmaxes)
        grads = torch.autograd.grad(sum(nll.sum() for nll in nlls), leaves)
        assert {result.dtype for result in (*nlls, *grads)} == {torch.float32}
        return [{str(n): result.detach() for n, result in enumerate((*nlls, *grads))}]

    def torch_under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(torch_cross_entropy)

    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(linear_cross_entropy, SOFTMAXES)
    assert_error_within_baseline(found, loss_and_gradients(torch_cross_entropy), torch_under_autocast, torch.bfloat16)
    assert not torch.equal(found[0]["0"], loss_and_gradients(linear_cross_entropy, SOFTMAXES)[0]["0"])
