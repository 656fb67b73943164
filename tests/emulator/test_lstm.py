"""The CUDA kernels of lstm on the emulator, against the reference in float64.

How close is close enough is said in tests/tolerances.py.
"""

import random

import pytest
import torch
from torch import Tensor

from pytbptt.ops.lstm import reference
from tests import tolerances
from tests.emulator.lstm import DTYPES, Kernels, Lstm, Plan

REGISTERS = 65536
ROOMY = (6, 227 * 1024, REGISTERS)
CRAMPED = (6, 48 * 1024, REGISTERS)  # weights are read from L2 too
BY_STEP = (6, 227 * 1024, REGISTERS // 2)
NAMES = ("output", "h_n", "c_n", "gates", "weight_hh", "h0", "c0")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

# T, B, H: one step, one unit; units and streams that no tile divides; several passes; every warp with depth of its own,
# and rows of weights that begin at multiples of 16 bytes in every dtype.
SIZES = [(1, 3, 1), (4, 3, 41), (3, 20, 130), (3, 70, 66), (2, 1, 264)]


def draw(T: int, B: int, H: int, dtype: torch.dtype, number: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(T + 10 * B + 100 * H + 10000 * number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight_hh = (normal(4 * H, H) / H**0.5).to(dtype)
    return normal(T, B, 4 * H).to(dtype), weight_hh, normal(B, H).to(dtype), normal(B, H).float()


def some_resets(T: int, B: int) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.3


def gradients_of(results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in results)
    output, h_n, c_n = (grad.to(t.dtype) for grad, t in zip(drawn, results, strict=True))
    return output, h_n, c_n


def evaluate(inputs: Inputs, reset: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference's results and gradients in a dtype, as float64, by NAMES."""
    cells = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(cells if i == 3 else dtype).requires_grad_() for i, t in enumerate(inputs)]
    results = reference.lstm(*leaves, reset)
    # What flows back is rounded as it is for the kernels.
    grads = gradients_of(
        tuple(t.to(c) for t, c in zip(results, (inputs[0].dtype,) * 2 + (torch.float32,), strict=True))
    )
    gradients = torch.autograd.grad(results, leaves, [g.to(t.dtype) for g, t in zip(grads, results, strict=True)])
    return {name: t.detach().double() for name, t in zip(NAMES, (*results, *gradients), strict=True)}


def run(kernels: Kernels, inputs: Inputs, reset: Tensor | None = None) -> list[Tensor]:
    """The kernels' results and gradients, in the order of NAMES."""
    saved = kernels.forward(*inputs, reset)
    results = (saved["output"], saved["h_n"], saved["c_n"])
    gradients = kernels.backward(gradients_of(results), *inputs[1:], reset, saved)
    return [*results, *gradients.values()]


def assert_as_exact_as_baseline(kernels: Kernels, size: tuple[int, int, int], reset: Tensor | None) -> None:
    dtype = DTYPES[kernels.numbers]
    drawn = [draw(*size, dtype, number) for number in tolerances.enough_draws(*size)]
    found = [dict(zip(NAMES, run(kernels, inputs, reset), strict=True)) for inputs in drawn]
    exact = [evaluate(inputs, reset, torch.float64) for inputs in drawn]
    baselines = []
    for order in tolerances.orders(*size):
        with tolerances.TermByTerm(order, in_tf32=kernels.numbers == "tf32"):
            baselines.append([evaluate(inputs, reset, dtype) for inputs in drawn])
    unit = 2.0**-10 if kernels.numbers == "tf32" else torch.finfo(dtype).eps
    tolerances.assert_as_exact_as_baseline(found, exact, baselines, unit, {"weight_hh": size[0] * size[1]})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("numbers", DTYPES)
def test_as_exact_as_baseline(numbers: str, size: tuple[int, int, int]) -> None:
    assert_as_exact_as_baseline(Kernels(numbers), size, None)
    assert_as_exact_as_baseline(Kernels(numbers, schedule=1), size, some_resets(*size[:2]))


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("limits", [ROOMY, CRAMPED, BY_STEP], ids=["on chip", "from L2", "by step"])
@pytest.mark.parametrize("numbers", ["float16", "float32"])
def test_wherever_weights_are(numbers: str, limits: tuple[int, int, int], schedule: int) -> None:
    kernels = Kernels(numbers, schedule, limits, None if limits == BY_STEP else ((5, 1), (2, 1)))
    assert_as_exact_as_baseline(kernels, (3, 9, 204), some_resets(3, 9) if schedule % 2 else None)
    for plan in kernels.plans.values():
        assert plan.persistent == (limits != BY_STEP)
        assert (plan.streamed_bytes > 0) == (limits != ROOMY)
        assert plan.blocks_per_group > 1
    assert (kernels.plans["backward"].held_bytes > 0) == (limits != BY_STEP and numbers == "float16")


@pytest.mark.parametrize("row_tiles", range(1, 6))
@pytest.mark.parametrize("numbers", DTYPES)
def test_every_kernel(numbers: str, row_tiles: int) -> None:
    """Of any number of tiles of rows, in two groups of streams, with weights on chip and in L2."""
    T, B, H = 2, 19, 70
    layouts = ((row_tiles, 2), (1 + row_tiles % 2, 2))
    for shared in (44 if numbers == "float32" else 60, 227):
        kernels = Kernels(numbers, row_tiles, (64, 1024 * shared, REGISTERS), layouts)
        assert_as_exact_as_baseline(kernels, (T, B, H), some_resets(T, B))


@pytest.mark.parametrize("numbers", DTYPES)
def test_schedules_change_no_bit(numbers: str) -> None:
    inputs, reset = draw(4, 11, 70, DTYPES[numbers]), some_resets(4, 11)
    runs = [run(Kernels(numbers, schedule), inputs, reset) for schedule in range(5)]
    assert all(torch.equal(one, other) for found in runs[1:] for one, other in zip(found, runs[0], strict=True))


@pytest.mark.parametrize("where", ["first", "last", "all", "never"])
def test_resets(where: str) -> None:
    T, B = 4, 9
    reset = torch.full((T, B), where == "all")
    if where in ("first", "last"):
        reset[0 if where == "first" else -1, ::2] = True
    assert_as_exact_as_baseline(Kernels("float32"), (T, B, 41), reset)


def test_one_long_call_equals_many_chunks() -> None:
    gates, weight_hh, h, c = draw(7, 9, 70, torch.bfloat16)
    reset = some_resets(7, 9)
    kernels = Kernels("bfloat16")
    whole = kernels.forward(gates, weight_hh, h, c, reset, save=False)
    outputs = []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        part = kernels.forward(gates[begin:end], weight_hh, h, c, reset[begin:end].contiguous(), save=False)
        outputs.append(part["output"])
        h, c = part["h_n"], part["c_n"]
    assert torch.equal(torch.cat(outputs), whole["output"])
    assert torch.equal(h, whole["h_n"])
    assert torch.equal(c, whole["c_n"])


class CellsInMemory(Kernels):
    def plan(self, name: str, inputs: Lstm) -> Plan:
        plan = super().plan(name, inputs)
        plan.cells_in_registers = False
        return plan


def test_cells_in_registers_or_in_memory_change_no_bit() -> None:
    inputs, reset = draw(3, 40, 10, torch.float16), some_resets(3, 40)  # two passes
    kernels, other = (kind("float16", layouts=((3, 1), (1, 1))) for kind in (Kernels, CellsInMemory))
    in_registers, in_memory = run(kernels, inputs, reset), run(other, inputs, reset)
    assert all(plan.cells_in_registers for plan in kernels.plans.values())
    assert all(torch.equal(one, two) for one, two in zip(in_registers, in_memory, strict=True))


def test_strides_change_nothing() -> None:
    inputs = draw(3, 5, 48, torch.float16)
    gates, weight_hh, h0, c0 = inputs
    kernels = Kernels("float16")
    expected = run(kernels, inputs)
    wide = torch.cat([weight_hh, weight_hh], dim=1)[:, 48:]
    odd = torch.cat([weight_hh[:, :1], weight_hh], dim=1)[:, 1:]  # rows cannot be read 16 bytes at a time
    for strided in (
        (gates.transpose(0, 1).contiguous().transpose(0, 1), odd, h0, c0),
        (torch.cat([gates[..., :1], gates], dim=-1)[..., 1:], wide, torch.cat([h0, h0], dim=1)[:, 48:], c0),
    ):
        assert all(torch.equal(one, other) for one, other in zip(run(kernels, strided), expected, strict=True))
    same = (gates[:1, :1].expand(3, 5, -1), weight_hh, h0[:1].expand(5, -1), c0[:1].expand(5, -1))
    dense = tuple(t.contiguous() for t in same)
    assert all(torch.equal(one, other) for one, other in zip(run(kernels, same), run(kernels, dense), strict=True))


def test_gradients_that_are_not_there_are_zeros() -> None:
    inputs = draw(3, 5, 41, torch.float32)
    kernels = Kernels("float32")
    saved = kernels.forward(*inputs)
    zeros = [torch.zeros_like(saved[name]) for name in ("output", "h_n", "c_n")]
    for used in range(3):
        grads = [torch.ones(5, 41) if i == used else None for i in range(3)]
        if used == 0:
            grads[0] = torch.ones(1, 1, 41).expand(3, 5, 41)  # as sum() gives it
        dense = [zero if grad is None else grad.contiguous() for grad, zero in zip(grads, zeros, strict=True)]
        found, expected = (kernels.backward(tuple(g), *inputs[1:], None, saved) for g in (grads, dense))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_inputs_stay_in_their_stream_and_end_at_its_reset(value: float) -> None:
    gates, weight_hh, h0, c0 = draw(5, 11, 41, torch.float32)
    kernels = Kernels("float32")
    reset = torch.zeros(5, 11, dtype=torch.bool)
    reset[3, 1] = reset[0, 2] = True
    clean = kernels.forward(gates, weight_hh, h0, c0, reset)["output"]
    gates[1, 1, 2 * 41] = value
    c0[2] = float("nan")
    results = kernels.forward(gates, weight_hh, h0, c0, reset)
    assert results["output"][1:3, 1].isnan().any() == (value != value)
    assert torch.equal(results["output"][:, 2:], clean[:, 2:])
    assert torch.equal(results["output"][3:, 1], clean[3:, 1])
    backward = kernels.backward((torch.ones(5, 11, 41), None, None), weight_hh, h0, c0, reset, results)
    assert not backward["gates"][:, 2:].isnan().any()
    assert not backward["gates"][3:, 1].isnan().any()


@pytest.mark.parametrize("numbers", DTYPES)
def test_gates_and_weights_that_are_not_finite_give_what_eager_gives(numbers: str) -> None:
    """As tests/ops/test_lstm_fused.py says of the CPU's kernels."""
    spread, kernels = random.Random(0), Kernels(numbers)
    for number in range(6):
        T, B, H = spread.choice([(4, 17, 1), (3, 3, 5), (2, 17, 33)])
        inputs, reset = draw(T, B, H, DTYPES[numbers], number), spread.choice([None, some_resets(T, B)])
        for tensor in spread.choice([inputs[:1], inputs[1:2], inputs[:2]]):
            value = spread.choice([float("inf"), float("-inf"), float("nan")])
            tensor.view(-1)[spread.randrange(tensor.numel())] = value
        found = run(kernels, inputs, reset)
        with torch.backends.mkldnn.flags(enabled=False):  # as said there
            expected = evaluate(inputs, reset, DTYPES[numbers])
        for name, one in zip(NAMES, found, strict=True):
            for same in (Tensor.isnan, Tensor.isposinf, Tensor.isneginf):
                assert torch.equal(same(one.double()), same(expected[name])), (name, number)


UNORDERED = "touches what block . wrote|writes what another block read"
PLANTED = {
    "missing flag wait": ("wait_at_least(flags + b, flag_value);", "(void)flags, (void)flag_value;", UNORDERED),
    "waits for the pass before": (
        "(phase - 1) * share.passes + pass + 1",
        "(phase - 1) * share.passes + pass",
        UNORDERED,
    ),
    "stale h buffer": (
        "share, phase - 1, first_stream, count",
        "share, phase, first_stream, count",
        UNORDERED + "|differs",
    ),
    "one h buffer": ("phase % 2 * r.plan.groups", "phase % 1 * r.plan.groups", UNORDERED),
    "missing barrier after the wait": ("    }\n  }\n  sync_warp();", "    }\n  }", UNORDERED),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str) -> None:
    """In these kernels; what else the emulator catches is in test_emulator.py."""
    found, instead, message = PLANTED[bug]
    inputs = draw(4, 9, 70, torch.float32)
    expected = Kernels("float32").forward(*inputs)["output"]
    for schedule in range(3):
        edit = ("lstm/cuda/recurrence.cuh", found, instead)
        kernels = Kernels("float32", schedule, layouts=((2, 1), (1, 1)), edit=edit)
        with pytest.raises(AssertionError, match=message):
            assert torch.equal(kernels.forward(*inputs)["output"], expected), "differs"
