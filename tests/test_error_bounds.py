"""The error bounds accept correct results in any summation order and reject injected errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from tests.common import error_bounds
from tests.common.error_bounds import SequentialSumMode, Tensors, assert_error_within_baseline, attention_baseline

EPS = torch.finfo(torch.float32).eps
SEEDS = range(20)
T, B, H = 20, 64, 40


def make_operands(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, B, 4 * H, generator=generator), torch.randn(T, B, H, generator=generator)


def sum_per_step(gates: Tensor, hidden: Tensor) -> Tensors:
    """As autograd accumulates the gradient of a weight that every step uses."""
    return {"w": sum((gates[t].t() @ hidden[t] for t in range(1, T)), gates[0].t() @ hidden[0])}


def sequential_sum(gates: Tensor, hidden: Tensor, first: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """As a kernel may: one chain over all steps and streams."""
    total = torch.zeros(4 * H, H, dtype=dtype)
    for gates_row, hidden_row in list(zip(gates.flatten(0, 1), hidden.flatten(0, 1), strict=True))[first:]:
        total = (total.float() + gates_row.unsqueeze(1) * hidden_row.unsqueeze(0)).to(dtype)
    return {"w": total}


@pytest.mark.parametrize("seed", SEEDS)
def test_sum_bound_accepts_any_order_and_rejects_missing_terms_and_fp16(seed: int) -> None:
    gates, hidden = make_operands(seed)
    reference = sum_per_step(gates.double(), hidden.double())
    baselines = []
    for order in range(2):
        with SequentialSumMode(order):
            baselines.append([sum_per_step(gates, hidden)])

    def check(actual: Tensors) -> None:
        assert_error_within_baseline([actual], [reference], baselines, EPS, {"w": T * B})

    check(sum_per_step(gates, hidden))
    check(sequential_sum(gates, hidden))
    check(sequential_sum(gates.flip(0, 1), hidden.flip(0, 1)))
    for wrong in (
        sequential_sum(gates, hidden, first=1),
        sequential_sum(gates.flip(0), hidden),
        sequential_sum(gates, hidden.half().float()),
        sequential_sum(gates, hidden, dtype=torch.float16),
    ):
        with pytest.raises(AssertionError, match="w: root_mean_square of the error"):
            check(wrong)
    few_wrong_elements = sum_per_step(gates, hidden)
    few_wrong_elements["w"].view(-1)[:: 4 * H * H // 8] *= 1.001
    with pytest.raises(AssertionError, match="w: "):
        check(few_wrong_elements)


SIZE = (1, 6, 290, 2, 64, 200)  # B, T, M, H, D, R


def make_inputs(seed: int, dtype: torch.dtype) -> Tensors:
    batch, chunk, memory, heads, depth, rows = SIZE
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (batch, chunk, heads, depth) for name in ("query", "key", "value")}
    shapes |= {name: (batch, memory, heads, depth) for name in ("memory_key", "memory_value")}
    shapes |= {"position": (rows, heads, depth), "content_bias": (heads, depth), "position_bias": (heads, depth)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)


def reference_results(inputs: Tensors, dtype: torch.dtype, **options) -> Tensors:
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    with backend("reference"):
        out = rel_attention(**inputs, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), gradient_of(out).to(out.dtype))
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def make_check(seed: int, dtype: torch.dtype) -> tuple[Tensors, Callable[[Tensors], None]]:
    """Random inputs of rel_attention, and a function that checks results for them."""
    inputs = make_inputs(seed, dtype)
    reference = reference_results(inputs, torch.float64)
    baselines = [[attention_baseline(inputs, gradient_of, order)] for order in range(2)]
    eps = torch.finfo(dtype).eps
    return inputs, lambda actual: assert_error_within_baseline([actual], [reference], baselines, eps)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_bound_rejects_a_missing_key_and_lower_precision(seed: int) -> None:
    inputs, check = make_check(seed, torch.float32)
    correct = reference_results(inputs, torch.float32)
    check(correct)
    for wrong in (
        # The last query does not see the first key.
        reference_results(inputs, torch.float32, window=SIZE[1] + SIZE[2] - 1),
        reference_results(inputs, torch.float32, scale=SIZE[4] ** -0.5 * 1.00002),
        reference_results(inputs | {"key": inputs["key"].half().float()}, torch.float32),
        correct | {"position": correct["position"].roll(1, dims=0)},
        correct | {"memory_key": correct["memory_key"].half().float()},
    ):
        with pytest.raises(AssertionError, match="of the error"):
            check(wrong)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_bound_for_16_bit_inputs_rejects_16_bit_sums(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, check = make_check(seed, dtype)
    check({name: tensor.to(dtype) for name, tensor in reference_results(inputs, torch.float32).items()})

    def add_in_16_bits(self: SequentialSumMode, total: Tensor, term: Tensor) -> Tensor:
        return (total + term).to(dtype).to(total.dtype)

    monkeypatch.setattr(SequentialSumMode, "add", add_in_16_bits)
    with pytest.raises(AssertionError, match="of the error"):
        check(attention_baseline(inputs, gradient_of))


def test_in_tf32_rounds_operands_forward_and_backward() -> None:
    left, right = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)
    with SequentialSumMode(in_tf32=True):
        product = torch.einsum("ik,kj->ij", left, right)
        (gradient,) = torch.autograd.grad(product.sum(), left)
    rounded = error_bounds.round_to_tf32(left.detach()).double() @ error_bounds.round_to_tf32(right).double()
    torch.testing.assert_close(
        product.detach().double(), rounded, rtol=0, atol=8 * 2.0**-24 * float(rounded.abs().max()) * 7
    )
    assert float((product.detach() - left.detach() @ right).norm() / product.detach().norm()) > 1e-5
    torch.testing.assert_close(gradient, error_bounds.round_to_tf32(right).sum(1).expand(5, 7))
