"""The programs as a newcomer meets them: what they print, what they leave behind, what they refuse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pytbptt.data import load
from pytbptt.ops.extension import EXTENSION
from tests.conftest import Program

SMALL = "--d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 8 --tokens-per-sample 8 --batch-size 4"
SHORT = "--max-update 30 --log-interval 10 --lr 0.01"


@pytest.fixture(scope="module")
def trained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pytbptt.training.config import read_command_line
    from pytbptt.training.run import train

    folder = tmp_path_factory.mktemp("runs") / "checkpoints"
    words = f"{corpus} {SMALL} {SHORT} --save-dir {folder} --log-format json --sample-tokens 20 --test"
    train(read_command_line(words.split()))
    return folder


def test_the_seeds_training_and_evaluation_commands(corpus: str, program: Program, tmp_path: Path) -> None:
    training = program(
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

    evaluation = program(
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


def test_a_run_leaves_results_settings_metrics_and_a_picture(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "config.toml",
        ".lock",
        "curves.png",
        "metrics.jsonl",
        "results.json",
    }
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((trained / "results.json").read_text())
    assert results["update"] == 30
    assert results["test"]["tokens"] > 0
    assert results["sample"]
    assert "tokens-per-sample = 8\n" in (trained / "config.toml").read_text()


def test_a_finished_run_says_its_results_and_how_to_start_afresh(
    corpus: str, trained: Path, program: Program, tmp_path: Path
) -> None:
    again = program("train", corpus, *SMALL.split(), *SHORT.split(), "--save-dir", trained)
    assert again.returncode == 0, again.stderr
    assert re.search(r"\ntest         \S+ bits/byte, perplexity \S+ per word; loss ", again.stdout)
    assert "--restart" in again.stdout
    afresh = program("train", "--config", trained / "config.toml", "--restart", "--max-update", 3, "--save-dir", "new")
    assert afresh.returncode == 0, afresh.stderr
    more = ("--save-dir", "new", "--log-format", "simple", "--max-minutes", 5)
    longer = program("train", corpus, *SMALL.split(), *more, "--max-update", 5)
    assert "resuming from update 3 in new" in longer.stdout
    assert json.loads((tmp_path / "new" / "results.json").read_text())["update"] == 5


def test_generation_streams_text_after_the_prompt(trained: Path, program: Program) -> None:
    arguments = ("--path", trained / "checkpoint_best.pt", "--prompt", "w1 w4", "--length", 25)
    text = program("generate", *arguments)
    assert text.returncode == 0, text.stderr
    assert text.stdout.split()[:2] == ["w1", "w4"]
    # Words and ends of lines, one of which may be the last token or the program's own.
    assert len(text.stdout.split()) + text.stdout.count("\n") - 1 in (26, 27)
    assert program("generate", *arguments).stdout == text.stdout


def test_plot_draws_runs_side_by_side(trained: Path, program: Program, tmp_path: Path) -> None:
    assert program("plot", trained, trained, "--output", "both.png").stdout == "both.png\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_cost_one_line_and_status_2(corpus: str, trained: Path, program: Program, tmp_path: Path) -> None:
    best = trained / "checkpoint_best.pt"
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
        refused = program(*arguments)
        assert refused.returncode == 2, (arguments, refused)
        assert message in refused.stderr, refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert refused.stdout == ""


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
def test_a_refused_start_leaves_no_folder_that_it_made_and_all_that_was_there(
    corpus: str, program: Program, tmp_path: Path, flag: str, arguments: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("Motörhead\n".encode("latin1"))
    words = [corpus if word == "CORPUS" else word for word in arguments.split()]
    assert program(*words, flag, "new/run").returncode == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "run").mkdir(parents=True)
    (tmp_path / "full" / "run" / "notes.txt").write_text("mine")
    for there in ("empty", "full/run"):
        assert program(*words, flag, f"{there}/new").returncode == 2
        assert program(*words, flag, there).returncode == 2
    assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "full" / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "full" / "run" / "new").exists()


def test_a_refused_restart_loses_nothing(corpus: str, program: Program, tmp_path: Path) -> None:
    command = ("train", corpus, *SMALL.split(), "--max-update", 2, "--save-dir", "run")
    assert program(*command).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
        refused = program(*command, "--restart", "--tensorboard-logdir", "events")
    assert refused.returncode == 2
    assert refused.stderr.endswith("--tensorboard-logdir: found no tensorboard package; pip install tensorboard\n")
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {**after, ".lock": b""} == {**before, ".lock": b""}  # (the lock's number of a process may be another)


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
def test_a_variable_that_names_nothing_is_one_line(name: str, value: str, expected: str) -> None:
    command = [sys.executable, "-m", "pytbptt.info"]
    environment = {
        **os.environ,
        name: value,
        "PYTHONWARNINGS": "ignore",
    }  # that there is no extension, if there is none
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"python -m pytbptt.info: {name}: found '{value}', expected one of {expected}")
