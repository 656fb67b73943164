"""The fused lstm is held to the reference in float64; how close is close enough is said in tests/tolerances.py."""

import random

import pytest
import torch
from torch._inductor.utils import fresh_cache

from pytbptt.ops import backend, lstm
from pytbptt.ops.extension import EXTENSION
from pytbptt.ops.lstm import reference
from tests import tolerances

pytestmark = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)

# (T, B, H): single steps, streams and units; vectors cut short; whole tiles; more streams than a tile has rows; sizes
# whose products are cut into slices, for few streams into short ones; streams enough to be shared out among threads.
SIZES = [
    *((1, 3, 1), (1, 20, 250), (5, 1, 41), (7, 3, 64), (3, 33, 17), (9, 16, 130), (6, 20, 650), (4, 64, 200)),
    *((5, 1, 130), (4, 2, 330)),
]


NAMES = ("output", "h_n", "c_n", *(f"{name} gradient" for name in ("gates", "weight_hh", "h0", "c0")))


def draw(T, B, H, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cell = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"gates": (T, B, 4 * H), "weight_hh": (4 * H, H), "h0": (B, H), "c0": (B, H)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    drawn["weight_hh"] /= H**0.5
    return [value.to(cell if name == "c0" else dtype) for name, value in drawn.items()]


def resets_at(T, B, where):
    reset = torch.zeros(T, B, dtype=torch.bool)
    if where == "some":
        reset = torch.rand(T, B, generator=torch.Generator().manual_seed(1)) < 0.3
    elif where == "all":
        reset[:] = True
    elif where is not None:
        reset[{"first": 0, "last": -1}[where], ::2] = True
    return None if where is None else reset


def results_and_gradients(op, inputs, reset=None):
    """Output, h_n, c_n, then the inputs' gradients through all three together."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = op(*leaves, reset=reset)
    generator = torch.Generator().manual_seed(2)
    objective = sum(
        (result.double() * torch.randn(result.shape, generator=generator, dtype=torch.float64)).sum()
        for result in results
    )
    return [*results, *torch.autograd.grad(objective, leaves, allow_unused=True, materialize_grads=True)]


def eager(gates, weight_hh, h0, c0, *, reset=None):
    return reference.lstm(gates, weight_hh, h0, c0, reset)


def fused(*inputs, **options):
    with backend("fused"):
        return lstm(*inputs, **options)


def assert_as_exact_as_baseline(T, B, H, dtype, where, scale=1.0):
    """tests/tolerances.py says how; the gradient of weight_hh may be one sum over all steps and streams."""
    reset = resets_at(T, B, where)
    found, exact, baselines = [], [], [[] for _ in tolerances.orders(T, B, H)]
    for seed in tolerances.enough_draws(T, B, H):
        gates, weight_hh, h0, c0 = draw(T, B, H, dtype, seed)
        inputs = [gates * scale, weight_hh, h0, c0 * scale]
        found.append(named(results_and_gradients(fused, inputs, reset)))
        exact.append(named(results_and_gradients(eager, [tensor.double() for tensor in inputs], reset)))
        for order in tolerances.orders(T, B, H):
            with tolerances.TermByTerm(order):
                baselines[order].append(named(results_and_gradients(eager, inputs, reset)))
        assert [t.dtype for t in found[0].values()] == [t.dtype for t in baselines[0][0].values()]
    tolerances.assert_as_exact_as_baseline(
        found, exact, baselines, torch.finfo(dtype).eps, terms={"weight_hh gradient": T * B}
    )


def named(results):
    return dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "B", "H"), SIZES)
def test_as_exact_as_baseline(T, B, H, dtype):
    assert_as_exact_as_baseline(T, B, H, dtype, None)


@pytest.mark.parametrize("where", ["first", "last", "all", "some"])
@pytest.mark.parametrize(("T", "B", "H"), [(1, 3, 1), (5, 20, 41), (4, 64, 200)])
def test_as_exact_as_baseline_with_resets(T, B, H, where):
    assert_as_exact_as_baseline(T, B, H, torch.float32, where)


@pytest.mark.parametrize("where", [None, "some"])
@pytest.mark.parametrize(("T", "B", "H"), [*SIZES, (1, 1, 250), (1, 2, 130)])
def test_float64(T, B, H, where):
    # A sum of n products of order 1 may differ by some n * 2^-53 with the order of its terms.
    inputs, reset = draw(T, B, H), resets_at(T, B, where)
    expected, found = results_and_gradients(eager, inputs, reset), results_and_gradients(fused, inputs, reset)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13 * max(1, T * B) ** 0.5)


@pytest.mark.parametrize("where", [None, "some"])
def test_gradcheck(where):
    inputs = [tensor.requires_grad_() for tensor in draw(T=3, B=2, H=3)]
    reset = resets_at(3, 2, where)
    assert torch.autograd.gradcheck(lambda *tensors: fused(*tensors, reset=reset), inputs)


@pytest.mark.parametrize("scale", [1e-4, 10.0, 1e4])
def test_activations_over_their_range(scale):
    assert_as_exact_as_baseline(3, 40, 96, torch.float32, None, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "H"), [(1, 41), (5, 41), (2, 230), (33, 130)])
def test_one_long_call_equals_many_chunks_and_single_steps(B, H, dtype):
    gates, weight_hh, h0, c0 = draw(12, B, H, dtype)
    reset = resets_at(12, B, "some")
    whole = fused(gates, weight_hh, h0, c0, reset=reset)
    outputs, h, c = [], h0, c0
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        output, h, c = fused(gates[begin:end], weight_hh, h, c, reset=reset[begin:end])
        outputs.append(output)
    for found, expected in zip((torch.cat(outputs), h, c), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("T", "B", "H"), [(5, 3, 41), (6, 20, 650), (4, 64, 200), (3, 5, 1), (1, 2, 230), (1, 64, 100)]
)
def test_same_bits_for_any_threads_and_reruns(T, B, H, dtype):
    inputs, reset = draw(T, B, H, dtype), resets_at(T, B, "some")
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results_and_gradients(fused, inputs, reset))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_strides():
    T, B, H = 4, 3, 20
    gates, weight_hh, h0, c0 = draw(T, B, H, torch.float32)
    reset = resets_at(T, B, "some")
    expected = results_and_gradients(fused, [gates, weight_hh, h0, c0], reset)

    by_stream = gates.transpose(0, 1).contiguous().transpose(0, 1)  # rows contiguous, time not outermost
    wide = torch.randn(4 * H, H + 3)
    wide[:, :H] = weight_hh
    across = h0.t().contiguous().t()  # rows not contiguous
    strided = [by_stream, wide[:, :H], across, c0]
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    results = fused(*leaves, reset=reset.t().contiguous().t())
    for found, true in zip(results, expected[:3], strict=True):
        assert torch.equal(found, true)

    # An expanded gradient, as sum() gives, equals a dense one; unused results have none at all.
    for used in ((0,), (1,), (2,), (0, 2)):
        objective = sum(results[n].sum() for n in used)
        found = torch.autograd.grad(objective, leaves, retain_graph=True)
        dense = torch.autograd.grad(
            [results[n] for n in used], leaves, [torch.ones(results[n].shape) for n in used], retain_graph=True
        )
        assert all(torch.equal(one, other) for one, other in zip(found, dense, strict=True))


def test_expanded_inputs():
    gates, weight_hh, h0, c0 = draw(T=4, B=3, H=9, dtype=torch.float32)
    inputs = [gates[:1, :1].expand(4, 3, -1), weight_hh, h0[:1].expand(3, -1), c0[:1].expand(3, -1)]
    found, expected = fused(*inputs), fused(*[tensor.contiguous() for tensor in inputs])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("T", "B", "H"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(T, B, H):
    inputs = draw(T, B, max(H, 1), torch.float32)
    if H == 0:
        inputs = [inputs[0][..., :0], inputs[1][:0, :0], inputs[2][:, :0], inputs[3][:, :0]]
    found, expected = results_and_gradients(fused, inputs), results_and_gradients(eager, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("where", [None, "some"])
def test_opcheck(where):
    inputs = [tensor.requires_grad_() for tensor in draw(T=3, B=2, H=5, dtype=torch.float32)]
    reset = resets_at(3, 2, where)
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*inputs, reset, True, False))
    detached = [tensor.detach() for tensor in inputs]
    torch.library.opcheck(torch.ops.pytbptt.lstm.default, (*detached, reset, False, False))
    results = [result.detach() for result in torch.ops.pytbptt.lstm(*detached, reset, True, False)]
    _, weight_hh, h0, c0 = detached
    output, h_n, c_n, activated, cells = results
    rest = (weight_hh, h0, c0, reset, output, activated, cells)
    for grads in ((output, h_n, c_n), (output, None, None), (None, h_n, None), (None, None, c_n)):
        torch.library.opcheck(torch.ops.pytbptt.lstm_backward.default, (*grads, *rest, False))


def test_second_derivative_is_refused():
    inputs = [tensor.requires_grad_() for tensor in draw(T=3, B=2, H=5)]
    once, twice = (
        torch.autograd.grad(fused(*inputs)[0].square().sum(), inputs, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="lstm: the fused op has no second derivative"):
        torch.autograd.grad(sum(gradient.square().sum() for gradient in twice), inputs)


def test_compiles_without_graph_breaks():
    inputs, reset = draw(T=4, B=3, H=9, dtype=torch.float32), resets_at(4, 3, "some")

    def doubled(*leaves, reset):
        output, h_n, c_n = lstm(*leaves, reset=reset)
        return output * 2, h_n, c_n

    with fresh_cache(), backend("fused"):
        compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
        found = results_and_gradients(compiled, inputs, reset)
        expected = results_and_gradients(doubled, inputs, reset)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast():
    gates, weight_hh, h0, c0 = draw(T=4, B=3, H=9, dtype=torch.float32)
    weight_hh.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, c_n = fused(gates, weight_hh, h0, c0)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert weight_hh.grad.dtype == torch.float32
    rounded = fused(gates.bfloat16(), weight_hh.detach().bfloat16(), h0.bfloat16(), c0)
    assert all(torch.equal(one, other) for one, other in zip((output, h_n, c_n), rounded, strict=True))


@pytest.fixture
def poisoned():
    """Every new tensor is full of NaN until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(("T", "B", "H"), [(1, 3, 1), (3, 33, 17), (4, 20, 130)])
@pytest.mark.usefixtures("poisoned")
def test_everything_is_written(T, B, H):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw(T, B, H, dtype)
        assert not any(result.isnan().any() for result in results_and_gradients(fused, inputs, resets_at(T, B, "some")))
        results = torch.ops.pytbptt.lstm(*inputs, None, True, False)
        assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_inputs_stay_in_their_stream_and_end_at_its_reset(value):
    T, B, H = 6, 3, 20
    gates, weight_hh, h0, c0 = draw(T, B, H, torch.float32)
    clean = fused(gates, weight_hh, h0, c0)[0]
    gates[1, 1, 2 * H] = value
    c0[2] = float("nan")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4, 1] = reset[0, 2] = True
    output, h_n, c_n = fused(gates, weight_hh, h0, c0, reset=reset)
    expected = eager(gates, weight_hh, h0, c0, reset=reset)[0]
    assert torch.equal(output.isnan(), expected.isnan())
    assert output[1:4, 1].isnan().any() == (value != value)
    assert torch.equal(output[:, 0], clean[:, 0])
    assert not output[4:, 1].isnan().any()
    assert not output[:, 2].isnan().any()
    assert not h_n.isnan().any()
    assert not c_n.isnan().any()


@pytest.mark.parametrize("where", [None, "some"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gates_and_weights_that_are_not_finite_give_what_eager_gives(dtype, where):
    """NaN and infinities are in the same places; a closed gate is 0, and 0 times an infinite weight is NaN."""
    spread = random.Random(0)
    for seed in range(25):
        T, B, H = spread.choice([(1, 3, 8), (4, 17, 1), (3, 3, 5), (2, 17, 33)])
        inputs, reset = draw(T, B, H, dtype, seed), resets_at(T, B, where)
        for tensor in spread.choice([inputs[:1], inputs[1:2], inputs[:2]]):
            for _ in range(spread.choice([1, 4])):
                value = spread.choice([float("inf"), float("-inf"), float("nan")])
                tensor.view(-1)[spread.randrange(tensor.numel())] = value
        found = named(results_and_gradients(fused, inputs, reset))
        # oneDNN's AMX products in bfloat16 spread a NaN to the rows beside it, where K is no multiple of what it reads.
        with torch.backends.mkldnn.flags(enabled=False):
            expected = named(results_and_gradients(eager, inputs, reset))
        for name in found:
            torch.testing.assert_close(
                found[name].nan_to_num(1, 2, 3).where(~expected[name].isfinite(), 0.0),
                expected[name].nan_to_num(1, 2, 3).where(~expected[name].isfinite(), 0.0),
                rtol=0,
                atol=0,
                msg=lambda text, name=name, seed=seed: f"{name}, seed {seed}: {text}",
            )
            assert found[name].isfinite()[expected[name].isfinite()].all(), (name, seed)


def test_nan_weights_do_not_hang():
    gates, weight_hh, h0, c0 = draw(T=3, B=2, H=20, dtype=torch.float32)
    weight_hh[:] = float("nan")
    assert all(result.isnan().all() for result in results_and_gradients(fused, [gates, weight_hh, h0, c0])[:3])


def test_saves_for_backward_only_where_one_can_follow():
    inputs = draw(T=3, B=2, H=20, dtype=torch.float32)
    assert fused(*inputs)[0].grad_fn is None
    with torch.no_grad():
        assert fused(inputs[0].requires_grad_(), *inputs[1:])[0].grad_fn is None
    *_, activated, cells = torch.ops.pytbptt.lstm(*[tensor.detach() for tensor in inputs], None, False, False)
    assert (activated.numel(), cells.numel()) == (0, 0)


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("weight_hh", 1, lambda tensor: tensor[1:]),
        ("h0", 2, lambda tensor: tensor.double()),
        ("c0", 3, lambda tensor: tensor[:, 1:]),
        ("reset", 4, lambda tensor: tensor[1:]),
    ],
)
def test_the_compiled_op_checks_for_itself(name, place, change):
    inputs = [*draw(T=3, B=2, H=4, dtype=torch.float32), torch.zeros(3, 2, dtype=torch.bool)]
    inputs[place] = change(inputs[place])
    with pytest.raises(RuntimeError, match=f"lstm: {name}: found.*expected"):
        torch.ops.pytbptt.lstm(*inputs, False, False)
