"""The command-line programs: their output, the files that they write, and their error messages."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from pytbptt.advise import read_advice_command_line
from pytbptt.convert import ConvertSettings
from pytbptt.data import load
from pytbptt.data.preparation import PrepareSettings
from pytbptt.eval import EvaluationSettings
from pytbptt.generate import GenerationSettings
from pytbptt.info import InfoSettings
from pytbptt.ops.extension import EXTENSION
from pytbptt.plot import PlotSettings
from pytbptt.runtime.cli import parse
from pytbptt.score import ScoreSettings
from pytbptt.training.config import read_command_line
from tests.common.cli import RunCli

SMALL = "--d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 8 --tokens-per-sample 8 --batch-size 4"
SHORT = "--max-update 30 --log-interval 10 --lr 0.01"


@pytest.fixture(scope="module")
def trained_run(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pytbptt.training.config import read_command_line
    from pytbptt.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "checkpoints"
    words = f"{corpus} {SMALL} {SHORT} --save-dir {folder} --log-format json --sample-tokens 20 --test"
    train(read_command_line(words.split()))
    return folder


def test_fairseq_example_commands_run(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    training = run_cli(
        "train",
        *f"--user-dir examples/truncated_bptt {corpus} --task truncated_bptt_lm --arch transformer_xl {SMALL} {SHORT} "
        "--dropout 0.1 --dropatt 0.0 --optimizer adam --clip-norm 0.25 --lr-scheduler cosine --warmup-updates 0 "
        "--min-lr 0.0 --log-format json --log-interval 25 --fp16 --device cpu".split(),
    )
    assert training.returncode == 0, training.stderr
    fused = "reference: " if EXTENSION.facts is None else "fused ("
    computation = f" on cpu (threads: {torch.get_num_threads()}) in float32, rel_attention: {fused}"
    assert "--fp16: no GPU here, so training in float32" in training.stderr
    assert f"\ntraining{computation}" in training.stderr
    entries = [json.loads(line) for line in training.stdout.splitlines()]
    assert [(entry["split"], entry["step"]) for entry in entries][:1] == [("train", 25)]

    evaluation = run_cli(
        "eval",
        corpus,
        *"--path checkpoints/checkpoint_best.pt --user-dir examples/truncated_bptt/ --task truncated_bptt_lm "
        "--batch-size 1 --required-batch-size-multiple 1 --tokens-per-sample 6".split(),
        "--model-overrides",
        '{"mem_len":40,"clamp_len":20,"same_length":True}',
    )
    assert evaluation.returncode == 0, evaluation.stderr
    first, second, third, fourth = evaluation.stdout.splitlines()
    assert first.startswith("num. model params: ")
    assert computation in first
    assert second.startswith(f"Evaluated {len(load(corpus, 'test'))} tokens in ")
    assert second.endswith(" tokens/s)")
    assert third.startswith("Loss (base 2): ")
    assert ", Perplexity: " in third
    assert fourth.startswith("Per byte: ")


def test_run_writes_results_settings_metrics_and_curves(trained_run: Path) -> None:
    assert {path.name for path in trained_run.iterdir()} == {
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "config.toml",
        ".lock",
        "curves.png",
        "metrics.jsonl",
        "results.json",
    }
    assert (trained_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((trained_run / "results.json").read_text())
    assert results["update"] == 30
    assert results["test"]["tokens"] > 0
    assert results["sample"]
    assert "tokens-per-sample = 8\n" in (trained_run / "config.toml").read_text()


def test_finished_run_prints_results_and_restart_hint(
    corpus: str, trained_run: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    finished = run_cli("train", corpus, *SMALL.split(), *SHORT.split(), "--save-dir", trained_run)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"\ntest         \S+ bits/byte, perplexity \S+ per word; loss ", finished.stdout)
    assert "--restart" in finished.stdout
    restarted = run_cli(
        "train", "--config", trained_run / "config.toml", "--restart", "--max-update", 3, "--save-dir", "new"
    )
    assert restarted.returncode == 0, restarted.stderr
    options = ("--save-dir", "new", "--log-format", "simple", "--max-minutes", 5)
    resumed = run_cli("train", corpus, *SMALL.split(), *options, "--max-update", 5)
    assert "resuming from update 3 in new" in resumed.stdout
    assert json.loads((tmp_path / "new" / "results.json").read_text())["update"] == 5


def test_generation_streams_text_after_the_prompt(trained_run: Path, run_cli: RunCli) -> None:
    arguments = ("--path", trained_run / "checkpoint_best.pt", "--prompt", "w1 w4", "--length", 25)
    text = run_cli("generate", *arguments)
    assert text.returncode == 0, text.stderr
    assert text.stdout.split()[:2] == ["w1", "w4"]
    # Words and line ends, the last of which is a token or is added by the program.
    assert len(text.stdout.split()) + text.stdout.count("\n") - 1 in (26, 27)
    assert run_cli("generate", *arguments).stdout == text.stdout


def test_plot_draws_runs_side_by_side(trained_run: Path, run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("plot", trained_run, trained_run, "--output", "both.png").stdout == "both.png\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_invalid_arguments_exit_2_with_one_line(
    corpus: str, trained_run: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    best = trained_run / "checkpoint_best.pt"
    (tmp_path / "broken.pt").write_bytes(best.read_bytes()[:500])
    for arguments, message in (
        (("train", "no/such/data"), "no/such/data"),
        (("train", corpus, "--batch-sizes", 3), "--batch-sizes: unknown flag; did you mean --batch-size?"),
        (("train", corpus, "--batch-size", 100_000), "100000"),
        (("eval", corpus, "--path", best, "--model-overrides", "[1]"), "found [1], expected a Python dict"),
        (("eval", corpus, "--path", best, "--model-overrides", '{"mem_lem": 3}'), "did you mean mem_len?"),
        (("eval", corpus, "--path", best, "--model-overrides", '{"d_model": 14}'), "weights do not fit"),
        (("eval", corpus, "--path", best, "--gen-subset", "tests"), "tests"),
        (("eval", corpus, "--path", "missing.pt"), "missing.pt: found no such file"),
        (("generate", "--path", "broken.pt"), "broken.pt: found no valid checksum"),
        (
            ("generate", "--path", best, "--temperature", 1e-46),
            "found 1e-46, expected 0 or at least 1e-06",
        ),
        (("plot", "nowhere"), "nowhere: found no metrics.jsonl"),
    ):
        failed = run_cli(*arguments)
        assert failed.returncode == 2, (arguments, failed)
        assert message in failed.stderr, failed.stderr
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
        assert failed.stdout == ""


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("--save-dir", "train no/such/data"),
        ("--save-dir", "train CORPUS --vocab-size 3"),
        ("--save-dir", "train CORPUS --batch-size 100000"),
        ("--advice-dir", "advise no/such/data"),
        ("--destdir", "prepare --only-source --trainpref latin1.txt"),
    ],
)
def test_failed_start_cleans_up_created_folders_only(
    corpus: str, run_cli: RunCli, tmp_path: Path, flag: str, arguments: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("Motörhead\n".encode("latin1"))
    words = [corpus if word == "CORPUS" else word for word in arguments.split()]
    assert run_cli(*words, flag, "new/run").returncode == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "run").mkdir(parents=True)
    (tmp_path / "full" / "run" / "notes.txt").write_text("a note")
    for existing in ("empty", "full/run"):
        assert run_cli(*words, flag, f"{existing}/new").returncode == 2
        assert run_cli(*words, flag, existing).returncode == 2
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "full" / "run" / "notes.txt").read_text() == "a note"
    assert not (tmp_path / "full" / "run" / "new").exists()


def test_failed_restart_keeps_all_files(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    command = ("train", corpus, *SMALL.split(), "--max-update", 2, "--save-dir", "run")
    assert run_cli(*command).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
        failed = run_cli(*command, "--restart", "--tensorboard-logdir", "events")
    assert failed.returncode == 2
    assert failed.stderr.endswith("--tensorboard-logdir: found no tensorboard package; pip install tensorboard\n")
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {**after, ".lock": b""} == {**before, ".lock": b""}  # the lock holds a process id


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PYTBPTT_BACKEND", "fast", "auto, fused, reference"),
        pytest.param(
            "PYTBPTT_CPU_ISA",
            "sse",
            "baseline",
            marks=pytest.mark.skipif(EXTENSION.facts is None, reason="no compiled extension, so nothing to choose"),
        ),
    ],
)
def test_invalid_environment_variable_is_reported(name: str, value: str, expected: str) -> None:
    command = [sys.executable, "-m", "pytbptt.info"]
    environment = {**os.environ, name: value, "PYTHONWARNINGS": "ignore"}  # of a missing extension
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"python -m pytbptt.info: {name}: found '{value}', expected one of {expected}")


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "advise": read_advice_command_line,
    "convert": lambda arguments: parse("convert", ConvertSettings, arguments),
    "eval": lambda arguments: parse("eval", EvaluationSettings, arguments),
    "generate": lambda arguments: parse("generate", GenerationSettings, arguments),
    "info": lambda arguments: parse("info", InfoSettings, arguments),
    "plot": lambda arguments: parse("plot", PlotSettings, arguments),
    "prepare": lambda arguments: parse("prepare", PrepareSettings, arguments),
    "score": lambda arguments: parse("score", ScoreSettings, arguments),
    "train": read_command_line,
}


@pytest.mark.parametrize("name", PARSERS)
def test_help_describes_every_flag_and_fills_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        PARSERS[name](["--help"])
    lines = re.sub("[│┃|]", " ", capsys.readouterr().out).splitlines()
    column = next(line for line in lines if line.startswith("  -h")).index("show this")
    help_lines: dict[str, list[str]] = {}
    texts: list[str] = []
    for line in lines:
        if re.match(r"  \S", line):  # a flag, or the description of a group of flags
            texts = help_lines.setdefault(line.split()[0], []) if re.match(r"  (--?\w|\[?STR)", line) else []
        if help_lines and not line[column - 2 : column].strip() and line[column:].strip():
            texts.append(line[column:].rstrip())
    width = max(len(text) for texts in help_lines.values() for text in texts)
    assert len(help_lines) > 1
    for flag, texts in help_lines.items():
        help_text = " ".join(texts).partition(" (default:")[0]
        assert " " in help_text, flag
        for text, following in itertools.pairwise(texts):
            assert len(text) + 1 + len(following.split()[0]) > width, (flag, text)
        if re.search(r"\(default: (''|)\)", " ".join(texts)):
            assert re.search("empty|ignored", help_text, re.IGNORECASE), flag
