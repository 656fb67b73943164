"""benchmarks.end_to_end counts a model's operations and attributes time to its parts."""

import pytest
import torch
from torch import nn

from benchmarks.end_to_end import EndToEndSettings, cases, model_flops
from benchmarks.peers.cases import Case
from benchmarks.peers.parts import OTHER, mark, seconds_by_part
from pytbptt.ops.extension import EXTENSION

V, E, D, INNER, M, T, B = 11, 8, 3, 12, 6, 5, 2


def make_case(arch, **sizes):
    work = {"warm_up": 0, "chunks": 1, "ours": ("train",), "theirs": {"train": None}}
    return Case("tiny", "", arch, V, sizes, batch_size=B, bptt=T, **work)


needs_kernels = pytest.mark.skipif(
    EXTENSION.facts is None, reason=f"no compiled extension: {EXTENSION.unavailable_reason}"
)


@needs_kernels
def test_model_flops_of_transformer_xl_match_its_products():
    sizes = {"n_layer": 2, "d_model": E, "n_head": 2, "d_head": D, "d_inner": INNER, "mem_len": M}
    width, tokens = 2 * D, B * T
    projections = tokens * E * 3 * width + tokens * width * E + B * M * E * 2 * width + (M + T) * E * width
    attention = 3 * width * B * sum(M + i + 1 for i in range(T))
    layer = projections + attention + 2 * tokens * E * INNER
    assert model_flops(make_case("transformer_xl", **sizes)) == 2 * (2 * layer + tokens * E * V) / tokens


@needs_kernels
def test_model_flops_of_awd_lstm_match_its_products():
    flops = model_flops(make_case("awd_lstm", n_layer=1, d_embed=E))
    assert flops == 2 * (E * 4 * E + E * 4 * E + E * V)


def test_profiler_attributes_backward_time_to_forward_module():
    """Nearly all time is spent in the large layer, two thirds of it in the backward pass, outside of the ranges."""
    torch.manual_seed(0)
    large, small = nn.Linear(600, 600), nn.Linear(600, 1)
    mark([(large, "forward", "large"), (small, "forward", "small")])
    rows = torch.randn(2000, 600, requires_grad=True)

    def forward_and_backward() -> None:
        small(large(rows)).sum().backward()

    forward_and_backward()
    parts = seconds_by_part(forward_and_backward)
    assert set(parts) == {"large", "small", OTHER}
    assert parts["large"] > 0.6 * sum(parts.values())


def test_benchmark_cases_match_presets():
    train, evaluation = cases("wt103-base", EndToEndSettings(), "cpu")
    assert (train.bptt, train.sizes["mem_len"], train.sizes["same_length"]) == (150, 150, False)
    assert (evaluation.bptt, evaluation.sizes["mem_len"], evaluation.sizes["clamp_len"]) == (64, 640, 400)
    assert train.trained
    assert not evaluation.trained
