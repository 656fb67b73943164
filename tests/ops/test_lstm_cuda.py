"""The CUDA lstm on a GPU, against float64 on the same GPU within tests/common/error_bounds.py.

Only what needs a GPU is tested here; tests/emulator has the rest.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pytbptt.nn import LSTM
from pytbptt.ops import backend, lstm
from pytbptt.ops.extension import EXTENSION
from tests.common import error_bounds, lstm_cases
from tests.common.lstm_cases import RESULTS, Inputs, Tensors, outputs_and_gradients, run_fused, run_reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)
if not EXTENSION.supports("cuda"):
    pytest.skip("the extension was built without CUDA kernels", allow_module_level=True)

SIZES = [  # T, B, H
    (1, 3, 1),
    (5, 3, 41),
    (35, 20, 650),
    (20, 80, 1150),
    (20, 64, 1024),
    (10, 60, 2048),
    (10, 3, 5000),
    (9, 1000, 200),
]


def make_inputs(T: int, B: int, H: int, dtype: torch.dtype) -> Inputs:
    return lstm_cases.make_inputs(T, B, H, dtype, device="cuda")


def random_resets(T: int, B: int) -> Tensor:
    return (torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.1).cuda()


def assert_bitwise_equal(actual: Tensors, expected: Tensors) -> None:
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_within_baseline(size: tuple[int, int, int], dtype: torch.dtype | str) -> None:
    in_tf32 = dtype == "tf32"
    dtype = torch.float32 if in_tf32 else dtype
    for reset in (None, random_resets(*size[:2])):

        def run(inputs: Inputs, reset: Tensor | None = reset) -> Tensors:
            with error_bounds.tf32(in_tf32):
                return outputs_and_gradients(run_fused, inputs, reset)

        lstm_cases.assert_error_within_baseline(run, size, dtype, reset, in_tf32=in_tf32, device="cuda")


def test_reruns_and_chunks_are_bitwise_equal() -> None:
    inputs, reset = make_inputs(30, 20, 650, torch.bfloat16), random_resets(30, 20)
    first, second = (outputs_and_gradients(run_fused, inputs, reset) for _ in range(2))
    assert_bitwise_equal(second, first)
    gates, weight_hh, h, c = inputs
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        output, h, c = run_fused(gates[begin:end], weight_hh, h, c, reset=reset[begin:end])
        assert torch.equal(output, first["output"][begin:end])
    assert torch.equal(c, first["c_n"])


@pytest.mark.parametrize(("T", "B", "H"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_match_reference(T: int, B: int, H: int) -> None:
    inputs = make_inputs(T, B, max(H, 1), torch.float32)
    if H == 0:
        inputs = (inputs[0][..., :0], inputs[1][:0, :0], inputs[2][:, :0], inputs[3][:, :0])
    actual, expected = (outputs_and_gradients(op, inputs) for op in (run_fused, run_reference))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_non_contiguous_inputs_are_bitwise_equal() -> None:
    inputs = make_inputs(4, 5, 41, torch.float16)
    gates, weight_hh, h0, c0 = inputs
    expected = run_fused(*inputs)
    for strided in (
        (gates.transpose(0, 1).contiguous().transpose(0, 1), weight_hh, h0, c0),
        (gates, torch.cat([weight_hh, weight_hh], dim=1)[:, 41:], h0.t().contiguous().t(), c0),
        (torch.stack([gates, gates], dim=-1)[..., 0], weight_hh, h0, torch.cat([c0, c0], dim=1)[:, 41:]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run_fused(*strided), expected, strict=True))


@pytest.mark.parametrize("with_reset", [False, True])
def test_opcheck(with_reset: bool) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(3, 2, 5, torch.float32)]
    reset = random_resets(3, 2) if with_reset else None
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*inputs, reset, True, False))
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*detached, reset, False, False))
    output, h_n, c_n, activated, cells = (t.detach() for t in torch.ops.pytbptt.lstm(*detached, reset, True, False))
    rest = (*detached[1:], reset, output, activated, cells)
    for grads in ((output, h_n, c_n), (output, None, None), (None, h_n, None), (None, None, c_n)):
        torch.library.opcheck(torch.ops.pytbptt.lstm_backward.default, (*grads, *rest, False))


def test_compiles_without_graph_breaks() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(4, 3, 9, torch.float32)]
    compiled = torch.compile(lstm, fullgraph=True)
    actual, expected = compiled(*inputs), run_fused(*inputs)
    gradients = [torch.autograd.grad(sum(t.sum() for t in outputs), inputs) for outputs in (actual, expected)]
    for a, b in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert torch.equal(a, b)


def test_cuda_graph_replay_matches_eager() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(35, 20, 650, torch.bfloat16)]
    reset = random_resets(35, 20)

    def step() -> tuple[Tensor, ...]:
        results = run_fused(*inputs, reset=reset)
        return *results, *torch.autograd.grad(results[0].float().square().sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (1.0, -0.5):
        with torch.no_grad():
            for tensor in inputs:
                tensor.mul_(factor)
        graph.replay()
        for name, actual, expected in zip(RESULTS, captured, step(), strict=True):
            # cuBLAS, which computes the gradient of weight_hh, may choose another algorithm during capture.
            tolerance = 1e-2 if name == "weight_hh" else 0.0
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_runs_on_the_current_stream() -> None:
    inputs = make_inputs(10, 20, 200, torch.float32)
    expected = run_fused(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        delayed = [t.clone() for t in inputs]  # written after the sleep
        results = run_fused(*delayed)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_cooperative_launches_do_not_hang_on_busy_gpu() -> None:
    """Blocks that wait for one another must be resident together, whatever else runs on the GPU."""
    inputs = [t.requires_grad_() for t in make_inputs(3, 20, 650, torch.bfloat16)]
    expected = run_fused(*inputs)
    busy, matrix = torch.cuda.Stream(), torch.eye(2048, device="cuda")
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(busy):
            for _ in range(20):
                matrix = matrix @ matrix
        for _ in range(50):
            results = run_fused(*inputs)
            torch.autograd.grad(results[0].sum(), inputs)
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + 60
        while not done.query():
            assert time.monotonic() < deadline, "the launches hang"
            time.sleep(0.001)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_concurrent_threads_on_separate_streams_do_not_interfere() -> None:
    """Two launches at once, in each of which blocks wait for one another, must not deadlock."""
    inputs = [make_inputs(35, 20, H, torch.bfloat16) for H in (650, 1150)]
    expected = [outputs_and_gradients(run_fused, one) for one in inputs]
    torch.cuda.synchronize()

    def run_repeatedly(one: Inputs) -> list[Tensors]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [outputs_and_gradients(run_fused, one) for _ in range(100)]
            torch.cuda.current_stream().synchronize()
        return results

    with backend("fused"), ThreadPoolExecutor(2) as threads:
        for results, expected_results in zip(threads.map(run_repeatedly, inputs), expected, strict=True):
            for actual in results:
                assert_bitwise_equal(actual, expected_results)


def test_more_than_2_31_elements() -> None:
    """About 30 GB. The last rows match a batch of these rows except for the order of sums."""
    T, B, H = 65, 2**13 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of free GPU memory")
    torch.manual_seed(0)
    gates = torch.randn(T, B, 4 * H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_hh = torch.randn(4 * H, H, device="cuda").div(H**0.5).bfloat16()
    state = torch.zeros(B, H, device="cuda", dtype=torch.bfloat16), torch.zeros(B, H, device="cuda")
    last = gates.detach()[:, -5:].clone().requires_grad_()
    output, last_output = (
        run_fused(gates, weight_hh, *state)[0],
        run_fused(last, weight_hh, *(s[-5:] for s in state))[0],
    )
    assert gates.numel() > 2**31
    torch.testing.assert_close(output[:, -5:], last_output, rtol=0, atol=2**-5)
    (actual,), (expected,) = torch.autograd.grad(output.sum(), gates), torch.autograd.grad(last_output.sum(), last)
    torch.testing.assert_close(actual[:, -5:], expected, rtol=2**-4, atol=2**-4)


def test_autocast_dtypes_and_gradients() -> None:
    module = LSTM(20, 41, num_layers=2, weight_drop=0.5).cuda()
    input = torch.randn(6, 3, 20, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), backend("fused"):
        output, (h_n, c_n) = module(input, reset=random_resets(6, 3))
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_backend_fused_raises_for_float64() -> None:
    inputs = [t.double() for t in make_inputs(2, 3, 5, torch.float32)]
    with pytest.raises(RuntimeError, match="cannot be used"):
        run_fused(*inputs)
