"""The compiled rel_attention against the reference in float64: every option, alone and together, on odd sizes.

How close is close enough is said in tests/tolerances.py.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.philox import attention_keep_mask, dropout_threshold
from pytbptt.ops.rel_attention import reference
from tests import tolerances

if EXTENSION.facts is None:
    pytest.skip(f"no compiled extension: {EXTENSION.unavailable_reason}", allow_module_level=True)

SEED = 0x1234_5678_9ABC_DEF0
Problem = dict[str, Tensor]


def make(B: int, T: int, M: int, H: int, D: int, R: int, dtype: torch.dtype = torch.float32, draw: int = 0) -> Problem:
    """Random inputs, gradients wanted for all."""
    generator = torch.Generator().manual_seed(B + 10 * T + 100 * M + 1000 * D + R + 1_000_000 * draw)

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
        chosen["scale"] = 0.3
    return chosen


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)


def evaluate(which: str, problem: Problem, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """Output and all gradients of one implementation, in float64 for comparison."""
    inputs = {name: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for name, t in problem.items()}
    with backend(which):
        out = rel_attention(**inputs, **options)
    wanted = [name for name, t in inputs.items() if t.requires_grad]
    gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], gradient_of(out))
    results = {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}
    return {name: t.double() for name, t in results.items()}


def assert_as_exact_as_baseline(size: tuple[int, ...], dtype: torch.dtype, **options) -> None:
    B, T, _, H, D, _ = size
    problems = [make(*size, dtype=dtype, draw=draw) for draw in tolerances.enough_draws(B, T, H, D)]
    tolerances.assert_as_exact_as_baseline(
        [evaluate("fused", problem, **options) for problem in problems],
        [evaluate("reference", problem, torch.float64, **options) for problem in problems],
        [
            [tolerances.attention_baseline(p, gradient_of, order, **options) for p in problems]
            for order in tolerances.orders(B, T, H, D)
        ],
        torch.finfo(dtype).eps,
    )


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
def test_every_option_alone_and_combined(size: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, M = size[:3]
    for first_key, window, dropout, scale in product((False, True), repeat=4):
        options = options_for(B, T, M, first_key=first_key, window=window, dropout=dropout, scale=scale)
        assert_as_exact_as_baseline(size, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 2, 8, 12), (1, 2, 9, 1, 41, 11), (2, 70, 60, 2, 41, 130)], ids=str)
def test_sixteen_bit_inputs(size: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_exact_as_baseline(size, dtype)
    options = options_for(*size[:3], first_key=True, window=True, dropout=True, scale=False)
    assert_as_exact_as_baseline(size, dtype, **options)


SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1, 40])
def test_an_only_key_leaves_its_score_no_gradient(T: int, dtype: torch.dtype) -> None:
    """Its weight is 1 whatever the score. Of two terms that cancel, rounding would leave a part; scaled by dropout and
    summed over the queries, it was more than any true gradient."""
    M, options = 3, {"dropout_p": 0.97, "scale": 5.0, "seed": torch.tensor([SEED])}
    last = torch.arange(M, M + T, dtype=torch.int32).expand(2, T)
    for limit in ({"window": 1}, {"first_key": last}):
        found = evaluate("fused", make(2, T, M, 2, 41, 1, dtype=dtype), **limit, **options)
        for name in ("query", "key", "memory_key", "position", "content_bias", "position_bias"):
            assert not found[name].any(), name
        assert found["value"].any() or T == 1  # which dropout has dropped
    # Beside queries that see more, which have gradients.
    some = last.clone()
    some[0, -1] = 0
    found = evaluate("fused", make(2, T, M, 2, 41, 9, dtype=dtype), first_key=some, dropout_p=0.3, seed=options["seed"])
    assert found["query"][0, -1].any()
    assert not found["query"][0, :-1].any()
    assert not found["query"][1].any()


def test_what_is_not_finite_is_not_made_finite_by_an_only_key() -> None:
    problem = make(1, 3, 0, 1, 8, 4)
    with torch.no_grad():
        problem["query"][0, 1] = float("inf")
        problem["value"][0, 2] = float("nan")
    found = evaluate("fused", problem, window=1)
    assert not found["query"][0, 0].any()
    for name in ("out", "query"):
        assert found[name][0, 0].isfinite().all()
        assert not found[name][0, 1:].isfinite().any()


@pytest.mark.parametrize("T", [1, 5])
def test_scores_of_minus_infinity_have_no_weight_wherever_they_are(T: int) -> None:
    """Also where they are all that a query has met so far; a query that meets nothing else is NaN, as eager's is."""
    problem = {name: t.detach() for name, t in make(2, T, 1100, 1, 8, 4).items()}
    problem["query"] = problem["query"].abs() + problem["content_bias"].abs()
    problem["memory_key"][:, :1050] = float("-inf")
    problem["memory_key"][1] = problem["key"][1] = float("-inf")
    problem["key"][1, 0] = float("-inf")
    found, expected = [], []
    for which, results in (("fused", found), ("reference", expected)):
        with backend(which):
            results.append(rel_attention(**problem))
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=1e-5, atol=1e-5)
    assert found[0][0].isfinite().all()
    assert found[0][1].isnan().all()
    assert expected[0][1].isnan().all()


def cancelling_bound(problem: Problem, *, window: int, scale: float, dropout_p: float, seed: Tensor) -> Tensor:
    """How far the gradient of content_bias may be off, in float64: (H, D).

    With dP the gradients of the weights P, the fused backward forms dS = P (dP - grad_out · out). Where every weight's
    gradient is alike, as with few keys or values, next to nothing remains of that difference, so what its terms are
    rounded by remains instead:

    * out and what was rounded off it, in 16 bits each of roundoff u: u² of out, or half of the least subnormal;
    * the weights: 2σ of each, where σ bounds the error of a score in float32;
    * sums of n terms in float32: n · 2**-24 of the sum of their absolute values.
    """
    p = {name: t.detach().double() for name, t in problem.items()}
    B, T, H, D = p["query"].shape
    keys, values = (torch.cat([p[f"memory_{name}"], p[name]], dim=1) for name in ("key", "value"))
    K, grad = keys.shape[1], gradient_of(problem["query"]).double()
    u, half_subnormal = torch.finfo(problem["query"].dtype).eps / 2, 2.0**-25
    visible = reference.visible_keys(T, K, None, window, grad.device)
    kept = attention_keep_mask(seed, B, H, T, K, dropout_p) * (1 / (1 - dropout_threshold(dropout_p) / 65536))

    to_content, to_position = p["query"] + p["content_bias"], p["query"] + p["position_bias"]
    sums = reference.unscaled_scores(to_content, to_position, keys, p["position"])
    weights = (scale * sums).masked_fill(~visible, float("-inf")).softmax(dim=-1)
    sizes = reference.unscaled_scores(to_content.abs(), to_position.abs(), keys.abs(), p["position"].abs())
    sigma = 2.0**-24 * (2 * D + 10) * scale * sizes.masked_fill(~visible, 0).amax(dim=-1, keepdim=True)

    d_weights = kept * torch.einsum("bihd,bjhd->bhij", grad, values)
    out = torch.einsum("bhij,bjhd->bihd", weights * kept, values)
    difference = d_weights - torch.einsum("bihd,bihd->bhi", grad, out).unsqueeze(-1)
    of_products = D * 2.0**-24 * kept * torch.einsum("bihd,bjhd->bhij", grad.abs(), values.abs())
    of_rounding = (grad.abs() * (u**2 * out.abs() + half_subnormal)).sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    sizes_out = torch.einsum("bhij,bjhd->bihd", weights * kept, values.abs())
    of_out = torch.einsum("bihd,bihd->bhi", grad.abs(), sizes_out).unsqueeze(-1) * ((K + 2 * D) * 2.0**-24 + 2 * sigma)
    d_scores = weights * (2 * sigma * difference.abs() + of_products + of_rounding + of_out)
    total = (weights * difference).abs() * (B * T * K * 2.0**-24) + d_scores
    exact = torch.einsum("bhij,bjhd->hd", weights * difference, keys)
    return scale * (torch.einsum("bhij,bjhd->hd", total, keys.abs()) + u * exact.abs())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("window", [2, 3, 7])
def test_gradients_that_cancel_are_as_exact_as_what_is_kept_of_the_output(window: int, dtype: torch.dtype) -> None:
    """Values that are all but alike, and sums so short that without what is kept of the output, the bound is exceeded
    more than ten times."""
    options = {"window": window, "scale": 0.01, "dropout_p": 0.0, "seed": torch.tensor([SEED])}
    for draw in range(20):
        problem = make(1, 4, 3, 2, 9, 1, dtype=dtype, draw=draw)
        with torch.no_grad():
            for name in ("value", "memory_value"):
                problem[name].mul_(0.01).add_(3 * torch.randn(9, generator=torch.Generator().manual_seed(draw)))
        found, expected = (
            evaluate("fused", problem, **options),
            evaluate("reference", problem, torch.float64, **options),
        )
        error = (found["content_bias"] - expected["content_bias"]).abs()
        bound = cancelling_bound(problem, **options)
        assert (error <= bound).all()


def test_float16_keeps_subnormals_infinities_and_nan() -> None:
    values = torch.tensor([6e-8, -3e-6, 65504.0, 0.0, float("inf"), float("nan"), 1.5, -0.1], dtype=torch.float16)
    problem = make(1, 1, 0, 1, 8, 1, dtype=torch.float16)
    problem["value"] = values.view(1, 1, 1, 8)  # one key: the output is its value
    for which in ("reference", "fused"):
        with backend(which):
            assert torch.equal(torch.nan_to_num(rel_attention(**problem).flatten(), 7.0), values.nan_to_num(7.0)), which


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = evaluate("fused", make(B, T, M, 2, 8, 5))
    assert results["out"].shape == (B, T, 2, 8)
    assert all(not t.any() for t in results.values())


def test_gradcheck() -> None:
    problem = make(2, 5, 4, 2, 3, 6, dtype=torch.float64)
    options = options_for(2, 5, 4, first_key=True, window=True, dropout=True, scale=True)
    names = list(problem)

    def run(*tensors: Tensor) -> Tensor:
        with backend("fused"):
            return rel_attention(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(run, tuple(problem.values()))


def test_second_derivative_is_refused() -> None:
    problem = make(2, 3, 2, 1, 5, 4, torch.float64)
    inputs = list(problem.values())
    with backend("fused"):
        once, twice = (
            torch.autograd.grad(rel_attention(**problem).square().sum(), inputs, create_graph=create_graph)
            for create_graph in (False, True)
        )
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="rel_attention: the fused op has no second derivative"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in twice), inputs)


def test_memory_without_gradient_changes_no_other_gradient() -> None:
    problem = make(2, 60, 70, 2, 41, 100)
    with_memory = evaluate("fused", problem)
    for name in ("memory_key", "memory_value"):
        problem[name] = problem[name].detach()
    without = evaluate("fused", problem)
    assert set(with_memory) - set(without) == {"memory_key", "memory_value"}
    for name, gradient in without.items():
        assert torch.equal(gradient, with_memory[name]), name


def strided(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other layouts."""
    yield "transposed", tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield "part of a wider projection", torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
    yield "last dimension strided", torch.stack([tensor, tensor], dim=-1)[..., 0]


@pytest.mark.parametrize("T", [1, 50])
def test_strides_change_nothing(T: int) -> None:
    problem = {name: t.detach() for name, t in make(2, T, 31, 3, 20, T + 31).items()}
    with backend("fused"):
        expected = rel_attention(**problem)
        for name, tensor in problem.items():
            for layout, other in strided(tensor):
                assert torch.equal(rel_attention(**problem | {name: other}), expected), f"{name} {layout}"


def test_expanded_inputs() -> None:
    problem = make(1, 30, 10, 2, 12, 40)
    wide = {name: t.expand(3, *t.shape[1:]) if t.dim() == 4 else t for name, t in problem.items()}
    with backend("fused"):
        narrow_out, wide_out = rel_attention(**problem), rel_attention(**wide)
        wide_out.sum().backward()  # a gradient of ones is expanded as well
    assert torch.equal(wide_out, narrow_out.expand_as(wide_out))
    exact = {name: t.detach().double().requires_grad_() for name, t in problem.items()}
    with backend("reference"):
        (3 * rel_attention(**exact)).sum().backward()
    for name in problem:
        torch.testing.assert_close(problem[name].grad, exact[name].grad.float(), rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    options = options_for(2, 5, 7, first_key=True, window=True, dropout=True, scale=False)
    for memory, rest in product((7, 0), (options, {})):
        problem = make(2, 5, memory, 2, 8, 12)
        arguments = (
            *(problem[n] for n in ("query", "key", "value", "position", "content_bias", "position_bias")),
            problem.get("memory_key"),
            problem.get("memory_value"),
            rest.get("first_key"),
            rest.get("window"),
            0.4,
            rest.get("dropout_p", 0.0),
            rest.get("seed"),
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
    problem = make(2, 9, 5, 2, 8, 14)
    compiled = torch.compile(rel_attention, fullgraph=True)
    seed = torch.tensor([SEED])
    expected = rel_attention(**problem, dropout_p=0.2, seed=seed)
    out = compiled(**problem, dropout_p=0.2, seed=seed)
    assert torch.equal(out, expected)
    tensors = list(problem.values())
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(compiled(**problem, dropout_p=0.2), compiled(**problem, dropout_p=0.2))


def test_autocast() -> None:
    problem = make(2, 9, 5, 2, 8, 14)
    problem["value"] = problem["value"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), backend("fused"):
        out = rel_attention(**problem)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert problem["query"].grad.dtype == torch.float32
    cast = {name: t.detach().bfloat16() for name, t in problem.items()}
    with backend("fused"):
        assert torch.equal(out, rel_attention(**cast))


def bits(results: dict[str, Tensor]) -> bytes:
    return b"".join(t.numpy().tobytes() for t in results.values())


@pytest.mark.parametrize("size", [(3, 100, 61, 2, 41, 161), (1, 200, 30, 1, 16, 230), (5, 1, 90, 3, 41, 91)], ids=str)
def test_threads_and_reruns_change_no_bit(size: tuple[int, ...]) -> None:
    problem = make(*size)
    options = options_for(*size[:3], first_key=True, window=False, dropout=True, scale=False)
    threads = torch.get_num_threads()
    try:
        seen = set()
        for count in (1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            seen.add(bits(evaluate("fused", problem, **options)))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


def test_every_element_of_every_result_is_written() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        for fill in (False, True):
            torch.use_deterministic_algorithms(fill)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # new memory holds NaN
            for size in SIZES:
                problem = make(*size)
                first_key = torch.full(size[:1] + size[1:2], size[1] + size[2], dtype=torch.int32)  # sees nothing
                for options in ({}, {"window": 2}, {"first_key": first_key}):
                    results = evaluate("fused", problem, **options)
                    assert all(t.isfinite().all() for t in results.values())
                assert all(not t.any() for t in results.values())
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_tokens_one_at_a_time_equal_the_chunk() -> None:
    """One query against keys in place (decoding) is the same function as tiles of queries against packed keys."""
    problem = {name: t.detach() for name, t in make(2, 20, 30, 2, 41, 50, dtype=torch.float64).items()}
    memory = {name: torch.cat([problem[f"memory_{name}"], problem[name]], dim=1) for name in ("key", "value")}
    with backend("fused"):
        chunk = rel_attention(**problem)
        for i in range(20):
            one = {name: problem[name][:, i : i + 1] for name in ("query", "key", "value")}
            past = {f"memory_{name}": memory[name][:, : 30 + i] for name in ("key", "value")}
            out = rel_attention(**problem | one | past)
            torch.testing.assert_close(out, chunk[:, i : i + 1], rtol=1e-12, atol=1e-12)


def test_nan_propagates() -> None:
    for T in (1, 20):
        problem = {name: t.detach() for name, t in make(1, T, 5, 2, 8, 9).items()}
        problem["query"][0, 0, 1] = float("nan")
        with backend("fused"):
            out = rel_attention(**problem)
        assert out[0, 0, 1].isnan().all()
        assert not out[:, :, 0].isnan().any()


def test_the_op_itself_refuses_what_does_not_fit() -> None:
    problem = {name: t.detach() for name, t in make(2, 5, 7, 2, 8, 12).items()}

    def call(window: int | None = None, dropout_p: float = 0.0, **changed: Tensor) -> None:
        inputs = problem | changed
        names = ("query", "key", "value", "position", "content_bias", "position_bias", "memory_key", "memory_value")
        first_key = inputs.get("first_key")
        torch.ops.pytbptt.rel_attention(
            *(inputs[n] for n in names), first_key, window, 0.3, dropout_p, None, False, False
        )

    for name, tensor in problem.items():
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


def test_backend_fused_raises_and_auto_warns_once_where_no_kernel_serves() -> None:
    problem = {name: t.detach().to(torch.float8_e5m2) for name, t in make(1, 2, 0, 1, 4, 2).items()}
    with backend("fused"), pytest.raises(RuntimeError, match="float8"):
        rel_attention(**problem)
    with pytest.warns(RuntimeWarning, match="float8"), pytest.raises(RuntimeError):
        rel_attention(**problem)  # eager PyTorch adds no float8 either
    with pytest.raises(ValueError, match="backend"), backend("fast"):
        pass
