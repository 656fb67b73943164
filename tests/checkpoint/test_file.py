"""Checkpoint files: written atomically, read only if their checksum is valid, and without running code."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pytbptt import checkpoint as checkpoints
from pytbptt.errors import InputError, RunError
from pytbptt.nn import AWDLSTMConfig, TransformerXLConfig
from tests.common.malicious import Malicious

VALID_CHECKPOINT = {key: None for key in checkpoints.REQUIRED_KEYS} | {"format": checkpoints.FORMAT_VERSION}


def test_write_read_round_trip(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST_CHECKPOINT
    checkpoints.write(path, {**VALID_CHECKPOINT, "model": {"weight": torch.arange(3)}})
    assert checkpoints.read(path)["model"]["weight"].tolist() == [0, 1, 2]
    assert torch.load(path, weights_only=True)["model"]["weight"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == [checkpoints.LAST_CHECKPOINT]


def test_code_in_checkpoint_raises_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    checkpoints.write(path, {**VALID_CHECKPOINT, "model": Malicious(os.system, "touch executed")})
    with pytest.raises(InputError, match="found code in the checkpoint"):
        checkpoints.read(path)
    assert not (tmp_path / "executed").exists()


def test_invalid_checkpoint_files_raise(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST_CHECKPOINT
    checkpoints.write(path, {**VALID_CHECKPOINT, "model": torch.randn(1000)})
    content = path.read_bytes()
    for length in [1, *(len(content) * n // 16 for n in range(16)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="truncated, corrupt"):
            checkpoints.read(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match="not pytbptt's checkpoint"):
        checkpoints.read(path)
    checkpoints.write(path, {"state_dict": {}})
    with pytest.raises(InputError, match="not a checkpoint of pytbptt"):
        checkpoints.read(path)
    checkpoints.write(path, {**VALID_CHECKPOINT, "format": 99})
    with pytest.raises(InputError, match="found checkpoint format 99"):
        checkpoints.read(path)
    with pytest.raises(InputError, match="found no such file"):
        checkpoints.read(tmp_path / "nowhere.pt")


def test_bit_flip_is_detected_by_checksum(tmp_path: Path) -> None:
    """Also in the values of a tensor, where unpickling does not fail."""
    path = tmp_path / checkpoints.LAST_CHECKPOINT
    checkpoints.write(path, {**VALID_CHECKPOINT, "model": torch.full((5000,), 3.0), "progress": {"update": 7}})
    content = path.read_bytes()
    for offset in range(0, len(content), 97):
        corrupted = bytearray(content)
        corrupted[offset] ^= 1 << offset % 8
        path.write_bytes(corrupted)
        with pytest.raises(InputError, match="corrupt"):
            checkpoints.read(path)


def test_corrupt_last_checkpoint_falls_back_to_older_ones_then_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.read_latest(tmp_path) is None
    names = [checkpoints.LAST_CHECKPOINT, "checkpoint_100.pt", "checkpoint_20.pt", checkpoints.BEST_CHECKPOINT]
    for name in names:
        checkpoints.write(tmp_path / name, {**VALID_CHECKPOINT, "progress": name})
    for name, fallback in pairwise(names):
        assert checkpoints.read_latest(tmp_path) == (tmp_path / name, {**VALID_CHECKPOINT, "progress": name})
        (tmp_path / name).write_bytes(b"PK")
        latest = checkpoints.read_latest(tmp_path)
        assert latest is not None
        assert latest[0].name == fallback
        warning = capsys.readouterr().err
        assert f"warning: {tmp_path / name}: found no valid checksum" in warning
        assert warning.endswith(f"; falling back to {tmp_path / fallback}\n")
    (tmp_path / checkpoints.BEST_CHECKPOINT).write_bytes(b"")
    with pytest.raises(InputError, match="truncated, corrupt"):
        checkpoints.read_latest(tmp_path, quiet=True)
    assert capsys.readouterr().err == ""


def test_snapshot_copies_and_preserves_aliasing() -> None:
    weight = torch.arange(4.0)
    state = {"a": weight, "b": weight.detach(), "rest": [weight[1:], (3, "x", None)]}
    copy = checkpoints.snapshot(state)
    weight.zero_()
    assert copy["a"].tolist() == [0, 1, 2, 3]
    assert copy["a"] is copy["b"]
    assert copy["rest"][0].tolist() == [1, 2, 3]
    assert copy["rest"][1] == (3, "x", None)


WRITE_WITH_FILE_SIZE_LIMIT = """
import resource, signal, sys, torch
from pathlib import Path
from pytbptt import checkpoint as checkpoints
from pytbptt.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.write(path, {"model": torch.randn(1_000_000)})
except RunError as error:
    print(error)
"""


def test_failed_write_keeps_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST_CHECKPOINT
    checkpoints.write(path, {**VALID_CHECKPOINT, "progress": 7})
    command = [sys.executable, "-c", WRITE_WITH_FILE_SIZE_LIMIT, path]
    message = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    assert message.startswith(f"could not save {path}: ")
    assert "the previous checkpoint is intact" in message
    assert len(message.splitlines()) == 1
    assert checkpoints.read(path)["progress"] == 7
    assert os.listdir(tmp_path) == [checkpoints.LAST_CHECKPOINT]


def test_write_to_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not save"):
        checkpoints.write(tmp_path / "missing" / checkpoints.LAST_CHECKPOINT, VALID_CHECKPOINT)


def test_overrides_replace_config_fields_and_reject_invalid_ones() -> None:
    state = checkpoints.model_config_to_dict(TransformerXLConfig(vocab_size=10, mem_len=3))
    config = checkpoints.model_config_from_dict(state, {"mem_len": 640, "same_length": True, "dropout": 1})
    assert isinstance(config, TransformerXLConfig)
    assert (config.mem_len, config.same_length, config.vocab_size) == (640, True, 10)
    with pytest.raises(InputError, match=r"mem_lenn: unknown; did you mean mem_len\?"):
        checkpoints.model_config_from_dict(state, {"mem_lenn": 640})
    with pytest.raises(InputError, match='mem_len: found "long", expected int'):
        checkpoints.model_config_from_dict(state, {"mem_len": "long"})
    with pytest.raises(InputError, match="mem_len: found true, expected int"):
        checkpoints.model_config_from_dict(state, {"mem_len": True})
    assert checkpoints.model_config_from_dict(state, {"cutoffs": [2, 3]}).cutoffs == (2, 3)
    assert checkpoints.model_config_from_dict(
        checkpoints.model_config_to_dict(AWDLSTMConfig(alpha=3.0))
    ) == AWDLSTMConfig(alpha=3.0)


def test_invalid_config_raises_input_error() -> None:
    with pytest.raises(InputError, match="same_length"):
        TransformerXLConfig(vocab_size=10, same_length=True, mem_len=0).build()
