"""The CUDA kernels of rel_attention on the emulator, against the reference in float64.

A tolerance is what eager PyTorch itself is off by in the same dtype, times two (in float16, which rounds to as many
bits as TF32 does, for TF32); errors are root mean squares. It is never less than ROUNDINGS units in the last place of
the largest result, for results that are zero by cancellation.
"""

from itertools import product

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
]


def padded(D: int) -> int:
    return next(size for size in PADDED if D <= size)


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


def evaluate(problem: Problem, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The reference's results in a dtype, as float64."""
    inputs = {name: t.detach().to(dtype) for name, t in problem.items()}
    with backend("reference"):
        return {"out": rel_attention(**inputs, **options).double()}


def assert_as_good_as_eager(kind: str, problem: Problem, schedule: int = 0, **options) -> None:
    exact = evaluate(problem, torch.float64, **options)
    like = torch.float16 if kind == "Tf32" else DTYPES[kind]
    eager = evaluate(problem, like, **options)
    kernels = Kernels(kind, padded(problem["query"].shape[-1]), schedule)
    fused = {"out": kernels.forward(problem, **options)[0].double()}
    largest = max(t.abs().max() for t in exact.values())
    for name, expected in exact.items():
        least = ROUNDINGS * torch.finfo(like).eps * largest
        tolerance = max(2 * (eager[name] - expected).square().mean().sqrt(), least)
        error = (fused[name] - expected).square().mean().sqrt()
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
