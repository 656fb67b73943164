"""Transformer-XL's memory: carried from chunk to chunk, cleared by resets, separate for each stream, never modified."""

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch

from pytbptt import memory as memories
from pytbptt.nn import ProjectedMemory
from tests.common.tiny_transformer_xl import V, make_model, random_tokens

CONFIGS = [{}, {"pre_norm": True}, {"clamp_len": 3}, {"untie_bias": False, "div_val": 2, "cutoffs": (5, 11)}]


def run_chunks(model, tokens, edges=(), memory=None, reset=None):
    """The outputs of chunks cut at `edges`, concatenated, and the final memory."""
    outputs, bounds = [], [0, *edges, tokens.shape[1]]
    for start, end in pairwise(bounds):
        chunk_reset = None if reset is None else reset[:, start:end]
        output, memory = model(tokens[:, start:end], memory, chunk_reset)
        outputs.append(output)
    return torch.cat(outputs, dim=1), memory


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", CONFIGS)
def test_chunks_equal_one_long_sequence_if_memory_covers_history(changes):
    model, tokens = make_model(mem_len=30, **changes), random_tokens(length=25)
    expected, expected_memory = run_chunks(model, tokens)
    for edges in ([5, 6, 13], [1], range(1, 25)):
        found, memory = run_chunks(model, tokens, edges)
        assert_close(found, expected)
        assert_close(memory.hidden, expected_memory.hidden)
        assert torch.equal(memory.first, expected_memory.first)


@pytest.mark.parametrize("changes", CONFIGS)
def test_chunks_equal_one_long_sequence_with_same_length(changes):
    model, tokens = make_model(mem_len=4, same_length=True, **changes), random_tokens(length=25)
    reset = torch.rand(3, 25, generator=torch.Generator().manual_seed(3)) < 0.1
    for flags in (None, reset):
        expected, _ = run_chunks(model, tokens, reset=flags)
        for edges in ([5, 6, 13, 20], [2, 4], range(1, 25)):
            assert_close(run_chunks(model, tokens, edges, reset=flags)[0], expected)


def test_same_length_has_no_effect_if_window_covers_history():
    tokens = random_tokens(length=7)
    assert_close(make_model(mem_len=7, same_length=True)(tokens)[0], make_model(mem_len=7)(tokens)[0])
    difference = make_model(mem_len=6, same_length=True)(tokens)[0] - make_model(mem_len=6)(tokens)[0]
    assert (difference[:, :6].abs() < 1e-12).all()
    assert (difference[:, 6].abs() > 1e-4).any()


def test_gradients_without_detach_equal_one_long_sequence():
    model, tokens = make_model(mem_len=12), random_tokens(length=10)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model.loss(tokens, tokens)[0].objective, parameters)
    objective, memory = torch.zeros((), dtype=torch.float64), None
    for chunk in tokens.split(5, dim=1):
        result, memory = model.loss(chunk, chunk, memory, detach=False)
        objective = objective + result.objective / 2
    torch.testing.assert_close(torch.autograd.grad(objective, parameters), expected, rtol=0, atol=1e-12)


def test_memory_is_detached_at_chunk_boundary():
    model = make_model(tie_weights=False)
    _, memory = model(torch.full((2, 5), 3))
    assert not memory.hidden.requires_grad
    model(torch.full((2, 5), 4), memory)[0].sum().backward()
    assert (model.embedding.weights[0].grad[3] == 0).all()
    assert (model.embedding.weights[0].grad[4] != 0).any()


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"initial_memory": "zeros"}])
@pytest.mark.parametrize(("mem_len", "edges"), [(6, [4, 8, 12]), (3, [5, 11]), (9, [1, 2, 3]), (0, [7])])
def test_reset_equals_fresh_start_with_same_later_chunks(changes, mem_len, edges):
    model, tokens = make_model(mem_len=mem_len, **changes), random_tokens(streams=2, length=14)
    # A reset empties the memory also with initial_memory="zeros", which applies to the start of a stream only.
    fresh_model = make_model(mem_len=mem_len, **{**changes, "initial_memory": "empty"})
    without_reset, _ = run_chunks(model, tokens, edges)
    for step in range(14):
        reset = torch.zeros(2, 14, dtype=torch.bool)
        reset[0, step] = True
        found, memory = run_chunks(model, tokens, edges, reset=reset)
        fresh, fresh_memory = run_chunks(fresh_model, tokens[:, step:], [edge - step for edge in edges if edge > step])
        assert_close(found[0, step:], fresh[0])
        assert memory.first[0] == fresh_memory.first[0]
        assert_close(found[0, :step], without_reset[0, :step])
        assert_close(found[1], without_reset[1])


def test_reset_equals_fresh_start_with_same_length():
    model, tokens = make_model(mem_len=4, same_length=True), random_tokens(streams=1, length=19)
    for step in range(19):
        reset = torch.zeros(1, 19, dtype=torch.bool)
        reset[0, step] = True
        assert_close(
            run_chunks(model, tokens, [3, 9, 15], reset=reset)[0][:, step:], run_chunks(model, tokens[:, step:])[0]
        )


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"same_length": True}, {"initial_memory": "zeros"}])
@pytest.mark.parametrize("projected", [False, True])
def test_reset_hides_previous_document(changes, projected):
    """The memory (6) is longer than the chunks (3), so that a reset must affect later chunks, too."""
    model, tokens = make_model(mem_len=6, **changes), random_tokens(streams=2, length=15)
    for step in range(1, 15):
        reset = torch.zeros(2, 15, dtype=torch.bool)
        reset[:, step] = True
        outputs = []
        for shift in (0, 1):
            previous = (tokens + shift) % V
            document = torch.cat([previous[:, :step], tokens[:, step:]], dim=1)
            memory = model.init_memory(2, projected=projected)
            outputs.append(run_chunks(model, document, [3, 6, 9, 12], memory, reset)[0][:, step:])
        assert torch.equal(*outputs)


def test_each_of_several_resets_in_a_chunk_starts_a_document():
    model, tokens = make_model(), random_tokens(streams=1, length=8)
    reset = torch.tensor([[False, True, False, False, True, True, False, False]])
    found, _ = model(tokens, reset=reset)
    for start, end in ((0, 1), (1, 4), (4, 5), (5, 8)):
        assert_close(found[:, start:end], model(tokens[:, start:end])[0])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("mem_len", [0, 4, 7, 9])
def test_memory_shape_and_dtype_are_constant(mem_len, projected):
    model = make_model(mem_len=mem_len)
    memory = model.init_memory(2, projected=projected)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in memories.state_dict(memory).items()}
    num_tokens = 0
    for length in (1, 7, 4, 2, 9):
        _, memory = model(random_tokens(streams=2, length=length), memory)
        num_tokens += length
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in memories.state_dict(memory).items()} == shapes
        assert memory.first.tolist() == [max(0, mem_len - num_tokens)] * 2


def test_memory_holds_last_inputs_of_every_layer():
    model, tokens = make_model(mem_len=5), random_tokens(length=12)
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _, memory = run_chunks(model, tokens, [3])
    for n, hidden in enumerate(memory.hidden):
        first, second = inputs[n], inputs[len(model.layers) + n]
        assert torch.equal(hidden, torch.cat([first, second], dim=1)[:, -5:])


@pytest.mark.parametrize("changes", [{}, {"cutoffs": (5, 11), "div_val": 2}])
def test_streams_are_independent(changes):
    model, tokens = make_model(**changes), random_tokens(length=15)
    reset = torch.zeros(3, 15, dtype=torch.bool)
    reset[1, 8] = True
    batched, batched_memory = run_chunks(model, tokens, [4, 8], reset=reset)
    for b in range(3):
        row = slice(b, b + 1)
        single, single_memory = run_chunks(model, tokens[row], [4, 8], reset=reset[row])
        assert_close(batched[row], single)
        assert_close(memories.select(batched_memory, row).hidden, single_memory.hidden)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % V
    others = run_chunks(model, changed, [4, 8], reset=reset)[0][[0, 2]]
    assert_close(others, batched[[0, 2]])


@pytest.mark.parametrize("changes", [*CONFIGS, {"initial_memory": "zeros", "pre_norm": True}, {"same_length": True}])
def test_projected_memory_matches_hidden_memory(changes):
    model, tokens = make_model(**changes), random_tokens(length=20)
    if model.config.pre_norm:
        for layer in model.layers:
            torch.nn.init.normal_(layer.attention_norm.bias)
    reset = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.1
    edges = [2, 10, 11, 17]
    with torch.no_grad():
        found, memory = run_chunks(model, tokens, edges, model.init_memory(3, projected=True), reset)
        expected, _ = run_chunks(model, tokens, edges, reset=reset)
    assert isinstance(memory, ProjectedMemory)
    assert_close(found, expected)


def test_projected_memory_is_immutable():
    """Consecutive memories share storage, which a chunk that continues one of them must not overwrite."""
    model, tokens = make_model(mem_len=7).eval(), random_tokens(streams=3, length=40)
    with torch.no_grad():
        projected, copies = [model.init_memory(3, projected=True)], []
        for chunk in tokens.split(3, dim=1):
            copies.append(copy.deepcopy(projected[-1]))
            projected.append(model(chunk, projected[-1])[1])
        for memory, before in zip(projected, copies, strict=False):
            assert all(torch.equal(getattr(memory, name), getattr(before, name)) for name in ("key", "value", "first"))
        other = tokens.flip(1)
        for memory, before in zip(projected[3:6], copies[3:6], strict=True):
            assert torch.equal(model(other[:, :3], memory)[0], model(other[:, :3], before)[0])
            branches = [model(chunk, memory)[1] for chunk in (tokens[:, :3], other[:, :3])]
            found = [model(tokens[:, 3:6], branch)[0] for branch in branches]
            expected = [model(tokens[:, 3:6], model(chunk, before)[1])[0] for chunk in (tokens[:, :3], other[:, :3])]
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_projected_memory_is_thread_safe():
    model, streams, threads = make_model(mem_len=9).eval(), 2, 4
    with torch.no_grad():
        memory = model.init_memory(streams, projected=True)
        for _ in range(2):  # so that the memory is in a buffer with space for the next chunks
            _, memory = model(random_tokens(streams, 2), memory)
        continuations = [random_tokens(streams, 30, seed) for seed in range(threads)]
        expected = [run_chunks(model, tokens, range(1, 30), copy.deepcopy(memory))[0] for tokens in continuations]
        found = [None] * threads
        barrier = threading.Barrier(threads)

        def continue_from_memory(n):
            with torch.no_grad():
                barrier.wait()
                found[n] = run_chunks(model, continuations[n], range(1, 30), memory)[0]

        for _ in range(10):
            running = [threading.Thread(target=continue_from_memory, args=(n,)) for n in range(threads)]
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_cached_projections_are_reused_and_optional(monkeypatch):
    """The projected distances, which are most of the work for a single token, and the buffer of keys and values."""
    model, tokens = make_model(mem_len=9).eval(), random_tokens(2, 12)
    projections = []
    for layer in model.layers:
        layer.attention.pos_proj.register_forward_hook(lambda *call: projections.append(call[2]))
    with torch.no_grad():
        expected, _ = run_chunks(model, tokens, range(1, 12))
        projections.clear()
        found, memory = run_chunks(model, tokens, range(1, 12), model.init_memory(2, projected=True))
        assert_close(found, expected)
        assert len(projections) == len(model.layers)
        for copied in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), memories.select(memory, slice(0, 2))):
            assert torch.equal(model(tokens, copied)[0], model(tokens, memory)[0])
        # Under CUDA-graph capture nothing is reused: the graph would read cached tensors after they are freed.
        monkeypatch.setattr("pytbptt.nn.transformer_xl.is_tracing_or_capturing", lambda tensor: True)
        projections.clear()
        _, next_memory = model(tokens[:, :1], memory)
        assert len(projections) == len(model.layers)
        model(tokens[:, :1], next_memory)
        assert len(projections) == 2 * len(model.layers)


def test_distance_cache_is_keyed_by_autocast():
    model, tokens = make_model(mem_len=9, dtype=torch.float32).eval(), random_tokens(2, 4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _, memory = model(tokens, model.init_memory(2, projected=True))
        expected = model(tokens, copy.deepcopy(memory))[0]
        assert torch.equal(model(tokens, memory)[0], expected)


def test_projected_memory_works_across_inference_mode():
    model, tokens = make_model(mem_len=7).eval(), random_tokens(streams=3, length=12)
    with torch.no_grad():
        memory = model.init_memory(3, projected=True)
        expected = run_chunks(model, tokens, [3, 6, 9], memory)[0]
    outputs = []
    for n, chunk in enumerate(tokens.split(3, dim=1)):
        with torch.inference_mode() if n % 2 else torch.no_grad():
            output, memory = model(chunk, memory)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=0)


def test_projected_memory_in_training_raises():
    model = make_model()
    memory = model.init_memory(3, projected=True)
    with pytest.raises(ValueError, match="found projected keys in training"):
        model.train()(random_tokens(), memory)


def test_initial_memory_zeros_vs_empty():
    tokens = random_tokens()
    empty, zeros = make_model(), make_model(initial_memory="zeros")
    assert_close(empty(tokens)[0], make_model(mem_len=0)(tokens)[0])
    assert not torch.allclose(empty(tokens)[0], zeros(tokens)[0], atol=1e-3)
    assert empty.init_memory(2).first.tolist() == [6, 6]
    assert zeros.init_memory(2).first.tolist() == [0, 0]


def test_memory_with_wrong_shape_raises():
    model = make_model()
    with pytest.raises(ValueError, match="memory: first: found 2 streams, expected 3 as tokens"):
        model(random_tokens(streams=3), model.init_memory(2))
    with pytest.raises(ValueError, match=r"hidden: found shape \(3, 3, 9, 16\), expected \(3, 3, 6, 16\)"):
        model(random_tokens(streams=3), make_model(mem_len=9).init_memory(3))
