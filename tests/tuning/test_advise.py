"""The program advise, from its command line to its files, on a small corpus."""

import json
import shlex
from pathlib import Path

import pytest

from pytbptt import checkpoint as checkpoints
from pytbptt.data import load
from pytbptt.nn import TransformerXL, TransformerXLConfig
from pytbptt.training.config import flatten, read_command_line
from pytbptt.training.run import train
from pytbptt.tuning import cost
from pytbptt.tuning.cost import MemoryPoint
from tests.common.cli import RunCli

MODELS = {
    "awd_lstm": "--arch awd_lstm --d-embed 12 --d-hidden 16 --n-layer 2",
    "transformer_xl": "--arch transformer_xl --d-model 12 --n-head 2 --d-head 6 --d-inner 16 --n-layer 2 --mem-len 8",
}
SIZES = "--tokens-per-sample 12 --batch-size 4 --lr 0.01 --adam-betas 0.9 0.98 --device cpu --seed 3"
SHORT = "--minutes 0.003 --memory-limit 1"
MEASUREMENTS = ("speed", "knee", "seconds", "recommendation", "command")


@pytest.fixture(autouse=True)
def skip_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory from a formula (test_cost.py tests the measurement), and speed from very short runs."""

    def measure(settings: object, device: object, bptt: int, batch_size: int, limit: float) -> MemoryPoint:
        peak = 300_000_000 + 30_000 * bptt * batch_size
        return MemoryPoint(bptt, batch_size, peak if peak <= limit else None)

    monkeypatch.setattr(cost, "measure_peak", measure)
    monkeypatch.setattr("pytbptt.tuning.cost.MIN_SECONDS", 0.0)


@pytest.mark.parametrize("arch", MODELS)
def test_advise_writes_files_and_valid_train_command(corpus: str, run_cli: RunCli, tmp_path: Path, arch: str) -> None:
    ended = run_cli("advise", corpus, *MODELS[arch].split(), *SIZES.split(), *SHORT.split())
    assert ended.returncode == 0, ended.stderr
    advice = json.loads((tmp_path / "advice" / "advice.json").read_text())
    assert (tmp_path / "advice" / "advice.png").read_bytes().startswith(b"\x89PNG")

    bptts = [point["bptt"] for point in advice["stability"]]
    assert 12 in bptts  # --tokens-per-sample itself, besides powers of two
    assert advice["bias"]["lengths"] == [bptt for bptt in bptts if bptt >= (8 if arch == "awd_lstm" else 16)]
    assert advice["memory"]["held_out_error"] == pytest.approx(0.0, abs=1e-3)
    assert {point["bptt"] for point in advice["speed"]} <= set(bptts)
    assert len(ended.stdout.splitlines()) <= 15
    assert (advice["context"] == []) == (arch == "awd_lstm")

    last = ended.stdout.splitlines()[-1]
    assert last == advice["command"]
    assert last.startswith(f"python -m pytbptt.train {corpus} ")
    advised = flatten(read_command_line(shlex.split(last)[3:]))
    original = flatten(read_command_line([corpus, *MODELS[arch].split(), *SIZES.split()]))
    recommended = advice["recommendation"]
    changed = {key for key in original if original[key] != advised[key]}
    assert changed <= {"tokens_per_sample", "batch_size", "mem_len"}
    assert advised["tokens_per_sample"] == recommended["tokens_per_sample"]
    assert advised["batch_size"] == recommended["batch_size"]
    assert advised.get("mem_len") == recommended["mem_len"]
    assert all(f"- {reason}" in ended.stdout for reason in recommended["reasons"])


def test_advice_is_deterministic(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        run_cli("advise", corpus, *MODELS["transformer_xl"].split(), *SIZES.split(), *SHORT.split())
        content = json.loads((tmp_path / "advice" / "advice.json").read_text())
        runs.append({key: value for key, value in content.items() if key not in MEASUREMENTS})
    assert runs[0] == runs[1]


def test_checkpoint_provides_weights_and_settings(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    flags = [*MODELS["awd_lstm"].split(), *SIZES.split(), "--max-update", "20", "--save-dir", str(tmp_path)]
    train(read_command_line([corpus, *flags, "--log-format", "json"]))
    ended = run_cli("advise", "--path", "checkpoint_last.pt", *SHORT.split(), "--tokens-per-sample", 16)
    assert ended.returncode == 0, ended.stderr
    assert "weights: checkpoint_last.pt, update 20" in ended.stdout
    assert corpus in ended.stdout.splitlines()[-1]
    assert "--d-hidden 16" in ended.stdout.splitlines()[-1]
    # Not the save_dir of the checkpoint's run, which cannot be resumed with other sizes.
    advised = flatten(read_command_line(shlex.split(ended.stdout.splitlines()[-1])[3:]))
    assert advised["save_dir"] == str(tmp_path / f"bptt-{advised['tokens_per_sample']}")

    other = run_cli("advise", "--path", "checkpoint_last.pt", "--d-hidden", 24, *SHORT.split())
    assert other.returncode == 2
    assert "--path: weights do not fit the settings" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_converted_checkpoint_provides_model_settings_only(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    vocabulary = load(corpus, "train").vocabulary
    model = TransformerXL(
        TransformerXLConfig(
            vocab_size=len(vocabulary), d_model=12, n_head=2, d_head=6, d_inner=16, n_layer=2, mem_len=8, clamp_len=7
        )
    )
    checkpoints.write(tmp_path / "converted.pt", checkpoints.weights_only_checkpoint(model, vocabulary))
    ended = run_cli("advise", corpus, "--path", "converted.pt", *SIZES.split(), *SHORT.split())
    assert ended.returncode == 0, ended.stderr
    assert "weights: converted.pt, converted" in ended.stdout
    assert "--clamp-len 7" in ended.stdout.splitlines()[-1]


def test_too_little_validation_text_raises_before_measuring(run_cli: RunCli, tmp_path: Path) -> None:
    for split, text in (("train", "some words to train on\n" * 400), ("valid", "a b c\n" * 16)):  # 64 tokens
        (tmp_path / f"{split}.txt").write_text(text)
    run_cli("prepare", "--only-source", "--trainpref", "train.txt", "--validpref", "valid.txt", "--destdir", "small")
    refused = run_cli("advise", "small", *MODELS["transformer_xl"].split(), *SIZES.split(), *SHORT.split())
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.endswith("DATA: found 64 tokens to validate on, expected at least 65 to measure with\n")


def test_invalid_arguments_exit_2_with_one_line(corpus: str, run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("no/such/data",), "no/such/data"),
        ((corpus, "--tolerance", 1.5), "--tolerance: found 1.5, expected more than 0 and less than 1"),
        ((corpus, "--minutes", 0), "--minutes: found 0.0, expected more than 0"),
        ((corpus, "--memory-limit", -1), "--memory-limit: found -1.0, expected at least 0"),
        ((corpus, "--minute", 1), "--minute: unknown flag; did you mean --minutes?"),
        ((corpus, "--path", "missing.pt"), "missing.pt: found no such file"),
        ((corpus, "--path"), "--path"),
        ((corpus, "--arch", "lstm"), "--arch: found lstm, expected one of transformer_xl, awd_lstm"),
        ((corpus, "--advice-dir", "file/there"), "--advice-dir: file/there: found Not a directory"),
    ):
        refused = run_cli("advise", *arguments)
        assert refused.returncode == 2, (arguments, refused)
        assert message in refused.stderr, refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert refused.stdout == ""


def test_memory_limit_that_nothing_fits_exits_1(corpus: str, run_cli: RunCli) -> None:
    small = run_cli(
        "advise", corpus, *MODELS["awd_lstm"].split(), *SIZES.split(), *SHORT.split(), "--memory-limit", 0.2
    )
    assert small.returncode == 1
    assert "--memory-limit: found that 0 of " in small.stderr.splitlines()[-1]
