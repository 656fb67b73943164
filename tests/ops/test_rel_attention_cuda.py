"""The CUDA rel_attention on a GPU, against the reference in float64 on the same GPU; tests/tolerances.py says how.

What is left for here is what only a GPU and its torch can show.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pytbptt.ops import backend, rel_attention
from pytbptt.ops.extension import EXTENSION
from tests import gpu_wrappers, tolerances
from tests.emulator import wrappers

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)
if not EXTENSION.supports("cuda"):
    pytest.skip("the extension was built without CUDA kernels", allow_module_level=True)

SEED = 0x1234_5678_9ABC_DEF0
Problem = dict[str, Tensor]
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
    """Those of tests/emulator/wrappers.cpp."""
    library = gpu_wrappers.load(tmp_path_factory.mktemp("wrappers"))
    if library is None:
        pytest.skip(f"no nvcc on PATH, and no {gpu_wrappers.prebuilt()} (make gpu-prebuild)")
    return library


def test_two_blocks_play_ping_pong(kernels: ctypes.CDLL) -> None:
    flags, values = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.arange(128.0, device="cuda").reshape(2, 64)
    torch.cuda.synchronize()
    error = kernels.play_ping_pong(1000, ctypes.c_void_p(flags.data_ptr()), ctypes.c_void_p(values.data_ptr()))
    assert error is None, error
    wrappers.assert_played(flags, values, 1000)


@pytest.mark.parametrize("name", wrappers.STATE_DICT_KEYS)
def test_wrappers(kernels: ctypes.CDLL, name: str) -> None:
    given = wrappers.given(name)
    on_gpu, out = given.cuda(), torch.full((64, 4), float("nan"), device="cuda")
    torch.cuda.synchronize()
    error = kernels.use_wrapper(name.encode(), ctypes.c_void_p(on_gpu.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert error is None, error
    tolerance = wrappers.tolerance(name)
    torch.testing.assert_close(out.cpu(), wrappers.expected(name, given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("product", wrappers.WARPGROUP_PRODUCTS, ids=str)
def test_warpgroup_products(kernels: ctypes.CDLL, product: tuple) -> None:
    error = wrappers.multiply_by_warpgroup(kernels, product, "cuda")
    if error == "no warpgroups":
        pytest.skip("a GPU without warpgroups, or kernels that were not compiled for sm_90a")
    assert error is None, error


def make(B: int, T: int, M: int, H: int, D: int, R: int, dtype: torch.dtype = torch.float32, draw: int = 0) -> Problem:
    generator = torch.Generator("cuda").manual_seed(B + 10 * T + 100 * M + 1000 * D + R + 1_000_000 * draw)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    problem = {name: normal(B, T, H, D) for name in ("query", "key", "value")}
    problem |= {"position": normal(R, H, D), "content_bias": normal(H, D), "position_bias": normal(H, D)}
    if M:
        problem |= {"memory_key": normal(B, M, H, D), "memory_value": normal(B, M, H, D)}
    return problem


def every_option(B: int, T: int, M: int) -> dict:
    generator = torch.Generator().manual_seed(T)
    first_key = torch.randint(-1, M + T + 1, (B, T), generator=generator, dtype=torch.int32).cuda()
    seed = torch.tensor([SEED], device="cuda")
    return {"first_key": first_key, "window": (M + T) // 3 + 1, "dropout_p": 0.3, "seed": seed, "scale": -0.3}


def upstream(out: Tensor) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.randn(out.shape, generator=generator, device="cuda", dtype=torch.float64).to(out.dtype)


def evaluate(which: str, problem: Problem, dtype: torch.dtype, **options) -> Problem:
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in problem.items()}
    with backend(which):
        out = rel_attention(**inputs, **options)
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream(out))
    return {name: t.detach().double() for name, t in zip(["out", *inputs], [out, *gradients], strict=True)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_baseline(size: tuple[int, ...], dtype: torch.dtype | str) -> None:
    in_tf32 = isinstance(dtype, str)
    unit = 2.0**-10 if isinstance(dtype, str) else torch.finfo(dtype).eps
    dtype = torch.float32 if isinstance(dtype, str) else dtype
    B, T, _, H, D, _ = size
    problems = [make(*size, dtype=dtype, draw=draw) for draw in tolerances.enough_draws(B, T, H, D)]
    for options in ({}, every_option(*size[:3])):
        exact = [evaluate("reference", problem, torch.float64, **options) for problem in problems]
        baselines = [
            [tolerances.attention_baseline(problem, upstream, order, in_tf32, **options) for problem in problems]
            for order in tolerances.orders(B, T, H, D)
        ]
        with tolerances.tf32(in_tf32):
            found = [evaluate("fused", problem, dtype, **options) for problem in problems]
        tolerances.assert_as_exact_as_baseline(found, exact, baselines, unit)


def test_two_runs_give_the_same_bits() -> None:
    problem = make(4, 150, 150, 10, 41, 300, dtype=torch.bfloat16)
    options = every_option(4, 150, 150)
    first, second = (evaluate("fused", problem, torch.bfloat16, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_without_gradient_changes_no_other_gradient() -> None:
    problem = make(2, 60, 77, 2, 41, 100)
    expected = evaluate("fused", problem, torch.float32)
    inputs = {name: t.detach().requires_grad_(not name.startswith("memory")) for name, t in problem.items()}
    with backend("fused"):
        out = rel_attention(**inputs)
    wanted = [name for name, t in inputs.items() if t.requires_grad]
    gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], upstream(out))
    for name, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("B", "T", "M"), [(0, 4, 3), (2, 0, 3), (2, 0, 0)])
def test_empty_batches_and_chunks(B: int, T: int, M: int) -> None:
    results = evaluate("fused", make(B, T, M, 2, 8, 5), torch.float32)
    assert results["out"].shape == (B, T, 2, 8)
    assert all(not t.any() for t in results.values())


def test_strides_change_nothing() -> None:
    problem = {name: t.detach().half() for name, t in make(2, 50, 31, 3, 40, 81).items()}
    with backend("fused"):
        expected = rel_attention(**problem)
        for name, tensor in problem.items():
            for other in (
                tensor.transpose(0, 1).contiguous().transpose(0, 1),
                torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]],
                torch.cat([tensor[..., :1], tensor], dim=-1)[..., 1:],  # rows that 16 bytes do not divide
                torch.stack([tensor, tensor], dim=-1)[..., 0],
            ):
                assert torch.equal(rel_attention(**problem | {name: other}), expected), name


def test_opcheck() -> None:
    problem = make(2, 5, 7, 2, 8, 12)
    options = every_option(2, 5, 7)
    rest = (*(options[name] for name in ("first_key", "window", "scale", "dropout_p", "seed")),)
    arguments = (*(problem[name] for name in NAMES), *rest)
    torch.library.opcheck(torch.ops.pytbptt.rel_attention.default, (*arguments, True, False))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    results = torch.ops.pytbptt.rel_attention(*detached, True, False)
    for memory_needs_grad in (False, True):
        backward = (torch.ones_like(results[0]), *detached, *results, memory_needs_grad, False)
        torch.library.opcheck(torch.ops.pytbptt.rel_attention_backward.default, backward)


def test_compiles_without_graph_breaks() -> None:
    problem = make(2, 9, 5, 2, 8, 14)
    seed = torch.tensor([SEED], device="cuda")
    expected = rel_attention(**problem, dropout_p=0.2, seed=seed)
    out = torch.compile(rel_attention, fullgraph=True)(**problem, dropout_p=0.2, seed=seed)
    assert torch.equal(out, expected)
    tensors = list(problem.values())
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_a_captured_graph_draws_new_dropout_and_sees_new_inputs() -> None:
    problem = {name: t.detach().half().requires_grad_() for name, t in make(2, 70, 61, 2, 41, 131).items()}
    tensors = list(problem.values())

    def step() -> tuple[Tensor, ...]:
        out = rel_attention(**problem, dropout_p=0.2)
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
        problem["value"].zero_()
        problem["memory_value"].zero_()
    graph.replay()
    assert not results[0].any()


def test_runs_on_the_current_stream() -> None:
    problem = {name: t.detach() for name, t in make(2, 70, 61, 2, 41, 131).items()}
    expected = rel_attention(**problem)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: t.clone() for name, t in problem.items()}  # is there once the stream has slept
        out = rel_attention(**late)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_threads_with_streams_of_their_own_do_not_disturb_one_another() -> None:
    problems = [make(2, 70, 61, 2, 41, 131, dtype=torch.bfloat16, draw=draw) for draw in range(2)]
    expected = [evaluate("fused", problem, torch.bfloat16) for problem in problems]
    torch.cuda.synchronize()

    def often(problem: Problem) -> list[Problem]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [evaluate("fused", problem, torch.bfloat16) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return results

    with backend("fused"), ThreadPoolExecutor(2) as threads:
        for results, wanted in zip(threads.map(often, problems), expected, strict=True):
            assert all(torch.equal(found[name], wanted[name]) for found in results for name in wanted)


def test_tensors_past_2_31_elements() -> None:
    """About 40 GB. The last streams, whose places no 32-bit number holds, are those of a batch of their own."""
    B, T, H, D = 2**15 + 3, 32, 16, 128
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("less than 50 GiB of free GPU memory")
    torch.manual_seed(0)
    chunk = [torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    rest = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((T, H, D), (H, D), (H, D))]
    last = [tensor.detach()[-5:].clone().requires_grad_() for tensor in chunk]
    with backend("fused"):
        out, alone = rel_attention(*chunk, *rest), rel_attention(*last, *rest)
    assert out.numel() > 2**31
    assert torch.equal(out[-5:], alone)
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, chunk, grad_out)
    expected = torch.autograd.grad(alone, last, grad_out[-5:])
    for whole, part in zip(found, expected, strict=True):
        torch.testing.assert_close(whole[-5:], part, rtol=2**-6, atol=2**-6)


def test_what_no_cuda_kernel_serves_is_served_by_the_reference() -> None:
    for problem in (make(1, 4, 3, 1, 8, 7, dtype=torch.float64), make(1, 4, 3, 1, 160, 7)):
        with backend("fused"), pytest.raises(RuntimeError, match="cannot be used"):
            rel_attention(**problem)
