"""The CUDA kernels of rel_attention on the emulator, against the reference in float64; tests/tolerances.py says how."""

import math

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from pytbptt.ops.philox import attention_keep_mask, dropout_threshold
from tests import tolerances
from tests.emulator.rel_attention import DTYPES, Kernels, Problem

SEED = 0x1234_5678_9ABC_DEF0
PADDED = (32, 48, 64, 96, 128)

SIZES = [  # B, T, M, H, D, R
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (5, 1, 140, 2, 41, 141),
    (1, 70, 61, 1, 41, 131),
    (1, 150, 150, 1, 41, 90),
    (1, 66, 100, 1, 40, 1),
    (2, 3, 600, 1, 20, 500),  # keys are split among blocks
]

WARPGROUP_SIZES = [  # those whose backward takes warpgroups, too
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
    return next(size for size in PADDED if size >= D)


def make(B: int, T: int, M: int, H: int, D: int, R: int, dtype: torch.dtype, draw: int = 0) -> Problem:
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
        chosen["scale"] = -0.3
    return chosen


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)


def evaluate(problem: Problem, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The reference's output and gradients in a dtype, as float64."""
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.items()}
    with backend("reference"):
        out = rel_attention(**inputs, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), gradient_of(out))
    return {name: t.detach().double() for name, t in zip(["out", *inputs], [out, *gradients], strict=True)}


def run(kernels: Kernels, problem: Problem, memory_needs_grad: bool = True, **options) -> dict[str, Tensor]:
    """The kernels' output and gradients."""
    results = kernels.forward(problem, **options)
    out = results["out"]
    gradients = kernels.backward(problem, gradient_of(out), results, memory_needs_grad=memory_needs_grad, **options)
    return {"out": out, **gradients}


def assert_as_exact_as_baseline(
    kind: str,
    size: tuple[int, ...],
    schedule: int = 0,
    memory_needs_grad: bool = True,
    warpgroups: bool = False,
    **options,
) -> None:
    B, T, _, H, D, _ = size
    problems = [make(*size, dtype=DTYPES[kind], draw=draw) for draw in tolerances.enough_draws(B, T, H, D)]
    kernels = Kernels(kind, padded(D), schedule, warpgroups=warpgroups)
    found = [run(kernels, problem, memory_needs_grad, **options) for problem in problems]
    exact = [evaluate(problem, torch.float64, **options) for problem in problems]
    baselines = [
        [tolerances.attention_baseline(p, gradient_of, order, kind == "Tf32", **options) for p in problems]
        for order in tolerances.orders(B, T, H, D)
    ]
    missing = set() if memory_needs_grad else {"memory_key", "memory_value"} & set(problems[0])
    assert set(exact[0]) - set(found[0]) == missing
    unit = 2.0**-10 if kind == "Tf32" else torch.finfo(DTYPES[kind]).eps
    tolerances.assert_as_exact_as_baseline(found, exact, baselines, unit)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_options(kind: str, size: tuple[int, ...]) -> None:
    for together in (False, True):
        assert_as_exact_as_baseline(
            kind,
            size,
            **options_for(*size[:3], first_key=together, window=together, dropout=together, scale=together),
        )


@pytest.mark.parametrize(
    ("kind", "size"),
    [*(("half", size) for size in WARPGROUP_SIZES), *(("bfloat16", size) for size in WARPGROUP_SIZES[3:6])],
    ids=str,
)
def test_options_by_warpgroups(kind: str, size: tuple[int, ...]) -> None:
    for together in (False, True):
        options = options_for(*size[:3], first_key=together, window=together, dropout=together, scale=together)
        assert_as_exact_as_baseline(kind, size, warpgroups=True, **options)


@pytest.mark.parametrize("schedule", range(1, 5))
@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_each_option_alone_by_warpgroups(kind: str, schedule: int) -> None:
    size = (2, 200, 61, 1, 41, 261)
    names = ("first_key", "window", "dropout", "scale")
    options = options_for(*size[:3], **{name: name == names[schedule - 1] for name in names})
    assert_as_exact_as_baseline(kind, size, schedule, schedule % 2 == 0, warpgroups=True, **options)


@pytest.mark.parametrize("schedule", range(1, 5))
@pytest.mark.parametrize("kind", DTYPES)
def test_each_option_alone(kind: str, schedule: int) -> None:
    """Under the other schedules, and with a memory that needs no gradient, whose length eights do not divide."""
    size = (2, 90, 61, 1, 41, 151)
    names = ("first_key", "window", "dropout", "scale")
    options = options_for(*size[:3], **{name: name == names[schedule - 1] for name in names})
    assert_as_exact_as_baseline(kind, size, schedule, memory_needs_grad=schedule % 2 == 0, **options)


@pytest.mark.parametrize(("kind", "warpgroups"), [*((kind, False) for kind in DTYPES), ("bfloat16", True)])
def test_schedules_change_no_bit(kind: str, warpgroups: bool) -> None:
    size = (3, 200 if warpgroups else 70, 61, 1, 41, 100)
    problem = make(*size, dtype=DTYPES[kind])
    options = options_for(*size[:3], first_key=True, window=False, dropout=True, scale=False)
    first, second = (run(Kernels(kind, 48, schedule, warpgroups=warpgroups), problem, **options) for schedule in (0, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("kind", "warpgroups"), [("half", False), ("half", True), ("float", False)])
def test_strides_change_nothing(kind: str, warpgroups: bool) -> None:
    problem = {name: t.detach() for name, t in make(2, 30, 21, 2, 40, 51, dtype=DTYPES[kind]).items()}
    kernels = Kernels(kind, 48, warpgroups=warpgroups)
    expected = run(kernels, problem)
    for layout in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t,
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],  # rows that 16 bytes do not divide
    ):
        results = run(kernels, {name: layout(t) for name, t in problem.items()})
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_rows_that_see_nothing() -> None:
    problem = make(2, 70, 20, 1, 41, 90, dtype=torch.float32)
    first_key = torch.full((2, 70), 90, dtype=torch.int32)
    kernels = Kernels("float", 48)
    results = run(kernels, problem, first_key=first_key)
    assert all(not t.any() for t in results.values())
    assert kernels.forward(problem, first_key=first_key)["log_sum_exp"].isposinf().all()


@pytest.mark.parametrize(("kind", "warpgroups"), [*((kind, False) for kind in DTYPES), ("half", True)])
def test_an_only_key_leaves_its_score_no_gradient(kind: str, warpgroups: bool) -> None:
    """As tests/ops/test_rel_attention_fused.py says of the CPU's kernels."""
    T = 100 if warpgroups else 70
    problem = make(2, T, 61, 1, 41, 1, dtype=DTYPES[kind])
    dropout = {"dropout_p": 0.97, "scale": 5.0, "seed": torch.tensor([SEED])}
    last = torch.arange(61, 61 + T, dtype=torch.int32).repeat(2, 1)
    some = last.clone()
    some[0, -1] = 0
    kernels = Kernels(kind, 48, warpgroups=warpgroups)
    for options in ({"window": 1, **dropout}, {"first_key": last}, {"first_key": some}):
        found = run(kernels, problem, **options)
        rest = [found["query"][1], found["query"][0, :-1]]
        if options.get("first_key") is some:
            assert found["query"][0, -1].any()
        else:
            rest += [
                found[name] for name in ("query", "key", "memory_key", "position", "content_bias", "position_bias")
            ]
        assert not any(part.any() for part in rest)
        assert found["value"].any()


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
@pytest.mark.parametrize("size", [(2, 70, 61, 2, 41, 1), (1, 3, 600, 1, 20, 1), (1, 5, 3, 1, 8, 1)], ids=str)
def test_what_rounding_takes_from_the_output_is_kept(kind: str, size: tuple[int, ...]) -> None:
    """One key's weight is 1 and all others' are 0, exactly, as the scores' unit is that of powers of 2: the output is
    its value, times what dropout scales it by."""
    B, T, M, H, D, _ = size
    problem = {name: t.detach() for name, t in make(*size, dtype=DTYPES[kind]).items()}
    problem |= {name: problem[name] * 0 for name in ("position", "position_bias", "content_bias", "key", "memory_key")}
    problem["query"], problem["memory_key"][:, 1] = torch.ones_like(problem["query"]), 40.0
    seed = torch.tensor([SEED])
    results = Kernels(kind, padded(D)).forward(problem, scale=math.log(2), dropout_p=0.3, seed=seed)
    kept = attention_keep_mask(seed, B, H, T, M + T, 0.3)[..., 1] / (1 - dropout_threshold(0.3) / 65536)  # (B, H, T)
    expected = kept.double().transpose(1, 2).unsqueeze(-1) * problem["memory_value"][:, 1:2].double()
    found = results["out"].double() + results["rounding"].double()
    # Each is rounded to 16 bits, half's least subnormals included, and their sum before that to float32.
    u = torch.finfo(DTYPES[kind]).eps / 2
    assert ((found - expected).abs() <= (u**2 + 2.0**-22) * expected.abs() + 2.0**-25).all()
    assert (results["out"].double() - expected).abs().max() > u / 2


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = run(Kernels("float", 48), make(B, T, M, 2, 41, 5, dtype=torch.float32))
    assert all(not t.any() for t in results.values())


PLANTED = {
    "sums of distances added by every lane": (
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
    "groups of the table that do not change places": (
        "rel_attention/cuda/keys.cuh",
        "first_query / T::size % 2",
        "0",
        "differs",
    ),
    "a row too many": ("rel_attention/cuda/tile.cuh", "i < count ? 16 : 0", "i <= count ? 16 : 0", "differs|reads"),
    "nothing hidden": ("rel_attention/cuda/tile.cuh", "if (all_visible<T>(first_key)) return;", "return;", "differs"),
    "biases of the next head": (
        "rel_attention/cuda/pack.cuh",
        "p / pieces * copy.bias.head",
        "(p / pieces + 1) * copy.bias.head",
        "differs|reads",
    ),
}


PLANTED_IN_WARPGROUPS = {
    "a sum of distances added twice": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "partial.add_sums(place_sums, farthest);",
        "partial.add_sums(place_sums, farthest), partial.add_sums(place_sums, farthest);",
        "differs",
    ),
    "gradients of scores that products cannot see": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "all_clamped(in, step)) continue;\n      fence_async_shared();",
        "all_clamped(in, step)) continue;",
        "no fence_async_shared between",
    ),
    "no barrier before a whole group is read": (
        "rel_attention/cuda/warpgroup_keys.cuh",
        "    sync_warpgroup();\n",
        "",
        "race",
    ),
    "queries that products cannot see": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "  fence_async_shared();\n  const auto content_rows",
        "  const auto content_rows",
        "no fence_async_shared between",
    ),
    "sums used before they are there": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "    warpgroup_wait<0>(sums);\n",
        "",
        "differs|never waited for",
    ),
    "registers written without a fence": (
        "rel_attention/cuda/warpgroup_forward.cuh",
        "    warpgroup_fence(out, weights);\n",
        "",
        "without a warpgroup_fence",
    ),
    "one stage too few": (
        "rel_attention/cuda/warpgroup_queries.cuh",
        "static constexpr int groups = groups_of_queries, stages = groups + 1;",
        "static constexpr int groups = groups_of_queries, stages = groups;",
        "unfinished copy|race|was written before it was waited for|differs",
    ),
    "a ring that does not begin again": (
        "rel_attention/cuda/warpgroup_tile.cuh",
        "const auto here = n > last ? wrapped : from;",
        "const auto here = n > last && n > 8 ? wrapped : from;",
        "differs|outside its part",
    ),
    "groups in each other's place": (
        "rel_attention/cuda/warpgroup_keys.cuh",
        "band.add_to(sums, upper);",
        "band.add_to(sums, upper + 1);",
        "differs",
    ),
}


@pytest.mark.parametrize("bug", [*PLANTED, *PLANTED_IN_WARPGROUPS])
def test_planted_bugs_are_caught(bug: str) -> None:
    """In these kernels; what else the emulator catches is in test_emulator.py."""
    warpgroups = bug in PLANTED_IN_WARPGROUPS
    file, found, instead, message = (PLANTED | PLANTED_IN_WARPGROUPS)[bug]
    kind, dtype = ("half", torch.float16) if warpgroups else ("float", torch.float32)
    problem = make(*((1, 260, 61, 1, 41, 321) if warpgroups else (1, 70, 61, 2, 41, 131)), dtype=dtype)
    expected = run(Kernels(kind, 48, warpgroups=warpgroups), problem)

    def check() -> None:
        results = run(Kernels(kind, 48, edit=(file, found, instead), warpgroups=warpgroups), problem)
        assert all(torch.equal(results[name], expected[name]) for name in expected), "differs"

    with pytest.raises(AssertionError, match=message):
        check()


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("D", [8, 41, 64, 96, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_every_head_size_under_every_schedule(kind: str, D: int, schedule: int) -> None:
    """And every combination of options, shared out among schedules and sizes."""
    for chosen in range(schedule, 16, 5):
        size = ((2, 70, 67, 1, D, 120), (1, 65, 0, 2, D, 65), (2, 3, 140, 1, D, 1))[chosen % 3]
        first_key, window, dropout, scale = (bool(chosen >> bit & 1) for bit in range(4))
        options = options_for(*size[:3], first_key=first_key, window=window, dropout=dropout, scale=scale)
        assert_as_exact_as_baseline(kind, size, schedule, memory_needs_grad=chosen // 3 % 2 > 0, **options)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("schedule", range(5))
@pytest.mark.parametrize("D", [8, 41, 64])
@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_every_head_size_under_every_schedule_by_warpgroups(kind: str, D: int, schedule: int) -> None:
    """Likewise."""
    for chosen in range(schedule, 16, 5):
        size = ((2, 100, 67, 1, D, 150), (1, 193, 0, 2, D, 65), (2, 64, 140, 1, D, 1))[chosen % 3]
        first_key, window, dropout, scale = (bool(chosen >> bit & 1) for bit in range(4))
        options = options_for(*size[:3], first_key=first_key, window=window, dropout=dropout, scale=scale)
        memory_needs_grad = chosen // 3 % 2 > 0
        assert_as_exact_as_baseline(kind, size, schedule, memory_needs_grad, warpgroups=True, **options)
