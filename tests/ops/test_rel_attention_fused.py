"""The compiled rel_attention on the CPU, against the reference in float64 within tests/common/error_bounds.py."""

import os
import shutil
from collections.abc import Iterator
from itertools import compress, product

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.philox import dropout_threshold
from pytbptt.ops.rel_attention import reference
from pytbptt.ops.rel_attention.reference import attention_keep_mask
from tests.common import rel_attention_cases
from tests.common.rel_attention_cases import (
    OPTIONS,
    SEED,
    Tensors,
    make_grad_output,
    make_inputs,
    make_options,
    outputs_and_gradients,
)

if EXTENSION.facts is None:
    pytest.skip(f"no compiled extension: {EXTENSION.unavailable_reason}", allow_module_level=True)


def run_fused(inputs: Tensors, **options) -> Tensors:
    return outputs_and_gradients("fused", inputs, **options)


def assert_error_within_baseline(size: tuple[int, ...], dtype: torch.dtype, **options) -> None:
    rel_attention_cases.assert_error_within_baseline(run_fused, size, dtype, **options)


SIZES = [  # B, T, M, H, D, R
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (200, 1, 40, 2, 41, 41),
    (60, 3, 9, 1, 5, 4),
    (3, 40, 23, 2, 41, 63),
    (1, 150, 150, 3, 41, 1),
    (1, 64, 500, 1, 24, 30),
    (2, 49, 0, 2, 16, 60),
    (1, 100, 600, 1, 64, 700),
    (1, 20, 13, 1, 130, 33),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference_with_every_combination_of_options(size: tuple[int, ...], dtype: torch.dtype) -> None:
    for flags in product((False, True), repeat=4):
        options = make_options(*size[:3], list(compress(OPTIONS, flags)), scale=0.3)
        assert_error_within_baseline(size, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 2, 8, 12), (1, 2, 9, 1, 41, 11), (2, 70, 60, 2, 41, 130)], ids=str)
def test_16_bit_error_within_baseline(size: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_error_within_baseline(size, dtype)
    options = make_options(*size[:3], ("first_key", "window", "dropout"))
    assert_error_within_baseline(size, dtype, **options)


DTYPES_16_BIT = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*DTYPES_16_BIT, torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1, 40])
def test_single_visible_key_has_zero_score_gradient(T: int, dtype: torch.dtype) -> None:
    """Exactly 0: rounding of terms that should cancel, scaled by dropout and summed over queries, once exceeded every
    true gradient."""
    M, options = 3, {"dropout_p": 0.97, "scale": 5.0, "seed": torch.tensor([SEED])}
    own_key_only = torch.arange(M, M + T, dtype=torch.int32).expand(2, T)
    for mask in ({"window": 1}, {"first_key": own_key_only}):
        results = run_fused(make_inputs(2, T, M, 2, 41, 1, dtype=dtype), **mask, **options)
        for name in ("query", "key", "memory_key", "position", "content_bias", "position_bias"):
            assert not results[name].any(), name
        assert results["value"].any() or T == 1  # dropout drops the only one
    # Next to a query that sees all keys, and has gradients.
    except_one_query = own_key_only.clone()
    except_one_query[0, -1] = 0
    results = run_fused(
        make_inputs(2, T, M, 2, 41, 9, dtype=dtype), first_key=except_one_query, dropout_p=0.3, seed=options["seed"]
    )
    assert results["query"][0, -1].any()
    assert not results["query"][0, :-1].any()
    assert not results["query"][1].any()


def test_single_visible_key_propagates_non_finite() -> None:
    inputs = make_inputs(1, 3, 0, 1, 8, 4)
    with torch.no_grad():
        inputs["query"][0, 1] = float("inf")
        inputs["value"][0, 2] = float("nan")
    results = run_fused(inputs, window=1)
    assert not results["query"][0, 0].any()
    for name in ("out", "query"):
        assert results[name][0, 0].isfinite().all()
        assert not results[name][0, 1:].isfinite().any()


@pytest.mark.parametrize("T", [1, 5])
def test_minus_infinity_scores_have_zero_weight(T: int) -> None:
    """Also if the first keys of a query are all -inf. If all its keys are, the output is NaN, as in eager mode."""
    inputs = {name: t.detach() for name, t in make_inputs(2, T, 1100, 1, 8, 4).items()}
    inputs["query"] = inputs["query"].abs() + inputs["content_bias"].abs()
    inputs["memory_key"][:, :1050] = float("-inf")
    inputs["memory_key"][1] = inputs["key"][1] = float("-inf")
    inputs["key"][1, 0] = float("-inf")
    with backend("fused"):
        actual = rel_attention(**inputs)
    with backend("reference"):
        expected = rel_attention(**inputs)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert actual[0].isfinite().all()
    assert actual[1].isnan().all()
    assert expected[1].isnan().all()


def cancellation_error_bound(inputs: Tensors, *, window: int, scale: float, dropout_p: float, seed: Tensor) -> Tensor:
    """Bound (H, D) for the error of the gradient of content_bias, in float64.

    With dP the gradients of the weights P, the fused backward forms dS = P (dP - grad_out · out). With nearly equal dP
    the difference cancels, and the rounding of its terms remains:

    * out and its rounding residual, each in 16 bits with unit roundoff u: u² of out, or half the smallest subnormal;
    * the weights: 2σ of each, where σ bounds the error of a score in float32;
    * sums of n terms in float32: n · 2**-24 of the sum of their absolute values.
    """
    p = {name: t.detach().double() for name, t in inputs.items()}
    B, T, H, D = p["query"].shape
    keys, values = (torch.cat([p[f"memory_{name}"], p[name]], dim=1) for name in ("key", "value"))
    K, grad = keys.shape[1], make_grad_output(inputs["query"]).double()
    u, half_subnormal = torch.finfo(inputs["query"].dtype).eps / 2, 2.0**-25
    visible = reference.visible_keys(T, K, None, window, grad.device)
    keep = attention_keep_mask(seed, B, H, T, K, dropout_p) * (1 / (1 - dropout_threshold(dropout_p) / 65536))

    to_content, to_position = p["query"] + p["content_bias"], p["query"] + p["position_bias"]
    scores = reference.unscaled_scores(to_content, to_position, keys, p["position"])
    weights = (scale * scores).masked_fill(~visible, float("-inf")).softmax(dim=-1)
    score_sizes = reference.unscaled_scores(to_content.abs(), to_position.abs(), keys.abs(), p["position"].abs())
    sigma = 2.0**-24 * (2 * D + 10) * scale * score_sizes.masked_fill(~visible, 0).amax(dim=-1, keepdim=True)

    d_weights = keep * torch.einsum("bihd,bjhd->bhij", grad, values)
    out = torch.einsum("bhij,bjhd->bihd", weights * keep, values)
    difference = d_weights - torch.einsum("bihd,bihd->bhi", grad, out).unsqueeze(-1)
    product_error = D * 2.0**-24 * keep * torch.einsum("bihd,bjhd->bhij", grad.abs(), values.abs())
    rounding_error = (grad.abs() * (u**2 * out.abs() + half_subnormal)).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    out_sizes = torch.einsum("bhij,bjhd->bihd", weights * keep, values.abs())
    out_error = torch.einsum("bihd,bihd->bhi", grad.abs(), out_sizes).unsqueeze(-1) * (
        (K + 2 * D) * 2.0**-24 + 2 * sigma
    )
    d_scores = weights * (2 * sigma * difference.abs() + product_error + rounding_error + out_error)
    total = (weights * difference).abs() * (B * T * K * 2.0**-24) + d_scores
    exact = torch.einsum("bhij,bjhd->hd", weights * difference, keys)
    return scale * (torch.einsum("bhij,bjhd->hd", total, keys.abs()) + u * exact.abs())


@pytest.mark.parametrize("dtype", DTYPES_16_BIT)
@pytest.mark.parametrize("window", [2, 3, 7])
def test_cancelling_gradients_are_as_accurate_as_rounding_residual(window: int, dtype: torch.dtype) -> None:
    """Nearly equal values and short sums: without the rounding residual, the bound is exceeded more than tenfold."""
    options = {"window": window, "scale": 0.01, "dropout_p": 0.0, "seed": torch.tensor([SEED])}
    for seed in range(20):
        inputs = make_inputs(1, 4, 3, 2, 9, 1, dtype=dtype, seed=seed)
        with torch.no_grad():
            for name in ("value", "memory_value"):
                inputs[name].mul_(0.01).add_(3 * torch.randn(9, generator=torch.Generator().manual_seed(seed)))
        actual = run_fused(inputs, **options)["content_bias"]
        expected = outputs_and_gradients("reference", inputs, torch.float64, **options)["content_bias"]
        assert ((actual - expected).abs() <= cancellation_error_bound(inputs, **options)).all()


def test_float16_keeps_subnormals_infinities_and_nan() -> None:
    values = torch.tensor([6e-8, -3e-6, 65504.0, 0.0, float("inf"), float("nan"), 1.5, -0.1], dtype=torch.float16)
    inputs = make_inputs(1, 1, 0, 1, 8, 1, dtype=torch.float16)
    inputs["value"] = values.view(1, 1, 1, 8)  # with one key the output is its value
    for which in ("reference", "fused"):
        with backend(which):
            assert torch.equal(torch.nan_to_num(rel_attention(**inputs).flatten(), 7.0), values.nan_to_num(7.0)), which


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = run_fused(make_inputs(B, T, M, 2, 8, 5))
    assert results["out"].shape == (B, T, 2, 8)
    assert all(not t.any() for t in results.values())


def test_gradcheck() -> None:
    inputs = make_inputs(2, 5, 4, 2, 3, 6, dtype=torch.float64)
    options = make_options(2, 5, 4, OPTIONS, scale=0.3)
    names = list(inputs)

    def run(*tensors: Tensor) -> Tensor:
        with backend("fused"):
            return rel_attention(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_second_derivative_raises() -> None:
    inputs = make_inputs(2, 3, 2, 1, 5, 4, torch.float64)
    tensors = list(inputs.values())
    with backend("fused"):
        once, twice = (
            torch.autograd.grad(rel_attention(**inputs).square().sum(), tensors, create_graph=create_graph)
            for create_graph in (False, True)
        )
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="rel_attention: the fused op has no second derivative"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in twice), tensors)


def test_memory_without_gradient_changes_no_other_gradient() -> None:
    inputs = make_inputs(2, 60, 70, 2, 41, 100)
    expected = run_fused(inputs)
    for name in ("memory_key", "memory_value"):
        inputs[name] = inputs[name].detach()
    actual = run_fused(inputs)
    assert set(expected) - set(actual) == {"memory_key", "memory_value"}
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other layouts."""
    yield "transposed", tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield "slice of a wider projection", torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    yield "last dimension strided", torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("T", [1, 50])
def test_non_contiguous_inputs_are_bitwise_equal(T: int) -> None:
    inputs = {name: t.detach() for name, t in make_inputs(2, T, 31, 3, 20, T + 31).items()}
    with backend("fused"):
        expected = rel_attention(**inputs)
        for name, tensor in inputs.items():
            for layout, other in layouts(tensor):
                assert torch.equal(rel_attention(**inputs | {name: other}), expected), f"{name} {layout}"


def test_expanded_inputs_are_bitwise_equal() -> None:
    inputs = make_inputs(1, 30, 10, 2, 12, 40)
    expanded = {name: t.expand(3, *t.shape[1:]) if t.dim() == 4 else t for name, t in inputs.items()}
    with backend("fused"):
        out, expanded_out = rel_attention(**inputs), rel_attention(**expanded)
        expanded_out.sum().backward()  # with an expanded gradient
    assert torch.equal(expanded_out, out.expand_as(expanded_out))
    expected = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    with backend("reference"):
        (3 * rel_attention(**expected)).sum().backward()
    for name in inputs:
        torch.testing.assert_close(inputs[name].grad, expected[name].grad.float(), rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    options = make_options(2, 5, 7, ("first_key", "window", "dropout"))
    for memory_length, enabled in product((7, 0), (options, {})):
        inputs = make_inputs(2, 5, memory_length, 2, 8, 12)
        arguments = (
            *(inputs[n] for n in ("query", "key", "value", "position", "content_bias", "position_bias")),
            inputs.get("memory_key"),
            inputs.get("memory_value"),
            enabled.get("first_key"),
            enabled.get("window"),
            0.4,
            enabled.get("dropout_p", 0.0),
            enabled.get("seed"),
        )
        torch.library.opcheck(torch.ops.pytbptt.rel_attention.default, (*arguments, True, False))
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        results = torch.ops.pytbptt.rel_attention(*detached, True, False)
        for memory_needs_grad in (False, True):
            backward = (torch.ones_like(results[0]), *detached, *results, memory_needs_grad, False)
            torch.library.opcheck(torch.ops.pytbptt.rel_attention_backward.default, backward)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for torch.compile's inductor (CXX, g++)"
)
def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(2, 9, 5, 2, 8, 14)
    compiled = torch.compile(rel_attention, fullgraph=True)
    seed = torch.tensor([SEED])
    expected = rel_attention(**inputs, dropout_p=0.2, seed=seed)
    out = compiled(**inputs, dropout_p=0.2, seed=seed)
    assert torch.equal(out, expected)
    tensors = list(inputs.values())
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(compiled(**inputs, dropout_p=0.2), compiled(**inputs, dropout_p=0.2))


def test_autocast_dtypes_and_gradients() -> None:
    inputs = make_inputs(2, 9, 5, 2, 8, 14)
    inputs["value"] = inputs["value"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), backend("fused"):
        out = rel_attention(**inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert inputs["query"].grad.dtype == torch.float32
    cast = {name: t.detach().bfloat16() for name, t in inputs.items()}
    with backend("fused"):
        assert torch.equal(out, rel_attention(**cast))


def to_bytes(results: Tensors) -> bytes:
    return b"".join(t.numpy().tobytes() for t in results.values())


@pytest.mark.parametrize("size", [(3, 100, 61, 2, 41, 161), (1, 200, 30, 1, 16, 230), (5, 1, 90, 3, 41, 91)], ids=str)
def test_thread_counts_and_reruns_are_bitwise_equal(size: tuple[int, ...]) -> None:
    inputs = make_inputs(*size)
    options = make_options(*size[:3], ("first_key", "dropout"))
    threads = torch.get_num_threads()
    try:
        seen = set()
        for count in (1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            seen.add(to_bytes(run_fused(inputs, **options)))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


def test_outputs_are_fully_written() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        for fill in (False, True):
            torch.use_deterministic_algorithms(fill)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # with NaN
            for size in SIZES:
                inputs = make_inputs(*size)
                first_key = torch.full(size[:1] + size[1:2], size[1] + size[2], dtype=torch.int32)  # masks all keys
                for options in ({}, {"window": 2}, {"first_key": first_key}):
                    results = run_fused(inputs, **options)
                    assert all(t.isfinite().all() for t in results.values())
                assert all(not t.any() for t in results.values())
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_decoding_equals_chunk() -> None:
    """Kernels for one query and unpacked keys (decoding) match those for tiles of queries and packed keys."""
    inputs = {name: t.detach() for name, t in make_inputs(2, 20, 30, 2, 41, 50, dtype=torch.float64).items()}
    memory = {name: torch.cat([inputs[f"memory_{name}"], inputs[name]], dim=1) for name in ("key", "value")}
    with backend("fused"):
        chunk = rel_attention(**inputs)
        for i in range(20):
            token = {name: inputs[name][:, i : i + 1] for name in ("query", "key", "value")}
            past = {f"memory_{name}": memory[name][:, : 30 + i] for name in ("key", "value")}
            out = rel_attention(**inputs | token | past)
            torch.testing.assert_close(out, chunk[:, i : i + 1], rtol=1e-12, atol=1e-12)


def test_nan_propagates() -> None:
    for T in (1, 20):
        inputs = {name: t.detach() for name, t in make_inputs(1, T, 5, 2, 8, 9).items()}
        inputs["query"][0, 0, 1] = float("nan")
        with backend("fused"):
            out = rel_attention(**inputs)
        assert out[0, 0, 1].isnan().all()
        assert not out[:, :, 0].isnan().any()


def test_raw_op_validates_arguments() -> None:
    inputs = {name: t.detach() for name, t in make_inputs(2, 5, 7, 2, 8, 12).items()}

    def call(window: int | None = None, dropout_p: float = 0.0, **changed: Tensor) -> None:
        changed_inputs = inputs | changed
        names = ("query", "key", "value", "position", "content_bias", "position_bias", "memory_key", "memory_value")
        first_key = changed_inputs.get("first_key")
        torch.ops.pytbptt.rel_attention(
            *(changed_inputs[n] for n in names), first_key, window, 0.3, dropout_p, None, False, False
        )

    for name, tensor in inputs.items():
        with pytest.raises(RuntimeError, match=name):
            call(**{name: tensor[..., :-1]} if name != "query" else {name: tensor[0]})
        if name != "query":
            with pytest.raises(RuntimeError, match=name):
                call(**{name: tensor.double()})
    with pytest.raises(RuntimeError, match="window"):
        call(window=0)
    with pytest.raises(RuntimeError, match="dropout_p"):
        call(dropout_p=1.0)
    with pytest.raises(RuntimeError, match="seed"):
        call(dropout_p=0.5)
    with pytest.raises(RuntimeError, match="first_key"):
        call(first_key=torch.zeros(2, 5, dtype=torch.int64))


def test_float8_raises_with_backend_fused_and_warns_with_auto() -> None:
    inputs = {name: t.detach().to(torch.float8_e5m2) for name, t in make_inputs(1, 2, 0, 1, 4, 2).items()}
    with backend("fused"), pytest.raises(RuntimeError, match="float8"):
        rel_attention(**inputs)
    with pytest.warns(RuntimeWarning, match="float8"), pytest.raises(RuntimeError):
        rel_attention(**inputs)  # eager PyTorch has no float8 addition either
    with pytest.raises(ValueError, match="backend"), backend("fast"):
        pass
