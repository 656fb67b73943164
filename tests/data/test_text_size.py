"""The text's size in bytes, characters, words and lines, which makes losses of different vocabularies comparable."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pytbptt.data import (
    PrepareSettings,
    TextSize,
    Vocabulary,
    blocks,
    load,
    prepare,
    text_bytes,
    text_size,
    tokenising,
    write_indexed,
)
from pytbptt.data.text_size import measure_text
from pytbptt.errors import InputError
from pytbptt.training.plotting import plot_runs
from tests.common.cli import RunCli

LONG = "w" * 30
KINDS: dict[str, dict[str, object]] = {
    "words": {},
    "rare words": {"thresholdsrc": 3},
    "bytes": {"bytes": True},
    "bpe": {"bpe": 270},
    "chars": {"chars": True},
}


def random_texts(count: int, separator: str) -> list[str]:
    """With every kind of white space and line end, characters of one to four bytes, and words longer than a block."""
    rng = random.Random(0)
    parts = [
        "a",
        "é",
        "日本",
        "𝄞",
        " ",
        "  ",
        "\t",
        "\u3000",
        "\xa0",
        "\x1c",
        "\x0b",
        "\x85",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " \t\n",
        LONG,
    ]
    return ["x" + separator.join(rng.choices(parts, k=rng.randint(1, 80))) for _ in range(count)]


def reference_sizes(text: str) -> tuple[int, int, int, int]:
    """Bytes, characters, words, lines."""
    lines = re.split("\r\n|\r|\n", text)
    return len(text.encode()), len(text), len(text.split()), len(lines) - (not lines[-1])


@pytest.mark.parametrize("documents", ["file", "line", "blank"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_size_is_independent_of_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, documents: str
) -> None:
    """Also if the text is split into blocks and files."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40)
    monkeypatch.setattr(tokenising, "SLICE_CHARS", 16)
    # For bytes, words longer than a block are split and counted as several; separators keep words shorter.
    all_texts = random_texts(24, separator=" " if kind == "bytes" else "")
    for number, texts in enumerate(zip(all_texts[::2], all_texts[1::2], strict=True)):
        paths = [tmp_path / f"{number}-{part}" for part in range(2)]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(text.encode())
        folder = tmp_path / f"data-{number}"
        settings = {"destdir": folder, "documents": documents, "workers": 1}
        prepare(PrepareSettings(trainpref=paths, **KINDS[kind], **settings))
        size = text_size(load(folder))
        assert size is not None
        expected = [sum(sizes) for sizes in zip(*map(reference_sizes, texts), strict=True)]
        actual = [size.bytes, size.characters, size.words, size.lines]
        assert actual == expected, texts
        assert (size.tokens, size.altered) == (len(load(folder)), False)
        assert (size.unknown > 0) == (kind == "rare words")


def test_byte_blocks_end_between_characters_if_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10)
    for text in ("日本" * 40, "éa" * 40, "\r\n" * 7 + "b", "𝄞" * 9 + "\r\n" * 9):
        (tmp_path / "text").write_bytes(text.encode())
        folder = tmp_path / text[:2].strip()
        prepare(PrepareSettings(trainpref=tmp_path / "text", bytes=True, destdir=folder / str(len(text)), workers=1))
        size = text_size(load(folder / str(len(text))))
        assert size is not None
        assert (size.bytes, size.characters, size.lines) == (*reference_sizes(text)[:2], reference_sizes(text)[3])
    binary = bytes(range(128, 256)) * 3
    (tmp_path / "binary").write_bytes(binary)
    prepare(PrepareSettings(trainpref=tmp_path / "binary", bytes=True, destdir=tmp_path / "data", workers=1))
    assert load(tmp_path / "data")[:-1].tolist() == [value + 4 for value in binary]


def test_bits_and_perplexity_conversion() -> None:
    size = TextSize(tokens=50, bytes=100, characters=80, words=15, lines=5)
    assert size.metrics(math.log(2)) == pytest.approx(
        {"bits_per_byte": 0.5, "bits_per_character": 50 / 80, "ppl_per_word": 2**2.5}
    )
    assert size.describe(math.log(2)) == (
        "Per byte: 0.5000 bits (of 100), per character: 0.6250 bits (of 80), per word: perplexity 5.65685 (of 20, line "
        "ends included)"
    )
    assert TextSize(50, 100).metrics(1.0) == {"bits_per_byte": pytest.approx(0.5 / math.log(2))}
    assert "ppl_per_word" not in size.metrics(math.inf)
    unknown = size + TextSize(unknown=3)
    assert unknown.metrics(1.0) == {**size.metrics(1.0), "incomparable": "3 of 50 tokens are <unk>"}
    assert unknown.describe(1.0).endswith("; not comparable with other vocabularies: 3 of 50 tokens are <unk>")


def test_ppl_per_word_of_word_vocabulary_is_token_perplexity() -> None:
    text = "the cat sat\non the mat\n"
    assert (measure_text(text.encode()) + TextSize(tokens=8)).metrics(1.5)["ppl_per_word"] == pytest.approx(
        math.exp(1.5)
    )


def test_stale_or_invalid_size_record(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a b\nc\n")
    prepare(PrepareSettings(trainpref=tmp_path / "text", destdir=tmp_path, workers=1))
    record = tmp_path / "train.size.json"
    assert text_size(load(tmp_path)) == TextSize(5, 6, 6, 3, 2)
    record.write_text(json.dumps({**json.loads(record.read_text()), "tokens": 4}))
    assert text_size(load(tmp_path)) is None  # a record of another corpus
    for content in ("[]", "{", '{"pages": 3}', '{"tokens": 5, "bytes": "7"}'):
        record.write_text(content)
        with pytest.raises(InputError, match=r"train\.size\.json: found no size of a text"):
            text_size(load(tmp_path))
    write_indexed(tmp_path / "train", [np.array([4, 5, 6, 2, 2])], np.uint16)
    assert not record.exists()
    assert text_size(load(tmp_path)) is None  # unknown for a corpus of words


@pytest.mark.parametrize(("options", "size"), [({}, 8), ({"documents": "line"}, 8)])
def test_byte_corpus_size_without_record(tmp_path: Path, options: dict[str, str], size: int) -> None:
    (tmp_path / "text").write_bytes(b"some\nxy\n")
    prepare(PrepareSettings(trainpref=tmp_path / "text", destdir=tmp_path, bytes=True, workers=1, **options))
    recorded = text_size(load(tmp_path))
    assert recorded is not None
    (tmp_path / "train.size.json").unlink()
    assert text_size(load(tmp_path)) == TextSize(recorded.tokens, size)
    assert text_bytes(load(tmp_path)) == size == recorded.bytes


def tokenizer_json(lower: bool) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "the", "cat", "The", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer.to_str()


@pytest.mark.parametrize(
    ("lower", "text", "reason"),
    [
        (False, "The cat\nthe the", ""),
        (True, "The cat\nthe the", "the tokenizer does not give back the text that it was given"),
        (True, "the cat\nthe the", ""),
        (False, "the dog the dog", "2 of 5 tokens are <unk>"),
    ],
)
def test_lossy_tokenizer_is_marked_incomparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lower: bool, text: str, reason: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(lower))
    (tmp_path / "text").write_text(text)
    tokenizer = tmp_path / "tokenizer.json"
    prepare(PrepareSettings(trainpref=tmp_path / "text", tokenizer=tokenizer, destdir=tmp_path / "d", workers=1))
    size = text_size(load(tmp_path / "d"))
    assert size is not None
    assert size.incomparable_reason == reason
    assert (bool(reason) and not size.unknown) == ("will not be comparable" in capsys.readouterr().err)


def test_unknown_ids_of_tokenizer() -> None:
    assert Vocabulary.from_tokenizer(tokenizer_json(False)).unknown_ids == [3, 4]
    assert Vocabulary(["a"], [1]).unknown_ids == [3]


def test_unknown_tokens_mark_metrics_incomparable(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "text").write_text("a b a c\nd a b\n" * 12)
    (tmp_path / "held-out").write_text("a b e\n" * 8)
    files = "--trainpref text --validpref held-out --testpref text --destdir".split()
    flags = "--arch awd_lstm --d-embed 8 --d-hidden 8 --n-layer 1 --batch-size 2 --tokens-per-sample 8 --max-update 4"
    train_output = {}
    for kind, options in {"words": (), "chars": ("--chars",)}.items():
        assert run_cli("prepare", *files, kind, *options).returncode == 0
        trained = run_cli("train", kind, *flags.split(), "--save-dir", f"run-{kind}", "--device", "cpu", "--test")
        assert trained.returncode == 0, trained.stderr
        train_output[kind] = trained.stdout
        entries = [json.loads(line) for line in Path(f"run-{kind}/metrics.jsonl").read_text().splitlines()]
        assert all({"bits_per_byte", "bits_per_character", "ppl_per_word"} <= entry.keys() for entry in entries)
        incomparable = {entry["split"]: entry.get("incomparable", "") for entry in entries}
        assert incomparable["valid"] == ("8 of 32 tokens are <unk>" if kind == "words" else "")
        results = json.loads(Path(f"run-{kind}/results.json").read_text())
        size = text_size(load(kind, "test"))
        assert size is not None
        assert not size.incomparable_reason
        test = results["test"]
        assert {**test, **size.metrics(test["loss"])} == test
        evaluated = run_cli("eval", kind, "--path", f"run-{kind}/checkpoint_best.pt", "--device", "cpu").stdout
        bits_per_byte = re.findall(r"Per byte: (\S+) bits", evaluated)
        assert float(bits_per_byte[0]) == pytest.approx(test["bits_per_byte"], abs=2e-4)
    assert "valid: numbers per byte and per word are not comparable: 8 of 32 tokens are <unk>" in train_output["words"]
    assert "not comparable" not in train_output["chars"]
    assert re.search(r"valid loss .* bits/byte, \S+ ppl/word", train_output["chars"])
    assert not re.search(r"valid loss .* bits/byte", train_output["words"])


def test_plot_uses_bits_per_byte_if_comparable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    labels: list[str] = []
    original: Callable[..., object] = Axes.set_ylabel
    monkeypatch.setattr(Axes, "set_ylabel", lambda self, label: (labels.append(label), original(self, label)))
    size = TextSize(50, 100)
    rows = {
        "bytes": size.metrics(1.0),
        "unknown": (size + TextSize(unknown=1)).metrics(1.0),
        "no size": {},
    }
    for name, numbers in rows.items():
        (tmp_path / name).mkdir()
        entry = {"split": "train", "step": 1, "loss": 1.0, "bits": 1.4, "grad_norm": 1.0, "lr": 0.1, **numbers}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    for runs, unit in (({"bytes"}, "byte"), ({"bytes", "unknown"}, "token"), ({"no size"}, "token")):
        labels.clear()
        plot_runs([tmp_path / name for name in sorted(runs)], tmp_path / "curves.png")
        assert labels[0] == f"bits per {unit}"


def test_bits_per_byte_of_byte_corpus_need_no_size_record(tmp_path: Path, run_cli: RunCli) -> None:
    """As for data that an older version prepared."""
    (tmp_path / "text").write_text("a b a c\nd a b\n" * 12)
    run_cli("prepare", "--trainpref", "text", "--validpref", "text", "--destdir", "data", "--bytes")
    flags = "--arch awd_lstm --d-embed 8 --d-hidden 8 --n-layer 1 --batch-size 2 --tokens-per-sample 8 --max-update 2"
    bits_per_byte = []
    for folder in ("with-record", "without-record"):
        trained = run_cli("train", "data", *flags.split(), "--log-interval", 1, "--save-dir", folder, "--device", "cpu")
        assert trained.returncode == 0, trained.stderr
        entries = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        bits_per_byte.append([(entry["split"], round(entry["bits_per_byte"], 9)) for entry in entries])
        for path in (tmp_path / "data").glob("*.size.json"):
            path.unlink()
    assert bits_per_byte[0] == bits_per_byte[1]
    assert len(bits_per_byte[0]) == 3
