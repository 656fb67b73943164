"""The CUDA rel_attention kernels on the emulator, against float64 within tests/common/error_bounds.py."""

import math

import pytest
import torch

from pytbptt.ops.philox import dropout_threshold
from pytbptt.ops.rel_attention.reference import attention_keep_mask
from tests.common import rel_attention_cases
from tests.common.rel_attention_cases import OPTIONS, SEED, Tensors, make_grad_output, make_inputs, make_options
from tests.emulator.build import SourcePatch
from tests.emulator.rel_attention import DTYPES, EmulatedRelAttention

PADDED_HEAD_SIZES = (32, 48, 64, 96, 128)

SIZES = [  # B, T, M, H, D, R
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (5, 1, 140, 2, 41, 141),
    (1, 70, 61, 1, 41, 131),
    (1, 150, 150, 1, 41, 90),
    (1, 66, 100, 1, 40, 1),
    (2, 3, 600, 1, 20, 500),  # keys are split among blocks
]

WGMMA_SIZES = [  # B, T, M, H, D, R; some of which the backward computes with WGMMA too
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (5, 1, 140, 2, 41, 141),
    (1, 60, 61, 1, 41, 121),
    (1, 100, 61, 1, 64, 131),
    (1, 200, 150, 1, 41, 90),
    (2, 96, 100, 1, 20, 1),
    (1, 260, 0, 1, 64, 200),
    (2, 30, 600, 2, 20, 500),  # keys are split among blocks
]


def padded(D: int) -> int:
    return next(size for size in PADDED_HEAD_SIZES if size >= D)


def run(kernels: EmulatedRelAttention, inputs: Tensors, memory_needs_grad: bool = True, **options) -> Tensors:
    """The output and the gradients that the kernels compute."""
    outputs = kernels.forward(inputs, **options)
    out = outputs["out"]
    gradients = kernels.backward(inputs, make_grad_output(out), outputs, memory_needs_grad=memory_needs_grad, **options)
    return {"out": out, **gradients}


def assert_bitwise_equal(actual: Tensors, expected: Tensors) -> None:
    assert all(torch.equal(actual[name], expected[name]) for name in expected), "differs"


def assert_error_within_baseline(
    kind: str,
    size: tuple[int, ...],
    schedule: int = 0,
    memory_needs_grad: bool = True,
    wgmma: bool = False,
    **options,
) -> None:
    kernels = EmulatedRelAttention(kind, padded(size[4]), schedule, wgmma=wgmma)

    def run_kernels(inputs: Tensors, **options) -> Tensors:
        results = run(kernels, inputs, memory_needs_grad, **options)
        missing = set() if memory_needs_grad else {"memory_key", "memory_value"} & set(inputs)
        assert {"out", *inputs} - set(results) == missing
        return results

    rel_attention_cases.assert_error_within_baseline(run_kernels, size, DTYPES[kind], in_tf32=kind == "Tf32", **options)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_matches_reference_with_all_options(kind: str, size: tuple[int, ...]) -> None:
    for enabled in ((), OPTIONS):
        assert_error_within_baseline(kind, size, **make_options(*size[:3], enabled))


@pytest.mark.parametrize(
    ("kind", "size"),
    [*(("half", size) for size in WGMMA_SIZES), *(("bfloat16", size) for size in WGMMA_SIZES[3:6])],
    ids=str,
)
def test_matches_reference_with_all_options_wgmma(kind: str, size: tuple[int, ...]) -> None:
    for enabled in ((), OPTIONS):
        assert_error_within_baseline(kind, size, wgmma=True, **make_options(*size[:3], enabled))


@pytest.mark.parametrize("schedule", range(1, 5))
@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_matches_reference_with_single_option_wgmma(kind: str, schedule: int) -> None:
    size = (2, 200, 61, 1, 41, 261)
    options = make_options(*size[:3], [OPTIONS[schedule - 1]])
    assert_error_within_baseline(kind, size, schedule, schedule % 2 == 0, wgmma=True, **options)


@pytest.mark.parametrize("schedule", range(1, 5))
@pytest.mark.parametrize("kind", DTYPES)
def test_matches_reference_with_single_option(kind: str, schedule: int) -> None:
    """Under the other schedules, with a memory length that is not a multiple of 8, with and without its gradient."""
    size = (2, 90, 61, 1, 41, 151)
    options = make_options(*size[:3], [OPTIONS[schedule - 1]])
    assert_error_within_baseline(kind, size, schedule, memory_needs_grad=schedule % 2 == 0, **options)


@pytest.mark.parametrize(("kind", "wgmma"), [*((kind, False) for kind in DTYPES), ("bfloat16", True)])
def test_results_are_bitwise_equal_for_all_schedules(kind: str, wgmma: bool) -> None:
    size = (3, 200 if wgmma else 70, 61, 1, 41, 100)
    inputs, options = make_inputs(*size, dtype=DTYPES[kind]), make_options(*size[:3], ("first_key", "dropout"))
    first, second = (
        run(EmulatedRelAttention(kind, 48, schedule, wgmma=wgmma), inputs, **options) for schedule in (0, 2)
    )
    assert_bitwise_equal(second, first)


@pytest.mark.parametrize(("kind", "wgmma"), [("half", False), ("half", True), ("float", False)])
def test_non_contiguous_inputs_are_bitwise_equal(kind: str, wgmma: bool) -> None:
    inputs = {name: t.detach() for name, t in make_inputs(2, 30, 21, 2, 40, 51, dtype=DTYPES[kind]).items()}
    kernels = EmulatedRelAttention(kind, 48, wgmma=wgmma)
    expected = run(kernels, inputs)
    for layout in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],  # rows that are not 16-byte aligned
    ):
        assert_bitwise_equal(run(kernels, {name: layout(t) for name, t in inputs.items()}), expected)


def test_fully_masked_rows_are_zero() -> None:
    inputs = make_inputs(2, 70, 20, 1, 41, 90, dtype=torch.float32)
    first_key = torch.full((2, 70), 90, dtype=torch.int32)
    kernels = EmulatedRelAttention("float", 48)
    results = run(kernels, inputs, first_key=first_key)
    assert all(not t.any() for t in results.values())
    assert kernels.forward(inputs, first_key=first_key)["log_sum_exp"].isposinf().all()


@pytest.mark.parametrize(("kind", "wgmma"), [*((kind, False) for kind in DTYPES), ("half", True)])
def test_single_visible_key_has_zero_score_gradient(kind: str, wgmma: bool) -> None:
    """For the CPU kernels, see tests/ops/test_rel_attention_fused.py."""
    T = 100 if wgmma else 70
    inputs = make_inputs(2, T, 61, 1, 41, 1, dtype=DTYPES[kind])
    dropout = {"dropout_p": 0.97, "scale": 5.0, "seed": torch.tensor([SEED])}
    own_key_only = torch.arange(61, 61 + T, dtype=torch.int32).repeat(2, 1)
    except_one_query = own_key_only.clone()
    except_one_query[0, -1] = 0
    kernels = EmulatedRelAttention(kind, 48, wgmma=wgmma)
    names = ("query", "key", "memory_key", "position", "content_bias", "position_bias")
    for options in ({"window": 1, **dropout}, {"first_key": own_key_only}, {"first_key": except_one_query}):
        results = run(kernels, inputs, **options)
        zero = [results["query"][1], results["query"][0, :-1]]
        if options.get("first_key") is except_one_query:
            assert results["query"][0, -1].any()
        else:
            zero += [results[name] for name in names]
        assert not any(gradient.any() for gradient in zero)
        assert results["value"].any()


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
@pytest.mark.parametrize("size", [(2, 70, 61, 2, 41, 1), (1, 3, 600, 1, 20, 1), (1, 5, 3, 1, 8, 1)], ids=str)
def test_rounding_residual_restores_output(kind: str, size: tuple[int, ...]) -> None:
    """One key has a weight of exactly 1, so that the output is its value, scaled by dropout. The scale of log(2) makes
    the kernels' exponents integers."""
    B, T, M, H, D, _ = size
    inputs = {name: t.detach() for name, t in make_inputs(*size, dtype=DTYPES[kind]).items()}
    inputs |= {name: inputs[name] * 0 for name in ("position", "position_bias", "content_bias", "key", "memory_key")}
    inputs["query"], inputs["memory_key"][:, 1] = torch.ones_like(inputs["query"]), 40.0
    seed = torch.tensor([SEED])
    results = EmulatedRelAttention(kind, padded(D)).forward(inputs, scale=math.log(2), dropout_p=0.3, seed=seed)
    keep = attention_keep_mask(seed, B, H, T, M + T, 0.3)[..., 1] / (1 - dropout_threshold(0.3) / 65536)  # (B, H, T)
    expected = keep.double().transpose(1, 2).unsqueeze(-1) * inputs["memory_value"][:, 1:2].double()
    actual = results["out"].double() + results["rounding"].double()
    # Both are rounded to 16 bits (in half down to subnormals), and their sum to float32 before.
    u = torch.finfo(DTYPES[kind]).eps / 2
    assert ((actual - expected).abs() <= (u**2 + 2.0**-22) * expected.abs() + 2.0**-25).all()
    assert (results["out"].double() - expected).abs().max() > u / 2


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = run(EmulatedRelAttention("float", 48), make_inputs(B, T, M, 2, 41, 5, dtype=torch.float32))
    assert all(not t.any() for t in results.values())


# Fault: (file, source text, replacement, error message).
INJECTED_FAULTS = {
    "distance sums added by every lane": (
        "rel_attention/cuda/queries.cuh",
        "if (q == 0 && cut == 0) add_to(",
        "if (cut == 0) add_to(",
        "no sync_threads between",
    ),
    "a partial sum added twice": (
        "rel_attention/cuda/queries.cuh",
        "add_to_partial(tile, cut, near);",
        "add_to_partial(tile, cut, near), add_to_partial(tile, cut, near);",
        "differs",
    ),
    "position groups that are not swapped": (
        "rel_attention/cuda/keys.cuh",
        "first_query / T::size % 2",
        "0",
        "differs",
    ),
    "one row too many": ("rel_attention/cuda/tile.cuh", "i < count ? 16 : 0", "i <= count ? 16 : 0", "differs|reads"),
    "no masking": ("rel_attention/cuda/tile.cuh", "if (all_visible<T>(first_key)) return;", "return;", "differs"),
    "biases of the next head": (
        "rel_attention/cuda/pack.cuh",
        "p / pieces * copy.bias.head",
        "(p / pieces + 1) * copy.bias.head",
        "differs|reads",
    ),
}


INJECTED_WGMMA_FAULTS = {
    "a distance sum added twice": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "partial.add_sums(place_sums, farthest);",
        "partial.add_sums(place_sums, farthest), partial.add_sums(place_sums, farthest);",
        "differs",
    ),
    "score gradients without fence_async_shared": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "all_clamped(in, step)) continue;\n      fence_async_shared();",
        "all_clamped(in, step)) continue;",
        "no fence_async_shared between",
    ),
    "missing barrier before a group is read": (
        "rel_attention/cuda/warpgroup_keys.cuh",
        "    sync_warpgroup();\n",
        "",
        "race",
    ),
    "queries without fence_async_shared": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "  fence_async_shared();\n  const auto query_u_rows",
        "  const auto query_u_rows",
        "no fence_async_shared between",
    ),
    "accumulators used before warpgroup_wait": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "    warpgroup_wait<0>(sums);\n",
        "",
        "differs|never waited for",
    ),
    "registers written without warpgroup_arrive": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "    warpgroup_arrive(out, weights);\n",
        "",
        "without a warpgroup_arrive",
    ),
    "one stage too few": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "static constexpr int warpgroups = groups_of_queries, stages = warpgroups + 1;",
        "static constexpr int warpgroups = groups_of_queries, stages = warpgroups;",
        "unfinished copy|race|was written before it was waited for|differs",
    ),
    "ring buffer that does not wrap": (
        "rel_attention/cuda/warpgroup_tile.cuh",
        "const auto here = n > last ? wrapped : from;",
        "const auto here = n > last && n > 8 ? wrapped : from;",
        "differs|outside its view",
    ),
    "swapped groups": (
        "rel_attention/cuda/warpgroup_keys.cuh",
        "band.add_to(sums, upper);",
        "band.add_to(sums, upper + 1);",
        "differs",
    ),
}


@pytest.mark.parametrize("fault", [*INJECTED_FAULTS, *INJECTED_WGMMA_FAULTS])
def test_injected_faults_are_detected(fault: str) -> None:
    """In these kernels; test_emulator.py has the emulator's own tests."""
    wgmma = fault in INJECTED_WGMMA_FAULTS
    *patch, message = (INJECTED_FAULTS | INJECTED_WGMMA_FAULTS)[fault]
    kind, dtype = ("half", torch.float16) if wgmma else ("float", torch.float32)
    inputs = make_inputs(*((1, 260, 61, 1, 41, 321) if wgmma else (1, 70, 61, 2, 41, 131)), dtype=dtype)
    expected = run(EmulatedRelAttention(kind, 48, wgmma=wgmma), inputs)
    kernels = EmulatedRelAttention(kind, 48, source_patch=SourcePatch(*patch), wgmma=wgmma)
    with pytest.raises(AssertionError, match=message):
        assert_bitwise_equal(run(kernels, inputs), expected)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("D", [8, 41, 64, 96, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_every_head_size_under_every_schedule(kind: str, D: int, schedule: int) -> None:
    """All combinations of options, distributed over schedules and sizes."""
    for combination in range(schedule, 16, 5):
        size = ((2, 70, 67, 1, D, 120), (1, 65, 0, 2, D, 65), (2, 3, 140, 1, D, 1))[combination % 3]
        options = make_options(*size[:3], [name for bit, name in enumerate(OPTIONS) if combination >> bit & 1])
        assert_error_within_baseline(kind, size, schedule, memory_needs_grad=combination // 3 % 2 > 0, **options)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("D", [8, 41, 64])
@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_every_head_size_under_every_schedule_wgmma(kind: str, D: int, schedule: int) -> None:
    for combination in range(schedule, 16, 5):
        size = ((2, 100, 67, 1, D, 150), (1, 193, 0, 2, D, 65), (2, 64, 140, 1, D, 1))[combination % 3]
        options = make_options(*size[:3], [name for bit, name in enumerate(OPTIONS) if combination >> bit & 1])
        memory_needs_grad = combination // 3 % 2 > 0
        assert_error_within_baseline(kind, size, schedule, memory_needs_grad, wgmma=True, **options)
