"""The CUDA rel_attention on a GPU, against float64 on the same GPU within tests/common/error_bounds.py.

Only what needs a GPU is tested here; tests/emulator has the rest.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from pytbptt.ops.extension import EXTENSION
from tests.common import error_bounds, gpu_primitives, rel_attention_cases
from tests.common.rel_attention_cases import OPTIONS, SEED, Tensors, outputs_and_gradients
from tests.emulator import primitives

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)
if not EXTENSION.supports("cuda"):
    pytest.skip("the extension was built without CUDA kernels", allow_module_level=True)

NAMES = ("query", "key", "value", "position", "content_bias", "position_bias", "memory_key", "memory_value")

SIZES = [  # B, T, M, H, D, R
    (2, 5, 7, 2, 8, 12),
    (3, 1, 0, 1, 41, 1),
    (3, 150, 150, 10, 41, 300),
    (1, 64, 640, 10, 41, 704),
    (2, 200, 130, 3, 64, 100),
    (2, 333, 512, 2, 64, 845),
    (1, 260, 70, 2, 32, 100),
    (2, 333, 512, 2, 96, 845),
    (1, 130, 65, 2, 128, 195),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Those of tests/emulator/primitives.cpp."""
    library = gpu_primitives.load(tmp_path_factory.mktemp("primitives"))
    if library is None:
        pytest.skip(f"no nvcc on PATH, and no {gpu_primitives.prebuilt()} (make gpu-prebuild)")
    return library


def test_flag_handshake_between_blocks(kernels: ctypes.CDLL) -> None:
    flags, values = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.arange(128.0, device="cuda").reshape(2, 64)
    torch.cuda.synchronize()
    error = kernels.run_ping_pong(1000, ctypes.c_void_p(flags.data_ptr()), ctypes.c_void_p(values.data_ptr()))
    assert error is None, error
    primitives.assert_ping_pong_result(flags, values, 1000)


@pytest.mark.parametrize("name", primitives.PRIMITIVES)
def test_device_primitives_match_expected(kernels: ctypes.CDLL, name: str) -> None:
    x = primitives.make_input(name)
    on_gpu, out = x.cuda(), torch.full((64, 4), float("nan"), device="cuda")
    torch.cuda.synchronize()
    error = kernels.run_primitive(name.encode(), ctypes.c_void_p(on_gpu.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert error is None, error
    tolerance = primitives.tolerance(name)
    torch.testing.assert_close(out.cpu(), primitives.expected(name, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", primitives.WGMMA_CASES, ids=str)
def test_wgmma_matches_matmul(kernels: ctypes.CDLL, case: tuple) -> None:
    error = primitives.check_wgmma(kernels, case, "cuda")
    if error == "no warpgroups":
        pytest.skip("the GPU has no WGMMA, or the kernels were not compiled for sm_90a")
    assert error is None, error


def make_inputs(
    B: int, T: int, M: int, H: int, D: int, R: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensors:
    return rel_attention_cases.make_inputs(B, T, M, H, D, R, dtype, seed, "cuda")


def make_all_options(B: int, T: int, M: int) -> dict:
    return rel_attention_cases.make_options(B, T, M, OPTIONS, device="cuda")


def assert_bitwise_equal(actual: Tensors, expected: Tensors) -> None:
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_within_baseline(size: tuple[int, ...], dtype: torch.dtype | str) -> None:
    in_tf32 = dtype == "tf32"
    dtype = torch.float32 if in_tf32 else dtype

    def run(inputs: Tensors, **options) -> Tensors:
        with error_bounds.tf32(in_tf32):
            return outputs_and_gradients("fused", inputs, **options)

    for options in ({}, make_all_options(*size[:3])):
        rel_attention_cases.assert_error_within_baseline(run, size, dtype, in_tf32=in_tf32, device="cuda", **options)


def test_reruns_are_bitwise_equal() -> None:
    inputs = make_inputs(4, 150, 150, 10, 41, 300, dtype=torch.bfloat16)
    options = make_all_options(4, 150, 150)
    first, second = (outputs_and_gradients("fused", inputs, **options) for _ in range(2))
    assert_bitwise_equal(second, first)


def test_memory_without_gradient_changes_no_other_gradient() -> None:
    inputs = make_inputs(2, 60, 77, 2, 41, 100)
    expected = outputs_and_gradients("fused", inputs)
    inputs |= {name: inputs[name].detach() for name in ("memory_key", "memory_value")}
    actual = outputs_and_gradients("fused", inputs)
    assert set(expected) - set(actual) == {"memory_key", "memory_value"}
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = outputs_and_gradients("fused", make_inputs(B, T, M, 2, 8, 5))
    assert results["out"].shape == (B, T, 2, 8)
    assert all(not t.any() for t in results.values())


def test_non_contiguous_inputs_are_bitwise_equal() -> None:
    inputs = {name: t.detach().half() for name, t in make_inputs(2, 50, 31, 3, 40, 81).items()}
    with backend("fused"):
        expected = rel_attention(**inputs)
        for name, tensor in inputs.items():
            for other in (
                tensor.transpose(0, 1).contiguous().transpose(0, 1),
                torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]],
                torch.cat([tensor[..., :1], tensor], dim=-1)[..., 1:],  # rows that are not 16-byte aligned
                torch.stack([tensor, tensor], dim=-1)[..., 0],
            ):
                assert torch.equal(rel_attention(**inputs | {name: other}), expected), name


def test_opcheck() -> None:
    inputs = make_inputs(2, 5, 7, 2, 8, 12)
    options = make_all_options(2, 5, 7)
    option_names = ("first_key", "window", "scale", "dropout_p", "seed")
    arguments = (*(inputs[name] for name in NAMES), *(options[name] for name in option_names))
    torch.library.opcheck(torch.ops.pytbptt.rel_attention.default, (*arguments, True, False))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    results = torch.ops.pytbptt.rel_attention(*detached, True, False)
    for memory_needs_grad in (False, True):
        backward = (torch.ones_like(results[0]), *detached, *results, memory_needs_grad, False)
        torch.library.opcheck(torch.ops.pytbptt.rel_attention_backward.default, backward)


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(2, 9, 5, 2, 8, 14)
    seed = torch.tensor([SEED], device="cuda")
    expected = rel_attention(**inputs, dropout_p=0.2, seed=seed)
    out = torch.compile(rel_attention, fullgraph=True)(**inputs, dropout_p=0.2, seed=seed)
    assert torch.equal(out, expected)
    tensors = list(inputs.values())
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_cuda_graph_replay_draws_new_dropout_and_reads_new_inputs() -> None:
    inputs = {name: t.detach().half().requires_grad_() for name, t in make_inputs(2, 70, 61, 2, 41, 131).items()}
    tensors = list(inputs.values())

    def step() -> tuple[Tensor, ...]:
        out = rel_attention(**inputs, dropout_p=0.2)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), backend("fused"):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), backend("fused"):
        results = step()
    graph.replay()
    first = [t.clone() for t in results]
    graph.replay()
    assert not torch.equal(results[0], first[0])
    with torch.no_grad():
        inputs["value"].zero_()
        inputs["memory_value"].zero_()
    graph.replay()
    assert not results[0].any()


def test_runs_on_the_current_stream() -> None:
    inputs = {name: t.detach() for name, t in make_inputs(2, 70, 61, 2, 41, 131).items()}
    expected = rel_attention(**inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        delayed = {name: t.clone() for name, t in inputs.items()}  # written after the sleep
        out = rel_attention(**delayed)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_concurrent_threads_on_separate_streams_do_not_interfere() -> None:
    inputs = [make_inputs(2, 70, 61, 2, 41, 131, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    expected = [outputs_and_gradients("fused", one) for one in inputs]
    torch.cuda.synchronize()

    def run_repeatedly(one: Tensors) -> list[Tensors]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [outputs_and_gradients("fused", one) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return results

    with backend("fused"), ThreadPoolExecutor(2) as threads:
        for results, expected_results in zip(threads.map(run_repeatedly, inputs), expected, strict=True):
            for actual in results:
                assert_bitwise_equal(actual, expected_results)


def test_more_than_2_31_elements() -> None:
    """About 40 GB. The last sequences, at indices over 2^32 bytes, match a batch of these sequences."""
    B, T, H, D = 2**15 + 3, 32, 16, 128
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("less than 50 GiB of free GPU memory")
    torch.manual_seed(0)
    chunk = [torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    rest = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((T, H, D), (H, D), (H, D))]
    last = [tensor.detach()[-5:].clone().requires_grad_() for tensor in chunk]
    with backend("fused"):
        out, last_out = rel_attention(*chunk, *rest), rel_attention(*last, *rest)
    assert out.numel() > 2**31
    assert torch.equal(out[-5:], last_out)
    grad_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, chunk, grad_out)
    expected = torch.autograd.grad(last_out, last, grad_out[-5:])
    for gradient, expected_last in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient[-5:], expected_last, rtol=2**-6, atol=2**-6)


def test_backend_fused_raises_for_float64_and_large_heads() -> None:
    for inputs in (make_inputs(1, 4, 3, 1, 8, 7, dtype=torch.float64), make_inputs(1, 4, 3, 1, 160, 7)):
        with backend("fused"), pytest.raises(RuntimeError, match="cannot be used"):
            rel_attention(**inputs)
