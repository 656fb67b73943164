"""Models run on meta and fake tensors, and can be traced and exported: no shape depends on a tensor's values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pytbptt.nn import AWDLSTMConfig, TransformerXLConfig

CONFIGS = {
    "transformer_xl": TransformerXLConfig(
        vocab_size=31, n_layer=2, d_model=8, n_head=2, d_head=4, d_inner=12, mem_len=4, cutoffs=(7, 15), div_val=2
    ),
    "awd_lstm": AWDLSTMConfig(vocab_size=31, d_embed=5, d_hidden=7, n_layer=2, cutoffs=(7, 15)),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def initial_memories(model):
    yield model.init_memory(2)
    if isinstance(model.config, TransformerXLConfig):
        yield model.init_memory(2, projected=True)


@pytest.mark.parametrize("enable_grad", [True, False])
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_output_and_loss_shapes_of_two_chunks(config, device, enable_grad):
    with torch.device("meta") if device == "meta" else FakeTensorMode(), torch.set_grad_enabled(enable_grad):
        model = config.build().eval()
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        for memory in initial_memories(model):
            for _ in range(2):
                output, memory = model(tokens, memory, torch.zeros(2, 5, dtype=torch.bool))
            assert output.shape[:2] == (2, 5)
            assert model.log_prob(output).shape == (2, 5, 31)
            capacity = [3, 3] if device == "meta" else None
            result, _ = model.loss(tokens, tokens, memory, capacity=capacity)
            assert result.objective.shape == ()
            if enable_grad:
                result.objective.backward()
                assert all(parameter.grad is not None for parameter in model.parameters())


def test_exported_loss_is_correct_for_other_targets(config):
    """The number of targets in each tail differs from that of the example input."""
    model = config.build().eval()
    in_head, in_tail = torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), 20)
    exported = torch.export.export(model, (in_head, None, None, True, in_head)).module()
    traced = make_fx(lambda tokens: model.loss(tokens, tokens)[0].nll)(in_head)
    for tokens in (in_head, in_tail, torch.randint(31, (2, 5))):
        expected = model.loss(tokens, tokens)[0]
        torch.testing.assert_close(exported(tokens, None, None, True, tokens)[0].objective, expected.objective)
        torch.testing.assert_close(traced(tokens), expected.nll)
