"""Evaluation loss and generation: independent of streams, chunks and ranks; equal to plain forward passes."""

import math
from collections.abc import Callable

import pytest
import torch

from pytbptt.data import IndexedTokens, evaluation_chunks, load
from pytbptt.evaluation import scoring
from pytbptt.evaluation.generation import generate
from pytbptt.evaluation.scoring import Score, Scorer, chunk_length, score
from pytbptt.nn import AWDLSTM, AWDLSTMConfig, TransformerXL, TransformerXLConfig
from pytbptt.runtime.cuda_graph import CUDAGraphRunner
from pytbptt.runtime.distributed import DistributedContext

SINGLE_PROCESS = DistributedContext(0, 1, torch.device("cpu"))


def transformer(tokens: IndexedTokens, **changes: object) -> TransformerXL:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "d_model": 12, "n_head": 2, "d_head": 6, "d_inner": 16, "mem_len": 9, "init_std": 0.5}
    config = TransformerXLConfig(vocab_size=len(tokens.vocabulary), **{**sizes, **changes})  # type: ignore[arg-type]
    return TransformerXL(config).double()


def lstm(tokens: IndexedTokens) -> AWDLSTM:
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(vocab_size=len(tokens.vocabulary), d_embed=8, d_hidden=12, n_layer=2)).double()


def score_tokens(
    model: TransformerXL | AWDLSTM, tokens: IndexedTokens, streams: int, bptt: int = 7, **options: object
) -> Score:
    arguments = {"warm_up": model.warm_up(bptt), "reset_on": "auto", "distributed": SINGLE_PROCESS, **options}
    return score(model, tokens, streams=streams, bptt=bptt, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"same_length": True},
        {"initial_memory": "zeros"},
        {"initial_memory": "zeros", "pre_norm": True, "same_length": True},
        {"clamp_len": 4},
        {"mem_len": 0},
        {"mem_len": 3},
    ],
)
def test_loss_does_not_depend_on_number_of_streams(corpus: str, changes: dict[str, object]) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens, **changes)
    expected = score_tokens(model, tokens, streams=1)
    assert expected.count == len(tokens)
    for streams in (2, 5, 64):
        actual = score_tokens(model, tokens, streams=streams)
        assert actual.count == len(tokens)
        assert actual.nll == pytest.approx(expected.nll, rel=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 10, 10**9])
def test_loss_does_not_depend_on_softmax_batch_size(
    corpus: str, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    expected = score_tokens(model, tokens, streams=3)
    monkeypatch.setattr(scoring, "SOFTMAX_BATCH_TOKENS", batch_tokens)
    actual = score_tokens(model, tokens, streams=3)
    assert actual.count == expected.count
    assert actual.nll == pytest.approx(expected.nll, rel=1e-12)


@pytest.mark.parametrize("build", [lstm, lambda tokens: transformer(tokens, same_length=True, initial_memory="zeros")])
def test_chunk_merging_keeps_loss(
    corpus: str, monkeypatch: pytest.MonkeyPatch, build: Callable[[IndexedTokens], TransformerXL | AWDLSTM]
) -> None:
    tokens = load(corpus, "test")
    model = build(tokens)
    assert chunk_length(model, bptt=7, streams=3) == 7 * 24
    merged = score_tokens(model, tokens, streams=1)
    merged_with_resets = score_tokens(model, tokens, streams=1, reset_on="</s>")
    monkeypatch.setattr(scoring, "MIN_CHUNK_TOKENS", 1)
    assert chunk_length(model, bptt=7, streams=3) == 7
    assert score_tokens(model, tokens, streams=1).nll == pytest.approx(merged.nll, rel=1e-12)
    assert score_tokens(model, tokens, streams=1, reset_on="</s>").nll == pytest.approx(
        merged_with_resets.nll, rel=1e-12
    )


def test_chunks_are_not_merged_if_context_would_change(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    assert chunk_length(model, bptt=7, streams=1) == 7
    assert score_tokens(model, tokens, 1, bptt=7).nll != pytest.approx(
        score_tokens(model, tokens, 1, bptt=14).nll, rel=1e-6
    )


def test_lstm_loss_converges_with_warm_up(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = lstm(tokens)
    expected, actual = score_tokens(model, tokens, streams=1), score_tokens(model, tokens, streams=4, warm_up=200)
    assert actual.count == expected.count == len(tokens)
    assert actual.nll == pytest.approx(expected.nll, rel=1e-9)


def test_single_stream_loss_equals_one_forward(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = lstm(tokens).eval()
    ids = torch.from_numpy(tokens[:].astype("int64"))
    inputs = torch.cat([torch.tensor([2]), ids[:-1]])
    with torch.no_grad():
        log_prob = model.log_prob(model(inputs.view(1, -1))[0])[0]
    expected = -log_prob.gather(1, ids.view(-1, 1)).sum().item()
    assert score_tokens(model, tokens, streams=1).nll == pytest.approx(expected, rel=1e-12)


def test_reset_symbol_clears_memory(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    with_resets = score_tokens(model, tokens, streams=1, bptt=1000, reset_on="</s>", warm_up=0)
    assert with_resets.nll != pytest.approx(score_tokens(model, tokens, streams=1, bptt=1000).nll, rel=1e-6)
    ids = torch.from_numpy(tokens[:].astype("int64"))
    model.eval()
    expected = 0.0
    for line in ids.tensor_split((ids == 2).nonzero().squeeze(1) + 1):
        if len(line):
            inputs = torch.cat([torch.tensor([2]), line[:-1]])
            expected += model.loss(inputs.view(1, -1), line.view(1, -1))[0].nll.item()
    assert with_resets.nll == pytest.approx(expected, rel=1e-12)


def test_sharded_evaluation_sums_to_total(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    parts = []

    class Recording(DistributedContext):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values)
            return values

    for rank in range(3):
        score_tokens(model, tokens, streams=5, distributed=Recording(rank, 3, torch.device("cpu")))
    nll, count, _ = torch.stack(parts).sum(dim=0).tolist()
    assert count == len(tokens)
    assert nll == pytest.approx(score_tokens(model, tokens, streams=1).nll, rel=1e-12)


def test_scoring_restores_training_mode(corpus: str) -> None:
    tokens = load(corpus, "valid")
    model = lstm(tokens)
    for mode in (True, False):
        model.train(mode)
        score_tokens(model, tokens, streams=8)
        assert model.training is mode


@pytest.mark.parametrize("build", [transformer, lstm])
def test_greedy_generation_takes_most_probable_tokens(corpus: str, build: object) -> None:
    tokens = load(corpus, "valid")
    model = build(tokens).eval()  # type: ignore[operator]
    if isinstance(model, TransformerXL):
        model = transformer(tokens, mem_len=64).eval()
    prompt = torch.from_numpy(tokens[:10].astype("int64"))
    text = [token for (token,) in generate(model, prompt, 12, temperature=0.0)]
    ids = torch.cat([prompt, torch.tensor(text)]).view(1, -1)
    with torch.no_grad():
        log_prob = model.log_prob(model(ids)[0])[0]
    log_prob[:, [0, 1]] = -math.inf
    assert text == log_prob[9:-1].argmax(dim=1).tolist()


def test_sampling_is_reproducible_and_respects_top_k_and_top_p(corpus: str) -> None:
    tokens = load(corpus, "valid")
    model = lstm(tokens).eval()
    prompt = torch.tensor([2])

    def sample(**options: float) -> list[int]:
        generators = [torch.Generator().manual_seed(5)]
        ids = generate(model, prompt, 40, generators=generators, **options)  # type: ignore[arg-type]
        return [token for (token,) in ids]

    assert sample() == sample()
    assert sample(top_k=1) == sample(temperature=0.0) == sample(top_p=1e-9)
    assert len(set(sample(temperature=50.0))) > len(set(sample(temperature=0.01)))
    assert not {0, 1} & set(sample(temperature=50.0))


@pytest.mark.parametrize("build", [transformer, lstm])
def test_batched_sampling_equals_single(corpus: str, build: object) -> None:
    tokens = load(corpus, "valid")
    model = build(tokens).eval()  # type: ignore[operator]
    prompt = torch.from_numpy(tokens[:150].astype("int64"))  # more than one chunk

    def samples(*seeds: int) -> list[tuple[int, ...]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(zip(*generate(model, prompt, 30, generators=generators), strict=True))

    batched = samples(3, 4, 5)
    assert batched == [sample for seed in (3, 4, 5) for sample in samples(seed)]
    assert len(set(batched)) == 3


@pytest.mark.usefixtures("fake_cuda_graphs")
@pytest.mark.parametrize("kind", ["lstm", "transformer", "same_length", "cutoffs"])
def test_graphed_loss_bitwise_equals_eager(corpus: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With late stream starts, resets within chunks and a short last chunk; two forward calls for each length."""
    monkeypatch.setattr(scoring, "SOFTMAX_BATCH_TOKENS", 50)
    tokens = load(corpus, "test")
    changes = {"same_length": {"same_length": True}, "cutoffs": {"cutoffs": (8, 20), "div_val": 2}}
    model = lstm(tokens) if kind == "lstm" else transformer(tokens, **changes.get(kind, {}))
    model.eval()
    forward_calls, totals = [0], []
    model.register_forward_hook(lambda *_: forward_calls.append(0))
    for graphed in (False, True):
        scorer = Scorer(model, SINGLE_PROCESS.device)
        if graphed:
            scorer.uses_cuda_graph, scorer.forward = True, CUDAGraphRunner(scorer.forward, SINGLE_PROCESS.device)
        forward_calls.clear()
        with torch.no_grad():
            for chunk in evaluation_chunks(tokens, 5, 7, warm_up=21, reset_on="</s>"):
                scorer.read(chunk)
        totals.append(torch.stack(scorer.totals()))
    assert totals[0][1] == len(tokens)
    assert torch.equal(*totals)
    assert len(forward_calls) <= 4
