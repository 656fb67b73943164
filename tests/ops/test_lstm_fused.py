"""The compiled lstm on the CPU, against the reference in float64 within tests/common/error_bounds.py."""

import random

import pytest
import torch
from torch._inductor.utils import fresh_cache

from pytbptt.ops import backend, lstm
from pytbptt.ops.extension import EXTENSION
from tests.common import lstm_cases
from tests.common.lstm_cases import make_inputs, outputs_and_gradients, run_fused, run_reference

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)

# T, B, H: T = 1, B = 1, H = 1; partial vectors; full tiles; more rows than a tile; several blocks of k, smaller ones
# for few rows; batches split over threads.
SIZES = [
    *((1, 3, 1), (1, 20, 250), (5, 1, 41), (7, 3, 64), (3, 33, 17), (9, 16, 130), (6, 20, 650), (4, 64, 200)),
    *((5, 1, 130), (4, 2, 330)),
]


def make_resets(T, B, where):
    reset = torch.zeros(T, B, dtype=torch.bool)
    if where == "some":
        reset = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
    elif where == "all":
        reset[:] = True
    elif where is not None:
        reset[{"first": 0, "last": -1}[where], ::2] = True
    return None if where is None else reset


def assert_bitwise_equal(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_error_within_baseline(T, B, H, dtype, where, scale=1.0):
    reset = make_resets(T, B, where)
    lstm_cases.assert_error_within_baseline(
        lambda inputs: outputs_and_gradients(run_fused, inputs, reset), (T, B, H), dtype, reset, scale=scale
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "B", "H"), SIZES)
def test_error_within_baseline(T, B, H, dtype):
    assert_error_within_baseline(T, B, H, dtype, None)


@pytest.mark.parametrize("where", ["first", "last", "all", "some"])
@pytest.mark.parametrize(("T", "B", "H"), [(1, 3, 1), (5, 20, 41), (4, 64, 200)])
def test_error_with_resets_within_baseline(T, B, H, where):
    assert_error_within_baseline(T, B, H, torch.float32, where)


@pytest.mark.parametrize("where", [None, "some"])
@pytest.mark.parametrize(("T", "B", "H"), [*SIZES, (1, 1, 250), (1, 2, 130)])
def test_float64_matches_reference(T, B, H, where):
    # Two summation orders of n products of order 1 differ by about n * 2^-53.
    inputs, reset = make_inputs(T, B, H), make_resets(T, B, where)
    actual, expected = (outputs_and_gradients(op, inputs, reset) for op in (run_fused, run_reference))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13 * max(1, T * B) ** 0.5)


@pytest.mark.parametrize("where", [None, "some"])
def test_gradcheck(where):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(T=3, B=2, H=3)]
    reset = make_resets(3, 2, where)
    assert torch.autograd.gradcheck(lambda *tensors: run_fused(*tensors, reset=reset), inputs)


@pytest.mark.parametrize("scale", [1e-4, 10.0, 1e4])
def test_small_and_large_gates_have_error_within_baseline(scale):
    assert_error_within_baseline(3, 40, 96, torch.float32, None, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "H"), [(1, 41), (5, 41), (2, 230), (33, 130)])
def test_one_long_call_equals_many_chunks_and_single_steps(B, H, dtype):
    gates, weight_hh, h0, c0 = make_inputs(12, B, H, dtype)
    reset = make_resets(12, B, "some")
    expected = run_fused(gates, weight_hh, h0, c0, reset=reset)
    outputs, h, c = [], h0, c0
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        output, h, c = run_fused(gates[begin:end], weight_hh, h, c, reset=reset[begin:end])
        outputs.append(output)
    assert_bitwise_equal((torch.cat(outputs), h, c), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("T", "B", "H"), [(5, 3, 41), (6, 20, 650), (4, 64, 200), (3, 5, 1), (1, 2, 230), (1, 64, 100)]
)
def test_thread_counts_and_reruns_are_bitwise_equal(T, B, H, dtype):
    inputs, reset = make_inputs(T, B, H, dtype), make_resets(T, B, "some")
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(run_fused, inputs, reset))
    finally:
        torch.set_num_threads(before)
    for results in runs[1:]:
        assert_bitwise_equal(results.values(), runs[0].values())


def test_non_contiguous_inputs_are_bitwise_equal():
    T, B, H = 4, 3, 20
    gates, weight_hh, h0, c0 = make_inputs(T, B, H, torch.float32)
    reset = make_resets(T, B, "some")
    expected = run_fused(gates, weight_hh, h0, c0, reset=reset)

    batch_first = gates.transpose(0, 1).contiguous().transpose(0, 1)  # rows contiguous, time not outermost
    wide = torch.randn(4 * H, H + 3)
    wide[:, :H] = weight_hh
    column_major = h0.t().contiguous().t()  # rows not contiguous
    strided = [batch_first, wide[:, :H], column_major, c0]
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    results = run_fused(*leaves, reset=reset.t().contiguous().t())
    assert_bitwise_equal(results, expected)

    # Expanded gradients, as from sum(), are equal to dense ones. Unused outputs have no gradient.
    for used in ((0,), (1,), (2,), (0, 2)):
        objective = sum(results[n].sum() for n in used)
        expanded = torch.autograd.grad(objective, leaves, retain_graph=True)
        dense = torch.autograd.grad(
            [results[n] for n in used], leaves, [torch.ones(results[n].shape) for n in used], retain_graph=True
        )
        assert_bitwise_equal(expanded, dense)


def test_expanded_inputs_are_bitwise_equal():
    gates, weight_hh, h0, c0 = make_inputs(T=4, B=3, H=9, dtype=torch.float32)
    inputs = [gates[:1, :1].expand(4, 3, -1), weight_hh, h0[:1].expand(3, -1), c0[:1].expand(3, -1)]
    assert_bitwise_equal(run_fused(*inputs), run_fused(*[tensor.contiguous() for tensor in inputs]))


@pytest.mark.parametrize(("T", "B", "H"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_match_reference(T, B, H):
    inputs = make_inputs(T, B, max(H, 1), torch.float32)
    if H == 0:
        inputs = [inputs[0][..., :0], inputs[1][:0, :0], inputs[2][:, :0], inputs[3][:, :0]]
    actual, expected = (outputs_and_gradients(op, inputs) for op in (run_fused, run_reference))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("where", [None, "some"])
def test_opcheck(where):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(T=3, B=2, H=5, dtype=torch.float32)]
    reset = make_resets(3, 2, where)
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*inputs, reset, True, False))
    detached = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*detached, reset, False, False))
    results = [result.detach() for result in torch.ops.pytbptt.lstm(*detached, reset, True, False)]
    _, weight_hh, h0, c0 = detached
    output, h_n, c_n, activated, cells = results
    rest = (weight_hh, h0, c0, reset, output, activated, cells)
    for grads in ((output, h_n, c_n), (output, None, None), (None, h_n, None), (None, None, c_n)):
        torch.library.opcheck(torch.ops.pytbptt.lstm_backward.default, (*grads, *rest, False))


def test_second_derivative_raises():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(T=3, B=2, H=5)]
    once, twice = (
        torch.autograd.grad(run_fused(*inputs)[0].square().sum(), inputs, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert_bitwise_equal(once, twice)
    with pytest.raises(RuntimeError, match="lstm: the fused op has no second derivative"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in twice), inputs)


def test_compiles_without_graph_breaks():
    inputs, reset = make_inputs(T=4, B=3, H=9, dtype=torch.float32), make_resets(4, 3, "some")

    def doubled(*leaves, reset):
        output, h_n, c_n = lstm(*leaves, reset=reset)
        return output * 2, h_n, c_n

    with fresh_cache(), backend("fused"):
        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        actual = outputs_and_gradients(compiled, inputs, reset)
        expected = outputs_and_gradients(doubled, inputs, reset)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_dtypes_and_gradients():
    gates, weight_hh, h0, c0 = make_inputs(T=4, B=3, H=9, dtype=torch.float32)
    weight_hh.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, c_n = run_fused(gates, weight_hh, h0, c0)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert weight_hh.grad.dtype == torch.float32
    rounded = run_fused(gates.bfloat16(), weight_hh.detach().bfloat16(), h0.bfloat16(), c0)
    assert_bitwise_equal((output, h_n, c_n), rounded)


@pytest.fixture
def nan_filled_memory():
    """Uninitialised tensors contain NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("T", "B", "H"), [(1, 3, 1), (3, 33, 17), (4, 20, 130)])
@pytest.mark.usefixtures("nan_filled_memory")
def test_outputs_are_fully_written(T, B, H):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(T, B, H, dtype)
        results = outputs_and_gradients(run_fused, inputs, make_resets(T, B, "some"))
        assert not any(result.isnan().any() for result in results.values())
        results = torch.ops.pytbptt.lstm(*inputs, None, True, False)
        assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_batch_row_until_reset(value):
    T, B, H = 6, 3, 20
    gates, weight_hh, h0, c0 = make_inputs(T, B, H, torch.float32)
    clean = run_fused(gates, weight_hh, h0, c0)[0]
    gates[1, 1, 2 * H] = value
    c0[2] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4, 1] = reset[0, 2] = True
    output, h_n, c_n = run_fused(gates, weight_hh, h0, c0, reset=reset)
    expected = run_reference(gates, weight_hh, h0, c0, reset=reset)[0]
    assert torch.equal(output.isnan(), expected.isnan())
    assert output[1:4, 1].isnan().any() == (value != value)
    assert torch.equal(output[:, 0], clean[:, 0])
    assert not output[4:, 1].isnan().any()
    assert not output[:, 2].isnan().any()
    assert not h_n.isnan().any()
    assert not c_n.isnan().any()


@pytest.mark.parametrize("where", [None, "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_propagation_matches_eager(dtype, where):
    """NaN and infinities are at the same indices. Zero times an infinite weight is NaN."""
    rng = random.Random(0)
    for seed in range(25):
        T, B, H = rng.choice([(1, 3, 8), (4, 17, 1), (3, 3, 5), (2, 17, 33)])
        inputs, reset = make_inputs(T, B, H, dtype, seed), make_resets(T, B, where)
        for tensor in rng.choice([inputs[:1], inputs[1:2], inputs[:2]]):
            for _ in range(rng.choice([1, 4])):
                value = rng.choice([float("inf"), float("-inf"), float("nan")])
                tensor.view(-1)[rng.randrange(tensor.numel())] = value
        actual = outputs_and_gradients(run_fused, inputs, reset)
        with lstm_cases.without_onednn():
            expected = outputs_and_gradients(run_reference, inputs, reset)
        for name in actual:
            torch.testing.assert_close(
                actual[name].nan_to_num(1, 2, 3).where(~expected[name].isfinite(), 0.0),
                expected[name].nan_to_num(1, 2, 3).where(~expected[name].isfinite(), 0.0),
                rtol=0,
                atol=0,
                msg=lambda text, name=name, seed=seed: f"{name}, seed {seed}: {text}",
            )
            assert actual[name].isfinite()[expected[name].isfinite()].all(), (name, seed)


def test_nan_weights_do_not_hang():
    gates, weight_hh, h0, c0 = make_inputs(T=3, B=2, H=20, dtype=torch.float32)
    weight_hh[:] = float("nan")
    results = outputs_and_gradients(run_fused, (gates, weight_hh, h0, c0))
    assert all(results[name].isnan().all() for name in ("output", "h_n", "c_n"))


def test_no_activations_saved_without_grad():
    inputs = make_inputs(T=3, B=2, H=20, dtype=torch.float32)
    assert run_fused(*inputs)[0].grad_fn is None
    with torch.no_grad():
        assert run_fused(inputs[0].requires_grad_(), *inputs[1:])[0].grad_fn is None
    *_, activated, cells = torch.ops.pytbptt.lstm(*[tensor.detach() for tensor in inputs], None, False, False)
    assert (activated.numel(), cells.numel()) == (0, 0)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("weight_hh", 1, lambda tensor: tensor[1:]),
        ("h0", 2, lambda tensor: tensor.double()),
        ("c0", 3, lambda tensor: tensor[:, 1:]),
        ("reset", 4, lambda tensor: tensor[1:]),
    ],
)
def test_raw_op_validates_arguments(name, index, change):
    inputs = [*make_inputs(T=3, B=2, H=4, dtype=torch.float32), torch.zeros(3, 2, dtype=torch.bool)]
    inputs[index] = change(inputs[index])
    with pytest.raises(RuntimeError, match=f"lstm: {name}: found.*expected"):
        torch.ops.pytbptt.lstm(*inputs, False, False)
