"""Every token's log-probability is the model's, whichever way the text is cut up and listed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.data import Vocabulary, load
from pytbptt.evaluation.log_probs import encode_lines, find_resets, log_probs
from pytbptt.nn import TransformerXL, TransformerXLConfig
from pytbptt.nn.language_model import LanguageModel
from tests.conftest import Program

SIZES = {"n_layer": 2, "d_model": 12, "n_head": 2, "d_head": 6, "d_inner": 16, "init_std": 0.5}
TEXT = "w1 w2 unseen\n\nw3\r\nw4 w5 w1 w7"


def transformer(vocabulary: Vocabulary, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    options = {**SIZES, "mem_len": 40, "cutoffs": (7, 20), "div_val": 2, **changes}
    return TransformerXLConfig(vocab_size=len(vocabulary), **options).build().eval()  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(corpus: str, tmp_path: Path) -> Path:
    vocabulary = load(corpus, "test").vocabulary
    checkpoints.write(tmp_path / "model.pt", checkpoints.weights_only_checkpoint(transformer(vocabulary), vocabulary))
    (tmp_path / "text.txt").write_text(TEXT, newline="")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("bptt", [1, 3, 100])
def test_each_token_has_the_log_probability_that_the_model_gives_it(corpus: str, bptt: int) -> None:
    vocabulary = load(corpus, "test").vocabulary
    model = transformer(vocabulary).double()
    lines = [vocabulary.encode(text) for text in ("w1 w2\n", "\n", "w30 w31 w32 w33\n", "w5\n")]
    found = list(log_probs(model, lines, bptt, None))
    assert [len(values) for values in found] == [3, 1, 5, 2]
    ids = torch.from_numpy(np.concatenate(lines))
    with torch.no_grad():
        whole = model.log_prob(model(torch.cat([torch.tensor([2]), ids[:-1]]).view(1, -1))[0])[0]
    expected = whole.gather(1, ids.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(
        torch.cat([torch.tensor(values, dtype=torch.float64) for values in found]), expected, rtol=0, atol=1e-12
    )


def test_with_resets_lines_have_nothing_to_do_with_each_other(corpus: str) -> None:
    vocabulary = load(corpus, "test").vocabulary
    model = transformer(vocabulary).double()
    lines = [vocabulary.encode(text) for text in ("w1 w2\n", "w30 w31 w32 w33\n", "w5\n")]
    resets = find_resets(lines, [True] * 3, "document", vocabulary)
    assert resets is not None
    together = list(log_probs(model, lines, 4, resets))
    for line, values in zip(lines, together, strict=True):
        assert next(log_probs(model, [line], 100, None)) == pytest.approx(values, abs=1e-12)


def test_lines_end_as_they_do_in_preparation(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one two\r\n\ntwo")
    words = Vocabulary(["one", "two"], [1, 1])
    assert [line.tolist() for line in encode_lines(tmp_path / "text", words)[0]] == [[4, 5, 2], [2], [5, 2]]
    lines, ends, _ = encode_lines(tmp_path / "text", Vocabulary.bytes())
    assert [*np.concatenate(lines)[:-1] - 4, lines[-1][-1]] == [*b"one two\r\n\ntwo", Vocabulary.EOS]
    assert ends == [False, False, True]
    assert len(lines) == 3


def test_tables_and_objects_say_the_same(checkpoint: Path, program: Program) -> None:
    outputs = {}
    for per in ("line", "token"):
        for form in ("tsv", "json"):
            done = program("score", "text.txt", "--path", checkpoint, "--per", per, "--format", form)
            assert done.returncode == 0, done.stderr
            assert "12 tokens in 4 lines: log-probability -" in done.stderr
            outputs[per, form] = done.stdout.splitlines()
    lines = [row.split("\t") for row in outputs["line", "tsv"]]
    assert lines[0] == ["line", "tokens", "log_prob", "perplexity"]
    assert [(row[0], row[1]) for row in lines[1:]] == [("1", "4"), ("2", "1"), ("3", "2"), ("4", "5")]
    objects = [json.loads(row) for row in outputs["token", "json"]]
    assert objects[0]["symbols"] == ["w1", "w2", "<unk>", "</s>"]
    for row, found, short in zip(lines[1:], objects, outputs["line", "json"], strict=True):
        assert float(row[2]) == pytest.approx(found["log_prob"], abs=1e-6)
        assert float(row[3]) == pytest.approx(np.exp(-found["log_prob"] / found["tokens"]), rel=1e-4)
        assert sum(found["log_probs"]) == pytest.approx(found["log_prob"])
        assert json.loads(short) == {key: found[key] for key in ("line", "tokens", "log_prob", "perplexity")}
    each = [row.split("\t") for row in outputs["token", "tsv"]][1:]
    assert [row[1] for row in each] == [symbol for found in objects for symbol in found["symbols"]]


def test_the_perplexity_is_that_of_evaluation(corpus: str, checkpoint: Path, program: Program) -> None:
    text = Path(corpus).parent / "test.txt"
    scored = program("score", text, "--path", checkpoint, "--tokens-per-sample", 16)
    evaluated = program("eval", corpus, "--path", checkpoint, "--tokens-per-sample", 16)
    assert scored.stderr.split("perplexity ", 1)[1] == evaluated.stdout.split("Perplexity: ")[1]


def test_mistakes_cost_one_line(checkpoint: Path, program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("w1\nä\n".encode("latin-1"))
    for arguments, message in (
        (("nowhere.txt",), "nowhere.txt: found no readable file"),
        (("empty.txt",), "empty.txt: found no text"),
        (("latin.txt",), "latin.txt, line 2: text: found a byte at 0 that is not UTF-8"),
        (("text.txt", "--reset-on", "<eos>"), "--reset-on: found <eos>, expected auto, none, document or a symbol"),
        (("text.txt", "--tokens-per-sample", -1), "--tokens-per-sample: found -1"),
    ):
        refused = program("score", *arguments, "--path", checkpoint)
        assert refused.returncode == 2, (arguments, refused)
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr


def test_several_samples_are_those_of_their_seeds(checkpoint: Path, program: Program) -> None:
    arguments = ("--path", checkpoint, "--prompt", "w1 w4", "--length", 12)
    both = program("generate", *arguments, "--num-samples", 2, "--seed", 8)
    assert both.returncode == 0, both.stderr
    texts = [program("generate", *arguments, "--seed", seed).stdout for seed in (8, 9)]
    heads = [f"--- sample {n} of 2 (--seed {7 + n})\n" for n in (1, 2)]
    assert both.stdout == heads[0] + texts[0] + heads[1] + texts[1]
    refused = program("generate", *arguments, "--num-samples", 0)
    assert "--num-samples: found 0, expected at least 1" in refused.stderr


def test_nothing_to_train_on_in_a_checkpoint_without_a_run(corpus: str, checkpoint: Path, program: Program) -> None:
    assert isinstance(checkpoints.load_checkpoint(checkpoint, torch.device("cpu"))[0], TransformerXL)
    said = program("info", checkpoint).stdout
    assert "progress      none: converted weights" in said
    assert "documents: not known; memory reset on: none" in said  # as other projects carry it through all of a text
    checkpoint.rename(checkpoint.with_name(checkpoints.BEST))
    refused = program("train", corpus, "--save-dir", checkpoint.parent, "--max-update", 1)
    assert refused.returncode == 2
    assert "found converted weights, expected a run to resume" in refused.stderr
