"""Padded products give what torch's own give; tried on the CPU, where nothing needs padding by itself."""

import pytest
import torch
import torch.nn.functional as F

from pytbptt.nn import TransformerXL, TransformerXLConfig, aligned
from pytbptt.nn.cross_entropy import linear_cross_entropy

SIZES = [(5, 13, 10), (3, 16, 7), (4, 9, 24), (1, 8, 16), (0, 5, 3)]  # rows, inputs, outputs


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Inside of padded_products every product is padded; the shapes of what was."""
    shapes: list[torch.Size] = []
    pad, chosen = aligned.pad, aligned.padding.get

    def watched(tensor: torch.Tensor, rows: bool = False) -> torch.Tensor:
        shapes.append(tensor.shape)
        return pad(tensor, rows)

    monkeypatch.setattr(aligned, "needs_padding", lambda dtype, device, *sizes: chosen())
    monkeypatch.setattr(aligned, "pad", watched)
    return shapes


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_torchs(size: tuple[int, int, int], with_bias: bool, padded: list[torch.Size]) -> None:
    rows, inputs, outputs = size
    leaves = [torch.randn(2, rows, inputs), torch.randn(outputs, inputs), *[torch.randn(outputs)] * with_bias]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    expected = F.linear(*leaves)
    assert not padded
    with aligned.padded_products():
        found = F.linear(*leaves)
        assert len(padded) == len(leaves)
        if rows:
            assert torch.autograd.gradgradcheck(F.linear, leaves)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("padded")
def test_what_products_see_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    torchs = F.linear

    def watched(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.extend([input.shape[-1], *weight.shape, 0 if bias is None else len(bias)])
        return torchs(input, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    with aligned.padded_products():
        aligned.linear(torch.randn(5, 13), torch.randn(11, 13), torch.randn(11))
    assert seen == [16, 16, 16, 16]


def test_a_model_and_its_gradients_are_those_without_padding(padded: list[torch.Size]) -> None:
    """Adaptive softmax with clusters of odd sizes included; every product of a plain torch.nn.Linear is found."""
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

    def outcome() -> list[torch.Tensor]:
        result, _ = model.loss(tokens, targets, memory)
        return [result.nll.detach(), *torch.autograd.grad(result.objective, list(model.parameters()))]

    expected = outcome()
    assert not padded
    with aligned.padded_products():
        found = outcome()
    products = {
        weight.shape for layer in model.layers for name, weight in layer.named_parameters() if name.endswith("proj.weight")
    }
    assert products
    assert products | {table.shape for table in model.softmax.weights} <= set(padded)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cross_entropy_of_odd_sizes(dtype: torch.dtype) -> None:
    leaves = [torch.randn(7, 13), torch.randn(51, 13), torch.randn(51)]
    leaves = [leaf.mul(0.5).to(dtype).requires_grad_() for leaf in leaves]
    targets = torch.randint(51, (7,))
    expected = F.cross_entropy(F.linear(*leaves).double(), targets, reduction="none")
    with aligned.padded_products():
        (found,) = linear_cross_entropy(leaves[:1], [targets], leaves[1:2], leaves[2:], [[(0, 0, 51)]])
        gradients = torch.autograd.grad(found.sum(), leaves)
    # In bfloat16 a logit, of 8 at most, is rounded by up to 2^-6, and so is a probability, relative.
    tolerance = 2.0**-4 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_only_16_bits_of_odd_sizes_on_a_gpu_are_padded_and_where_asked_for() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not aligned.needs_padding(torch.bfloat16, gpu, 16, 410)
    with aligned.padded_products():
        assert aligned.needs_padding(torch.bfloat16, gpu, 16, 410)
        assert not aligned.needs_padding(torch.bfloat16, gpu, 2, 410)
        assert not aligned.needs_padding(torch.bfloat16, gpu, 16, 408)
        assert not aligned.needs_padding(torch.float32, gpu, 16, 410)
        assert not aligned.needs_padding(torch.bfloat16, cpu, 16, 410)
    assert not aligned.needs_padding(torch.bfloat16, gpu, 16, 410)
