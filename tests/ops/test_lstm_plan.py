"""How the LSTM is laid out on a GPU: what can be told without one."""

import pytest

from pytbptt.ops.extension import EXTENSION

if EXTENSION.facts is not None:
    from pytbptt import _C

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)

# Multiprocessors, and bytes of shared memory that a block may have, by the CUDA programming guide: A100, RTX 3090,
# RTX 4090, H200.
GPUS = {"sm_80": (108, 163), "sm_86": (82, 99), "sm_89": (128, 99), "sm_90": (132, 227)}
SIZES = [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60), (1, 1), (41, 3), (200, 1000), (5000, 7)]
DTYPES = ["float16", "bfloat16", "tf32", "float32"]


def limits(gpu):
    multiprocessors, kilobytes = GPUS[gpu]
    return {"multiprocessors": multiprocessors, "shared_bytes": 1024 * kilobytes, "registers": 65536}


def plan(hidden, batch, dtype, gpu):
    return _C.lstm_plan(hidden, batch, dtype, limits(gpu))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "batch"), SIZES)
def test_every_unit_of_every_stream_has_a_block_and_all_blocks_a_place(hidden, batch, dtype, gpu):
    for direction, found in plan(hidden, batch, dtype, gpu).items():
        assert found["blocks"] % found["groups"] == 0
        assert found["blocks"] // found["groups"] == -(-hidden // found["units"])
        assert found["groups"] == -(-batch // found["streams"])
        assert found["shared_bytes"] <= limits(gpu)["shared_bytes"]
        # Of its rows of weights (a unit's four gates, or its column) a block keeps every element somewhere.
        kept = found["weights_in_registers"] + found["weights_in_shared"] + found["weights_from_l2"]
        size = 4 if dtype in ("tf32", "float32") else 2
        assert kept >= found["units"] * 4 * hidden * size
        assert found["weights_in_registers"] <= 64 * 1024
        assert found["workspace_bytes"] == found["exchange_bytes"] + found["blocks"] * found["weights_from_l2"]
        exchanged = hidden * (4 if direction == "backward" else 1)
        assert found["exchange_bytes"] >= 2 * batch * exchanged * size + 4 * found["blocks"]
        if found["variant"] == "persistent":
            assert found["blocks"] <= limits(gpu)["multiprocessors"]
        else:
            assert found["weights_in_registers"] == found["weights_in_shared"] == 0
            assert found["cells"] == "memory"
        # A thread has one of 32 streams at a time, and carries the cells of two such passes.
        assert (found["cells"] == "registers") == (found["variant"] == "persistent" and found["streams"] <= 64)


@pytest.mark.parametrize(("hidden", "batch"), [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60)])
def test_language_models_keep_their_weights_on_chip_of_an_h200(hidden, batch):
    found = plan(hidden, batch, "bfloat16", "sm_90")["forward"]
    assert found["variant"] == "persistent"
    assert found["weights_from_l2"] <= (found["weights_in_registers"] + found["weights_in_shared"]) // 10
    assert found["blocks"] > 132 // 2


@pytest.mark.parametrize("gpu", GPUS)
def test_registers_and_shared_memory_are_full_before_weights_come_from_l2(gpu):
    for direction, found in plan(2048, 60, "bfloat16", gpu).items():
        if found["variant"] == "persistent" and found["weights_from_l2"] > 0:
            rows = found["units"] * (4 if direction == "forward" else 1)
            one_more = 8 * rows * 32 * 2  # its 8 warps keep equally many tiles of 32 columns
            assert found["weights_in_registers"] > 0 or rows > 64  # whose sums leave none
            assert found["shared_bytes"] + one_more > limits(gpu)["shared_bytes"]


def test_streams_are_divided_where_that_lowers_the_traffic():
    many, few = (plan(1150, batch, "bfloat16", "sm_90")["forward"] for batch in (80, 8))
    assert (many["groups"], few["groups"]) == (2, 1)


def test_cells_lie_in_registers_unless_a_block_has_many_streams():
    assert [plan(1150, batch, "bfloat16", "sm_80")["forward"]["cells"] for batch in (20, 80)] == ["registers", "memory"]
    for hidden, batch in [(650, 20), (1150, 80), (1500, 20), (1024, 64), (2048, 60)]:
        assert all(found["cells"] == "registers" for found in plan(hidden, batch, "bfloat16", "sm_90").values())


def test_a_gpu_without_room_for_all_blocks_runs_step_by_step():
    assert plan(5000, 7, "bfloat16", "sm_86")["forward"]["variant"] == "per step"
    few = limits("sm_90") | {"registers": 32768}
    assert all(found["variant"] == "per step" for found in _C.lstm_plan(650, 20, "bfloat16", few).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, "float16", limits("sm_80")), "hidden and batch: found 0 and 1, expected"),
        ((1, 1, "float64", limits("sm_80")), "dtype: found float64, expected"),
        ((1, 1, "float16", {"multiprocessors": 1, "shared_bytes": 1}), "limits: expected registers"),
    ],
)
def test_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=f"lstm_plan: {message}"):
        _C.lstm_plan(*arguments)
