"""tests/checks/kernel_stats.py finds the hot loop of a disassembly, and its check rejects kernels that have grown."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.checks import kernel_stats

# An outer loop that contains a short loop without MMA instructions and the hot loop.
LISTING = """
.L_x_1:
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_2:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R29], desc[UR6][R26.64] ;
        /*0040*/                   LDSM.16.M88.4 R148, [R21] ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   STS.64 [R60], R44 ;
        /*0090*/                   FADD R4, R4, R5 ;
        /*00a0*/                   R2UR UR10, R24 ;
        /*00b0*/               @P1 BRA `(.L_x_3) ;
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00d0*/               @P2 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
"""


def test_hot_loop_is_the_shortest_loop_with_most_mma_instructions() -> None:
    assert kernel_stats.hot_loop(LISTING.splitlines()) == Counter(
        matrix=2, ldmatrix=1, shared=1, copies=1, exp2=1, floats=1, integers=2
    )


@pytest.mark.parametrize(
    ("registers", "loop", "message"),
    [
        (128, {"matrix": 102}, None),
        (120, {"matrix": 90}, None),
        (129, {"matrix": 100}, "129 registers, expected 128"),
        (128, {"matrix": 60, "integers": 43}, "103 instructions in its hot loop, expected 100"),
    ],
)
def test_check_fails_on_more_registers_or_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registers: int, loop: dict[str, int], message: str | None
) -> None:
    monkeypatch.setattr(kernel_stats, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(kernel_stats, "nvcc_release", lambda: "13.0.88")
    kernel_stats.COUNTS.write_text(json.dumps({"nvcc": "13.0.88", "sm_80": {"kernel": [128, 100]}}))
    kernels = {"sm_80": {"kernel": kernel_stats.Kernel(registers, 0, Counter(loop))}}
    if message is None:
        kernel_stats.check(kernels)
    else:
        with pytest.raises(SystemExit, match=message):
            kernel_stats.check(kernels)


def test_check_fails_on_a_kernel_that_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_stats, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(kernel_stats, "nvcc_release", lambda: "13.0.88")
    kernel_stats.COUNTS.write_text(json.dumps({"nvcc": "13.0.88", "sm_80": {}}))
    with pytest.raises(SystemExit, match="not recorded"):
        kernel_stats.check({"sm_80": {"kernel": kernel_stats.Kernel(1, 0, Counter())}})


@pytest.mark.parametrize(
    ("architecture", "resources", "expected"),
    [
        ("sm_80", (168, 81920, 128), "8.0: 2, 8.6: 1, 8.9: 1"),
        ("sm_90a", (168, 231424, 384), "9.0: 1"),
        ("sm_90a", (32, 0, 256), "9.0: 8"),
        ("sm_87", (32, 0, 256), ""),
    ],
)
def test_occupancy_by_compute_capability(architecture: str, resources: tuple[int, int, int], expected: str) -> None:
    assert kernel_stats.occupancy(architecture, *resources) == expected
