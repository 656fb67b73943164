"""A text's loss does not depend on how it was cut up, and counts every token once."""

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
from tests.recorded_graph import recorded  # noqa: F401 - a fixture

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def transformer(tokens: IndexedTokens, **changes: object) -> TransformerXL:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "d_model": 12, "n_head": 2, "d_head": 6, "d_inner": 16, "mem_len": 9, "init_std": 0.5}
    config = TransformerXLConfig(vocab_size=len(tokens.vocabulary), **{**sizes, **changes})  # type: ignore[arg-type]
    return TransformerXL(config).double()


def lstm(tokens: IndexedTokens) -> AWDLSTM:
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(vocab_size=len(tokens.vocabulary), d_embed=8, d_hidden=12, n_layer=2)).double()


def scored(model: TransformerXL | AWDLSTM, tokens: IndexedTokens, streams: int, bptt: int = 7, **more: object) -> Score:
    options = {"warm_up": model.warm_up(bptt), "reset_on": "auto", "distributed": ALONE, **more}
    return score(model, tokens, streams=streams, bptt=bptt, **options)  # type: ignore[arg-type]


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
def test_the_loss_is_the_same_for_any_number_of_streams(corpus: str, changes: dict[str, object]) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens, **changes)
    alone = scored(model, tokens, streams=1)
    assert alone.count == len(tokens)
    for streams in (2, 5, 64):
        together = scored(model, tokens, streams=streams)
        assert together.count == len(tokens)
        assert together.nll == pytest.approx(alone.nll, rel=1e-12)


@pytest.mark.parametrize("together", [1, 10, 10**9])
def test_the_loss_is_the_same_however_many_targets_are_scored_together(
    corpus: str, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    expected = scored(model, tokens, streams=3)
    monkeypatch.setattr(scoring, "SOFTMAX_BATCH_TOKENS", together)
    found = scored(model, tokens, streams=3)
    assert found.count == expected.count
    assert found.nll == pytest.approx(expected.nll, rel=1e-12)


@pytest.mark.parametrize("build", [lstm, lambda tokens: transformer(tokens, same_length=True, initial_memory="zeros")])
def test_chunks_are_read_together_where_that_changes_nothing(
    corpus: str, monkeypatch: pytest.MonkeyPatch, build: Callable[[IndexedTokens], TransformerXL | AWDLSTM]
) -> None:
    tokens = load(corpus, "test")
    model = build(tokens)
    assert chunk_length(model, bptt=7, streams=3) == 7 * 24
    together, resets = scored(model, tokens, streams=1), scored(model, tokens, streams=1, reset_on="</s>")
    monkeypatch.setattr(scoring, "MIN_CHUNK_TOKENS", 1)
    assert chunk_length(model, bptt=7, streams=3) == 7
    assert scored(model, tokens, streams=1).nll == pytest.approx(together.nll, rel=1e-12)
    assert scored(model, tokens, streams=1, reset_on="</s>").nll == pytest.approx(resets.nll, rel=1e-12)


def test_chunks_are_not_read_together_where_context_depends_on_them(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    assert chunk_length(model, bptt=7, streams=1) == 7
    assert scored(model, tokens, 1, bptt=7).nll != pytest.approx(scored(model, tokens, 1, bptt=14).nll, rel=1e-6)


def test_an_lstms_loss_comes_close_with_a_warm_up(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = lstm(tokens)
    alone, together = scored(model, tokens, streams=1), scored(model, tokens, streams=4, warm_up=200)
    assert together.count == alone.count == len(tokens)
    assert together.nll == pytest.approx(alone.nll, rel=1e-9)


def test_one_stream_is_one_long_call(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = lstm(tokens).eval()
    ids = torch.from_numpy(tokens[:].astype("int64"))
    inputs = torch.cat([torch.tensor([2]), ids[:-1]])
    with torch.no_grad():
        log_prob = model.log_prob(model(inputs.view(1, -1))[0])[0]
    expected = -log_prob.gather(1, ids.view(-1, 1)).sum().item()
    assert scored(model, tokens, streams=1).nll == pytest.approx(expected, rel=1e-12)


def test_resets_on_a_symbol_forget_what_came_before(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    by_line = scored(model, tokens, streams=1, bptt=1000, reset_on="</s>", warm_up=0)
    assert by_line.nll != pytest.approx(scored(model, tokens, streams=1, bptt=1000).nll, rel=1e-6)
    ids = torch.from_numpy(tokens[:].astype("int64"))
    model.eval()
    total = 0.0
    for line in ids.tensor_split((ids == 2).nonzero().squeeze(1) + 1):
        if len(line):
            inputs = torch.cat([torch.tensor([2]), line[:-1]])
            total += model.loss(inputs.view(1, -1), line.view(1, -1))[0].nll.item()
    assert by_line.nll == pytest.approx(total, rel=1e-12)


def test_ranks_add_up_to_one_process(corpus: str) -> None:
    tokens = load(corpus, "test")
    model = transformer(tokens)
    parts = []

    class Recording(DistributedContext):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values)
            return values

    for rank in range(3):
        scored(model, tokens, streams=5, distributed=Recording(rank, 3, torch.device("cpu")))
    nll, count, _ = torch.stack(parts).sum(dim=0).tolist()
    assert count == len(tokens)
    assert nll == pytest.approx(scored(model, tokens, streams=1).nll, rel=1e-12)


def test_scoring_leaves_the_models_mode_as_it_was(corpus: str) -> None:
    tokens = load(corpus, "valid")
    model = lstm(tokens)
    for mode in (True, False):
        model.train(mode)
        scored(model, tokens, streams=8)
        assert model.training is mode


@pytest.mark.parametrize("build", [transformer, lstm])
def test_greedy_text_is_what_the_model_finds_most_likely(corpus: str, build: object) -> None:
    tokens = load(corpus, "valid")
    model = build(tokens).eval()  # type: ignore[operator]
    if isinstance(model, TransformerXL):
        model = transformer(tokens, mem_len=64).eval()
    prompt = torch.from_numpy(tokens[:10].astype("int64"))
    text = [token for (token,) in generate(model, prompt, 12, temperature=0.0)]
    whole = torch.cat([prompt, torch.tensor(text)]).view(1, -1)
    with torch.no_grad():
        log_prob = model.log_prob(model(whole)[0])[0]
    log_prob[:, [0, 1]] = -math.inf
    assert text == log_prob[9:-1].argmax(dim=1).tolist()


def test_sampling_is_repeatable_and_heeds_its_limits(corpus: str) -> None:
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
def test_samples_side_by_side_are_what_each_is_alone(corpus: str, build: object) -> None:
    tokens = load(corpus, "valid")
    model = build(tokens).eval()  # type: ignore[operator]
    prompt = torch.from_numpy(tokens[:150].astype("int64"))  # more than one chunk

    def samples(*seeds: int) -> list[tuple[int, ...]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(zip(*generate(model, prompt, 30, generators=generators), strict=True))

    together = samples(3, 4, 5)
    assert together == [sample for seed in (3, 4, 5) for sample in samples(seed)]
    assert len(set(together)) == 3


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("kind", ["lstm", "transformer", "same_length", "cutoffs"])
def test_replayed_chunks_give_the_same_loss_to_the_bit(corpus: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that begin, resets within chunks, a short last chunk; and Python runs twice for each length."""
    monkeypatch.setattr(scoring, "SOFTMAX_BATCH_TOKENS", 50)
    tokens = load(corpus, "test")
    changes = {"same_length": {"same_length": True}, "cutoffs": {"cutoffs": (8, 20), "div_val": 2}}
    model = lstm(tokens) if kind == "lstm" else transformer(tokens, **changes.get(kind, {}))
    model.eval()
    asked, sums = [0], []
    model.register_forward_hook(lambda *_: asked.append(0))
    for graphed in (False, True):
        scorer = Scorer(model, ALONE.device)
        if graphed:
            scorer.graphed, scorer.forward = True, CUDAGraphRunner(scorer.forward, ALONE.device)
        asked.clear()
        with torch.no_grad():
            for chunk in evaluation_chunks(tokens, 5, 7, warm_up=21, reset_on="</s>"):
                scorer.read(chunk)
        sums.append(torch.stack(scorer.totals()))
    assert sums[0][1] == len(tokens)
    assert torch.equal(*sums)
    assert len(asked) <= 4
