"""The emulator itself: right kernels pass under every schedule, every planted bug is caught."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import build, wrappers
from tests.emulator.build import library

SCHEDULES = range(5)

# bug -> the kernel it is planted in, and what the emulator says; None where the result is wrong instead.
PLANTED = {
    "missing_barrier": ("reverse", "race"),
    "warp_barrier_for_block": ("reverse", "race"),
    "divergent_barrier": ("reverse", "sync_threads diverges"),
    "thread_leaves_early": ("reverse", "deadlock"),
    "part_overrun": ("reverse", "outside its part"),
    "block_overrun": ("reverse", "shared memory up to"),
    "unwritten": ("reverse", None),
    "missing_wait": ("pipeline", "unfinished copy"),
    "missing_barrier_after_wait": ("pipeline", "unfinished copy|race"),
    "single_buffer": ("pipeline", "unfinished copy|race"),
    "misaligned_copy": ("pipeline", "misaligned"),
    "divergent_shuffle": ("warp_sum", "diverges"),
    "mixed_warp_operations": ("warp_sum", "diverges"),
    "wrong_lane": ("warp_sum", None),
    "missing_warp_barrier": ("warp_sum", "race"),
    "shared_result": ("reverse", "block . wrote"),
    "result_overrun": ("reverse", "writes outside"),
    "input_overrun": ("reverse", "reads outside"),
    "writes_input": ("reverse", "writes to an input"),
    "reads_other_block": ("reverse", "block . wrote|another block read"),
    "missing_flag_wait": ("exchange", "block . wrote|another block read"),
    "early_flag_wait": ("exchange", "block . wrote|another block read"),
    "missing_barrier_after_flag": ("exchange", "block . wrote|another block read"),
    "missing_barrier_before_flag": ("exchange", "block . wrote|another block read"),
    "one_exchange": ("exchange", "block . wrote|another block read"),
    "stale_exchange": ("exchange", ""),  # by the schedule an error or a wrong result
    "flag_never_set": ("exchange", "deadlock"),
}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run(kernel: str, bug: str, schedule: int) -> tuple[str, bool]:
    """What the emulator said, and whether the result is right."""
    planted = library("planted.cpp").run_planted
    planted.restype = ctypes.c_char_p
    aligned = np.empty(260, np.float32)
    start = -aligned.ctypes.data % 16 // 4
    values = aligned[start : start + 256]
    values[:] = np.random.default_rng(0).integers(-99, 99, 256)
    out = np.full(258, np.nan, np.float32)
    error = planted(kernel.encode(), bug.encode(), schedule, pointer(values), pointer(out)).decode()
    expected = np.full(128, np.nan, np.float32)
    if kernel == "exchange":
        expected[:] = np.tile(values.reshape(2, 2, 64).sum((0, 1)), 2)
    elif kernel == "reverse":
        expected[:] = values[:128].reshape(2, 64)[:, ::-1].reshape(-1)
    elif kernel == "pipeline":
        expected[:64] = values.reshape(4, 64).sum(0)[::-1]
    else:
        sums = values[:64].reshape(2, 32).sum(1).repeat(32)
        expected[:64] = sums + values[:64].reshape(32, 2)[:, ::-1].reshape(-1)
    return error, bool(np.array_equal(out[:128], expected, equal_nan=True))


@pytest.mark.parametrize("kernel", ["reverse", "pipeline", "warp_sum", "exchange"])
def test_right_kernels_pass(kernel: str) -> None:
    for schedule in SCHEDULES:
        assert run(kernel, "none", schedule) == ("", True)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug: str) -> None:
    kernel, message = PLANTED[bug]
    for schedule in SCHEDULES:
        error, right = run(kernel, bug, schedule)
        assert not right or error
        if message is None:
            assert error == ""
        else:
            assert any(part in error.replace("block 0", "block .").replace("block 1", "block .")
                       for part in message.split("|")), error  # fmt: skip


@pytest.mark.parametrize("name", wrappers.STATE_DICT_KEYS)
def test_wrappers_do_what_a_gpu_does(name: str) -> None:
    use = library("wrappers.cpp").use_wrapper
    use.restype = ctypes.c_char_p
    given, out = wrappers.given(name), torch.full((64, 4), float("nan"))
    assert use(name.encode(), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr())) is None
    tolerance = wrappers.tolerance(name)
    torch.testing.assert_close(out, wrappers.expected(name, given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("product", wrappers.WARPGROUP_PRODUCTS, ids=str)
def test_warpgroup_products(product: tuple) -> None:
    assert wrappers.multiply_by_warpgroup(library("wrappers.cpp"), product, "cpu") is None


def test_two_blocks_play_ping_pong() -> None:
    play = library("wrappers.cpp").play_ping_pong
    play.restype = ctypes.c_char_p
    flags, values = torch.zeros(2, dtype=torch.int32), torch.arange(128.0).reshape(2, 64)
    assert play(50, ctypes.c_void_p(flags.data_ptr()), ctypes.c_void_p(values.data_ptr())) is None
    wrappers.assert_played(flags, values, 50)


def test_conversions() -> None:
    convert = library("planted.cpp").convert
    narrow = np.arange(65536, dtype=np.uint16)
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        all_halves = narrow.view(np.float16).astype(np.float32)
        between = np.concatenate([all_halves, np.nextafter(all_halves, np.float32(0)), all_halves * 1.0004883])
    values = np.concatenate([patterns, between.astype(np.float32)])
    for kind, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
        wide = np.empty(65536, np.float32)
        convert(kind.encode(), True, ctypes.c_int64(65536), pointer(narrow), pointer(wide))
        expected = torch.from_numpy(narrow.view(np.int16)).view(dtype).float()
        assert torch.equal(torch.from_numpy(wide).nan_to_num(7.0), expected.nan_to_num(7.0))
        back = np.empty(len(values), np.uint16)
        convert(kind.encode(), False, ctypes.c_int64(len(values)), pointer(back), pointer(values))
        rounded = torch.from_numpy(back.view(np.int16)).view(dtype).float()
        assert torch.equal(rounded.nan_to_num(7.0), torch.from_numpy(values).to(dtype).float().nan_to_num(7.0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["half", "bfloat16", "tf32"])
def test_matrix_products(kind: str, transposed: bool) -> None:
    product = library("planted.cpp").run_product
    product.restype = ctypes.c_char_p
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}[kind]
    generator = torch.Generator().manual_seed(0)
    depth = 8 if kind == "tf32" else 16
    a = torch.randint(-8, 9, (16, depth), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (8, depth), generator=generator).to(dtype)
    stored = b.t().contiguous() if transposed and kind != "tf32" else b
    out = torch.full((16, 8), float("nan"))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, stored, out)]
    assert product(kind.encode(), transposed, *pointers) == b""
    assert torch.equal(out, a.float() @ b.float().t())


def test_builds_beside_others_that_clear_away_the_same_old_build(monkeypatch, tmp_path):
    """pytest-xdist's processes all find the sources changed at once."""

    def compile_nothing(command, **_):
        Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build, "BUILT", tmp_path)
    monkeypatch.setattr(build.subprocess, "run", compile_nothing)
    monkeypatch.setattr(Path, "iterdir", lambda folder: [folder / "cleared away already"])
    assert build.compile_source("emulator.cpp", "emulator.o").exists()


def test_processes_that_build_one_edited_source_see_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_source", lambda *_, **__: tmp_path / "compiled")
    monkeypatch.setattr(ctypes, "CDLL", str)
    edit = ("lstm/cuda/recurrence.cuh", "#pragma once\n", "#pragma once\n// edited\n")
    library.__wrapped__("lstm.cpp", edit=edit)
    (edited,) = tmp_path.rglob("lstm/cuda/recurrence.cuh")
    whole, seen = edited.read_text(), []
    assert "// edited" in whole

    def write_slowly(path: Path, text: str) -> None:
        with open(path, "w") as file:
            file.write(text[:100])
            file.flush()
            seen.append(edited.read_text())
            file.write(text[100:])

    monkeypatch.setattr(Path, "write_text", write_slowly)
    library.__wrapped__("lstm.cpp", edit=edit)
    assert seen == [whole]
    assert list(edited.parent.iterdir()) == [edited]
