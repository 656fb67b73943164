"""Dropout has the distribution of torch.nn.functional.dropout, with fewer random numbers."""

import pytest
import torch

from pytbptt.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_drop_rate_and_scale(p):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1_000_003), p)
    kept = dropped != 0
    # The standard error over a million elements is at most 0.0005; p is rounded to a multiple of 1 / 65536.
    assert kept.double().mean() == pytest.approx(1 - p, abs=0.0025)
    assert dropped[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=0.01 if p == 0.999 else 1e-4)


def test_elements_are_dropped_independently():
    """Also the four elements whose masks come from one random number."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000, 4), 0.3) != 0).double()
    # Standard errors: 0.001 for a rate, 0.002 for a correlation.
    assert (kept.mean(dim=0) - 0.7).abs().max() < 0.005
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 0.01


def test_gradient_uses_the_same_mask():
    input = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    dropped = dropout(input, 0.4)
    (grad,) = torch.autograd.grad(dropped.sum(), input)
    torch.testing.assert_close(grad * input, dropped, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (0, 4), (2, 4, 8)])
def test_shape_and_dtype_match_input(shape, dtype):
    input = torch.randn(shape, dtype=torch.float64).to(dtype)
    dropped = dropout(input, 0.5)
    assert dropped.shape == input.shape
    assert dropped.dtype == dtype


def test_mask_follows_torch_generator():
    input = torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(input, 0.5), dropout(input, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(input, 0.5), first)
    assert not torch.equal(first, second)


def test_no_random_numbers_are_consumed_without_dropout():
    input, state = torch.randn(9), torch.get_rng_state()
    assert dropout(input, 0.5, training=False) is input
    assert dropout(input, 0.0) is input
    assert Dropout(0.5).eval()(input) is input
    assert torch.equal(torch.get_rng_state(), state)
    assert (dropout(input, 1.0) == 0).all()
