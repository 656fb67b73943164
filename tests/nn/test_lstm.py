"""pytbptt.nn.LSTM is a drop-in replacement of torch.nn.LSTM, with resets, weight dropout and locked dropout."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from pytbptt.nn import LSTM
from pytbptt.nn.dropout import dropout


def make_pair(seed=0, **options):
    """pytbptt's and torch's LSTM, constructed with the same seed, in float64."""
    modules = []
    for cls in (LSTM, torch.nn.LSTM):
        torch.manual_seed(seed)
        modules.append(cls(3, 5, dtype=torch.float64, **options))
    return modules


@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"bias": False}, {"batch_first": True, "num_layers": 2}])
def test_parameter_names_initialisation_and_state_match_nn_lstm(options):
    lstm, reference = make_pair(**options)
    expected = dict(reference.named_parameters())
    assert [name for name, _ in lstm.named_parameters()] == list(expected)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in lstm.named_parameters())
    reference.load_state_dict(lstm.state_dict())
    lstm.load_state_dict(make_pair(seed=1, **options)[1].state_dict())


def test_repr_matches_nn_lstm():
    lstm, reference = make_pair(num_layers=2, batch_first=True, dropout=0.5)
    assert repr(lstm) == repr(reference)
    assert repr(LSTM(3, 5, weight_drop=0.5)) == "LSTM(3, 5, weight_drop=0.5)"


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bias": False}, {"batch_first": True}])
def test_attributes_match_nn_lstm(options):
    lstm, reference = make_pair(**options)
    for name in (name for name in vars(reference) if not name.startswith("_")):
        assert getattr(lstm, name) == getattr(reference, name), name
    for found, expected in zip(lstm.all_weights, reference.all_weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class DoubleParametrization(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZATIONS = {
    "weight_norm": lambda lstm: nn.utils.weight_norm(lstm, "weight_hh_l0"),
    "spectral_norm": lambda lstm: nn.utils.spectral_norm(lstm, "weight_ih_l1"),
    "prune": lambda lstm: prune.l1_unstructured(lstm, "weight_hh_l1", 0.3),
    "prune a bias": lambda lstm: prune.random_unstructured(lstm, "bias_ih_l0", 0.5),
    "parametrizations.weight_norm": lambda lstm: parametrizations.weight_norm(lstm, "weight_hh_l1"),
    "parametrizations.orthogonal": lambda lstm: parametrizations.orthogonal(lstm, "weight_ih_l0"),
    "parametrizations.spectral_norm": lambda lstm: parametrizations.spectral_norm(lstm.eval(), "weight_hh_l0"),
    "parametrization": lambda lstm: parametrize.register_parametrization(lstm, "weight_ih_l0", DoubleParametrization()),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_weight_norm_prune_parametrize_match_nn_lstm(parametrization):
    lstm, reference = make_pair(num_layers=2)
    for module in (lstm, reference):
        torch.manual_seed(1)
        PARAMETRIZATIONS[parametrization](module)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (lstm, reference)]
    for _ in range(3):
        input = torch.randn(6, 2, 3, dtype=torch.float64)
        outputs = [module(input)[0] for module in (lstm, reference)]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(lstm.state_dict(), reference.state_dict(), rtol=0, atol=1e-12)


def test_parametrization_is_computed_once_per_call():
    """Each computation of spectral norm is a step of its power iteration."""
    calls = []

    class Recorder(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return weight

    lstm = LSTM(3, 5, 2)
    parametrize.register_parametrization(lstm, "weight_ih_l0", Recorder())
    calls.clear()
    lstm(torch.randn(4, 2, 3))
    assert len(calls) == 1


def test_functional_call_copies_and_pickles_match_nn_lstm():
    lstm, reference = make_pair(num_layers=2)
    input = torch.randn(6, 2, 3, dtype=torch.float64)
    weights = {name: 1.1 * parameter.detach() for name, parameter in lstm.named_parameters()}
    found, expected = (torch.func.functional_call(module, weights, (input,))[0] for module in (lstm, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for copied in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(copied(input)[0], lstm(input)[0])
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    assert torch.equal(copy.deepcopy(lstm)(input)[0], lstm(input)[0])


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2}, {"bias": False}, {"batch_first": True, "num_layers": 2}, {"num_layers": 2, "dropout": 0.5}],
)
@pytest.mark.parametrize("streams", [4, 1, None])
def test_outputs_and_gradients_match_nn_lstm(options, streams, with_state):
    lstm, reference = (module.eval() for module in make_pair(**options))
    L = options.get("num_layers", 1)
    shape = (6, 3) if streams is None else (streams, 6, 3) if options.get("batch_first") else (6, streams, 3)
    state_shape = (L, 5) if streams is None else (L, streams, 5)
    input = torch.randn(shape, dtype=torch.float64)
    state = tuple(torch.randn(state_shape, dtype=torch.float64) for _ in range(2)) if with_state else None
    results = []
    for module in (lstm, reference):
        output, (h_n, c_n) = module(input, state)
        grads = torch.autograd.grad(output.square().sum() + h_n.sum() + c_n.sum(), list(module.parameters()))
        results.append((output, h_n, c_n, grads))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_chunks_equal_one_long_sequence_with_resets(batch_first):
    lstm = make_pair(num_layers=2, batch_first=batch_first)[0]
    time_dim = 1 if batch_first else 0
    input = torch.randn((2, 9, 3) if batch_first else (9, 2, 3), dtype=torch.float64)
    reset = torch.zeros(input.shape[:2], dtype=torch.bool)
    reset.select(time_dim, 4)[1] = True
    expected, expected_state = lstm(input, reset=reset)
    outputs, state = [], None
    for chunk, flags in zip(input.split([2, 1, 6], dim=time_dim), reset.split([2, 1, 6], dim=time_dim), strict=True):
        output, state = lstm(chunk, state, reset=flags)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=time_dim), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)
    stream_dim = 1 - time_dim
    after_reset = expected.narrow(time_dim, 4, 5).select(stream_dim, 1)
    fresh = lstm(input.narrow(time_dim, 4, 5))[0].select(stream_dim, 1)
    torch.testing.assert_close(after_reset, fresh, rtol=0, atol=1e-12)


def test_weight_drop_uses_one_mask_per_call_and_keeps_weights():
    lstm = LSTM(3, 5, dtype=torch.float64, weight_drop=0.4)
    before = {name: tensor.clone() for name, tensor in lstm.state_dict().items()}
    input = torch.randn(7, 4, 3, dtype=torch.float64)
    torch.manual_seed(3)
    output, _ = lstm(input)
    torch.manual_seed(3)
    mask = dropout(torch.ones_like(lstm.weight_hh_l0), 0.4)
    reference = LSTM(3, 5, dtype=torch.float64)
    reference.load_state_dict({**before, "weight_hh_l0": before["weight_hh_l0"] * mask})
    torch.testing.assert_close(output, reference(input)[0], rtol=0, atol=1e-12)

    output.sum().backward()
    assert torch.equal(lstm.weight_hh_l0.grad == 0, mask == 0)
    assert list(lstm.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lstm.state_dict().items())
    reference.load_state_dict(before)
    assert torch.equal(lstm.eval()(input)[0], reference(input)[0])


def test_locked_dropout_mask_is_shared_by_all_steps():
    torch.manual_seed(0)
    lstm = LSTM(3, 5, num_layers=2, dtype=torch.float64, locked_dropout=0.5)
    torch.nn.init.zeros_(lstm.weight_hh_l1)
    inputs = []
    forward_layer = lstm.forward_layer
    lstm.forward_layer = lambda n, hidden, *args: inputs.append(hidden) or forward_layer(n, hidden, *args)
    lstm(torch.randn(7, 40, 3, dtype=torch.float64))
    dropped = inputs[1] == 0
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    # 200 units with p = 0.5: the standard error is 0.035.
    assert abs(dropped[0].double().mean() - 0.5) < 0.15


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 3), (2, 0, 3)])
def test_empty_chunk_keeps_the_state(shape):
    """Unlike torch.nn.LSTM, which raises for T = 0."""
    lstm = LSTM(3, 5, num_layers=2, dropout=0.5, locked_dropout=0.5)
    state = tuple(torch.randn(2, *shape[1:-1], 5) for _ in range(2))
    output, (h_n, c_n) = lstm(torch.empty(shape), state)
    assert output.shape == (*shape[:-1], 5)
    assert torch.equal(h_n, state[0])
    assert torch.equal(c_n, state[1])


def test_dropout_with_one_layer_warns_like_nn_lstm():
    for cls in (LSTM, torch.nn.LSTM):
        with pytest.warns(UserWarning, match="dropout"):
            cls(3, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="^LSTM: locked_dropout: found 0.25 with one layer"):
        LSTM(3, 5, locked_dropout=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LSTM(3, 5, weight_drop=0.5)
        LSTM(3, 5, num_layers=2, dropout=0.5, locked_dropout=0.5)


def test_cell_state_of_16_bit_inputs_is_float32():
    lstm = LSTM(3, 5, dtype=torch.bfloat16)
    output, (h_n, c_n) = lstm(torch.randn(4, 2, 3, dtype=torch.bfloat16))
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output, (h_n, c_n) = lstm(torch.randn(4, 2, 3, dtype=torch.bfloat16), (h_n, c_n))
    assert c_n.dtype == torch.float32
    lstm = LSTM(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c_n) = lstm(torch.randn(4, 2, 3, dtype=torch.bfloat16))
    assert (output.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, (_, c_n) = lstm(torch.randn(4, 2, 3))
    assert (output.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": True}, "found bidirectional=True, expected one direction"),
        ({"proj_size": 2}, "found proj_size=2, expected"),
        ({"num_layers": 0}, "num_layers: found 0"),
        ({"weight_drop": 1.5}, "weight_drop: found 1.5"),
    ],
)
def test_unsupported_options_raise(options, message):
    with pytest.raises(ValueError, match=f"LSTM: {message}"):
        LSTM(3, 5, **options)


def test_invalid_inputs_raise():
    lstm = LSTM(3, 5)
    input = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="input: found a PackedSequence"):
        lstm(torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3)]))
    with pytest.raises(ValueError, match=r"input: found shape \(4, 2, 2\), expected \(T, B, 3\)"):
        lstm(input[..., 1:])
    for dtype in (torch.float64, torch.int64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"^LSTM: input: found {dtype}, expected torch.float32 as its weights$"):
            lstm(input.to(dtype))
    with pytest.raises(ValueError, match=r"input: found torch.float64, expected torch.float32 as its"):
        LSTM(3, 5, device="meta")(input.to("meta", torch.float64))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"input: found torch.float64, expected torch.float32 as its"),
    ):
        lstm(input.double())
    with pytest.raises(ValueError, match=r"c0: found shape \(1, 1, 5\), expected \(1, 2, 5\)"):
        lstm(input, (torch.zeros(1, 2, 5), torch.zeros(1, 1, 5)))
    with pytest.raises(ValueError, match="hx: found Tensor, expected a pair of h0 and c0"):
        lstm(input, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="hx: found 1 states, expected a pair of h0 and c0"):
        lstm(input, (torch.zeros(1, 2, 5),))
    with pytest.raises(ValueError, match=r"reset: found torch.bool \(2, 4\), expected torch.bool \(4, 2\)"):
        lstm(input, reset=torch.zeros(2, 4, dtype=torch.bool))
