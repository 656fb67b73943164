"""Products padded to multiples of 8 match torch's; here padding is forced on the CPU, which needs none."""

import pytest
import torch
import torch.nn.functional as F

from pytbptt.nn import TransformerXL, TransformerXLConfig, padded_linear
from pytbptt.nn.cross_entropy import linear_cross_entropy

SIZES = [(5, 13, 10), (3, 16, 7), (4, 9, 24), (1, 8, 16), (0, 5, 3)]  # rows, inputs, outputs


@pytest.fixture
def padded_shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Forces padding of every product within padded_matmuls; records the shapes of the padded tensors."""
    shapes: list[torch.Size] = []
    pad, padding = padded_linear.pad, padded_linear.padding.get

    def recording_pad(tensor: torch.Tensor, rows: bool = False) -> torch.Tensor:
        shapes.append(tensor.shape)
        return pad(tensor, rows)

    monkeypatch.setattr(padded_linear, "needs_padding", lambda dtype, device, *sizes: padding())
    monkeypatch.setattr(padded_linear, "pad", recording_pad)
    return shapes


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_padded_linear_matches_torch(
    size: tuple[int, int, int], with_bias: bool, padded_shapes: list[torch.Size]
) -> None:
    rows, inputs, outputs = size
    leaves = [torch.randn(2, rows, inputs), torch.randn(outputs, inputs), *[torch.randn(outputs)] * with_bias]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    expected = F.linear(*leaves)
    assert not padded_shapes
    with padded_linear.padded_matmuls():
        found = F.linear(*leaves)
        assert len(padded_shapes) == len(leaves)
        if rows:
            assert torch.autograd.gradgradcheck(F.linear, leaves)
    grad_output = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    found_grads, expected_grads = (torch.autograd.grad(out, leaves, grad_output) for out in (found, expected))
    torch.testing.assert_close(found_grads, expected_grads)


@pytest.mark.usefixtures("padded_shapes")
def test_padded_operand_sizes_are_multiples_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    linear = F.linear

    def recording_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        sizes.extend([input.shape[-1], *weight.shape, 0 if bias is None else len(bias)])
        return linear(input, weight, bias)

    monkeypatch.setattr(F, "linear", recording_linear)
    with padded_linear.padded_matmuls():
        padded_linear.padded_linear(torch.randn(5, 13), torch.randn(11, 13), torch.randn(11))
    assert sizes == [16, 16, 16, 16]


def test_padding_does_not_change_model_loss_and_gradients(padded_shapes: list[torch.Size]) -> None:
    """With clusters of odd sizes, where every torch.nn.Linear and the softmax are padded."""
    config = TransformerXLConfig(
        vocab_size=101,
        n_layer=2,
        d_model=13 * 2,
        n_head=2,
        d_head=5,
        d_inner=21,
        mem_len=7,
        cutoffs=(19, 50),
        div_val=2,
    )
    torch.manual_seed(0)
    model = TransformerXL(config).double()
    tokens, targets = torch.randint(101, (2, 3, 9))
    memory = model.init_memory(3)

    def loss_and_gradients() -> list[torch.Tensor]:
        result, _ = model.loss(tokens, targets, memory)
        return [result.nll.detach(), *torch.autograd.grad(result.objective, list(model.parameters()))]

    expected = loss_and_gradients()
    assert not padded_shapes
    with padded_linear.padded_matmuls():
        found = loss_and_gradients()
    linear_shapes = {
        weight.shape
        for layer in model.layers
        for name, weight in layer.named_parameters()
        if name.endswith("proj.weight")
    }
    assert linear_shapes
    assert linear_shapes | {table.shape for table in model.softmax.weights} <= set(padded_shapes)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("padded_shapes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_padded_cross_entropy_matches_torch(dtype: torch.dtype) -> None:
    leaves = [torch.randn(7, 13), torch.randn(51, 13), torch.randn(51)]
    leaves = [leaf.mul(0.5).to(dtype).requires_grad_() for leaf in leaves]
    targets = torch.randint(51, (7,))
    expected = F.cross_entropy(F.linear(*leaves).double(), targets, reduction="none")
    with padded_linear.padded_matmuls():
        (found,) = linear_cross_entropy(leaves[:1], [targets], leaves[1:2], leaves[2:], [[(0, 0, 51)]])
        gradients = torch.autograd.grad(found.sum(), leaves)
    # bfloat16 rounds logits, which are below 8, by up to 2^-6; that is also the relative error of a probability.
    tolerance = 2.0**-4 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert grad.shape == expected_grad.shape
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


def test_only_large_unaligned_16_bit_products_on_gpus_need_padding() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not padded_linear.needs_padding(torch.bfloat16, gpu, 16, 410)
    with padded_linear.padded_matmuls():
        assert padded_linear.needs_padding(torch.bfloat16, gpu, 16, 410)
        assert not padded_linear.needs_padding(torch.bfloat16, gpu, 2, 410)
        assert not padded_linear.needs_padding(torch.bfloat16, gpu, 16, 408)
        assert not padded_linear.needs_padding(torch.float32, gpu, 16, 410)
        assert not padded_linear.needs_padding(torch.bfloat16, cpu, 16, 410)
    assert not padded_linear.needs_padding(torch.bfloat16, gpu, 16, 410)
