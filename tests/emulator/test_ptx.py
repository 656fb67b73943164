"""nvcc compiles each primitive of csrc/common/cuda/device to its PTX instruction."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulator.build import ROOT

# A call whose result is used, and the instruction as the PTX ISA names it.
PTX_INSTRUCTIONS = {
    "sync_threads(); store(out, 0.0f)": r"bar\.sync\s+0;",
    "sync_warp(); store(out, 0.0f)": r"bar\.warp\.sync\s+0xffffffff;",
    "store(out, shfl(load(in), 3))": r"shfl\.sync\.idx\.b32",
    "store(out, shfl_xor(load(in), 3))": r"shfl\.sync\.bfly\.b32",
    "cp_async_16(tile, in, 12); cp_async_wait(); store(out, tile.load(3))": (
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;[^}]*cp\.async\.wait_all;"
    ),
    "add_to(out, load(in))": r"red\.relaxed\.gpu\.global\.add\.f32 \[%rd\d+\], %f\d+;",
    "store_release(flag, 7u); store(out, 0.0f)": r"st\.release\.gpu\.global\.u32 \[%rd\d+\], %r\d+;",
    "wait_at_least(flag, 7u); store(out, 0.0f)": r"ld\.acquire\.gpu\.global\.u32 %r\d+, \[%rd\d+\];",
    "ldmatrix_x4<false>(a, halves); use(out, a)": r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \{",
    "ldmatrix_x4<true>(a, halves); use(out, a)": r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 \{",
    "mma<half>(d, a, b); use(out, d)": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32 \{",
    "mma<bfloat16>(d, a, b); use(out, d)": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32 \{",
    "mma_tf32(d, a, b); use(out, d)": r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32 \{",
    "a[0] = to_tf32(load(in)); use(out, a)": r"cvt\.rna\.tf32\.f32",
    "store(out, from_tf32(*flag))": r"and\.b32\s+%r\d+, %r\d+, -8192;",
    "store(out, to_float(half{bits}))": r"cvt\.f32\.f16",
    "store(out, to_float(bfloat16{bits}))": r"shl\.b32\s+%r\d+, %r\d+, 16;",
    "a[0] = from_float<half>(load(in)).bits; use(out, a)": r"cvt\.rn\.f16\.f32",
    "a[0] = from_float<bfloat16>(load(in)).bits; use(out, a)": r"cvt\.rn\.bf16\.f32",
    "a[0] = pack<half>(load(in), load(in + 1)); use(out, a)": r"cvt\.rn\.f16x2\.f32",
    "a[0] = pack<bfloat16>(load(in), load(in + 1)); use(out, a)": r"cvt\.rn\.bf16x2\.f32",
    "store(out, device::exp2(load(in)))": r"ex2\.approx\.ftz\.f32",
    "store(out, device::fma(load(in), load(in + 1), 3.0f))": r"fma\.rn\.f32",
    "store(out, largest(load(in), load(in + 1)))": r"max\.f32",
    "a[0] = high_word(bits, a[1]); use(out, a)": r"mul\.hi\.u32",
}

# Primitives of sm_90a.
SM90A_INSTRUCTIONS = {
    "fence_async_shared(); store(out, 0.0f)": r"fence\.proxy\.async\.shared::cta;",
    "warpgroup_arrive(sums); use(out, sums[0])": r"wgmma\.fence\.sync\.aligned;",
    "warpgroup_commit_batch(); store(out, 0.0f)": r"wgmma\.commit_group\.sync\.aligned;",
    "warpgroup_wait<1>(sums); use(out, sums[0])": r"wgmma\.wait_group\.sync\.aligned 1;",
    "sync_warpgroup(); store(out, 0.0f)": r"bar\.sync\s+%r\d+, 128;",
    "warpgroup_reg_alloc<224>(); store(out, 0.0f)": r"setmaxnreg\.inc\.sync\.aligned\.u32 224;",
    "warpgroup_reg_dealloc<56>(); store(out, 0.0f)": r"setmaxnreg\.dec\.sync\.aligned\.u32 56;",
    "warpgroup_mma<true>(sums, a, rows); use(out, sums[0])": (
        r"wgmma\.mma_async\.sync\.aligned\.m64n16k16\.f32\.f16\.f16 "
        r"\{(%f\d+, ){7}%f\d+\}, \{(%r\d+, ){3}%r\d+\}, %rd\d+, p, 1, 1, 1;"
    ),
    "warpgroup_mma<false, true>(sums, rows, rows); use(out, sums[0])": (
        r"wgmma\.mma_async\.sync\.aligned\.m64n16k16\.f32\.f16\.f16 "
        r"\{(%f\d+, ){7}%f\d+\}, %rd\d+, %rd\d+, p, 1, 1, 0, 1;"
    ),
}

SOURCE = """
#include "common/cuda/device/device.h"
namespace pytbptt {{
using namespace device;
template <typename T, int COUNT>
PYTBPTT_DEVICE void use(float* out, const T (&values)[COUNT]) {{
  for (int i = 0; i < COUNT; ++i) store(reinterpret_cast<T*>(out) + i, values[i]);
}}
{kernels}
}}  // namespace pytbptt
"""
KERNEL = """
PYTBPTT_KERNEL(32, 1) primitive_{number}(const float* in, float* out, std::uint16_t bits) {{
  [[maybe_unused]] const auto tile = shared<float>(0, 64);
  [[maybe_unused]] const auto halves = shared<half>(16 * lane(), 8);
  [[maybe_unused]] std::uint32_t a[4] = {{bits, bits + 1u, bits + 2u, bits + 3u}}, b[2] = {{bits + 4u, bits + 5u}};
  [[maybe_unused]] float d[4] = {{}}, sums[2][4] = {{}};
  [[maybe_unused]] const Matrix<half> rows(shared<half>(0, 1024));
  [[maybe_unused]] auto* const flag = reinterpret_cast<std::uint32_t*>(out) + 1;
  {call};
}}
"""


def ptx(folder: Path, architecture: str, calls: list[str]) -> list[str]:
    """The PTX of one kernel per call."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    kernels = "".join(KERNEL.format(number=i, call=call) for i, call in enumerate(calls))
    Path(folder, "primitives.cu").write_text(SOURCE.format(kernels=kernels))
    flags = ["-std=c++17", f"-arch={architecture}", "-ptx", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["nvcc", *flags, "primitives.cu", "-o", "primitives.ptx"], cwd=folder, check=True)
    kernels_ptx = re.split(r"\.visible \.entry ", Path(folder, "primitives.ptx").read_text())[1:]
    assert len(kernels_ptx) == len(calls)
    return kernels_ptx


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ptx(tmp_path_factory.mktemp("ptx"), "sm_80", list(PTX_INSTRUCTIONS))


@pytest.mark.parametrize(("architecture", "instructions"), [("sm_80", [r"add\.f32"] * 2), ("sm_90", [r"add\.v2\.f32"])])
def test_pair_add_emits_vector_red_on_sm90(tmp_path: Path, architecture: str, instructions: list[str]) -> None:
    (function,) = ptx(tmp_path, architecture, ["add_to(reinterpret_cast<Pair*>(out), Pair{load(in), load(in + 1)})"])
    found = re.findall(r"red\.relaxed\.gpu\.global\.(\S+)", function)
    assert len(found) == len(instructions)
    assert all(re.fullmatch(pattern, one) for pattern, one in zip(instructions, found, strict=True))


@pytest.fixture(scope="module")
def sm90a_functions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ptx(tmp_path_factory.mktemp("ptx"), "sm_90a", list(SM90A_INSTRUCTIONS))


@pytest.mark.parametrize("call", SM90A_INSTRUCTIONS)
def test_wgmma_primitive_emits_its_instruction(sm90a_functions: list[str], call: str) -> None:
    function = sm90a_functions[list(SM90A_INSTRUCTIONS).index(call)]
    assert re.search(SM90A_INSTRUCTIONS[call], function), function


def test_no_wgmma_instructions_without_sm90a(tmp_path: Path) -> None:
    assert not any(re.search("wgmma|setmaxnreg", one) for one in ptx(tmp_path, "sm_90", list(SM90A_INSTRUCTIONS)))


@pytest.mark.parametrize("call", PTX_INSTRUCTIONS)
def test_primitive_emits_its_instruction(functions: list[str], call: str) -> None:
    function = functions[list(PTX_INSTRUCTIONS).index(call)]
    assert f"primitive_{list(PTX_INSTRUCTIONS).index(call)}" in function.partition("(")[0]
    assert re.search(PTX_INSTRUCTIONS[call], function), function


def test_mma_operands_are_in_documented_order(functions: list[str]) -> None:
    """Operands d, a, b, c of 4, 4, 2 and 4 registers."""
    for call in ("mma<half>(d, a, b); use(out, d)", "mma_tf32(d, a, b); use(out, d)"):
        function = functions[list(PTX_INSTRUCTIONS).index(call)]
        operands = re.search(r"mma\.sync[^;]*;", function).group().split("{")[1:]
        assert [part.count("%") for part in operands] == [4, 4, 2, 4]
