"""python -m pytbptt.convert writes a model with the original's perplexity, or one line that says what is wrong."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pytbptt.checkpoint import BEST_CHECKPOINT, load_checkpoint
from pytbptt.data import Vocabulary
from tests.common.cli import RunCli
from tests.common.conversion_cases import KIMIYOUNG_SIZES, fairseq_checkpoint, load_transfo_xl
from tests.common.external_models import (
    AWD_LSTM_LM_MODULES,
    KIMIYOUNG_MODULES,
    MemTransformerLM,
    PickledObject,
    RNNModel,
    SplitCrossEntropyLoss,
    temporary_modules,
    with_random_weights,
)
from tests.common.malicious import Malicious

SYMBOLS = ["<eos>", "<unk>", *"abcdefghijk"]
TEXT = "a b zzz\nc d e\n\nk\n"
IDS = [2, 3, 1, 0, 4, 5, 6, 0, 0, 12, 0]
"""TEXT as indices in SYMBOLS."""
KILLED_AT_RENAME_PROGRAM = """
import os, runpy, signal, sys
fatal_target, replace = sys.argv.pop(1), os.replace

def replace_or_die(source, target):
    if str(target) == fatal_target:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
runpy.run_module("pytbptt.convert", run_name="__main__")
"""
"""pytbptt.convert, which is killed when it renames a file to its first argument."""


def perplexity(log_prob: torch.Tensor) -> str:
    """As pytbptt.score prints it, from the log-probabilities (len(IDS), V) for inputs()."""
    nll = -log_prob.gather(1, torch.tensor(IDS).view(-1, 1)).mean().item()
    return f"perplexity {math.exp(nll):.2f}"


def inputs() -> torch.Tensor:
    """IDS shifted by one, after <eos>."""
    return torch.tensor([0, *IDS[:-1]])


@pytest.fixture(autouse=True)
def _text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)


def convert_and_score(run_cli: RunCli, *arguments: object) -> str:
    done = run_cli("convert", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"python -m pytbptt.score TEXT --path converted/{BEST_CHECKPOINT}"
    scored = run_cli("score", "text.txt", "--path", f"converted/{BEST_CHECKPOINT}")
    assert scored.returncode == 0, scored.stderr
    return scored.stderr


@pytest.mark.parametrize("weights_file", ["pytorch_model.bin", "model.safetensors"])
def test_transformers_directory_converts_with_same_perplexity(
    run_cli: RunCli, tmp_path: Path, weights_file: str
) -> None:
    weights, config, _, _ = load_transfo_xl("clamped, same length")
    folder = tmp_path / "transfo-xl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "transfo-xl", **config}))
    torch.save({"idx2sym": SYMBOLS}, folder / "vocab.bin")
    if weights_file == "pytorch_model.bin":
        torch.save(weights, folder / weights_file)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
        tied = {"crit.out_layers.0.weight", "crit.out_layers.1.weight", "crit.out_layers.2.weight"}
        safetensors.save_file(
            {name: value for name, value in weights.items() if name not in tied}, folder / weights_file
        )
    from pytbptt.convert import from_transfo_xl

    model = from_transfo_xl(weights, config).eval()
    with torch.no_grad():
        expected = perplexity(model.log_prob(model(inputs().view(1, -1))[0])[0])
    assert expected in convert_and_score(run_cli, folder)
    assert run_cli("info", f"converted/{BEST_CHECKPOINT}").returncode == 0
    dictionary = (tmp_path / "converted" / "dict.txt").read_text().split()
    assert dictionary[::2] == SYMBOLS[2:]


def test_kimiyoung_checkpoint_converts_with_same_perplexity(run_cli: RunCli, tmp_path: Path) -> None:
    model = with_random_weights(MemTransformerLM(**{**KIMIYOUNG_SIZES, "cutoffs": [7], "mem_len": 20}))
    with temporary_modules(**KIMIYOUNG_MODULES, data_utils=[PickledObject]):
        torch.save(model, tmp_path / "model.pt")
        torch.save(PickledObject(vocab=PickledObject(idx2sym=SYMBOLS)), tmp_path / "cache.pt")
    with torch.no_grad():
        hidden, _ = model.forward_chunk(inputs(), [torch.empty(0, 8)] * 2)
        expected = perplexity(model.log_prob(hidden))
    assert expected in convert_and_score(run_cli, "model.pt", "--vocabulary", "cache.pt")
    missing = run_cli("convert", "model.pt", "--save-dir", "other")
    assert "--vocabulary: found none, expected the cache.pt" in missing.stderr
    assert missing.returncode == 2


def test_refused_pickle_globals_are_reported(run_cli: RunCli, tmp_path: Path) -> None:
    model, criterion = with_random_weights(RNNModel(13, 4, 6, 2, 0.5, True)), SplitCrossEntropyLoss(4, [])
    with temporary_modules(**AWD_LSTM_LM_MODULES, data=[PickledObject]):
        torch.save([model, criterion, Malicious(os.system, "touch executed")], tmp_path / "PTB.pt")
        torch.save(PickledObject(dictionary=PickledObject(idx2word=SYMBOLS)), tmp_path / "corpus.1.data")
    done = run_cli("convert", "PTB.pt", "--vocabulary", "corpus.1.data")
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first.startswith("PTB.pt: read as plain data, without running their code: model.RNNModel, ")
    assert "posix.system" in first
    assert second == "corpus.1.data: read as plain data, without running their code: data.PickledObject"
    assert not (tmp_path / "executed").exists()


def test_fairseq_checkpoint_converts_with_dictionary(run_cli: RunCli, tmp_path: Path) -> None:
    torch.save(fairseq_checkpoint("dict"), tmp_path / "checkpoint_best.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in "abcdefghi"))
    printed = convert_and_score(run_cli, "checkpoint_best.pt", "--vocabulary", "dict.txt")
    assert "11 tokens in 4 lines" in printed
    _, vocabulary, settings, _ = load_checkpoint(tmp_path / "converted" / BEST_CHECKPOINT, torch.device("cpu"))
    assert (len(vocabulary), vocabulary.index("a"), settings["tokens_per_sample"]) == (13, 4, 128)
    (tmp_path / "dict.txt").write_text("a 1\n")
    refused = run_cli("convert", "checkpoint_best.pt", "--vocabulary", "dict.txt", "--save-dir", "other")
    assert "dict.txt: found 5 types, expected 13" in refused.stderr


def test_fastai_weights_convert_with_same_perplexity(run_cli: RunCli, tmp_path: Path) -> None:
    model = with_random_weights(RNNModel(13, 4, 6, 2, 0.0, True))
    weights = {f"0.{name}": value for name, value in model.state_dict().items() if name.startswith(("enc", "rnns"))}
    weights.update({f"1.{name}": value for name, value in model.state_dict().items() if name.startswith("decoder")})
    torch.save(weights, tmp_path / "lstm_wt103.pth")
    (tmp_path / "itos.pkl").write_bytes(pickle.dumps(["xxbos", "xxunk", *SYMBOLS[2:]]))
    with torch.no_grad():
        hidden = model.encoder(inputs().view(-1, 1))
        for rnn in model.rnns:
            hidden, _ = rnn(hidden)
        expected = perplexity((hidden[:, 0] @ model.decoder.weight.T + model.decoder.bias).log_softmax(1))
    assert expected in convert_and_score(run_cli, "lstm_wt103.pth", "--vocabulary", "itos.pkl")


def test_invalid_arguments_give_one_line_errors_and_no_output(run_cli: RunCli, tmp_path: Path) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    torch.save(weights, tmp_path / "weights.bin")
    torch.save({name: value for name, value in weights.items() if "r_net" not in name}, tmp_path / "missing.bin")
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "unknown.pt")
    torch.save({"model": Malicious(os.system, "touch executed")}, tmp_path / "evil.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "weights.bin").read_bytes()[:999])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mismatched.json").write_text(json.dumps({**config, "d_head": 4}))
    (tmp_path / "invalid.json").write_text("{")
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    (tmp_path / "short.txt").write_text("\n".join(SYMBOLS[:-1]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    vocabulary: tuple[Any, ...] = ("--vocabulary", "vocab.txt")
    for arguments, message in (
        (("nowhere.pt", *vocabulary), "nowhere.pt: found no such file"),
        (
            ("weights.bin", "--config", "config.json", *vocabulary, "--save-dir", "truncated.pt/x"),
            "--save-dir: truncated.pt/x: ",
        ),
        (("truncated.pt", *vocabulary), "truncated.pt: found something unreadable"),
        (("unknown.pt", *vocabulary), "unknown.pt: found a dict, expected a checkpoint of TransfoXL"),
        (("evil.pt", *vocabulary), "(it names posix.system; refused), expected a checkpoint of TransfoXL"),
        (("folder", *vocabulary), "config.json: found no readable JSON"),
        (("bert", *vocabulary), "config.json: found model_type bert, expected transfo-xl"),
        (("weights.bin", *vocabulary), "weights.bin: found only weights, expected --config"),
        (("weights.bin", "--config", "invalid.json", *vocabulary), "--config: invalid.json: found no readable JSON"),
        (("weights.bin", "--config", "mismatched.json", *vocabulary), "by the configuration"),
        (
            ("missing.bin", "--config", "config.json", *vocabulary),
            "found no transformer.layers.0.dec_attn.r_net.weight",
        ),
        (("weights.bin", "--config", "config.json"), "--vocabulary: found none, expected the vocab.bin"),
        (("weights.bin", "--config", "config.json", "--vocabulary", "short.txt"), "found 12 symbols, expected 13"),
    ):
        refused = run_cli("convert", *arguments)
        assert refused.returncode == 2, (arguments, refused)
        assert message in refused.stderr, refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "executed").exists()

    arguments = ("weights.bin", "--config", "config.json", *vocabulary)
    assert run_cli("convert", *arguments).returncode == 0
    second = run_cli("convert", *arguments)
    assert second.returncode == 2
    assert f"found converted/{BEST_CHECKPOINT}, which would be overwritten" in second.stderr


@pytest.mark.parametrize("killed_at", ["dict.txt", BEST_CHECKPOINT])
def test_interrupted_conversion_can_be_repeated(run_cli: RunCli, tmp_path: Path, killed_at: str) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    torch.save(weights, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    arguments = ["weights.bin", "--config", "config.json", "--vocabulary", "vocab.txt"]
    command = [sys.executable, "-c", KILLED_AT_RENAME_PROGRAM, f"converted/{killed_at}", *arguments]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    converted = tmp_path / "converted"
    assert not (converted / BEST_CHECKPOINT).exists()
    assert (converted / "dict.txt").exists() == (killed_at == BEST_CHECKPOINT)
    done = run_cli("convert", *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in converted.iterdir()} == {"dict.txt", BEST_CHECKPOINT}
    _, vocabulary, *_ = load_checkpoint(converted / BEST_CHECKPOINT, torch.device("cpu"))
    assert Vocabulary.load(converted) == vocabulary


@pytest.mark.parametrize("name", ["dict.txt", "tokenizer.json"])
def test_existing_vocabulary_is_not_overwritten(run_cli: RunCli, tmp_path: Path, name: str) -> None:
    torch.save(fairseq_checkpoint("dict"), tmp_path / "model.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in "abcdefghi"))
    existing = tmp_path / "converted" / name
    existing.parent.mkdir()
    existing.write_text("existing")
    refused = run_cli("convert", "model.pt", "--vocabulary", "dict.txt")
    assert refused.returncode == 2
    assert (
        f"--save-dir: found converted/{name}, which would be overwritten; expected a folder without it"
        in refused.stderr
    )
    assert [path.read_text() for path in existing.parent.iterdir()] == ["existing"]


def test_half_precision_weights_are_converted_to_float32(run_cli: RunCli, tmp_path: Path) -> None:
    weights, config, _, _ = load_transfo_xl("default")
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    assert run_cli("convert", "weights.bin", "--config", "config.json", "--vocabulary", "vocab.txt").returncode == 0
    model, *_ = load_checkpoint(tmp_path / "converted" / BEST_CHECKPOINT, torch.device("cpu"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_character_model_scores_text_without_end_of_line_tokens(run_cli: RunCli, tmp_path: Path) -> None:
    """enwik8 and text8 have neither <eos> nor <unk> in kimiyoung's repository."""
    symbols = [str(value) for value in range(60, 73)]
    model = with_random_weights(MemTransformerLM(**{**KIMIYOUNG_SIZES, "cutoffs": [], "mem_len": 20}))
    with temporary_modules(**KIMIYOUNG_MODULES):
        torch.save(model, tmp_path / "model.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(symbols))
    done = run_cli("convert", "model.pt", "--vocabulary", "vocab.txt")
    assert "never predicted, because the original does not have them: <s> <pad> </s> <unk>" in done.stdout
    (tmp_path / "test.txt").write_text("60 63 71\n\n64 60\n")
    scored = run_cli("score", "test.txt", "--path", f"converted/{BEST_CHECKPOINT}", "--per", "token")
    values = [float(row.split("\t")[2]) for row in scored.stdout.splitlines()[1:]]
    # The converted model has an embedding of zeros for </s>, which precedes the first token.
    converted, *_ = load_checkpoint(tmp_path / "converted" / BEST_CHECKPOINT, torch.device("cpu"))
    with torch.no_grad():
        output, _ = converted(torch.tensor([[2, 4, 7, 15, 8]]))
        expected = converted.log_prob(output)[0].gather(1, torch.tensor([4, 7, 15, 8, 4]).view(-1, 1)).squeeze(1)
    assert values == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(scored.stdout.splitlines()) == 6
