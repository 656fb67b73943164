"""prepare, train, eval and score agree on a text's tokens, resets and loss; generate resets memory as training does."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pytbptt import checkpoint as checkpoints, load_checkpoint
from pytbptt.data import PrepareSettings, TextFormat, Vocabulary, load, prepare, text_size
from pytbptt.data.resets import ResetRule, Runs
from pytbptt.data.text_format import DocumentUnit
from pytbptt.errors import InputError
from pytbptt.evaluation.generation import generate
from pytbptt.evaluation.log_probs import encode_lines, find_resets
from pytbptt.nn import AWDLSTMConfig
from pytbptt.nn.language_model import LanguageModel
from tests.common.cli import RunCli

KINDS: dict[str, dict[str, object]] = {
    "words": {},
    "bytes": {"bytes": True},
    "bpe": {"bpe": 270},
    "chars": {"chars": True},
}
DOCUMENTS: tuple[DocumentUnit, ...] = ("file", "line", "blank")
LSTM = "--arch awd_lstm --d-embed 12 --d-hidden 12 --n-layer 1"
XL = "--arch transformer_xl --n-layer 2 --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --mem-len 300"


def texts() -> list[bytes]:
    """All short combinations of lines, blank lines and line ends."""
    parts = ["a b", "\n", "\r\n", " \t\n", "\xa0\n", "</s> c"]
    combinations = {"".join(chosen) for count in range(1, 5) for chosen in itertools.product(parts, repeat=count)}
    return sorted(text.encode() for text in combinations if text.strip() and "\r" not in text.replace("\r\n", ""))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_score_tokens_equal_prepare(tmp_path: Path, kind: str, documents: DocumentUnit) -> None:
    """And so do the memory resets."""
    (tmp_path / "first").write_bytes(b"a b c </s>\n\n")
    settings = {"destdir": tmp_path / "bin", "documents": documents, "workers": 1}
    prepare(PrepareSettings(trainpref=tmp_path / "first", **KINDS[kind], **settings))
    vocabulary = Vocabulary.load(tmp_path / "bin")
    for text in texts()[:: 2 if kind in ("words", "bytes") else 19]:
        (tmp_path / "text").write_bytes(text)
        prepare(PrepareSettings(testpref=tmp_path / "text", srcdict=tmp_path / "bin" / "dict.txt", **settings))
        tokens = load(tmp_path / "bin", "test")
        lines, ends, size = encode_lines(tmp_path / "text", vocabulary, documents)
        actual, expected = np.concatenate(lines).tolist(), tokens[:].tolist()
        assert actual == expected, text
        assert size == text_size(tokens), text
        inputs = np.array([[Vocabulary.EOS, *expected[:-1]]])
        run = Runs(*(np.array([value]) for value in (0, len(expected) - 1, 0, 1)))
        for reset_on in ("document", "none"):
            resets = find_resets(lines, ends, reset_on, vocabulary)
            actual_resets = [False] * len(expected) if resets is None else resets.tolist()
            assert actual_resets == ResetRule(tokens, reset_on).mask(inputs, run)[0].tolist(), (text, reset_on)


@pytest.mark.parametrize("reset_on", ["auto", "none", "</s>"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_train_eval_and_score_report_same_loss(
    tmp_path: Path, run_cli: RunCli, kind: str, documents: str, reset_on: str
) -> None:
    # So that each model runs with all values of the other parameters.
    model = XL if (documents == "blank") != (kind == "chars") else LSTM
    text = "the cat sat\non the mat\n\nthe end of it\nis here\n\n\nno more\n" * 3
    (tmp_path / "text").write_text(text)
    name = next(iter(KINDS[kind]), "bytes")
    options = [] if kind == "words" else [f"--{name}", *(["270"] if kind == "bpe" else [])]
    files = ["--trainpref", "text", "--validpref", "text", "--destdir", "data"]
    assert run_cli("prepare", *files, "--documents", documents, *options).returncode == 0
    sizes = "--batch-size 2 --tokens-per-sample 8 --batch-size-valid 1 --max-update 30 --lr 0.03 --device cpu"
    flags = f"{model} {sizes} --reset-on {reset_on} --save-dir run --log-format simple".split()
    trained = run_cli("train", "data", *flags)
    assert trained.returncode == 0, trained.stderr
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = next(entry["loss"] for entry in reversed(entries) if entry["split"] == "valid")
    path = ("--path", "run/checkpoint_last.pt", "--device", "cpu")
    evaluated = run_cli("eval", "data", "--gen-subset", "valid", *path)
    assert "warning" not in evaluated.stderr
    (bits,) = re.findall(r"Loss \(base 2\): ([\d.]+)", evaluated.stdout)
    assert float(bits) == pytest.approx(loss / math.log(2), abs=2e-4)
    scored = run_cli("score", "text", *path)
    if scored.returncode == 2:  # score rejects --reset-on </s> if no </s> occurs within the text
        assert (reset_on, documents, kind == "words") == ("</s>", "file", False)
        assert "which does not occur in the text" in scored.stderr
        return
    ((count, total),) = re.findall(r"(\d+) tokens in \d+ lines: log-probability (-[\d.]+)", scored.stderr)
    assert -float(total) / int(count) == pytest.approx(loss, abs=2e-5)
    size = text_size(load("data", "valid"))
    assert size is not None
    assert size.describe(loss).split(":")[0] == "Per byte"
    expected = [size.metrics(loss)[name] for name in ("bits_per_byte", "bits_per_character", "ppl_per_word")]
    for output in (evaluated.stdout, scored.stderr):
        last = output.splitlines()[-1]
        numbers = re.findall(r"per byte: (\S+) bits.*per character: (\S+) bits.*perplexity (\S+) \(of", last.lower())
        assert [float(number) for number in numbers[0]] == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_reset_on_override_warns(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "text").write_text("a b\nb c\n" * 9)
    run_cli("prepare", "--trainpref", "text", "--validpref", "text", "--destdir", "data", "--documents", "line")
    flags = f"{LSTM} --batch-size 2 --tokens-per-sample 8 --max-update 2 --save-dir run --device cpu".split()
    assert run_cli("train", "data", *flags).returncode == 0
    assert load_checkpoint("run/checkpoint_last.pt").text_format == TextFormat("line", "document")
    path = ("--path", "run/checkpoint_last.pt", "--device", "cpu")
    for command in (("eval", "data", "--gen-subset", "valid"), ("score", "text"), ("generate", "--length", 3)):
        assert "--reset-on none: the model was trained with --reset-on document" in (
            run_cli(*command, *path, "--reset-on", "none").stderr
        )
        assert run_cli(*command, *path, "--reset-on", "no-symbol").returncode == 2
    run_cli("prepare", "--testpref", "text", "--srcdict", "data/dict.txt", "--destdir", "other")
    assert "found data with --documents file, expected line" in run_cli("eval", "other", *path).stderr
    run_cli(
        "prepare", "--testpref", "text", "--srcdict", "data/dict.txt", "--destdir", "flat", "--index-format", "fairseq"
    )
    assert "found no document index" in run_cli("eval", "flat", *path).stderr
    refused = run_cli("prepare", "--testpref", "text", "--srcdict", "data/dict.txt", "--destdir", "data")
    assert (refused.returncode, "--documents: found file, expected line" in refused.stderr) == (2, True)


def test_data_and_checkpoints_of_older_versions_are_read(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "text").write_text("a b\nb c\n" * 9)
    run_cli("prepare", "--trainpref", "text", "--validpref", "text", "--destdir", "data", "--documents", "line")
    (tmp_path / "data" / "text.json").unlink()
    assert load(tmp_path / "data").text_format == TextFormat(None, "document")
    flags = f"{LSTM} --batch-size 2 --tokens-per-sample 8 --max-update 2 --save-dir run --device cpu".split()
    assert run_cli("train", "data", *flags).returncode == 0
    older = checkpoints.read(tmp_path / "run" / checkpoints.LAST_CHECKPOINT)
    del older["text"]
    older["config"]["run"]["reset_on"] = "</s>"
    checkpoints.write(tmp_path / "older.pt", older)
    assert load_checkpoint(tmp_path / "older.pt").text_format == TextFormat(None, "</s>")
    for content in ('{"documents": "page"}', "[]", "{"):
        (tmp_path / "data" / "text.json").write_text(content)
        with pytest.raises(InputError, match=r"text\.json: found no text format"):
            load(tmp_path / "data")


def model_biased_to_eos() -> tuple[LanguageModel, Vocabulary]:
    vocabulary = Vocabulary([f"w{n}" for n in range(12)], [1] * 12)
    torch.manual_seed(0)
    config = AWDLSTMConfig(vocab_size=len(vocabulary), d_embed=12, d_hidden=12, n_layer=1, tie_weights=False)
    model = config.build().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
        model.softmax.biases[0][[Vocabulary.EOS, vocabulary.index("w3")]] += 8
    return model, vocabulary


@pytest.mark.parametrize(
    ("text_format", "starts"),
    [
        (TextFormat("line", "document"), lambda ids: [n for n, token in enumerate(ids) if token == 2]),
        (TextFormat("blank", "document"), lambda ids: [n for n in range(1, len(ids)) if ids[n - 1] == ids[n] == 2]),
        (TextFormat("file", "document"), lambda ids: []),
        (TextFormat("file", "w3"), lambda ids: [n for n, token in enumerate(ids) if token == 7]),
        (TextFormat("line", "none"), lambda ids: []),
    ],
)
def test_generation_resets_memory_like_training(
    text_format: TextFormat, starts: Callable[[list[int]], list[int]]
) -> None:
    """In the prompt and in the generated text: each token is sampled given the tokens since the last document start."""
    model, vocabulary = model_biased_to_eos()
    prompt = [2, 4, 2, 2, 7, 5]
    ids = generate(
        model,
        torch.tensor(prompt),
        60,
        vocabulary=vocabulary,
        text_format=text_format,
        generators=[torch.Generator().manual_seed(0)],
    )
    text = [*prompt, *(token for (token,) in ids)]
    generated_starts = [n for n in starts(text) if n > len(prompt)]
    assert len(generated_starts) > 1 if starts([2, 2, 7]) else not generated_starts
    generator = torch.Generator().manual_seed(0)
    for position in range(len(prompt), len(text)):
        start = max(starts(text[:position]), default=0)
        with torch.no_grad():
            output, _ = model(torch.tensor([text[start:position]]), model.init_memory(1))
            log_prob = model.log_prob(output[:, -1])[0]
        log_prob[vocabulary.non_text_ids] = float("-inf")
        ordered, order = log_prob.sort(descending=True)
        assert text[position] == int(order[torch.multinomial(ordered.softmax(0), 1, generator=generator)])


def test_special_and_padding_tokens_are_never_sampled() -> None:
    vocabulary = Vocabulary(["madeupword0003", "w", "madeupword0000", "madeupword0001"], [3, 1, 0, 0])
    torch.manual_seed(0)
    model = AWDLSTMConfig(vocab_size=len(vocabulary) + 8, d_embed=8, d_hidden=8, n_layer=1).build().eval()
    generators = [torch.Generator().manual_seed(n) for n in range(20)]

    def sampled(unknown: bool) -> set[int]:
        rows = generate(
            model,
            torch.tensor([2]),
            50,
            vocabulary=vocabulary,
            allow_unk=unknown,
            temperature=5.0,
            generators=generators,
        )
        return {token for row in rows for token in row}

    assert sampled(unknown=True) == {2, 3, 4, 5}
    assert sampled(unknown=False) == {2, 4, 5}


def test_generate_stop_symbol_and_multiple_prompts(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "text").write_text("a b c\nd\n" * 9)
    run_cli("prepare", "--trainpref", "text", "--destdir", "data", "--documents", "line")
    flags = f"{LSTM} --batch-size 2 --tokens-per-sample 8 --max-update 2 --save-dir run --device cpu".split()
    assert run_cli("train", "data", *flags).returncode == 0
    path = ("--path", "run/checkpoint_last.pt", "--device", "cpu", "--temperature", 1)
    each = [run_cli("generate", *path, "--prompt", prompt, "--length", 9).stdout for prompt in ("a", "b c")]
    assert run_cli("generate", *path, "--prompt", "a", "b c", "--length", 9).stdout == "".join(each)
    stopped = run_cli("generate", *path, "--length", 400, "--stop", "</s>", "--no-unk", "--num-samples", 3)
    samples = re.split(r"--- sample .*\n", stopped.stdout)[1:]
    assert [sample.count("\n") for sample in samples] == [2, 2, 2]  # the line's end and print's newline
    assert "<unk>" not in stopped.stdout
    assert run_cli("generate", *path, "--stop", "nowhere").returncode == 2
