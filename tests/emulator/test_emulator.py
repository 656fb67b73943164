"""The emulator: correct kernels pass under every schedule, injected faults are detected."""

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import build, primitives
from tests.emulator.build import SourcePatch, build_library, compile_library

SCHEDULES = range(5)

# Fault: (kernel, error message; None: no error, but a wrong result).
INJECTED_FAULTS = {
    "missing_barrier": ("reverse", "race"),
    "warp_instead_of_block_barrier": ("reverse", "race"),
    "divergent_barrier": ("reverse", "sync_threads diverges"),
    "early_return": ("reverse", "deadlock"),
    "smem_view_overrun": ("reverse", "outside its view"),
    "smem_overrun": ("reverse", "shared memory up to"),
    "uninitialised_smem": ("reverse", None),
    "missing_wait": ("pipeline", "unfinished copy"),
    "missing_barrier_after_wait": ("pipeline", "unfinished copy|race"),
    "missing_double_buffer": ("pipeline", "unfinished copy|race"),
    "misaligned_copy": ("pipeline", "misaligned"),
    "divergent_shuffle": ("warp_sum", "diverges"),
    "mixed_warp_operations": ("warp_sum", "diverges"),
    "wrong_lane": ("warp_sum", None),
    "missing_warp_barrier": ("warp_sum", "race"),
    "blocks_share_output": ("reverse", "block . wrote"),
    "output_overrun": ("reverse", "writes outside"),
    "input_overrun": ("reverse", "reads outside"),
    "writes_input": ("reverse", "writes to an input"),
    "reads_other_block": ("reverse", "block . wrote|another block read"),
    "missing_flag_wait": ("exchange", "block . wrote|another block read"),
    "early_flag_wait": ("exchange", "block . wrote|another block read"),
    "missing_barrier_after_flag": ("exchange", "block . wrote|another block read"),
    "missing_barrier_before_flag": ("exchange", "block . wrote|another block read"),
    "single_exchange_buffer": ("exchange", "block . wrote|another block read"),
    "stale_exchange": ("exchange", ""),  # an error or a wrong result, depending on the schedule
    "flag_never_set": ("exchange", "deadlock"),
}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run(kernel: str, fault: str, schedule: int) -> tuple[str, bool]:
    """The error message, and whether the result is correct."""
    run_kernel = build_library("buggy_kernels.cpp").run_kernel
    run_kernel.restype = ctypes.c_char_p
    aligned = np.empty(260, np.float32)
    start = -aligned.ctypes.data % 16 // 4
    values = aligned[start : start + 256]
    values[:] = np.random.default_rng(0).integers(-99, 99, 256)
    out = np.full(258, np.nan, np.float32)
    error = run_kernel(kernel.encode(), fault.encode(), schedule, pointer(values), pointer(out)).decode()
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
def test_correct_kernels_report_no_error(kernel: str) -> None:
    for schedule in SCHEDULES:
        assert run(kernel, "none", schedule) == ("", True)


@pytest.mark.parametrize("fault", INJECTED_FAULTS)
def test_injected_faults_are_detected(fault: str) -> None:
    kernel, message = INJECTED_FAULTS[fault]
    for schedule in SCHEDULES:
        error, correct = run(kernel, fault, schedule)
        assert not correct or error
        if message is None:
            assert error == ""
        else:
            assert re.search(message, error), error


@pytest.mark.parametrize("name", primitives.PRIMITIVES)
def test_device_primitives_match_expected(name: str) -> None:
    run_primitive = build_library("primitives.cpp").run_primitive
    run_primitive.restype = ctypes.c_char_p
    x, out = primitives.make_input(name), torch.full((64, 4), float("nan"))
    assert run_primitive(name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())) is None
    tolerance = primitives.tolerance(name)
    torch.testing.assert_close(out, primitives.expected(name, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", primitives.WGMMA_CASES, ids=str)
def test_wgmma_matches_matmul(case: tuple) -> None:
    assert primitives.check_wgmma(build_library("primitives.cpp"), case, "cpu") is None


def test_flag_handshake_between_blocks() -> None:
    run_ping_pong = build_library("primitives.cpp").run_ping_pong
    run_ping_pong.restype = ctypes.c_char_p
    flags, values = torch.zeros(2, dtype=torch.int32), torch.arange(128.0).reshape(2, 64)
    assert run_ping_pong(50, ctypes.c_void_p(flags.data_ptr()), ctypes.c_void_p(values.data_ptr())) is None
    primitives.assert_ping_pong_result(flags, values, 50)


def test_half_bfloat16_conversions_match_torch() -> None:
    convert = build_library("buggy_kernels.cpp").convert
    narrow = np.arange(65536, dtype=np.uint16)
    patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
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
def test_mma_matches_matmul(kind: str, transposed: bool) -> None:
    run_mma = build_library("buggy_kernels.cpp").run_mma
    run_mma.restype = ctypes.c_char_p
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}[kind]
    generator = torch.Generator().manual_seed(0)
    depth = 8 if kind == "tf32" else 16
    a = torch.randint(-8, 9, (16, depth), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (8, depth), generator=generator).to(dtype)
    stored = b.t().contiguous() if transposed and kind != "tf32" else b
    out = torch.full((16, 8), float("nan"))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, stored, out)]
    assert run_mma(kind.encode(), transposed, *pointers) == b""
    assert torch.equal(out, a.float() @ b.float().t())


def test_parallel_builds_tolerate_concurrent_cleanup(monkeypatch, tmp_path):
    """Several pytest-xdist workers may delete the same outdated build."""

    def compile_nothing(command, **_):
        Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build, "BUILD_DIR", tmp_path)
    monkeypatch.setattr(build.subprocess, "run", compile_nothing)
    monkeypatch.setattr(Path, "iterdir", lambda folder: [folder / "already deleted"])
    assert build.compile_source("emulator.cpp", "emulator.o").exists()


def test_patched_source_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_source", lambda *_, **__: tmp_path / "compiled")
    patch = SourcePatch("lstm/cuda/recurrence.cuh", "#pragma once\n", "#pragma once\n// patched\n")
    compile_library("lstm.cpp", source_patch=patch)
    (patched,) = tmp_path.rglob("lstm/cuda/recurrence.cuh")
    expected, read_during_write = patched.read_text(), []
    assert "// patched" in expected

    def write_slowly(path: Path, text: str) -> None:
        with open(path, "w") as file:
            file.write(text[:100])
            file.flush()
            read_during_write.append(patched.read_text())
            file.write(text[100:])

    monkeypatch.setattr(Path, "write_text", write_slowly)
    compile_library("lstm.cpp", source_patch=patch)
    assert read_during_write == [expected]
    assert list(patched.parent.iterdir()) == [patched]
