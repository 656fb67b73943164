"""Random inputs and options of rel_attention, results by name, and the check of a kernel's error."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from tests.common import error_bounds

OPTIONS = ("first_key", "window", "dropout", "scale")
SEED = 0x1234_5678_9ABC_DEF0  # of dropout

Tensors = dict[str, Tensor]


def make_inputs(
    B: int,
    T: int,
    M: int,
    H: int,
    D: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """By name; all require a gradient."""
    generator = torch.Generator(device).manual_seed(B + 10 * T + 100 * M + 1000 * D + R + 1_000_000 * seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    inputs = {name: normal(B, T, H, D) for name in ("query", "key", "value")}
    inputs |= {"position": normal(R, H, D), "content_bias": normal(H, D), "position_bias": normal(H, D)}
    if M:
        inputs |= {"memory_key": normal(B, M, H, D), "memory_value": normal(B, M, H, D)}
    return inputs


def make_options(B: int, T: int, M: int, enabled: Collection[str], *, scale: float = -0.3, device: str = "cpu") -> dict:
    """Keyword arguments for the enabled ones of OPTIONS. Some queries see all keys by first_key, and some none."""
    options: dict = {}
    if "first_key" in enabled:
        generator = torch.Generator().manual_seed(T)
        first_key = torch.randint(-1, M + T + 1, (B, T), generator=generator, dtype=torch.int32)
        options["first_key"] = first_key.to(device)
    if "window" in enabled:
        options["window"] = (M + T) // 3 + 1
    if "dropout" in enabled:
        options |= {"dropout_p": 0.3, "seed": torch.tensor([SEED], device=device)}
    if "scale" in enabled:
        options["scale"] = scale
    return options


def make_grad_output(out: Tensor) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(3)
    return torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float64).to(out.dtype)


def outputs_and_gradients(implementation: str, inputs: Tensors, dtype: torch.dtype | None = None, **options) -> Tensors:
    """`out` and the gradients of inputs that require one, computed in `dtype` (default: theirs), as float64."""
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for name, t in inputs.items()}
    with backend(implementation):
        out = rel_attention(**leaves, **options)
    names = [name for name, t in leaves.items() if t.requires_grad]
    gradients = torch.autograd.grad(out, [leaves[name] for name in names], make_grad_output(out))
    return {name: t.detach().double() for name, t in zip(["out", *names], [out, *gradients], strict=True)}


def assert_error_within_baseline(
    run: Callable[..., Tensors],
    size: tuple[int, ...],
    dtype: torch.dtype,
    *,
    in_tf32: bool = False,
    device: str = "cpu",
    **options,
) -> None:
    """Checks `run(inputs, **options)`, which returns what `outputs_and_gradients` does, within the bounds
    of tests/common/error_bounds.py.

    Args:
        size: B, T, M, H, D, R.
        in_tf32: whether `run` rounds operands of products to TF32.
    """
    B, T, _, H, D, _ = size
    inputs = [make_inputs(*size, dtype, seed, device) for seed in error_bounds.input_draws(B, T, H, D)]
    actual = [run(one, **options) for one in inputs]
    expected = [outputs_and_gradients("reference", one, torch.float64, **options) for one in inputs]
    baselines = [
        [error_bounds.attention_baseline(one, make_grad_output, order, in_tf32, **options) for one in inputs]
        for order in error_bounds.summation_orders(B, T, H, D)
    ]
    unit = 2.0**-10 if in_tf32 else torch.finfo(dtype).eps
    error_bounds.assert_error_within_baseline(actual, expected, baselines, unit)
