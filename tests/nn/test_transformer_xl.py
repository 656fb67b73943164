"""Transformer-XL: initialisation, loss, options, tying, dropout and invalid arguments.

Its memory is specified in test_transformer_xl_memory.py.
"""

import copy

import pytest
import torch

from pytbptt.nn import TransformerXL, TransformerXLConfig
from tests.common.tiny_transformer_xl import V, make_model, random_tokens


def test_parameter_count_matches_published():
    with torch.device("meta"):
        model = TransformerXL(
            TransformerXLConfig(
                vocab_size=267744, n_layer=16, d_model=410, n_head=10, d_head=41, d_inner=2100, mem_len=150
            )
        )
    assert model.num_parameters() == 151_123_537


def test_initialization_statistics_match_original():
    torch.manual_seed(0)
    model = TransformerXL(
        TransformerXLConfig(vocab_size=400, n_layer=2, d_model=64, n_head=4, d_head=16, d_inner=128, d_embed=32)
    )
    for name, parameter in model.named_parameters():
        mean, std = (1.0, 0.02) if name.endswith("norm.weight") else (0.0, 0.02)
        if "projections" in name:
            std = 0.01
        if name.endswith((".bias", "biases.0")):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.mean() - mean) < 5 * std / parameter.numel() ** 0.5, name
            # The smallest of these tensors has 64 elements: the standard error of its standard deviation is 9 %.
            assert 0.6 * std < parameter.std() < 1.4 * std, name
    uniform = TransformerXL(TransformerXLConfig(vocab_size=400, n_layer=1, init="uniform", init_range=0.05))
    assert 0.049 < uniform.layers[0].attention.qkv_proj.weight.abs().max() <= 0.05


def test_loss_is_negative_log_prob_of_targets():
    model, tokens, targets = make_model(cutoffs=(5, 11)), random_tokens(), random_tokens(seed=2)
    targets[0, 3] = targets[2, 0] = -100
    log_prob = model.log_prob(model(tokens)[0])
    assert log_prob.shape == (3, 7, V)
    result, _ = model.loss(tokens, targets)
    scored = targets != -100
    expected = -log_prob[scored].gather(1, targets[scored].unsqueeze(1)).sum()
    torch.testing.assert_close(result.nll, expected.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(result.objective, expected / 19, rtol=0, atol=1e-12)
    assert (result.count.dtype, int(result.count), result.nll.requires_grad) == (torch.int64, 19, False)


def test_all_targets_ignored_gives_zero_loss():
    model = make_model(cutoffs=(5, 11), div_val=2)
    result, _ = model.loss(random_tokens(), torch.full((3, 7), -100))
    assert (float(result.objective.detach()), int(result.count)) == (0.0, 0)
    result.objective.backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_attention_is_causal():
    model, tokens = make_model(), random_tokens()
    output, _ = model(tokens)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert torch.equal(model(changed)[0][:, :5], output[:, :5])
    assert not torch.equal(model(changed)[0][:, 5:], output[:, 5:])


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"clamp_len": 2}, {"same_length": True}, {"div_val": 2}])
def test_options_affect_output_and_all_weights_get_gradients(changes):
    changes = {"cutoffs": (5, 11), **changes}
    model, tokens = make_model(**changes), random_tokens()
    default = make_model(cutoffs=(5, 11))
    if changes.get("div_val", 1) == 1:  # the same seed gives the same weights
        assert torch.equal(model(tokens)[0], default(tokens)[0]) == (len(changes) == 1)
    _, memory = model(tokens)
    model.loss(tokens, tokens, memory)[0].objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all((parameter.grad != 0).any() for name, parameter in model.named_parameters() if "layers" in name)


def test_clamp_len_changes_only_distances_beyond_it():
    tokens = random_tokens(length=9)
    unclamped = make_model(mem_len=0)(tokens)[0]
    # 9 tokens are at most 8 apart.
    torch.testing.assert_close(make_model(mem_len=0, clamp_len=8)(tokens)[0], unclamped, rtol=0, atol=1e-12)
    clamped = make_model(mem_len=0, clamp_len=4)(tokens)[0]
    torch.testing.assert_close(clamped[:, :5], unclamped[:, :5], rtol=0, atol=1e-12)
    assert ((clamped - unclamped)[:, 5:].abs() > 1e-4).any()


def test_untie_bias_false_shares_biases_between_layers():
    shared, untied = make_model(untie_bias=False), make_model()
    assert untied.num_parameters() - shared.num_parameters() == 2 * 2 * (2 * 5)
    assert shared.layers[0].attention.content_bias is shared.layers[2].attention.content_bias


def test_cutoffs_beyond_vocabulary_are_ignored():
    assert make_model(cutoffs=(20000, 40000, 200000)).num_parameters() == make_model().num_parameters()
    assert make_model(cutoffs=(5, V, 200)).softmax.edges == [0, 5, V]


def test_tied_weights_stay_tied():
    model = make_model(cutoffs=(5, 11), div_val=2)
    for copied in (model, copy.deepcopy(model), model.to(torch.float32)):
        assert all(a is b for a, b in zip(copied.embedding.weights, copied.softmax.weights, strict=True))
        # Only the tails share their projections with the embedding.
        shared = [a is b for a, b in zip(copied.embedding.projections, copied.softmax.projections, strict=True)]
        assert shared == [False, True, True]
    untied = make_model(cutoffs=(5, 11), tie_weights=False)
    assert untied.num_parameters() == make_model(cutoffs=(5, 11)).num_parameters() + V * 16
    untied_projections = make_model(cutoffs=(5, 11), div_val=2, proj_share_all_but_first=False)
    assert untied_projections.num_parameters() == make_model(cutoffs=(5, 11), div_val=2).num_parameters() + 16 * (8 + 4)


def test_dropout_acts_in_training_only():
    model, tokens = make_model(dropout=0.3, dropatt=0.3), random_tokens()
    assert torch.equal(model(tokens)[0], make_model()(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    torch.manual_seed(4)
    output = model(tokens)[0]
    torch.manual_seed(4)
    assert torch.equal(model(tokens)[0], output)
    dropped = (torch.stack([model(tokens)[0] for _ in range(20)]) == 0).double().mean().item()
    # 6720 elements with p = 0.3: the standard error is 0.006.
    assert abs(dropped - 0.3) < 0.03


@pytest.mark.parametrize("cutoffs", [(), (5, 11)])
def test_autocast_keeps_loss_and_memory_in_float32(cutoffs):
    model, tokens = make_model(dtype=torch.float32, cutoffs=cutoffs), random_tokens()
    expected, memory = model.loss(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        result, autocast_memory = model.loss(tokens, tokens)
        result, autocast_memory = model.loss(tokens, tokens, autocast_memory)
        result.objective.backward()
    expected, memory = model.loss(tokens, tokens, memory)
    assert (result.objective.dtype, result.nll.dtype) == (torch.float32, torch.float32)
    assert autocast_memory.hidden.dtype == memory.hidden.dtype == torch.float32
    # Measured: at most 0.002 over four seeds. The loss is about 4, and bfloat16 has 8 significant bits.
    assert abs(result.objective - expected.objective) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: found 0, expected at least 1"),
        ({"same_length": True, "mem_len": 0}, "same_length: found mem_len 0"),
        ({"d_model": 15}, "d_model: found 15, expected an even"),
        ({"dropatt": 1.0}, r"dropatt: found 1\.0"),
        ({"mem_len": -1}, "mem_len: found -1"),
        ({"initial_memory": "zero"}, "initial_memory: found 'zero', expected 'empty' or 'zeros'"),
        ({"init": "xavier"}, "init: found 'xavier', expected 'normal' or 'uniform'"),
        ({"cutoffs": (9, 5)}, r"cutoffs: found \(9, 5\), expected ascending"),
        ({"cutoffs": (5, 9), "div_val": 9}, "div_val: found 9"),
    ],
)
def test_invalid_config_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


@pytest.mark.parametrize(
    ("tokens", "reset", "message"),
    [
        (torch.zeros(3, 7), None, r"tokens: found torch.float32 \(3, 7\), expected torch.int64 \(B, T\)"),
        (torch.zeros(3, 0, dtype=torch.int64), None, "tokens: found .*at least one token"),
        (torch.full((1, 2), V), None, f"tokens: found id {V}, expected 0 to {V - 1}"),
        (torch.full((1, 2), -1), None, "tokens: found id -1"),
        (random_tokens(), torch.zeros(7, 3, dtype=torch.bool), r"reset: found torch.bool \(7, 3\), .*\(3, 7\)"),
        (random_tokens(), torch.zeros(3, 7), "reset: found torch.float32"),
    ],
)
def test_invalid_inputs_raise(tokens, reset, message):
    with pytest.raises(ValueError, match=message):
        make_model()(tokens, reset=reset)


def test_invalid_targets_raise():
    model, tokens = make_model(cutoffs=(5, 11)), random_tokens()
    with pytest.raises(ValueError, match=f"targets: found id {V}, expected 0 to {V - 1}"):
        model.loss(tokens, torch.full_like(tokens, V))
    with pytest.raises(ValueError, match=r"targets: found .*\(3, 6\), expected .*\(3, 7\)"):
        model.loss(tokens, tokens[:, 1:])
