"""The CUDA lstm kernels on the emulator, against float64 within tests/common/error_bounds.py."""

import random

import pytest
import torch
from torch import Tensor

from tests.common import lstm_cases
from tests.common.lstm_cases import RESULTS, Inputs, Tensors, make_grad_outputs, make_inputs, run_reference
from tests.emulator.build import SourcePatch
from tests.emulator.lstm import DTYPES, EmulatedLstm, Lstm, LstmPlan

REGISTERS = 65536
ALL_WEIGHTS_ON_CHIP = (6, 227 * 1024, REGISTERS)
WEIGHTS_FROM_L2 = (6, 48 * 1024, REGISTERS)
NON_PERSISTENT = (6, 227 * 1024, REGISTERS // 2)

# T, B, H: H = 1; B and H not multiples of the tile; several passes; k split over all warps and 16-byte aligned rows.
SIZES = [(1, 3, 1), (4, 3, 41), (3, 20, 130), (3, 70, 66), (2, 1, 264)]


def random_resets(T: int, B: int) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.3


def run(kernels: EmulatedLstm, inputs: Inputs, reset: Tensor | None = None) -> Tensors:
    """The outputs and gradients that the kernels compute, by RESULTS."""
    saved = kernels.forward(*inputs, reset)
    outputs = (saved["output"], saved["h_n"], saved["c_n"])
    gradients = kernels.backward(make_grad_outputs(outputs, inputs[0].dtype), *inputs[1:], reset, saved)
    return dict(zip(RESULTS, [*outputs, *gradients.values()], strict=True))


def assert_bitwise_equal(actual: Tensors, expected: Tensors) -> None:
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_error_within_baseline(kernels: EmulatedLstm, size: tuple[int, int, int], reset: Tensor | None) -> None:
    lstm_cases.assert_error_within_baseline(
        lambda inputs: run(kernels, inputs, reset),
        size,
        DTYPES[kernels.compute_type],
        reset,
        in_tf32=kernels.compute_type == "tf32",
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("compute_type", DTYPES)
def test_error_within_baseline(compute_type: str, size: tuple[int, int, int]) -> None:
    assert_error_within_baseline(EmulatedLstm(compute_type), size, None)
    assert_error_within_baseline(EmulatedLstm(compute_type, schedule=1), size, random_resets(*size[:2]))


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(
    "limits", [ALL_WEIGHTS_ON_CHIP, WEIGHTS_FROM_L2, NON_PERSISTENT], ids=["on chip", "from L2", "non-persistent"]
)
@pytest.mark.parametrize("compute_type", ["float16", "float32"])
def test_all_weight_placements_match_reference(compute_type: str, limits: tuple[int, int, int], schedule: int) -> None:
    kernels = EmulatedLstm(compute_type, schedule, limits, None if limits == NON_PERSISTENT else ((5, 1), (2, 1)))
    assert_error_within_baseline(kernels, (3, 9, 204), random_resets(3, 9) if schedule % 2 else None)
    for plan in kernels.plans.values():
        assert plan.persistent == (limits != NON_PERSISTENT)
        assert (plan.streamed_bytes > 0) == (limits != ALL_WEIGHTS_ON_CHIP)
        assert plan.blocks_per_group > 1
    assert (kernels.plans["backward"].held_bytes > 0) == (limits != NON_PERSISTENT and compute_type == "float16")


@pytest.mark.parametrize("row_tiles", range(1, 6))
@pytest.mark.parametrize("compute_type", DTYPES)
def test_every_row_tile_count_matches_reference(compute_type: str, row_tiles: int) -> None:
    """In two groups of streams, with weights on chip and in L2."""
    T, B, H = 2, 19, 70
    layouts = ((row_tiles, 2), (1 + row_tiles % 2, 2))
    for shared in (44 if compute_type == "float32" else 60, 227):
        kernels = EmulatedLstm(compute_type, row_tiles, (64, 1024 * shared, REGISTERS), layouts)
        assert_error_within_baseline(kernels, (T, B, H), random_resets(T, B))


@pytest.mark.parametrize("compute_type", DTYPES)
def test_results_are_bitwise_equal_for_all_schedules(compute_type: str) -> None:
    inputs, reset = make_inputs(4, 11, 70, DTYPES[compute_type]), random_resets(4, 11)
    expected = run(EmulatedLstm(compute_type), inputs, reset)
    for schedule in range(1, 5):
        assert_bitwise_equal(run(EmulatedLstm(compute_type, schedule), inputs, reset), expected)


@pytest.mark.parametrize("where", ["first", "last", "all", "never"])
def test_resets_match_reference(where: str) -> None:
    T, B = 4, 9
    reset = torch.full((T, B), where == "all")
    if where in ("first", "last"):
        reset[0 if where == "first" else -1, ::2] = True
    assert_error_within_baseline(EmulatedLstm("float32"), (T, B, 41), reset)


def test_one_long_call_equals_many_chunks() -> None:
    gates, weight_hh, h, c = make_inputs(7, 9, 70, torch.bfloat16)
    reset = random_resets(7, 9)
    kernels = EmulatedLstm("bfloat16")
    expected = kernels.forward(gates, weight_hh, h, c, reset, save=False)
    outputs = []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        chunk = kernels.forward(gates[begin:end], weight_hh, h, c, reset[begin:end].contiguous(), save=False)
        outputs.append(chunk["output"])
        h, c = chunk["h_n"], chunk["c_n"]
    assert_bitwise_equal({"output": torch.cat(outputs), "h_n": h, "c_n": c}, expected)


class CellsInMemory(EmulatedLstm):
    def plan(self, name: str, inputs: Lstm) -> LstmPlan:
        plan = super().plan(name, inputs)
        plan.cells_in_registers = False
        return plan


def test_cell_placement_is_bitwise_equal() -> None:
    inputs, reset = make_inputs(3, 40, 10, torch.float16), random_resets(3, 40)  # two passes
    in_registers, in_memory = (
        kernels("float16", layouts=((3, 1), (1, 1))) for kernels in (EmulatedLstm, CellsInMemory)
    )
    expected = run(in_registers, inputs, reset)
    assert all(plan.cells_in_registers for plan in in_registers.plans.values())
    assert_bitwise_equal(run(in_memory, inputs, reset), expected)


def test_non_contiguous_inputs_are_bitwise_equal() -> None:
    inputs = make_inputs(3, 5, 48, torch.float16)
    gates, weight_hh, h0, c0 = inputs
    kernels = EmulatedLstm("float16")
    expected = run(kernels, inputs)
    wide = torch.cat([weight_hh, weight_hh], dim=1)[:, 48:]
    unaligned = torch.cat([weight_hh[:, :1], weight_hh], dim=1)[:, 1:]  # rows that cannot be read 16 bytes at a time
    for strided in (
        (gates.transpose(0, 1).contiguous().transpose(0, 1), unaligned, h0, c0),
        (torch.cat([gates[..., :1], gates], dim=-1)[..., 1:], wide, torch.cat([h0, h0], dim=1)[:, 48:], c0),
    ):
        assert_bitwise_equal(run(kernels, strided), expected)
    expanded = (gates[:1, :1].expand(3, 5, -1), weight_hh, h0[:1].expand(5, -1), c0[:1].expand(5, -1))
    dense = tuple(t.contiguous() for t in expanded)
    assert_bitwise_equal(run(kernels, expanded), run(kernels, dense))


def test_missing_gradients_equal_zeros() -> None:
    inputs = make_inputs(3, 5, 41, torch.float32)
    kernels = EmulatedLstm("float32")
    saved = kernels.forward(*inputs)
    zeros = [torch.zeros_like(saved[name]) for name in ("output", "h_n", "c_n")]
    for used in range(3):
        grads = [torch.ones(5, 41) if i == used else None for i in range(3)]
        if used == 0:
            grads[0] = torch.ones(1, 1, 41).expand(3, 5, 41)  # as from sum()
        dense = [zero if grad is None else grad.contiguous() for grad, zero in zip(grads, zeros, strict=True)]
        actual, expected = (kernels.backward(tuple(g), *inputs[1:], None, saved) for g in (grads, dense))
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_batch_row_until_reset(value: float) -> None:
    gates, weight_hh, h0, c0 = make_inputs(5, 11, 41, torch.float32)
    kernels = EmulatedLstm("float32")
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


@pytest.mark.parametrize("compute_type", DTYPES)
def test_non_finite_propagation_matches_eager(compute_type: str) -> None:
    """For the CPU kernels, see tests/ops/test_lstm_fused.py."""
    rng, kernels = random.Random(0), EmulatedLstm(compute_type)
    for seed in range(6):
        T, B, H = rng.choice([(4, 17, 1), (3, 3, 5), (2, 17, 33)])
        inputs, reset = make_inputs(T, B, H, DTYPES[compute_type], seed), rng.choice([None, random_resets(T, B)])
        for tensor in rng.choice([inputs[:1], inputs[1:2], inputs[:2]]):
            value = rng.choice([float("inf"), float("-inf"), float("nan")])
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        actual = run(kernels, inputs, reset)
        with lstm_cases.without_onednn():
            expected = lstm_cases.outputs_and_gradients(run_reference, inputs, reset)
        for name in RESULTS:
            for predicate in (Tensor.isnan, Tensor.isposinf, Tensor.isneginf):
                assert torch.equal(predicate(actual[name]), predicate(expected[name])), (name, seed)


UNORDERED = "accesses what block . wrote|writes what another block read"
# Fault: (source text, replacement, error message).
INJECTED_FAULTS = {
    "missing flag wait": ("wait_at_least(flags + b, flag_value);", "(void)flags, (void)flag_value;", UNORDERED),
    "waits for the previous pass": (
        "(phase - 1) * share.passes + pass + 1",
        "(phase - 1) * share.passes + pass",
        UNORDERED,
    ),
    "stale h buffer": (
        "share, phase - 1, first_stream, count",
        "share, phase, first_stream, count",
        UNORDERED + "|differs",
    ),
    "single h buffer": ("phase % 2 * r.plan.groups", "phase % 1 * r.plan.groups", UNORDERED),
    "missing barrier after the wait": ("    }\n  }\n  sync_warp();", "    }\n  }", UNORDERED),
}


@pytest.mark.parametrize("fault", INJECTED_FAULTS)
def test_injected_faults_are_detected(fault: str) -> None:
    """In these kernels; test_emulator.py has the emulator's own tests."""
    old, new, message = INJECTED_FAULTS[fault]
    patch = SourcePatch("lstm/cuda/recurrence.cuh", old, new)
    inputs = make_inputs(4, 9, 70, torch.float32)
    expected = EmulatedLstm("float32").forward(*inputs)["output"]
    for schedule in range(3):
        kernels = EmulatedLstm("float32", schedule, layouts=((2, 1), (1, 1)), source_patch=patch)
        with pytest.raises(AssertionError, match=message):
            assert torch.equal(kernels.forward(*inputs)["output"], expected), "differs"
