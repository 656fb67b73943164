"""From an old file to perplexity in two commands, and what is said where that cannot be."""

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

from pytbptt.checkpoint import BEST, load_checkpoint
from pytbptt.data import Vocabulary
from tests.conftest import Program
from tests.conversion.external_models import (
    KIMIYOUNG,
    SALESFORCE,
    MemTransformerLM,
    RNNModel,
    SplitCrossEntropyLoss,
    importable,
    randomised,
)
from tests.conversion.test_fairseq import checkpoint
from tests.conversion.test_kimiyoung import SIZES
from tests.conversion.test_safe_unpickle import Malicious
from tests.conversion.test_transfo_xl import load
from tests.conversion.test_vocabulary import Holder

SYMBOLS = ["<eos>", "<unk>", *"abcdefghijk"]
TEXT = "a b zzz\nc d e\n\nk\n"
KILLED = """
import os, runpy, signal, sys
last, replace = sys.argv.pop(1), os.replace

def replace_or_die(source, target):
    if str(target) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
runpy.run_module("pytbptt.convert", run_name="__main__")
"""  # killed when it renames a file to its first argument
IDS = [2, 3, 1, 0, 4, 5, 6, 0, 0, 12, 0]  # of TEXT, in SYMBOLS


def perplexity(log_prob: torch.Tensor) -> str:
    """Of IDS, the first of them predicted from <eos>."""
    nll = -log_prob.gather(1, torch.tensor(IDS).view(-1, 1)).mean().item()
    return f"perplexity {math.exp(nll):.2f}"


def inputs() -> torch.Tensor:
    return torch.tensor([0, *IDS[:-1]])


@pytest.fixture(autouse=True)
def text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)


def score_after(program: Program, *arguments: object) -> str:
    """What the score says after a conversion."""
    done = program("convert", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"python -m pytbptt.score TEXT --path converted/{BEST}"
    scored = program("score", "text.txt", "--path", f"converted/{BEST}")
    assert scored.returncode == 0, scored.stderr
    return scored.stderr


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors"])
def test_from_transformers_directory(program: Program, tmp_path: Path, form: str) -> None:
    weights, config, _, _ = load("clamped, same length")
    folder = tmp_path / "transfo-xl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "transfo-xl", **config}))
    torch.save({"idx2sym": SYMBOLS}, folder / "vocab.bin")
    if form == "pytorch_model.bin":
        torch.save(weights, folder / form)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="needs the package safetensors")
        tied = {"crit.out_layers.0.weight", "crit.out_layers.1.weight", "crit.out_layers.2.weight"}
        safetensors.save_file({name: value for name, value in weights.items() if name not in tied}, folder / form)
    from pytbptt.convert import from_transfo_xl

    model = from_transfo_xl(weights, config).eval()
    with torch.no_grad():
        expected = perplexity(model.log_prob(model(inputs().view(1, -1))[0])[0])
    assert expected in score_after(program, folder)
    assert program("info", f"converted/{BEST}").returncode == 0
    dictionary = (tmp_path / "converted" / "dict.txt").read_text().split()
    assert dictionary[::2] == SYMBOLS[2:]


def test_from_kimiyoungs_module_and_cache(program: Program, tmp_path: Path) -> None:
    model = randomised(MemTransformerLM(**{**SIZES, "cutoffs": [7], "mem_len": 20}))
    with importable(**KIMIYOUNG, data_utils=[Holder]):
        torch.save(model, tmp_path / "model.pt")
        torch.save(Holder(vocab=Holder(idx2sym=SYMBOLS)), tmp_path / "cache.pt")
    with torch.no_grad():
        hidden, _ = model.read(inputs(), [torch.empty(0, 8)] * 2)
        expected = perplexity(model.log_prob(hidden))
    assert expected in score_after(program, "model.pt", "--vocabulary", "cache.pt")
    missing = program("convert", "model.pt", "--save-dir", "other")
    assert "--vocabulary: found none, expected the cache.pt" in missing.stderr
    assert missing.returncode == 2


def test_what_was_refused_is_named(program: Program, tmp_path: Path) -> None:
    model, criterion = randomised(RNNModel(13, 4, 6, 2, 0.5, True)), SplitCrossEntropyLoss(4, [])
    with importable(**SALESFORCE, data=[Holder]):
        torch.save([model, criterion, Malicious(os.system, "touch executed")], tmp_path / "PTB.pt")
        torch.save(Holder(dictionary=Holder(idx2word=SYMBOLS)), tmp_path / "corpus.1.data")
    done = program("convert", "PTB.pt", "--vocabulary", "corpus.1.data")
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first.startswith("PTB.pt: read as plain data, without running their code: model.RNNModel, ")
    assert "posix.system" in first
    assert second == "corpus.1.data: read as plain data, without running their code: data.Holder"
    assert not (tmp_path / "executed").exists()


def test_from_fairseqs_checkpoint_with_its_dictionary(program: Program, tmp_path: Path) -> None:
    torch.save(checkpoint("a dict"), tmp_path / "checkpoint_best.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in "abcdefghi"))
    done = score_after(program, "checkpoint_best.pt", "--vocabulary", "dict.txt")
    assert "11 tokens in 4 lines" in done
    _, vocabulary, settings, _ = load_checkpoint(tmp_path / "converted" / BEST, torch.device("cpu"))
    assert (len(vocabulary), vocabulary.index("a"), settings["tokens_per_sample"]) == (13, 4, 128)
    (tmp_path / "dict.txt").write_text("a 1\n")
    blocked_globals = program("convert", "checkpoint_best.pt", "--vocabulary", "dict.txt", "--save-dir", "other")
    assert "dict.txt: found 5 types, expected 13" in blocked_globals.stderr


def test_from_fastais_weights_and_itos(program: Program, tmp_path: Path) -> None:
    model = randomised(RNNModel(13, 4, 6, 2, 0.0, True))
    weights = {f"0.{name}": value for name, value in model.state_dict().items() if name.startswith(("enc", "rnns"))}
    weights.update({f"1.{name}": value for name, value in model.state_dict().items() if name.startswith("decoder")})
    torch.save(weights, tmp_path / "lstm_wt103.pth")
    (tmp_path / "itos.pkl").write_bytes(pickle.dumps(["xxbos", "xxunk", *SYMBOLS[2:]]))
    with torch.no_grad():
        hidden = model.encoder(inputs().view(-1, 1))
        for rnn in model.rnns:
            hidden, _ = rnn(hidden)
        expected = perplexity((hidden[:, 0] @ model.decoder.weight.T + model.decoder.bias).log_softmax(1))
    assert expected in score_after(program, "lstm_wt103.pth", "--vocabulary", "itos.pkl")


def test_mistakes_cost_one_line_and_leave_nothing_behind(program: Program, tmp_path: Path) -> None:
    weights, config, _, _ = load("plain")
    torch.save(weights, tmp_path / "weights.bin")
    torch.save({name: value for name, value in weights.items() if "r_net" not in name}, tmp_path / "missing.bin")
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    torch.save({"model": Malicious(os.system, "touch executed")}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "weights.bin").read_bytes()[:999])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "wrong.json").write_text(json.dumps({**config, "d_head": 4}))
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    (tmp_path / "short.txt").write_text("\n".join(SYMBOLS[:-1]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    vocabulary: tuple[Any, ...] = ("--vocabulary", "vocab.txt")
    for arguments, message in (
        (("nowhere.pt", *vocabulary), "nowhere.pt: found no such file"),
        (("weights.bin", "--config", "config.json", *vocabulary, "--save-dir", "cut.pt/x"), "--save-dir: cut.pt/x: "),
        (("cut.pt", *vocabulary), "cut.pt: found something unreadable"),
        (("other.pt", *vocabulary), "other.pt: found a dict, expected a checkpoint of TransfoXL"),
        (("evil.pt", *vocabulary), "(it names posix.system; refused), expected a checkpoint of TransfoXL"),
        (("folder", *vocabulary), "config.json: found no readable JSON"),
        (("bert", *vocabulary), "config.json: found model_type bert, expected transfo-xl"),
        (("weights.bin", *vocabulary), "weights.bin: found weights alone, expected --config"),
        (("weights.bin", "--config", "no.json", *vocabulary), "--config: no.json: found no readable JSON"),
        (("weights.bin", "--config", "wrong.json", *vocabulary), "by the configuration"),
        (
            ("missing.bin", "--config", "config.json", *vocabulary),
            "found no transformer.layers.0.dec_attn.r_net.weight",
        ),
        (("weights.bin", "--config", "config.json"), "--vocabulary: found none, expected the vocab.bin"),
        (("weights.bin", "--config", "config.json", "--vocabulary", "short.txt"), "found 12 symbols, expected 13"),
    ):
        blocked_globals = program("convert", *arguments)
        assert blocked_globals.returncode == 2, (arguments, blocked_globals)
        assert message in blocked_globals.stderr, blocked_globals.stderr
        assert len(blocked_globals.stderr.splitlines()) == 1, blocked_globals.stderr
        assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "executed").exists()

    arguments = ("weights.bin", "--config", "config.json", *vocabulary)
    assert program("convert", *arguments).returncode == 0
    again = program("convert", *arguments)
    assert again.returncode == 2
    assert f"found converted/{BEST}, which would be overwritten" in again.stderr


@pytest.mark.parametrize("last", ["dict.txt", BEST])
def test_a_conversion_killed_before_a_file_was_whole_is_begun_again(
    program: Program, tmp_path: Path, last: str
) -> None:
    weights, config, _, _ = load("plain")
    torch.save(weights, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    arguments = ["weights.bin", "--config", "config.json", "--vocabulary", "vocab.txt"]
    command = [sys.executable, "-c", KILLED, f"converted/{last}", *arguments]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    converted = tmp_path / "converted"
    assert not (converted / BEST).exists()
    assert (converted / "dict.txt").exists() == (last == BEST)
    done = program("convert", *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in converted.iterdir()} == {"dict.txt", BEST}
    _, vocabulary, *_ = load_checkpoint(converted / BEST, torch.device("cpu"))
    assert Vocabulary.load(converted) == vocabulary


@pytest.mark.parametrize("name", ["dict.txt", "tokenizer.json"])
def test_another_vocabulary_is_not_replaced(program: Program, tmp_path: Path, name: str) -> None:
    torch.save(checkpoint("a dict"), tmp_path / "model.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in "abcdefghi"))
    there = tmp_path / "converted" / name
    there.parent.mkdir()
    there.write_text("another")
    blocked_globals = program("convert", "model.pt", "--vocabulary", "dict.txt")
    assert blocked_globals.returncode == 2
    assert (
        f"--save-dir: found converted/{name}, which would be overwritten; expected a folder without it"
        in blocked_globals.stderr
    )
    assert [path.read_text() for path in there.parent.iterdir()] == ["another"]


def test_weights_in_half_precision_become_float32(program: Program, tmp_path: Path) -> None:
    weights, config, _, _ = load("plain")
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(SYMBOLS))
    assert program("convert", "weights.bin", "--config", "config.json", "--vocabulary", "vocab.txt").returncode == 0
    model, *_ = load_checkpoint(tmp_path / "converted" / BEST, torch.device("cpu"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_model_of_characters_reads_its_prepared_text_without_line_ends(program: Program, tmp_path: Path) -> None:
    """enwik8 and text8 have neither <eos> nor <unk> in kimiyoung's repository."""
    symbols = [str(value) for value in range(60, 73)]
    model = randomised(MemTransformerLM(**{**SIZES, "cutoffs": [], "mem_len": 20}))
    with importable(**KIMIYOUNG):
        torch.save(model, tmp_path / "model.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(symbols))
    done = program("convert", "model.pt", "--vocabulary", "vocab.txt")
    assert "never predicted, because the original does not have them: <s> <pad> </s> <unk>" in done.stdout
    (tmp_path / "test.txt").write_text("60 63 71\n\n64 60\n")
    scored = program("score", "test.txt", "--path", f"converted/{BEST}", "--per", "token")
    values = [float(row.split("\t")[2]) for row in scored.stdout.splitlines()[1:]]
    # All but the first, which nothing comes before in the original, while here there is an embedding of zeros.
    converted, *_ = load_checkpoint(tmp_path / "converted" / BEST, torch.device("cpu"))
    with torch.no_grad():
        output, _ = converted(torch.tensor([[2, 4, 7, 15, 8]]))
        expected = converted.log_prob(output)[0].gather(1, torch.tensor([4, 7, 15, 8, 4]).view(-1, 1)).squeeze(1)
    assert values == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(scored.stdout.splitlines()) == 6
