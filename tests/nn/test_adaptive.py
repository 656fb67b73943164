"""Adaptive embedding and softmax against their definitions."""

from itertools import pairwise

import pytest
import torch

from pytbptt.nn import AdaptiveEmbedding, AdaptiveSoftmax

V = 23
LAYOUTS = [
    {"cutoffs": (), "div_val": 1},
    {"cutoffs": (5, 11), "div_val": 1},
    {"cutoffs": (5, 11), "div_val": 2},
    {"cutoffs": (), "div_val": 2},
    {"cutoffs": (5, 11), "div_val": 1, "d_embed": 6},
    {"cutoffs": (1, 2, 22), "div_val": 1},
]


def make(cutoffs=(), div_val=1, d_embed=8, tied=True):
    torch.manual_seed(0)
    layout = {"vocab_size": V, "d_embed": d_embed, "d_model": 8, "cutoffs": cutoffs, "div_val": div_val}
    embedding = AdaptiveEmbedding(**layout).double()
    softmax = AdaptiveSoftmax(**layout, embedding=embedding if tied else None).double()
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter)
    return embedding, softmax


def by_definition(softmax, hidden):
    """Log-probabilities word by word."""
    edges, rows = softmax.edges, {}
    for i, (first, end) in enumerate(pairwise(edges)):
        for word in range(first, end):
            table, row = (0, word) if softmax.div_val == 1 else (i, word - first)
            inputs = hidden @ softmax.projections[i] if len(softmax.projections) else hidden
            rows[word] = inputs @ softmax.weights[table][row] + softmax.biases[table][row]
    inputs = hidden @ softmax.projections[0] if len(softmax.projections) else hidden
    tails = [inputs @ softmax.cluster_weight[i] + softmax.cluster_bias[i] for i in range(len(edges) - 2)]
    head = torch.stack([rows[word] for word in range(edges[1])] + tails, dim=-1).log_softmax(-1)
    parts = [head[..., : edges[1]]]
    for i, (first, end) in enumerate(pairwise(edges[1:])):
        tail = torch.stack([rows[word] for word in range(first, end)], dim=-1).log_softmax(-1)
        parts.append(tail + head[..., edges[1] + i, None])
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_the_definition(layout, tied):
    _, softmax = make(**layout, tied=tied)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    log_prob = softmax.log_prob(hidden)
    torch.testing.assert_close(log_prob, by_definition(softmax, hidden), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 7).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_its_gradients_are_those_of_the_log_probabilities(layout):
    _, softmax = make(**layout)
    hidden = torch.randn(4, 9, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (4, 9))
    targets[0, :3] = -100
    nll, count = softmax.nll(hidden, targets)
    scored = targets != -100
    expected = -softmax.log_prob(hidden)[scored].gather(1, targets[scored].unsqueeze(1)).sum()
    assert int(count) == 33
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-11)
    inputs = [hidden, *softmax.parameters()]
    grads = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (nll, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)
    apart, count = softmax.nll(hidden, targets, reduction="none")
    each = -softmax.log_prob(hidden).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert int(count) == 33
    torch.testing.assert_close(apart, each.where(scored, 0.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 5, 12, 40])
def test_loss_and_gradients_are_right_for_any_number_of_rows(rows):
    """The order of a product and what is joined to what depend on it."""
    _, softmax = make(cutoffs=(5, 11))
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.full((rows,), 12)
    nll, _ = softmax.nll(hidden, targets)
    expected = -by_definition(softmax, hidden)[:, 12].sum()
    inputs = [hidden, *softmax.parameters()]
    grads = [torch.autograd.grad(value, inputs, allow_unused=True) for value in (nll, expected)]
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-11)
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout["cutoffs"]])
@pytest.mark.parametrize("spare", [0, 3, 50])
def test_room_in_the_tails_changes_nothing(layout, spare):
    """But for the order of sums: what takes up the room adds nothing. More rows than inputs are room as well."""
    _, softmax = make(**layout)
    targets = torch.randint(V, (4, 9))
    targets[0, :3] = -100
    capacity = [count + spare for count in softmax.count(targets)]
    hidden = torch.randn(4, 9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *softmax.parameters()]
    for reduction in ("sum", "none"):
        exact, _ = softmax.nll(hidden, targets, reduction)
        roomy, _ = softmax.nll(hidden, targets, reduction, capacity)
        torch.testing.assert_close(roomy, exact, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(value.sum(), inputs) for value in (roomy, exact)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", [[22] * 12, [0] * 12, [-100] * 12, [5] * 6 + [-100] * 6, [4, 11] * 6])
def test_room_in_the_tails_for_targets_of_one_cluster(targets):
    _, softmax = make(cutoffs=(5, 11), div_val=2)
    hidden, targets = torch.randn(12, 8, dtype=torch.float64), torch.tensor(targets)
    expected = -softmax.log_prob(hidden).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    found, _ = softmax.nll(hidden, targets, "none", [12, 12])
    torch.testing.assert_close(found, expected.masked_fill(targets < 0, 0.0), rtol=0, atol=1e-12)


def test_targets_without_room_spoil_the_loss_and_its_gradient():
    """A number that leaves some of them out would pass for a loss."""
    _, softmax = make(cutoffs=(5, 11), div_val=2)
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    nll, _ = softmax.nll(hidden, torch.tensor([6, 7, 8, 0, 1, 12]), capacity=[2, 1])
    assert nll.isnan()
    assert torch.autograd.grad(nll, hidden)[0].isnan().all()


def test_room_for_other_tails_is_refused():
    _, softmax = make(cutoffs=(5, 11))
    for capacity in ([2], [2, 2, 2], [2, -1]):
        found = f"capacity: found {capacity}, expected 2 numbers of at least 0".replace("[", r"\[")
        with pytest.raises(ValueError, match=found):
            softmax.nll(torch.randn(2, 8).double(), torch.tensor([1, 2]), capacity=capacity)


@pytest.mark.parametrize("capacity", [None, [0, 0], [3, 1]])
def test_no_targets_at_all(capacity):
    _, softmax = make(cutoffs=(5, 11), div_val=2)
    nll, count = softmax.nll(torch.randn(0, 4, 8).double(), torch.zeros(0, 4, dtype=torch.int64), capacity=capacity)
    nll.backward()
    assert (nll, count) == (0, 0)
    assert all((parameter.grad == 0).all() for parameter in softmax.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clusters_that_no_token_uses_still_get_gradients(layout):
    """DistributedDataParallel waits for every parameter."""
    embedding, softmax = make(**layout, tied=False)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    softmax.nll(embedding(tokens), tokens)[0].backward()
    assert all(parameter.grad is not None for parameter in [*embedding.parameters(), *softmax.parameters()])
    if layout["div_val"] > 1 and layout["cutoffs"]:
        assert (softmax.weights[2].grad == 0).all()
        assert (embedding.projections[1].grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_is_each_words_row_projected_and_scaled(layout):
    embedding, _ = make(**layout)
    embedding.scale = 3.0
    tokens = torch.randperm(V).view(1, V)
    for token, found in zip(tokens[0].tolist(), embedding(tokens)[0], strict=True):
        i = max(i for i, first in enumerate(embedding.edges[:-1]) if first <= token)
        table, row = (0, token) if embedding.div_val == 1 else (i, token - embedding.edges[i])
        expected = embedding.weights[table][row]
        if len(embedding.projections):
            expected = embedding.projections[table] @ expected
        torch.testing.assert_close(found, 3.0 * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("token", [-1, V])
def test_no_table_serves_an_id_outside_the_vocabulary(token, monkeypatch):
    """Where nobody checks, because that would be to wait for a GPU, the lookup itself refuses it."""
    embedding, _ = make(cutoffs=(5, 11), div_val=2)
    monkeypatch.setattr("pytbptt.nn.adaptive.can_read_on_host", lambda ids: False)
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, token]))


def test_widths_shrink_by_div_val():
    embedding, softmax = make(cutoffs=(5, 11), div_val=2)
    assert [tuple(weight.shape) for weight in embedding.weights] == [(5, 8), (6, 4), (12, 2)]
    assert [tuple(projection.shape) for projection in softmax.projections] == [(8, 8), (8, 4), (8, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_inputs_are_scored_in_float32(layout):
    softmax = make(**layout)[1].to(torch.bfloat16)
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert softmax.nll(hidden, torch.full((2, 3), 7))[0].dtype == torch.float32
    assert softmax.log_prob(hidden).dtype == torch.float32


def test_embedding_of_other_clusters_is_refused():
    embedding, _ = make(cutoffs=(5,))
    with pytest.raises(ValueError, match=r"embedding: found clusters \[0, 5, 23\]"):
        AdaptiveSoftmax(V, 8, 8, (6,), embedding=embedding)
