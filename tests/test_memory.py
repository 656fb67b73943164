"""pytbptt.memory's functions on the memory of every model."""

import io
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from pytbptt import memory as memories
from pytbptt.nn import AWDLSTM, AWDLSTMConfig, LSTMMemory, TransformerXL, TransformerXLConfig


def make_models():
    xl = TransformerXLConfig(vocab_size=11, n_layer=2, d_model=6, n_head=2, d_head=3, d_inner=8, mem_len=4)
    awd = AWDLSTMConfig(vocab_size=11, d_embed=5, d_hidden=7, n_layer=3)
    return TransformerXL(xl).eval(), AWDLSTM(awd).eval()


@pytest.fixture(params=["hidden", "projected", "lstm"])
def memory(request):
    """A memory of six streams with different tokens."""
    xl, awd = make_models()
    model = awd if request.param == "lstm" else xl
    start = xl.init_memory(6, projected=True) if request.param == "projected" else model.init_memory(6)
    return model(torch.randint(11, (6, 3)), start)[1]


def leaves(memory):
    return pytree.tree_leaves(memory)


def equal(memory, other):
    return all(torch.equal(a, b) for a, b in zip(leaves(memory), leaves(other), strict=True))


def test_split_and_concatenate_are_inverse(memory):
    groups = memories.split(memory, 2)
    assert [memories.num_streams(group) for group in groups] == [2, 2, 2]
    assert equal(memories.concatenate(groups), memory)


def test_select_gathers_streams_in_the_given_order(memory):
    selected = memories.select(memory, torch.tensor([5, 0, 0]))
    assert equal(memories.select(selected, slice(0, 1)), memories.select(memory, slice(5, 6)))
    assert equal(memories.select(selected, slice(2, 3)), memories.select(memory, slice(0, 1)))


def test_reset_changes_only_the_masked_streams(memory):
    initial = pytree.tree_map(lambda tensor: torch.full_like(tensor, 3), memory)
    streams = torch.tensor([True, False, False, True, False, False])
    reset = memories.reset(memory, initial, streams)
    for b in range(6):
        row = slice(b, b + 1)
        assert equal(memories.select(reset, row), memories.select(initial if streams[b] else memory, row))


def test_detach_cuts_the_graph():
    for model in make_models():
        _, memory = model(torch.randint(11, (2, 3)), detach=False)
        assert any(tensor.requires_grad for tensor in leaves(memory))
        assert not any(tensor.requires_grad for tensor in leaves(memories.detach(memory)))


def test_latest_keeps_last_n_entries(memory):
    latest = memories.latest(memory, 3)
    if isinstance(memory, LSTMMemory):
        assert equal(latest, memory)
    else:
        assert equal(replace(memory, first=latest.first), memory)
        assert all(torch.equal(a, b[:, :, -3:]) for a, b in zip(leaves(latest)[:-1], leaves(memory)[:-1], strict=True))
    assert equal(memories.latest(memory, 99), memory)


def test_memory_is_a_registered_pytree(memory):
    doubled = pytree.tree_map(lambda tensor: tensor * 2, memory)
    assert type(doubled) is type(memory)
    assert all(torch.equal(a, b * 2) for a, b in zip(leaves(doubled), leaves(memory), strict=True))


def test_state_dict_round_trip_with_weights_only_and_any_batch_size(memory):
    file = io.BytesIO()
    torch.save(memories.state_dict(memory), file)
    file.seek(0)
    template = memories.select(memory, slice(0, 1))
    assert equal(memories.load(template, torch.load(file, weights_only=True)), memory)


def test_loading_mismatched_state_names_the_difference(memory):
    state = memories.state_dict(memory)
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"memory: found tensors .*expected .*{name}"):
        memories.load(memory, {"other": state[name]})
    with pytest.raises(ValueError, match=rf"memory: {name}: found shape .*expected \(.*B"):
        memories.load(memory, state | {name: state[name][..., :-1]})
    last = list(state)[-1]
    with pytest.raises(ValueError, match=f"memory: {last}: found 2 streams, expected 6 as in {name}"):
        memories.load(memory, state | {last: state[last][:2]})


def test_inconsistent_numbers_of_streams_raise(memory):
    last = "c" if isinstance(memory, LSTMMemory) else "first"
    fewer = getattr(memories.select(memory, slice(0, 2)), last)
    with pytest.raises(ValueError, match="expected the same number"):
        memories.num_streams(replace(memory, **{last: fewer}))
    with pytest.raises(ValueError, match="found 6 streams, expected a multiple of 4"):
        memories.split(memory, 4)
    with pytest.raises(ValueError, match="found no memory"):
        memories.concatenate([])
    with pytest.raises(ValueError, match=r"streams: found torch.int64 \(6,\), expected torch.bool \(6,\)"):
        memories.reset(memory, memory, torch.zeros(6, dtype=torch.int64))


def test_saved_memory_loads_with_weights_only(memory):
    file = io.BytesIO()
    torch.save({"memory": memory, "step": 3}, file)
    file.seek(0)
    loaded = torch.load(file)["memory"]
    assert type(loaded) is type(memory)
    assert equal(loaded, memory)


def test_treespec_can_be_serialized(memory):
    structure = pytree.tree_structure({"memory": memory})
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


@pytest.mark.parametrize("name", ["transformer_xl", "awd_lstm"])
def test_exported_program_with_memory_survives_save_and_load(name):
    model = dict(zip(("transformer_xl", "awd_lstm"), make_models(), strict=True))[name]
    tokens, reset, memory = torch.randint(11, (2, 5)), torch.rand(2, 5) < 0.3, model.init_memory(2)
    arguments = (tokens, memory, reset, True, tokens)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, arguments), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for _ in range(2):
        (result, memory), (expected, expected_memory) = loaded(*arguments), model(*arguments)
        torch.testing.assert_close(result.nll, expected.nll)
        assert equal(memory, expected_memory)
        arguments = (tokens, memory, reset, True, tokens)


def test_wrong_memory_type_or_dtype_raises():
    xl, awd = make_models()
    tokens = torch.randint(11, (2, 3))
    cases = [
        (xl, awd.init_memory(2), "TransformerXL: memory: found LSTMMemory, expected TransformerXLMemory or Projected"),
        (awd, xl.init_memory(2), "AWDLSTM: memory: found TransformerXLMemory, expected LSTMMemory$"),
        (xl, (xl.init_memory(2),), "TransformerXL: memory: found tuple, expected"),
        (
            xl,
            xl.init_memory(2, dtype=torch.bfloat16),
            "memory: hidden: found torch.bfloat16, expected torch.float32 as",
        ),
        (awd, awd.init_memory(2, dtype=torch.float64), "memory: h.0: found torch.float64, expected torch.float32 as"),
        (awd, replace(awd.init_memory(2), c=awd.init_memory(2, dtype=torch.float64).c), "c.0: found torch.float64"),
        (xl, replace(xl.init_memory(2), first=torch.zeros(2)), "first: found torch.float32, expected torch.int32"),
        (
            xl,
            xl.init_memory(2, dtype=torch.float16, projected=True),
            "memory: key: found torch.float16, expected torch.float32",
        ),
    ]
    for model, memory, message in cases:
        with pytest.raises(ValueError, match=message):
            model(tokens, memory)
    with torch.autocast("cpu", torch.bfloat16):
        xl(tokens, xl.init_memory(2, dtype=torch.bfloat16))


def test_to_moves_all_tensors(memory):
    assert all(tensor.device.type == "meta" for tensor in leaves(memories.to(memory, "meta")))
