"""torch.compile captures both models' loss, with memory and resets, in one graph."""

import pytest
import torch

from pytbptt.nn import AWDLSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig

MODELS = {
    "transformer_xl": lambda: TransformerXL(
        TransformerXLConfig(vocab_size=11, n_layer=2, d_model=8, n_head=2, d_head=5, d_inner=12, mem_len=6, dropatt=0.1)
    ),
    "awd_lstm": lambda: AWDLSTM(AWDLSTMConfig(vocab_size=11, d_embed=5, d_hidden=7, n_layer=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_compiled_loss_matches_eager(make_model):
    torch.manual_seed(0)
    model = make_model().eval()  # in training, compiled dropout uses other random numbers
    tokens, reset = torch.randint(11, (2, 15)), torch.rand(2, 15) < 0.2
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    objectives = []
    for loss in (model.loss, compiled):
        memory, objective = None, torch.zeros(())
        torch.manual_seed(1)
        for start in range(0, 15, 5):
            chunk = tokens[:, start : start + 5]
            result, memory = loss(chunk, chunk, memory, reset=reset[:, start : start + 5])
            objective = objective + result.objective
        objective.backward()
        objectives.append(objective)
    torch.testing.assert_close(*objectives, rtol=0, atol=1e-5)
