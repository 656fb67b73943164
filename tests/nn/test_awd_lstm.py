"""AWD-LSTM: regularisation, and chunks with carried memory equal one long sequence."""

import copy

import pytest
import torch

from pytbptt import memory as memories
from pytbptt.nn import AWDLSTM, AWDLSTMConfig

V = 23
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "weight_drop")


def make_model(seed=0, dtype=torch.float64, **changes):
    """A float64 model with every dropout off by default."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "d_embed": 6, "d_hidden": 9, "n_layer": 3, **dict.fromkeys(DROPOUTS, 0.0)}
    return AWDLSTM(AWDLSTMConfig(**{**sizes, **changes})).to(dtype)


def random_tokens(streams=3, length=17, seed=1):
    return torch.randint(V, (streams, length), generator=torch.Generator().manual_seed(seed))


def run_chunks(model, tokens, lengths, memory=None, reset=None):
    outputs = []
    resets = [None] * len(lengths) if reset is None else reset.split(lengths, dim=1)
    for chunk, flags in zip(tokens.split(lengths, dim=1), resets, strict=True):
        output, memory = model(chunk, memory, flags)
        outputs.append(output)
    return torch.cat(outputs, dim=1), memory


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_parameter_count_matches_paper():
    with torch.device("meta"):
        # Printed by the authors' script for the Penn Treebank's 10,000 words.
        assert AWDLSTM(AWDLSTMConfig(vocab_size=10000)).num_parameters() == 24_221_600


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"cutoffs": (5, 11)}, {"n_layer": 1}])
def test_chunks_equal_one_long_sequence(changes):
    model, tokens = make_model(**changes), random_tokens()
    reset = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) < 0.15
    for flags in (None, reset):
        expected, expected_memory = run_chunks(model, tokens, [17], reset=flags)
        found, memory = run_chunks(model, tokens, [1, 7, 4, 5], reset=flags)
        assert_close(found, expected)
        for name, tensor in memories.state_dict(expected_memory).items():
            assert_close(memories.state_dict(memory)[name], tensor)


def test_reset_at_any_step_equals_fresh_start():
    model, tokens = make_model(), random_tokens(streams=2)
    for step in range(17):
        reset = torch.zeros(2, 17, dtype=torch.bool)
        reset[0, step] = True
        found, _ = run_chunks(model, tokens, [6, 6, 5], reset=reset)
        assert_close(found[0, step:], model(tokens[:, step:])[0][0])
        assert_close(found[1], model(tokens)[0][1])


def test_detach_stops_gradients_at_chunk_boundary():
    model = make_model(tie_weights=False)
    for detach in (True, False):
        _, memory = model(torch.full((2, 5), 3), detach=detach)
        (grad,) = torch.autograd.grad(model(torch.full((2, 5), 4), memory)[0].sum(), [model.embedding.weights[0]])
        assert (grad[3] == 0).all() == detach
        assert (grad[4] != 0).any()


def test_streams_are_independent():
    model, tokens = make_model(), random_tokens()
    batched, _ = run_chunks(model, tokens, [8, 9])
    for b in range(3):
        assert_close(batched[b : b + 1], run_chunks(model, tokens[b : b + 1], [8, 9])[0])


def test_objective_adds_ar_and_tar_in_training_only():
    model = make_model(alpha=2.0, beta=3.0, dropout=0.5)
    tokens, targets = random_tokens(), random_tokens(seed=2)
    targets[1, 4] = -100
    torch.manual_seed(0)
    result, _ = model.loss(tokens, targets)
    torch.manual_seed(0)
    output, dropped, _ = model.forward_layers(tokens, None, None, True)
    differences = output[:, 1:] - output[:, :-1]
    expected = result.nll / 50 + 2.0 * dropped.square().mean() + 3.0 * differences.square().mean()
    assert_close(result.objective, expected)
    assert (dropped == 0).any()
    result, _ = model.eval().loss(tokens, targets)
    assert_close(result.objective.detach(), result.nll / 50)


def test_single_token_or_all_ignored_chunk_has_finite_objective():
    model = make_model()
    for targets in (random_tokens(length=1), torch.full((3, 1), -100)):
        result, _ = model.loss(random_tokens(length=1), targets)
        result.objective.backward()
        assert result.objective.isfinite()
    assert float(make_model(alpha=0.0).loss(random_tokens(length=1), targets)[0].objective.detach()) == 0.0


def test_embedding_dropout_drops_whole_words():
    model = make_model(dropoute=0.5)
    tokens = random_tokens(streams=4, length=50)
    embedded, expected = model.embed(tokens), model.eval().embed(tokens)
    dropped = (embedded == 0).all(dim=-1)
    assert 0 < dropped.sum() < dropped.numel()
    for token in range(V):
        assert dropped[tokens == token].unique().numel() <= 1
    assert_close(embedded[~dropped], 2 * expected[~dropped])


def test_output_dropout_mask_is_shared_by_all_steps():
    output, _ = make_model(dropout=0.5)(random_tokens(streams=20, length=9))
    dropped = output == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0.3 < dropped.double().mean() < 0.7


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_acts_in_training_only(name):
    model, tokens = make_model(**{name: 0.5}), random_tokens()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], make_model()(tokens)[0])


def test_tied_weights_stay_tied():
    model = make_model()
    for copied in (model, copy.deepcopy(model), model.to(torch.float32)):
        assert copied.softmax.weights[0] is copied.embedding.weights[0]
    assert [layer.hidden_size for layer in make_model().layers] == [9, 9, 6]
    assert [layer.hidden_size for layer in make_model(tie_weights=False).layers] == [9, 9, 9]


def test_memory_keeps_its_dtypes_under_autocast():
    model, tokens = make_model(dtype=torch.float32), random_tokens()
    memory = model.init_memory(3)
    with torch.autocast("cpu", torch.bfloat16):
        result, next_memory = model.loss(tokens, tokens, memory)
        result.objective.backward()
    assert result.objective.dtype == torch.float32
    for name, tensor in memories.state_dict(memory).items():
        assert memories.state_dict(next_memory)[name].dtype == tensor.dtype == torch.float32
    half = make_model(dtype=torch.bfloat16).init_memory(3)
    assert (half.h[0].dtype, half.c[0].dtype) == (torch.bfloat16, torch.float32)


def test_invalid_inputs_raise():
    model = make_model()
    with pytest.raises(ValueError, match=r"memory: h.0: found 2 streams, expected 3 as tokens"):
        model(random_tokens(), model.init_memory(2))
    with pytest.raises(ValueError, match="memory: found 1 layers, expected 3"):
        model(random_tokens(), make_model(n_layer=1).init_memory(3))
    with pytest.raises(ValueError, match=f"tokens: found id {V}"):
        model(torch.full((1, 1), V))
    with pytest.raises(ValueError, match="vocab_size: found 0"):
        make_model(vocab_size=0)
    with pytest.raises(ValueError, match=r"dropouth: found 1\.0"):
        make_model(dropouth=1.0)
