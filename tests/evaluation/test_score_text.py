"""log_probs and the programs score and generate: values, output formats and errors."""

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
from tests.common.cli import RunCli

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
def test_log_probs_equal_one_forward_pass(corpus: str, bptt: int) -> None:
    vocabulary = load(corpus, "test").vocabulary
    model = transformer(vocabulary).double()
    lines = [vocabulary.encode(text) for text in ("w1 w2\n", "\n", "w30 w31 w32 w33\n", "w5\n")]
    actual = list(log_probs(model, lines, bptt, None))
    assert [len(values) for values in actual] == [3, 1, 5, 2]
    ids = torch.from_numpy(np.concatenate(lines))
    with torch.no_grad():
        log_prob = model.log_prob(model(torch.cat([torch.tensor([2]), ids[:-1]]).view(1, -1))[0])[0]
    expected = log_prob.gather(1, ids.view(-1, 1)).squeeze(1)
    torch.testing.assert_close(
        torch.cat([torch.tensor(values, dtype=torch.float64) for values in actual]), expected, rtol=0, atol=1e-12
    )


def test_lines_are_independent_with_resets(corpus: str) -> None:
    vocabulary = load(corpus, "test").vocabulary
    model = transformer(vocabulary).double()
    lines = [vocabulary.encode(text) for text in ("w1 w2\n", "w30 w31 w32 w33\n", "w5\n")]
    resets = find_resets(lines, [True] * 3, "document", vocabulary)
    assert resets is not None
    together = list(log_probs(model, lines, 4, resets))
    for line, values in zip(lines, together, strict=True):
        assert next(log_probs(model, [line], 100, None)) == pytest.approx(values, abs=1e-12)


def test_line_endings_match_prepare(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one two\r\n\ntwo")
    words = Vocabulary(["one", "two"], [1, 1])
    assert [line.tolist() for line in encode_lines(tmp_path / "text", words)[0]] == [[4, 5, 2], [2], [5, 2]]
    lines, ends, _ = encode_lines(tmp_path / "text", Vocabulary.bytes())
    assert [*np.concatenate(lines)[:-1] - 4, lines[-1][-1]] == [*b"one two\r\n\ntwo", Vocabulary.EOS]
    assert ends == [False, False, True]
    assert len(lines) == 3


def test_tsv_and_json_agree(checkpoint: Path, run_cli: RunCli) -> None:
    outputs = {}
    for per in ("line", "token"):
        for output_format in ("tsv", "json"):
            ended = run_cli("score", "text.txt", "--path", checkpoint, "--per", per, "--format", output_format)
            assert ended.returncode == 0, ended.stderr
            assert "12 tokens in 4 lines: log-probability -" in ended.stderr
            outputs[per, output_format] = ended.stdout.splitlines()
    lines = [row.split("\t") for row in outputs["line", "tsv"]]
    assert lines[0] == ["line", "tokens", "log_prob", "perplexity"]
    assert [(row[0], row[1]) for row in lines[1:]] == [("1", "4"), ("2", "1"), ("3", "2"), ("4", "5")]
    objects = [json.loads(row) for row in outputs["token", "json"]]
    assert objects[0]["symbols"] == ["w1", "w2", "<unk>", "</s>"]
    for row, line, without_tokens in zip(lines[1:], objects, outputs["line", "json"], strict=True):
        assert float(row[2]) == pytest.approx(line["log_prob"], abs=1e-6)
        assert float(row[3]) == pytest.approx(np.exp(-line["log_prob"] / line["tokens"]), rel=1e-4)
        assert sum(line["log_probs"]) == pytest.approx(line["log_prob"])
        assert json.loads(without_tokens) == {key: line[key] for key in ("line", "tokens", "log_prob", "perplexity")}
    tokens = [row.split("\t") for row in outputs["token", "tsv"]][1:]
    assert [row[1] for row in tokens] == [symbol for line in objects for symbol in line["symbols"]]


def test_perplexity_of_score_equals_eval(corpus: str, checkpoint: Path, run_cli: RunCli) -> None:
    text = Path(corpus).parent / "test.txt"
    scored = run_cli("score", text, "--path", checkpoint, "--tokens-per-sample", 16)
    evaluated = run_cli("eval", corpus, "--path", checkpoint, "--tokens-per-sample", 16)
    assert scored.stderr.split("perplexity ", 1)[1] == evaluated.stdout.split("Perplexity: ")[1]


def test_invalid_arguments_exit_2_with_one_line(checkpoint: Path, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("w1\nä\n".encode("latin-1"))
    for arguments, message in (
        (("nowhere.txt",), "nowhere.txt: found no readable file"),
        (("empty.txt",), "empty.txt: found no text"),
        (("latin.txt",), "latin.txt, line 2: text: found a byte at 0 that is not UTF-8"),
        (("text.txt", "--reset-on", "<eos>"), "--reset-on: found <eos>, expected auto, none, document or a symbol"),
        (("text.txt", "--tokens-per-sample", -1), "--tokens-per-sample: found -1"),
    ):
        refused = run_cli("score", *arguments, "--path", checkpoint)
        assert refused.returncode == 2, (arguments, refused)
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr


def test_num_samples_uses_consecutive_seeds(checkpoint: Path, run_cli: RunCli) -> None:
    arguments = ("--path", checkpoint, "--prompt", "w1 w4", "--length", 12)
    both = run_cli("generate", *arguments, "--num-samples", 2, "--seed", 8)
    assert both.returncode == 0, both.stderr
    texts = [run_cli("generate", *arguments, "--seed", seed).stdout for seed in (8, 9)]
    heads = [f"--- sample {n} of 2 (--seed {7 + n})\n" for n in (1, 2)]
    assert both.stdout == heads[0] + texts[0] + heads[1] + texts[1]
    refused = run_cli("generate", *arguments, "--num-samples", 0)
    assert "--num-samples: found 0, expected at least 1" in refused.stderr


def test_converted_checkpoint_cannot_be_resumed(corpus: str, checkpoint: Path, run_cli: RunCli) -> None:
    assert isinstance(checkpoints.load_checkpoint(checkpoint, torch.device("cpu"))[0], TransformerXL)
    info = run_cli("info", checkpoint).stdout
    assert "progress      none: converted weights" in info
    assert "documents: not known; memory reset on: none" in info  # other projects never reset memory within a text
    checkpoint.rename(checkpoint.with_name(checkpoints.BEST_CHECKPOINT))
    refused = run_cli("train", corpus, "--save-dir", checkpoint.parent, "--max-update", 1)
    assert refused.returncode == 2
    assert "found converted weights, expected a run to resume" in refused.stderr
