"""The adaptive embedding and softmax match reference implementations that compute word by word."""

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


def make_layers(cutoffs=(), div_val=1, d_embed=8, tied=True):
    torch.manual_seed(0)
    layout = {"vocab_size": V, "d_embed": d_embed, "d_model": 8, "cutoffs": cutoffs, "div_val": div_val}
    embedding = AdaptiveEmbedding(**layout).double()
    softmax = AdaptiveSoftmax(**layout, embedding=embedding if tied else None).double()
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter)
    return embedding, softmax


def reference_log_prob(softmax, hidden):
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
def test_log_prob_matches_reference(layout, tied):
    _, softmax = make_layers(**layout, tied=tied)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    log_prob = softmax.log_prob(hidden)
    torch.testing.assert_close(log_prob, reference_log_prob(softmax, hidden), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 7).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_match_log_prob(layout):
    _, softmax = make_layers(**layout)
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
    found, count = softmax.nll(hidden, targets, reduction="none")
    expected = -softmax.log_prob(hidden).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert int(count) == 33
    torch.testing.assert_close(found, expected.where(scored, 0.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 5, 12, 40])
def test_loss_and_gradients_match_reference_for_any_number_of_rows(rows):
    """The order of multiplications, and what is concatenated, depend on it."""
    _, softmax = make_layers(cutoffs=(5, 11))
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.full((rows,), 12)
    nll, _ = softmax.nll(hidden, targets)
    expected = -reference_log_prob(softmax, hidden)[:, 12].sum()
    inputs = [hidden, *softmax.parameters()]
    grads = [torch.autograd.grad(value, inputs, allow_unused=True) for value in (nll, expected)]
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-11)
    for found, reference in zip(*grads, strict=True):
        expected = torch.zeros_like(found) if reference is None else reference
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout["cutoffs"]])
@pytest.mark.parametrize("padding", [0, 3, 50])
def test_tail_capacity_does_not_change_loss(layout, padding):
    """Up to the order of summation: padding rows add nothing, also where there are more of them than inputs."""
    _, softmax = make_layers(**layout)
    targets = torch.randint(V, (4, 9))
    targets[0, :3] = -100
    capacity = [count + padding for count in softmax.tail_counts(targets)]
    hidden = torch.randn(4, 9, 8, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, *softmax.parameters()]
    for reduction in ("sum", "none"):
        expected, _ = softmax.nll(hidden, targets, reduction)
        found, _ = softmax.nll(hidden, targets, reduction, capacity)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(value.sum(), inputs) for value in (found, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", [[22] * 12, [0] * 12, [-100] * 12, [5] * 6 + [-100] * 6, [4, 11] * 6])
def test_tail_capacity_with_single_cluster_targets(targets):
    _, softmax = make_layers(cutoffs=(5, 11), div_val=2)
    hidden, targets = torch.randn(12, 8, dtype=torch.float64), torch.tensor(targets)
    expected = -softmax.log_prob(hidden).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    found, _ = softmax.nll(hidden, targets, "none", [12, 12])
    torch.testing.assert_close(found, expected.masked_fill(targets < 0, 0.0), rtol=0, atol=1e-12)


def test_capacity_overflow_gives_nan():
    """A loss that leaves targets out would go unnoticed."""
    _, softmax = make_layers(cutoffs=(5, 11), div_val=2)
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    nll, _ = softmax.nll(hidden, torch.tensor([6, 7, 8, 0, 1, 12]), capacity=[2, 1])
    assert nll.isnan()
    assert torch.autograd.grad(nll, hidden)[0].isnan().all()


def test_invalid_capacity_raises():
    _, softmax = make_layers(cutoffs=(5, 11))
    for capacity in ([2], [2, 2, 2], [2, -1]):
        message = f"capacity: found {capacity}, expected 2 numbers of at least 0".replace("[", r"\[")
        with pytest.raises(ValueError, match=message):
            softmax.nll(torch.randn(2, 8).double(), torch.tensor([1, 2]), capacity=capacity)


@pytest.mark.parametrize("capacity", [None, [0, 0], [3, 1]])
def test_empty_batch_has_zero_loss(capacity):
    _, softmax = make_layers(cutoffs=(5, 11), div_val=2)
    nll, count = softmax.nll(torch.randn(0, 4, 8).double(), torch.zeros(0, 4, dtype=torch.int64), capacity=capacity)
    nll.backward()
    assert (nll, count) == (0, 0)
    assert all((parameter.grad == 0).all() for parameter in softmax.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unused_clusters_get_zero_gradients(layout):
    """DistributedDataParallel needs a gradient of every parameter."""
    embedding, softmax = make_layers(**layout, tied=False)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    softmax.nll(embedding(tokens), tokens)[0].backward()
    assert all(parameter.grad is not None for parameter in [*embedding.parameters(), *softmax.parameters()])
    if layout["div_val"] > 1 and layout["cutoffs"]:
        assert (softmax.weights[2].grad == 0).all()
        assert (embedding.projections[1].grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_is_projected_and_scaled_row_of_table(layout):
    embedding, _ = make_layers(**layout)
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
def test_out_of_vocabulary_id_raises(token, monkeypatch):
    """Also where the ids are not checked, because that would synchronise with a GPU: the lookup itself raises."""
    embedding, _ = make_layers(cutoffs=(5, 11), div_val=2)
    monkeypatch.setattr("pytbptt.nn.adaptive.can_read_on_host", lambda ids: False)
    with pytest.raises(IndexError):
        embedding(torch.tensor([0, token]))


def test_cluster_widths_shrink_by_div_val():
    embedding, softmax = make_layers(cutoffs=(5, 11), div_val=2)
    assert [tuple(weight.shape) for weight in embedding.weights] == [(5, 8), (6, 4), (12, 2)]
    assert [tuple(projection.shape) for projection in softmax.projections] == [(8, 8), (8, 4), (8, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_inputs_give_float32_loss(layout):
    softmax = make_layers(**layout)[1].to(torch.bfloat16)
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert softmax.nll(hidden, torch.full((2, 3), 7))[0].dtype == torch.float32
    assert softmax.log_prob(hidden).dtype == torch.float32


def test_tying_to_embedding_with_other_clusters_raises():
    embedding, _ = make_layers(cutoffs=(5,))
    with pytest.raises(ValueError, match=r"embedding: found clusters \[0, 5, 23\]"):
        AdaptiveSoftmax(V, 8, 8, (6,), embedding=embedding)
