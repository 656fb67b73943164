"""The CUDA lstm on a GPU, against the reference in float64 on the same GPU.

How close is close enough is said in tests/tolerances.py; eager PyTorch has its own products here. What is left for here
is what only a GPU and its torch can show.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pytbptt.nn import LSTM
from pytbptt.ops import backend, lstm
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.lstm import reference
from tests import tolerances

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)
if not EXTENSION.supports("cuda"):
    pytest.skip("the extension was built without CUDA kernels", allow_module_level=True)

NAMES = ("output", "h_n", "c_n", "gates", "weight_hh", "h0", "c0")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

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


def draw(T: int, B: int, H: int, dtype: torch.dtype, number: int = 0) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(T + 10 * B + 100 * H + 10000 * number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float64)

    weight_hh = (normal(4 * H, H) / H**0.5).to(dtype)
    return normal(T, B, 4 * H).to(dtype), weight_hh, normal(B, H).to(dtype), normal(B, H).float()


def some_resets(T: int, B: int) -> Tensor:
    return (torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.1).cuda()


def fused(*inputs: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    with backend("fused"):
        return lstm(*inputs, reset=reset)


def eager(*inputs: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return reference.lstm(*inputs, reset)


def evaluate(op, inputs: Inputs, reset: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of an implementation in a dtype, as float64, in the order of NAMES."""
    cells = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(cells if i == 3 else dtype).requires_grad_() for i, t in enumerate(inputs)]
    results = op(*leaves, reset=reset)
    generator = torch.Generator("cuda").manual_seed(2)
    grads = [
        torch.randn(t.shape, generator=generator, device="cuda", dtype=torch.float64).to(inputs[i].dtype).to(t.dtype)
        for i, t in enumerate(results, start=1)
    ]
    with_graph = [(t, grad) for t, grad in zip(results, grads, strict=True) if t.requires_grad]  # of no steps not all
    outputs, grads = ([pair[i] for pair in with_graph] for i in range(2))
    gradients = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    return [t.detach().double() for t in (*results, *gradients)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_baseline(size: tuple[int, int, int], dtype: torch.dtype | str) -> None:
    in_tf32 = dtype == "tf32"
    unit = 2.0**-10 if in_tf32 else torch.finfo(dtype).eps
    dtype = torch.float32 if in_tf32 else dtype
    drawn = [draw(*size, dtype, number) for number in tolerances.enough_draws(*size)]
    for reset in (None, some_resets(*size[:2])):
        exact = [named(evaluate(eager, inputs, reset, torch.float64)) for inputs in drawn]
        baselines = []
        for order in tolerances.orders(*size):
            with tolerances.TermByTerm(order, in_tf32):
                baselines.append([named(evaluate(eager, inputs, reset, dtype)) for inputs in drawn])
        with tolerances.tf32(in_tf32):
            found = [named(evaluate(fused, inputs, reset, dtype)) for inputs in drawn]
        tolerances.assert_as_exact_as_baseline(found, exact, baselines, unit, {"weight_hh": size[0] * size[1]})


def named(results: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, results, strict=True))


def test_two_runs_and_any_chunks_give_the_same_bits() -> None:
    inputs, reset = draw(30, 20, 650, torch.bfloat16), some_resets(30, 20)
    first, second = (evaluate(fused, inputs, reset, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gates, weight_hh, h, c = inputs
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        output, h, c = fused(gates[begin:end], weight_hh, h, c, reset=reset[begin:end])
        assert torch.equal(output.double(), first[0][begin:end])
    assert torch.equal(c.double(), first[2])


@pytest.mark.parametrize(("T", "B", "H"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(T: int, B: int, H: int) -> None:
    inputs = draw(T, B, max(H, 1), torch.float32)
    if H == 0:
        inputs = (inputs[0][..., :0], inputs[1][:0, :0], inputs[2][:, :0], inputs[3][:, :0])
    found, expected = (evaluate(op, inputs, None, torch.float32) for op in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_strides_change_nothing() -> None:
    inputs = draw(4, 5, 41, torch.float16)
    gates, weight_hh, h0, c0 = inputs
    expected = fused(*inputs)
    for strided in (
        (gates.transpose(0, 1).contiguous().transpose(0, 1), weight_hh, h0, c0),
        (gates, torch.cat([weight_hh, weight_hh], dim=1)[:, 41:], h0.t().contiguous().t(), c0),
        (torch.stack([gates, gates], dim=-1)[..., 0], weight_hh, h0, torch.cat([c0, c0], dim=1)[:, 41:]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(fused(*strided), expected, strict=True))


@pytest.mark.parametrize("with_reset", [False, True])
def test_opcheck(with_reset: bool) -> None:
    inputs = [t.requires_grad_() for t in draw(3, 2, 5, torch.float32)]
    reset = some_resets(3, 2) if with_reset else None
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*inputs, reset, True, False))
    detached = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*detached, reset, False, False))
    output, h_n, c_n, activated, cells = (t.detach() for t in torch.ops.pytbptt.lstm(*detached, reset, True, False))
    rest = (*detached[1:], reset, output, activated, cells)
    for grads in ((output, h_n, c_n), (output, None, None), (None, h_n, None), (None, None, c_n)):
        torch.library.opcheck(torch.ops.pytbptt.lstm_backward.default, (*grads, *rest, False))


def test_compiles_without_graph_breaks() -> None:
    inputs = [t.requires_grad_() for t in draw(4, 3, 9, torch.float32)]
    compiled = torch.compile(lstm, fullgraph=True)
    found, expected = compiled(*inputs), fused(*inputs)
    gradients = [torch.autograd.grad(sum(t.sum() for t in results), inputs) for results in (found, expected)]
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert torch.equal(a, b)


def test_a_captured_graph_sees_new_inputs() -> None:
    inputs = [t.requires_grad_() for t in draw(35, 20, 650, torch.bfloat16)]
    reset = some_resets(35, 20)

    def step() -> tuple[Tensor, ...]:
        results = fused(*inputs, reset=reset)
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
        for name, found, expected in zip(NAMES, captured, step(), strict=True):
            # The weights' gradient is cuBLAS's, which may choose another algorithm while a graph is captured.
            tolerance = 1e-2 if name == "weight_hh" else 0.0
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_runs_on_the_current_stream() -> None:
    inputs = draw(10, 20, 200, torch.float32)
    expected = fused(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [t.clone() for t in inputs]  # is there once the stream has slept
        results = fused(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_ten_thousand_launches_beside_a_busy_stream() -> None:
    """Blocks that wait for one another must all be on the GPU, whatever else runs there."""
    inputs = [t.requires_grad_() for t in draw(3, 20, 650, torch.bfloat16)]
    expected = evaluate(fused, tuple(inputs), None, torch.bfloat16)
    busy, matrix = torch.cuda.Stream(), torch.eye(2048, device="cuda")
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(busy):
            for _ in range(20):
                matrix = matrix @ matrix
        for _ in range(50):  # each of them a forward and a backward
            results = fused(*inputs)
            torch.autograd.grad(results[0].sum(), inputs)
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + 60
        while not done.query():
            assert time.monotonic() < deadline, "the launches hang"
            time.sleep(0.001)
    assert all(torch.equal(a.double(), b) for a, b in zip(results, expected[:3], strict=True))


def test_threads_with_streams_of_their_own_do_not_disturb_one_another() -> None:
    """Two launches at once, each of whose blocks wait for one another: neither may hold what the other waits for."""
    problems = [draw(35, 20, H, torch.bfloat16) for H in (650, 1150)]
    expected = [evaluate(fused, inputs, None, torch.bfloat16) for inputs in problems]
    torch.cuda.synchronize()

    def often(inputs: Inputs) -> list[list[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [list(evaluate(fused, inputs, None, torch.bfloat16)) for _ in range(100)]
            torch.cuda.current_stream().synchronize()
        return results

    with backend("fused"), ThreadPoolExecutor(2) as threads:
        for results, wanted in zip(threads.map(often, problems), expected, strict=True):
            assert all(torch.equal(a, b) for found in results for a, b in zip(found, wanted, strict=True))


def test_tensors_past_2_31_elements() -> None:
    """About 30 GB. The last streams are those of a batch of their own, but for the order of sums."""
    T, B, H = 65, 2**13 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of free GPU memory")
    torch.manual_seed(0)
    gates = torch.randn(T, B, 4 * H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_hh = torch.randn(4 * H, H, device="cuda").div(H**0.5).bfloat16()
    state = torch.zeros(B, H, device="cuda", dtype=torch.bfloat16), torch.zeros(B, H, device="cuda")
    last = gates.detach()[:, -5:].clone().requires_grad_()
    output, alone = fused(gates, weight_hh, *state)[0], fused(last, weight_hh, *(s[-5:] for s in state))[0]
    assert gates.numel() > 2**31
    torch.testing.assert_close(output[:, -5:], alone, rtol=0, atol=2**-5)
    (found,), (expected,) = torch.autograd.grad(output.sum(), gates), torch.autograd.grad(alone.sum(), last)
    torch.testing.assert_close(found[:, -5:], expected, rtol=2**-4, atol=2**-4)


def test_autocast() -> None:
    module = LSTM(20, 41, num_layers=2, weight_drop=0.5).cuda()
    input = torch.randn(6, 3, 20, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), backend("fused"):
        output, (h_n, c_n) = module(input, reset=some_resets(6, 3))
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_the_reference_serves_what_no_cuda_kernel_does() -> None:
    inputs = [t.double() for t in draw(2, 3, 5, torch.float32)]
    with pytest.raises(RuntimeError, match="cannot be used"):
        fused(*inputs)
