"""The CUDA kernels of rel_attention on the emulator, against the reference in float64.

A tolerance is what eager PyTorch itself is off by in the same dtype, times two; errors are root mean squares. (Times
three for TF32: only products round there, and the row sum of grad_out · out, which stands for that of the weights times
their gradients, does not make the errors it would have to cancel.) It is never less than one rounding of the result
itself, nor than ROUNDINGS of float32 on the largest result, which the sums inside are off by: where the exact result is
zero by cancellation, both errors are chance, and it is as many roundings in the tensors' own dtype.
"""

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from tests.emulator.rel_attention import DTYPES, Kernels, Problem

ROUNDINGS = 8
SEED = 0x1234_5678_9ABC_DEF0
PADDED = (32, 48, 64, 96, 128)

SIZES = [  # B, T, M, H, D, R
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (1, 1, 140, 2, 41, 141),
    (1, 70, 61, 1, 41, 131),
    (1, 150, 150, 1, 41, 90),
    (1, 66, 100, 1, 40, 1),
    (2, 3, 600, 1, 20, 500),  # keys are split among blocks
]


def padded(D: int) -> int:
    return next(size for size in PADDED if size >= D)


def make(B: int, T: int, M: int, H: int, D: int, R: int, dtype: torch.dtype) -> Problem:
    """Random inputs, gradients wanted for all."""
    generator = torch.Generator().manual_seed(B + 10 * T + 100 * M + 1000 * D + R)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    problem = {name: normal(B, T, H, D) for name in ("query", "key", "value")}
    problem |= {"position": normal(R, H, D), "content_bias": normal(H, D), "position_bias": normal(H, D)}
    if M:
        problem |= {"memory_key": normal(B, M, H, D), "memory_value": normal(B, M, H, D)}
    return problem


def options_for(B: int, T: int, M: int, *, first_key: bool, window: bool, dropout: bool, scale: bool) -> dict:
    """Keyword arguments; first keys include rows that see everything and rows that see nothing."""
    chosen: dict = {}
    if first_key:
        generator = torch.Generator().manual_seed(T)
        chosen["first_key"] = torch.randint(-1, M + T + 1, (B, T), generator=generator, dtype=torch.int32)
    if window:
        chosen["window"] = (M + T) // 3 + 1
    if dropout:
        chosen |= {"dropout_p": 0.3, "seed": torch.tensor([SEED])}
    if scale:
        chosen["scale"] = -0.3
    return chosen


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)


def round_to_tf32(tensor: Tensor) -> Tensor:
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def einsum_in_tf32(equation: str, *operands: Tensor) -> Tensor:
    """What torch.einsum of float32 does on a GPU with TF32 allowed, and so its backward."""
    rounded = [t + (round_to_tf32(t.detach()) - t).detach() for t in operands]
    out = torch.functional.einsum(equation, *rounded)
    out.register_hook(round_to_tf32)
    return out


def evaluate(problem: Problem, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The reference's output and gradients in a dtype, as float64."""
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.items()}
    with backend("reference"):
        out = rel_attention(**inputs, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), gradient_of(out))
    return {name: t.detach().double() for name, t in zip(["out", *inputs], [out, *gradients], strict=True)}


def run(kernels: Kernels, problem: Problem, memory_needs_grad: bool = True, **options) -> dict[str, Tensor]:
    """The kernels' output and gradients."""
    out, log_sum_exp = kernels.forward(problem, **options)
    gradients = kernels.backward(
        problem, gradient_of(out), out, log_sum_exp, memory_needs_grad=memory_needs_grad, **options
    )
    return {"out": out, **gradients}


def root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def assert_as_good_as_eager(kind: str, problem: Problem, schedule: int = 0, **options) -> None:
    exact = evaluate(problem, torch.float64, **options)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "Tf32":
            patch.setattr(torch, "einsum", einsum_in_tf32)
        eager = evaluate(problem, DTYPES[kind], **options)
    fused = run(Kernels(kind, padded(problem["query"].shape[-1]), schedule), problem, **options)
    unit = 2.0**-10 if kind == "Tf32" else torch.finfo(DTYPES[kind]).eps
    largest = max(t.abs().max() for t in exact.values())
    for name, expected in exact.items():
        cancels = expected.abs().max() < 1e-9 * largest
        least = ROUNDINGS * (unit if cancels else torch.finfo(torch.float32).eps) * largest
        factor = 3 if kind == "Tf32" else 2
        tolerance = max(factor * root_mean_square(eager[name] - expected), unit * root_mean_square(expected), least)
        error = root_mean_square(fused[name].double() - expected)
        assert error <= tolerance, f"{name}: error {error:.2e}, expected at most {tolerance:.2e}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_options(kind: str, size: tuple[int, ...]) -> None:
    problem = make(*size, dtype=DTYPES[kind])
    for together in (False, True):
        assert_as_good_as_eager(
            kind,
            problem,
            **options_for(*size[:3], first_key=together, window=together, dropout=together, scale=together),
        )
