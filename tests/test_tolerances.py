"""The bounds that kernels are held to pass right results, whatever order they sum in, and catch planted errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from tests import tolerances
from tests.tolerances import Results, TermByTerm, assert_as_exact_as_baseline, attention_baseline

UNIT = torch.finfo(torch.float32).eps
SEEDS = range(20)
T, B, H = 20, 64, 40


def operands(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, B, 4 * H, generator=generator), torch.randn(T, B, H, generator=generator)


def by_step(gates: Tensor, hidden: Tensor) -> Results:
    """As autograd adds up the gradient of a weight that every step uses."""
    return {"w": sum((gates[t].t() @ hidden[t] for t in range(1, T)), gates[0].t() @ hidden[0])}


def one_by_one(gates: Tensor, hidden: Tensor, first: int = 0, dtype: torch.dtype = torch.float32) -> Results:
    """As a kernel may: every product is added to the sum of those before it."""
    total = torch.zeros(4 * H, H, dtype=dtype)
    for gate, before in list(zip(gates.flatten(0, 1), hidden.flatten(0, 1), strict=True))[first:]:
        total = (total.float() + gate.unsqueeze(1) * before.unsqueeze(0)).to(dtype)
    return {"w": total}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sum_in_any_order_passes_and_one_without_a_term_or_in_16_bits_does_not(seed: int) -> None:
    gates, hidden = operands(seed)
    exact = by_step(gates.double(), hidden.double())
    baselines = []
    for order in range(2):
        with TermByTerm(order):
            baselines.append([by_step(gates, hidden)])

    def check(found: Results) -> None:
        assert_as_exact_as_baseline([found], [exact], baselines, UNIT, {"w": T * B})

    check(by_step(gates, hidden))
    check(one_by_one(gates, hidden))
    check(one_by_one(gates.flip(0, 1), hidden.flip(0, 1)))
    for wrong in (
        one_by_one(gates, hidden, first=1),
        one_by_one(gates.flip(0), hidden),
        one_by_one(gates, hidden.half().float()),
        one_by_one(gates, hidden, dtype=torch.float16),
    ):
        with pytest.raises(AssertionError, match="w: root_mean_square of the error"):
            check(wrong)
    one_off = by_step(gates, hidden)
    one_off["w"].view(-1)[:: 4 * H * H // 8] *= 1.001
    with pytest.raises(AssertionError, match="w: "):
        check(one_off)


SIZE = (1, 6, 290, 2, 64, 200)  # B, T, M, H, D, R


def problem(seed: int, dtype: torch.dtype) -> Results:
    batch, chunk, memory, heads, depth, rows = SIZE
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (batch, chunk, heads, depth) for name in ("query", "key", "value")}
    shapes |= {name: (batch, memory, heads, depth) for name in ("memory_key", "memory_value")}
    shapes |= {"position": (rows, heads, depth), "content_bias": (heads, depth), "position_bias": (heads, depth)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)


def eager(given: Results, dtype: torch.dtype, **options) -> Results:
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    with backend("reference"):
        out = rel_attention(**inputs, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), gradient_of(out).to(out.dtype))
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def checker(seed: int, dtype: torch.dtype) -> tuple[Results, Callable[[Results], None]]:
    given = problem(seed, dtype)
    exact, baselines = (
        eager(given, torch.float64),
        [[attention_baseline(given, gradient_of, order)] for order in range(2)],
    )
    return given, lambda found: assert_as_exact_as_baseline([found], [exact], baselines, torch.finfo(dtype).eps)


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_in_float32_passes_and_with_a_key_or_a_digit_less_does_not(seed: int) -> None:
    given, check = checker(seed, torch.float32)
    right = eager(given, torch.float32)
    check(right)
    for wrong in (
        eager(given, torch.float32, window=SIZE[1] + SIZE[2] - 1),  # the last query does not see the first key
        eager(given, torch.float32, scale=SIZE[4] ** -0.5 * 1.00002),
        eager(given | {"key": given["key"].half().float()}, torch.float32),
        right | {"position": right["position"].roll(1, dims=0)},
        right | {"memory_key": right["memory_key"].half().float()},
    ):
        with pytest.raises(AssertionError, match="of the error"):
            check(wrong)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_16_bits_passes_with_sums_in_float32_and_not_with_sums_in_16_bits(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, check = checker(seed, dtype)
    check({name: tensor.to(dtype) for name, tensor in eager(given, torch.float32).items()})

    def in_16_bits(self: TermByTerm, total: Tensor, term: Tensor) -> Tensor:
        return (total + term).to(dtype).to(total.dtype)

    monkeypatch.setattr(TermByTerm, "add", in_16_bits)
    with pytest.raises(AssertionError, match="of the error"):
        check(attention_baseline(given, gradient_of))


def test_tf32_rounds_operands_forward_and_backward() -> None:
    left, right = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)
    with TermByTerm(in_tf32=True):
        product = torch.einsum("ik,kj->ij", left, right)
        (gradient,) = torch.autograd.grad(product.sum(), left)
    rounded = tolerances.round_to_tf32(left.detach()).double() @ tolerances.round_to_tf32(right).double()
    torch.testing.assert_close(
        product.detach().double(), rounded, rtol=0, atol=8 * 2.0**-24 * float(rounded.abs().max()) * 7
    )
    assert float((product.detach() - left.detach() @ right).norm() / product.detach().norm()) > 1e-5
    torch.testing.assert_close(gradient, tolerances.round_to_tf32(right).sum(1).expand(5, 7))
