"""How a Transformer-XL carries its memory: chunks, resets, streams, and what must never leak between them."""

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch
from tiny_transformer_xl import V, draw_tokens, make

from pytbptt import memory as memories
from pytbptt.nn import ProjectedMemory

STYLES = [{}, {"pre_norm": True}, {"clamp_len": 3}, {"untie_bias": False, "div_val": 2, "cutoffs": (5, 11)}]


def read(model, tokens, edges=(), memory=None, reset=None):
    """The output of one stream after another chunk, cut at `edges`, and the memory after the last."""
    outputs, bounds = [], [0, *edges, tokens.shape[1]]
    for start, end in pairwise(bounds):
        chunk_reset = None if reset is None else reset[:, start:end]
        output, memory = model(tokens[:, start:end], memory, chunk_reset)
        outputs.append(output)
    return torch.cat(outputs, dim=1), memory


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", STYLES)
def test_one_long_call_equals_many_chunks_where_memory_covers_the_history(changes):
    model, tokens = make(mem_len=30, **changes), draw_tokens(length=25)
    whole, memory = read(model, tokens)
    for edges in ([5, 6, 13], [1], range(1, 25)):
        found, found_memory = read(model, tokens, edges)
        assert_same(found, whole)
        assert_same(found_memory.hidden, memory.hidden)
        assert torch.equal(found_memory.first, memory.first)


@pytest.mark.parametrize("changes", STYLES)
def test_one_long_call_equals_many_chunks_always_with_a_window(changes):
    model, tokens = make(mem_len=4, same_length=True, **changes), draw_tokens(length=25)
    reset = torch.rand(3, 25, generator=torch.Generator().manual_seed(3)) < 0.1
    for flags in (None, reset):
        whole, _ = read(model, tokens, reset=flags)
        for edges in ([5, 6, 13, 20], [2, 4], range(1, 25)):
            assert_same(read(model, tokens, edges, reset=flags)[0], whole)


def test_a_window_that_covers_the_history_hides_nothing():
    tokens = draw_tokens(length=7)
    assert_same(make(mem_len=7, same_length=True)(tokens)[0], make(mem_len=7)(tokens)[0])
    shorter = make(mem_len=6, same_length=True)(tokens)[0] - make(mem_len=6)(tokens)[0]
    assert (shorter[:, :6].abs() < 1e-12).all()
    assert (shorter[:, 6].abs() > 1e-4).any()


def test_gradients_of_chunks_kept_attached_equal_those_of_one_long_call():
    model, tokens = make(mem_len=12), draw_tokens(length=10)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model.loss(tokens, tokens)[0].objective, parameters)
    objective, memory = torch.zeros((), dtype=torch.float64), None
    for chunk in tokens.split(5, dim=1):
        result, memory = model.loss(chunk, chunk, memory, detach=False)
        objective = objective + result.objective / 2
    torch.testing.assert_close(torch.autograd.grad(objective, parameters), whole, rtol=0, atol=1e-12)


def test_no_gradient_crosses_the_edge_of_a_chunk():
    model = make(tie_weights=False)
    _, memory = model(torch.full((2, 5), 3))
    assert not memory.hidden.requires_grad
    model(torch.full((2, 5), 4), memory)[0].sum().backward()
    assert (model.embedding.weights[0].grad[3] == 0).all()
    assert (model.embedding.weights[0].grad[4] != 0).any()


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"initial_memory": "zeros"}])
@pytest.mark.parametrize(("mem_len", "edges"), [(6, [4, 8, 12]), (3, [5, 11]), (9, [1, 2, 3]), (0, [7])])
def test_reset_equals_starting_afresh_with_the_same_later_edges(changes, mem_len, edges):
    model, tokens = make(mem_len=mem_len, **changes), draw_tokens(streams=2, length=14)
    # What precedes a reset is never seen; that a stream begins with zeros that are is only so at its very beginning.
    afresh = make(mem_len=mem_len, **{**changes, "initial_memory": "empty"})
    without, _ = read(model, tokens, edges)
    for place in range(14):
        reset = torch.zeros(2, 14, dtype=torch.bool)
        reset[0, place] = True
        found, memory = read(model, tokens, edges, reset=reset)
        fresh, fresh_memory = read(afresh, tokens[:, place:], [edge - place for edge in edges if edge > place])
        assert_same(found[0, place:], fresh[0])
        assert memory.first[0] == fresh_memory.first[0]
        assert_same(found[0, :place], without[0, :place])
        assert_same(found[1], without[1])


def test_reset_equals_starting_afresh_always_with_a_window():
    model, tokens = make(mem_len=4, same_length=True), draw_tokens(streams=1, length=19)
    for place in range(19):
        reset = torch.zeros(1, 19, dtype=torch.bool)
        reset[0, place] = True
        assert_same(read(model, tokens, [3, 9, 15], reset=reset)[0][:, place:], read(model, tokens[:, place:])[0])


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"same_length": True}, {"initial_memory": "zeros"}])
@pytest.mark.parametrize("projected", [False, True])
def test_old_document_never_comes_back(changes, projected):
    """Memory (6) is longer than the chunks (3), so that a reset must last beyond its own chunk."""
    model, tokens = make(mem_len=6, **changes), draw_tokens(streams=2, length=15)
    for place in range(1, 15):
        reset = torch.zeros(2, 15, dtype=torch.bool)
        reset[:, place] = True
        outputs = []
        for shift in (0, 1):
            old = (tokens + shift) % V
            document = torch.cat([old[:, :place], tokens[:, place:]], dim=1)
            start = model.init_memory(2, projected=projected)
            outputs.append(read(model, document, [3, 6, 9, 12], start, reset)[0][:, place:])
        assert torch.equal(*outputs)


def test_several_resets_in_a_chunk_count_from_the_last():
    model, tokens = make(), draw_tokens(streams=1, length=8)
    reset = torch.tensor([[False, True, False, False, True, True, False, False]])
    found, _ = model(tokens, reset=reset)
    for start, end in ((0, 1), (1, 4), (4, 5), (5, 8)):
        assert_same(found[:, start:end], model(tokens[:, start:end])[0])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("mem_len", [0, 4, 7, 9])
def test_memory_never_changes_shape(mem_len, projected):
    model = make(mem_len=mem_len)
    memory = model.init_memory(2, projected=projected)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in memories.state_dict(memory).items()}
    seen = 0
    for length in (1, 7, 4, 2, 9):
        _, memory = model(draw_tokens(streams=2, length=length), memory)
        seen += length
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in memories.state_dict(memory).items()} == shapes
        assert memory.first.tolist() == [max(0, mem_len - seen)] * 2


def test_memory_is_the_last_inputs_of_every_layer():
    model, tokens = make(mem_len=5), draw_tokens(length=12)
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _, memory = read(model, tokens, [3])
    for n, hidden in enumerate(memory.hidden):
        first, second = inputs[n], inputs[len(model.layers) + n]
        assert torch.equal(hidden, torch.cat([first, second], dim=1)[:, -5:])


@pytest.mark.parametrize("changes", [{}, {"cutoffs": (5, 11), "div_val": 2}])
def test_streams_do_not_touch_each_other(changes):
    model, tokens = make(**changes), draw_tokens(length=15)
    reset = torch.zeros(3, 15, dtype=torch.bool)
    reset[1, 8] = True
    together, memory = read(model, tokens, [4, 8], reset=reset)
    for b in range(3):
        row = slice(b, b + 1)
        alone, alone_memory = read(model, tokens[row], [4, 8], reset=reset[row])
        assert_same(together[row], alone)
        assert_same(memories.select(memory, row).hidden, alone_memory.hidden)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % V
    others = read(model, changed, [4, 8], reset=reset)[0][[0, 2]]
    assert_same(others, together[[0, 2]])


@pytest.mark.parametrize("changes", [*STYLES, {"initial_memory": "zeros", "pre_norm": True}, {"same_length": True}])
def test_projected_memory_gives_what_hidden_states_give(changes):
    model, tokens = make(**changes), draw_tokens(length=20)
    if model.config.pre_norm:
        for layer in model.layers:
            torch.nn.init.normal_(layer.attention_norm.bias)
    reset = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.1
    edges = [2, 10, 11, 17]
    with torch.no_grad():
        found, memory = read(model, tokens, edges, model.init_memory(3, projected=True), reset)
        expected, _ = read(model, tokens, edges, reset=reset)
    assert isinstance(memory, ProjectedMemory)
    assert_same(found, expected)


def test_projected_memories_that_were_handed_out_never_change():
    """They share storage, and what follows one of them may not show in another."""
    model, tokens = make(mem_len=7).eval(), draw_tokens(streams=3, length=40)
    with torch.no_grad():
        memories, copies = [model.init_memory(3, projected=True)], []
        for chunk in tokens.split(3, dim=1):
            copies.append(copy.deepcopy(memories[-1]))
            memories.append(model(chunk, memories[-1])[1])
        for memory, before in zip(memories, copies, strict=False):
            assert all(torch.equal(getattr(memory, name), getattr(before, name)) for name in ("key", "value", "first"))
        other = tokens.flip(1)
        for memory, before in zip(memories[3:6], copies[3:6], strict=True):
            once, twice = (model(other[:, :3], start)[0] for start in (memory, before))
            assert torch.equal(once, twice)
            branches = [model(chunk, memory)[1] for chunk in (tokens[:, :3], other[:, :3])]
            found = [model(tokens[:, 3:6], branch)[0] for branch in branches]
            expected = [model(tokens[:, 3:6], model(chunk, before)[1])[0] for chunk in (tokens[:, :3], other[:, :3])]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_threads_that_continue_from_one_memory_do_not_touch_one_another():
    model, streams, threads = make(mem_len=9).eval(), 2, 4
    with torch.no_grad():
        memory = model.init_memory(streams, projected=True)
        for _ in range(2):  # chunks, so that there is room behind the memory
            _, memory = model(draw_tokens(streams, 2), memory)
        continuations = [draw_tokens(streams, 30, seed) for seed in range(threads)]
        expected = [read(model, tokens, range(1, 30), copy.deepcopy(memory))[0] for tokens in continuations]
        found = [None] * threads
        begin = threading.Barrier(threads)

        def go_on(n):
            with torch.no_grad():
                begin.wait()
                found[n] = read(model, continuations[n], range(1, 30), memory)[0]

        for _ in range(10):
            running = [threading.Thread(target=go_on, args=(n,)) for n in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_a_chunk_leaves_to_the_next_is_used_and_never_needed(monkeypatch):
    """The projected distances, which are most of a token's work, and the room behind the memory."""
    model, tokens = make(mem_len=9).eval(), draw_tokens(2, 12)
    made = []
    for layer in model.layers:
        layer.attention.pos_proj.register_forward_hook(lambda *call: made.append(call[2]))
    with torch.no_grad():
        expected, _ = read(model, tokens, range(1, 12))
        made.clear()
        found, memory = read(model, tokens, range(1, 12), model.init_memory(2, projected=True))
        assert_same(found, expected)
        assert len(made) == len(model.layers)
        for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), memories.select(memory, slice(0, 2))):
            assert torch.equal(model(tokens, other)[0], model(tokens, memory)[0])
        # A graph would go on reading what may have made room for other things.
        monkeypatch.setattr("pytbptt.nn.transformer_xl.is_tracing_or_capturing", lambda tensor: True)
        made.clear()
        _, following = model(tokens[:, :1], memory)
        assert len(made) == len(model.layers)
        model(tokens[:, :1], following)
        assert len(made) == 2 * len(model.layers)


def test_distances_under_autocast_are_not_those_without():
    model, tokens = make(mem_len=9, dtype=torch.float32).eval(), draw_tokens(2, 4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _, memory = model(tokens, model.init_memory(2, projected=True))
        expected = model(tokens, copy.deepcopy(memory))[0]
        assert torch.equal(model(tokens, memory)[0], expected)


def test_projected_memory_crosses_inference_mode():
    model, tokens = make(mem_len=7).eval(), draw_tokens(streams=3, length=12)
    with torch.no_grad():
        memory = model.init_memory(3, projected=True)
        expected = read(model, tokens, [3, 6, 9], memory)[0]
    outputs = []
    for n, chunk in enumerate(tokens.split(3, dim=1)):
        with torch.inference_mode() if n % 2 else torch.no_grad():
            output, memory = model(chunk, memory)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=0)


def test_projected_memory_is_refused_in_training():
    model = make()
    memory = model.init_memory(3, projected=True)
    with pytest.raises(ValueError, match="found projected keys in training"):
        model.train()(draw_tokens(), memory)


def test_zeros_are_seen_and_emptiness_is_not():
    tokens = draw_tokens()
    empty, zeros = make(), make(initial_memory="zeros")
    assert_same(empty(tokens)[0], make(mem_len=0)(tokens)[0])
    assert not torch.allclose(empty(tokens)[0], zeros(tokens)[0], atol=1e-3)
    assert empty.init_memory(2).first.tolist() == [6, 6]
    assert zeros.init_memory(2).first.tolist() == [0, 0]


def test_memory_of_other_streams_or_sizes_is_refused():
    model = make()
    with pytest.raises(ValueError, match="memory: first: found 2 streams, expected 3 as tokens"):
        model(draw_tokens(streams=3), model.init_memory(2))
    with pytest.raises(ValueError, match=r"hidden: found shape \(3, 3, 9, 16\), expected \(3, 3, 6, 16\)"):
        model(draw_tokens(streams=3), make(mem_len=9).init_memory(3))
