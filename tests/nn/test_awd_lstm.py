"""AWD-LSTM: its regularisation, and that its memory carries a stream exactly."""

import copy

import pytest
import torch

from pytbptt import memory as memories
from pytbptt.nn import AWDLSTM, AWDLSTMConfig

V = 23
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "weight_drop")


def make(seed=0, dtype=torch.float64, **changes):
    """A model in float64, without the dropouts that a test does not ask for."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "d_embed": 6, "d_hidden": 9, "n_layer": 3, **dict.fromkeys(DROPOUTS, 0.0)}
    return AWDLSTM(AWDLSTMConfig(**{**sizes, **changes})).to(dtype)


def draw_tokens(streams=3, length=17, seed=1):
    return torch.randint(V, (streams, length), generator=torch.Generator().manual_seed(seed))


def read(model, tokens, lengths, memory=None, reset=None):
    outputs = []
    resets = [None] * len(lengths) if reset is None else reset.split(lengths, dim=1)
    for chunk, flags in zip(tokens.split(lengths, dim=1), resets, strict=True):
        output, memory = model(chunk, memory, flags)
        outputs.append(output)
    return torch.cat(outputs, dim=1), memory


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_has_as_many_parameters_as_the_authors():
    with torch.device("meta"):
        # The Penn Treebank's 10,000 words; the authors' script prints this number.
        assert AWDLSTM(AWDLSTMConfig(vocab_size=10000)).num_parameters() == 24_221_600


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"cutoffs": (5, 11)}, {"n_layer": 1}])
def test_one_long_call_equals_many_chunks(changes):
    model, tokens = make(**changes), draw_tokens()
    reset = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) < 0.15
    for flags in (None, reset):
        whole, memory = read(model, tokens, [17], reset=flags)
        found, found_memory = read(model, tokens, [1, 7, 4, 5], reset=flags)
        assert_same(found, whole)
        for name, tensor in memories.state_dict(memory).items():
            assert_same(memories.state_dict(found_memory)[name], tensor)


def test_reset_equals_starting_afresh_at_any_place():
    model, tokens = make(), draw_tokens(streams=2)
    for place in range(17):
        reset = torch.zeros(2, 17, dtype=torch.bool)
        reset[0, place] = True
        found, _ = read(model, tokens, [6, 6, 5], reset=reset)
        assert_same(found[0, place:], model(tokens[:, place:])[0][0])
        assert_same(found[1], model(tokens)[0][1])


def test_gradients_stop_at_the_edge_of_a_chunk_unless_asked_to_go_on():
    model = make(tie_weights=False)
    for detach in (True, False):
        _, memory = model(torch.full((2, 5), 3), detach=detach)
        (grad,) = torch.autograd.grad(model(torch.full((2, 5), 4), memory)[0].sum(), [model.embedding.weights[0]])
        assert (grad[3] == 0).all() == detach
        assert (grad[4] != 0).any()


def test_streams_do_not_touch_each_other():
    model, tokens = make(), draw_tokens()
    together, _ = read(model, tokens, [8, 9])
    for b in range(3):
        assert_same(together[b : b + 1], read(model, tokens[b : b + 1], [8, 9])[0])


def test_objective_adds_both_regularisations_in_training_only():
    model = make(alpha=2.0, beta=3.0, dropout=0.5)
    tokens, targets = draw_tokens(), draw_tokens(seed=2)
    targets[1, 4] = -100
    torch.manual_seed(0)
    result, _ = model.loss(tokens, targets)
    torch.manual_seed(0)
    raw, dropped, _ = model.read_by_time(tokens, None, None, True)
    steps = raw[:, 1:] - raw[:, :-1]
    expected = result.nll / 50 + 2.0 * dropped.square().mean() + 3.0 * steps.square().mean()
    assert_same(result.objective, expected)
    assert (dropped == 0).any()
    evaluated, _ = model.eval().loss(tokens, targets)
    assert_same(evaluated.objective.detach(), evaluated.nll / 50)


def test_a_chunk_of_one_token_or_without_targets_has_a_finite_objective():
    model = make()
    for targets in (draw_tokens(length=1), torch.full((3, 1), -100)):
        result, _ = model.loss(draw_tokens(length=1), targets)
        result.objective.backward()
        assert result.objective.isfinite()
    assert float(make(alpha=0.0).loss(draw_tokens(length=1), targets)[0].objective.detach()) == 0.0


def test_embedding_dropout_drops_whole_words():
    model = make(dropoute=0.5)
    tokens = draw_tokens(streams=4, length=50)
    embedded, plain = model.embed(tokens), model.eval().embed(tokens)
    dropped = (embedded == 0).all(dim=-1)
    assert 0 < dropped.sum() < dropped.numel()
    for token in range(V):
        assert dropped[tokens == token].unique().numel() <= 1
    assert_same(embedded[~dropped], 2 * plain[~dropped])


def test_output_dropout_is_locked_for_the_chunk():
    output, _ = make(dropout=0.5)(draw_tokens(streams=20, length=9))
    dropped = output == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0.3 < dropped.double().mean() < 0.7


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_acts_in_training_and_in_nothing_else(name):
    model, tokens = make(**{name: 0.5}), draw_tokens()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], make()(tokens)[0])


def test_tied_table_stays_tied():
    model = make()
    for same in (model, copy.deepcopy(model), model.to(torch.float32)):
        assert same.softmax.weights[0] is same.embedding.weights[0]
    assert [layer.hidden_size for layer in make().layers] == [9, 9, 6]
    assert [layer.hidden_size for layer in make(tie_weights=False).layers] == [9, 9, 9]


def test_memory_keeps_its_dtypes_under_autocast():
    model, tokens = make(dtype=torch.float32), draw_tokens()
    memory = model.init_memory(3)
    with torch.autocast("cpu", torch.bfloat16):
        result, following = model.loss(tokens, tokens, memory)
        result.objective.backward()
    assert result.objective.dtype == torch.float32
    for name, tensor in memories.state_dict(memory).items():
        assert memories.state_dict(following)[name].dtype == tensor.dtype == torch.float32
    half = make(dtype=torch.bfloat16).init_memory(3)
    assert (half.h[0].dtype, half.c[0].dtype) == (torch.bfloat16, torch.float32)


def test_what_does_not_fit_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"memory: h.0: found 2 streams, expected 3 as tokens"):
        model(draw_tokens(), model.init_memory(2))
    with pytest.raises(ValueError, match="memory: found 1 layers, expected 3"):
        model(draw_tokens(), make(n_layer=1).init_memory(3))
    with pytest.raises(ValueError, match=f"tokens: found id {V}"):
        model(torch.full((1, 1), V))
    with pytest.raises(ValueError, match="vocab_size: found 0"):
        make(vocab_size=0)
    with pytest.raises(ValueError, match=r"dropouth: found 1\.0"):
        make(dropouth=1.0)
