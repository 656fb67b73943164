"""The plan of the CUDA lstm: how units, batch rows and weights are distributed over a GPU."""

import pytest

from pytbptt.ops.extension import EXTENSION

if EXTENSION.facts is not None:
    from pytbptt import _C

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)

# Multiprocessors, and KiB of shared memory per block by the CUDA programming guide, of A100, RTX 3090, RTX 4090, H200.
GPUS = {"sm_80": (108, 163), "sm_86": (82, 99), "sm_89": (128, 99), "sm_90": (132, 227)}
SIZES = [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60), (1, 1), (41, 3), (200, 1000), (5000, 7)]
DTYPES = ["float16", "bfloat16", "tf32", "float32"]


def limits(gpu):
    multiprocessors, kibibytes = GPUS[gpu]
    return {"multiprocessors": multiprocessors, "shared_bytes": 1024 * kibibytes, "registers": 65536}


def plan(hidden, batch, dtype, gpu):
    return _C.lstm_plan(hidden, batch, dtype, limits(gpu))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "batch"), SIZES)
def test_plan_covers_all_units_and_fits_device(hidden, batch, dtype, gpu):
    for direction, layout in plan(hidden, batch, dtype, gpu).items():
        assert layout["blocks"] % layout["groups"] == 0
        assert layout["blocks"] // layout["groups"] == -(-hidden // layout["units"])
        assert layout["groups"] == -(-batch // layout["streams"])
        assert layout["shared_bytes"] <= limits(gpu)["shared_bytes"]
        # Registers, shared memory and L2 together hold the block's weights.
        weights = layout["weights_in_registers"] + layout["weights_in_shared"] + layout["weights_from_l2"]
        size = 4 if dtype in ("tf32", "float32") else 2
        assert weights >= layout["units"] * 4 * hidden * size
        assert layout["weights_in_registers"] <= 64 * 1024
        assert layout["workspace_bytes"] == layout["exchange_bytes"] + layout["blocks"] * layout["weights_from_l2"]
        exchanged = hidden * (4 if direction == "backward" else 1)
        assert layout["exchange_bytes"] >= 2 * batch * exchanged * size + 4 * layout["blocks"]
        if layout["variant"] == "persistent":
            assert layout["blocks"] <= limits(gpu)["multiprocessors"]
        else:
            assert layout["weights_in_registers"] == layout["weights_in_shared"] == 0
            assert layout["cells"] == "memory"
        # Cells are in registers for at most 64 streams: 2 passes of 32.
        assert (layout["cells"] == "registers") == (layout["variant"] == "persistent" and layout["streams"] <= 64)


@pytest.mark.parametrize(("hidden", "batch"), [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60)])
def test_lm_sizes_are_persistent_on_h200(hidden, batch):
    layout = plan(hidden, batch, "bfloat16", "sm_90")["forward"]
    assert layout["variant"] == "persistent"
    assert layout["weights_from_l2"] <= (layout["weights_in_registers"] + layout["weights_in_shared"]) // 10
    assert layout["blocks"] > 132 // 2


@pytest.mark.parametrize("gpu", GPUS)
def test_l2_weights_only_if_on_chip_memory_is_full(gpu):
    for direction, layout in plan(2048, 60, "bfloat16", gpu).items():
        if layout["variant"] == "persistent" and layout["weights_from_l2"] > 0:
            rows = layout["units"] * (4 if direction == "forward" else 1)
            next_tiles = 8 * rows * 32 * 2  # bytes of one more tile of 32 columns for each of 8 warps
            assert layout["weights_in_registers"] > 0 or rows > 64  # accumulators of more rows take all registers
            assert layout["shared_bytes"] + next_tiles > limits(gpu)["shared_bytes"]


def test_large_batches_use_two_groups():
    large, small = (plan(1150, batch, "bfloat16", "sm_90")["forward"] for batch in (80, 8))
    assert (large["groups"], small["groups"]) == (2, 1)


def test_cells_are_in_registers_for_small_batches_per_block():
    assert [plan(1150, batch, "bfloat16", "sm_80")["forward"]["cells"] for batch in (20, 80)] == ["registers", "memory"]
    for hidden, batch in [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60)]:
        assert all(layout["cells"] == "registers" for layout in plan(hidden, batch, "bfloat16", "sm_90").values())


def test_plan_falls_back_to_per_step():
    assert plan(5000, 7, "bfloat16", "sm_86")["forward"]["variant"] == "per step"
    few_registers = limits("sm_90") | {"registers": 32768}
    assert all(layout["variant"] == "per step" for layout in _C.lstm_plan(650, 20, "bfloat16", few_registers).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "float16", limits("sm_80")), "hidden and batch: found 0 and 1, expected"),
        ((1, 1, "float64", limits("sm_80")), "dtype: found float64, expected"),
        ((1, 1, "float16", {"multiprocessors": 1, "shared_bytes": 1}), "limits: expected registers"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=f"lstm_plan: {message}"):
        _C.lstm_plan(*arguments)
