"""The bounds that kernels are held to pass right results and catch planted errors."""

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_as_good_as_eager, eager_in_tf32

UNIT = torch.finfo(torch.float32).eps
T, B, H = 20, 64, 40


def operands(draw: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw)
    return torch.randn(T, B, 4 * H, generator=generator), torch.randn(T, B, H, generator=generator)


def by_step(gates: Tensor, hidden: Tensor) -> Tensor:
    """As autograd adds up the gradient of a weight that every step uses."""
    return sum((gates[t].t() @ hidden[t] for t in range(1, T)), gates[0].t() @ hidden[0])


def one_by_one(gates: Tensor, hidden: Tensor, first: int = 0) -> Tensor:
    """As a BLAS may: every product is added to the sum of those before it."""
    total = torch.zeros(4 * H, H)
    for gate, before in list(zip(gates.flatten(0, 1), hidden.flatten(0, 1), strict=True))[first:]:
        total = torch.addcmul(total, gate.unsqueeze(1), before.unsqueeze(0))
    return total


def check(result: Tensor, gates: Tensor, hidden: Tensor, terms: int) -> None:
    draws = [({"w": by_step(*(t.double() for t in one))}, {"w": by_step(*one)}) for one in map(operands, range(4))]
    draws[0] = ({"w": by_step(gates.double(), hidden.double())}, {"w": by_step(gates, hidden)})
    assert_as_good_as_eager({"w": result}, draws, UNIT, terms={"w": terms})


@pytest.mark.parametrize("draw", range(20))
def test_a_sum_one_by_one_passes_and_one_without_a_term_or_in_16_bits_does_not(draw: int) -> None:
    gates, hidden = operands(draw)
    check(one_by_one(gates, hidden), gates, hidden, T * B)
    with pytest.raises(AssertionError):
        check(one_by_one(gates, hidden, first=1), gates, hidden, T * B)
    with pytest.raises(AssertionError):
        check(one_by_one(gates, hidden.half().float()), gates, hidden, T * B)
    with pytest.raises(AssertionError):
        check(one_by_one(gates.flip(0), hidden), gates, hidden, T * B)


def test_tf32_rounds_operands_and_their_gradients() -> None:
    left, right = torch.randn(5, 7, requires_grad=True), torch.randn(7, 3)
    exact = left.detach().double() @ right.double()
    with eager_in_tf32():
        product = torch.einsum("ik,kj->ij", left, right)
    error = float((product.detach().double() - exact).norm() / exact.norm())
    assert 1e-5 < error < 2.0**-10
    (gradient,) = torch.autograd.grad(product.sum(), left)
    assert gradient.shape == left.shape
    assert torch.equal(torch.einsum("ik,kj->ij", left, right), left @ right)
