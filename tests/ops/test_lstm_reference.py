"""The reference lstm matches torch.nn.LSTM, and its resets match separate runs."""

import pytest
import torch

from pytbptt.ops import lstm


def make_inputs(T=5, B=3, H=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)]
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", [(5, 3, 4), (1, 1, 1), (2, 1, 41)])
def test_reference_matches_nn_lstm(sizes):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(*sizes)]
    gates, weight_hh, h0, c0 = inputs
    H = sizes[2]
    module = torch.nn.LSTM(4 * H, H, bias=False, dtype=torch.float64)
    state = {"weight_ih_l0": torch.eye(4 * H, dtype=torch.float64), "weight_hh_l0": weight_hh}
    expected, (h_n, c_n) = torch.func.functional_call(module, state, (gates, (h0[None], c0[None])))
    actual = lstm(gates, weight_hh, h0, c0)
    expected = (expected, h_n[0], c_n[0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)

    weights = [torch.randn_like(tensor) for tensor in expected]
    grads = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, tensors, strict=True)), inputs)
        for tensors in (actual, expected)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_reset_equals_new_run_with_zero_state():
    gates, weight_hh, h0, c0 = make_inputs(T=6)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[0, 0] = reset[4, 1] = reset[2, 2] = reset[3, 2] = True
    output, h_n, c_n = lstm(gates, weight_hh, h0, c0, reset=reset)
    for b, start in enumerate((0, 4, 3)):
        row = slice(b, b + 1)
        zeros = torch.zeros_like(h0[row])
        expected = lstm(gates[start:, row], weight_hh, zeros, zeros)
        actual = output[start:, row], h_n[row], c_n[row]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    before = lstm(gates[:4], weight_hh, h0, c0)[0]
    torch.testing.assert_close(output[:4, 1], before[:, 1], rtol=0, atol=1e-13)


def test_no_gradient_crosses_a_reset():
    gates, weight_hh, h0, c0 = (tensor.requires_grad_() for tensor in make_inputs(T=4, B=2))
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    output, _, _ = lstm(gates, weight_hh, h0, c0, reset=reset)
    output[3].sum().backward()
    for tensor in (gates.grad[:2, 0], h0.grad[0], c0.grad[0]):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert (gates.grad[:2, 1] != 0).any()
    assert (h0.grad[1] != 0).any()


def test_gradients_with_resets_match_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(T=3, B=2, H=2)]
    reset = torch.tensor([[False, True], [True, False], [False, False]])
    torch.autograd.gradcheck(lambda *tensors: lstm(*tensors, reset=reset), inputs)


@pytest.mark.parametrize("autocast", [False, True])
def test_cell_stays_float32(autocast):
    gates, weight_hh, h0, c0 = make_inputs(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, h_n, c_n = lstm(gates, weight_hh, h0, c0.float())
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("gates", 0, lambda tensor: tensor[..., 1:]),
        ("weight_hh", 1, lambda tensor: tensor.t()),
        ("h0", 2, lambda tensor: tensor[1:]),
        ("c0", 3, lambda tensor: tensor.float()),
        ("gates", 0, lambda tensor: tensor.long()),
    ],
)
def test_error_names_the_input(name, index, change):
    inputs = make_inputs()
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"lstm: {name}: found.*expected"):
        lstm(*inputs)


@pytest.mark.parametrize("reset", [torch.zeros(3, 5, dtype=torch.bool), torch.zeros(5, 3)])
def test_error_names_the_reset(reset):
    with pytest.raises(ValueError, match=r"lstm: reset: found.*expected"):
        lstm(*make_inputs(), reset=reset)


def test_non_tensor_arguments_raise():
    gates, weight_hh, h0, c0 = make_inputs()
    with pytest.raises(TypeError, match="lstm: reset: found list, expected a tensor"):
        lstm(gates, weight_hh, h0, c0, reset=[False] * 5)
    with pytest.raises(TypeError, match="lstm: c0: found NoneType, expected a tensor"):
        lstm(gates, weight_hh, h0, None)
