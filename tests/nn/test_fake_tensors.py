"""Models run on tensors without values, and are traced and exported: nothing in them reads what it computes."""

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


def starts(model):
    yield model.init_memory(2)
    if isinstance(model.config, TransformerXLConfig):
        yield model.init_memory(2, projected=True)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_of_two_chunks_and_their_loss(config, kind, gradients):
    with torch.device("meta") if kind == "meta" else FakeTensorMode(), torch.set_grad_enabled(gradients):
        model = config.build().eval()
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        for memory in starts(model):
            for _ in range(2):
                output, memory = model(tokens, memory, torch.zeros(2, 5, dtype=torch.bool))
            assert output.shape[:2] == (2, 5)
            assert model.log_prob(output).shape == (2, 5, 31)
            capacity = [3, 3] if kind == "meta" else None
            result, _ = model.loss(tokens, tokens, memory, capacity=capacity)
            assert result.objective.shape == ()
            if gradients:
                result.objective.backward()
                assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_loss_of_an_exported_model_is_right_for_other_targets(config):
    """Which targets lie in a tail differs from call to call, and so do the sizes of what they take."""
    model = config.build().eval()
    few, many = torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), 20)
    exported = torch.export.export(model, (few, None, None, True, few)).module()
    traced = make_fx(lambda tokens: model.loss(tokens, tokens)[0].nll)(few)
    for tokens in (few, many, torch.randint(31, (2, 5))):
        expected = model.loss(tokens, tokens)[0]
        torch.testing.assert_close(exported(tokens, None, None, True, tokens)[0].objective, expected.objective)
        torch.testing.assert_close(traced(tokens), expected.nll)
