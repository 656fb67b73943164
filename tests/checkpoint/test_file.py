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

WHOLE = {key: None for key in checkpoints.KEYS} | {"format": checkpoints.FORMAT}


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, {**WHOLE, "model": {"weight": torch.arange(3)}})
    assert checkpoints.read(path)["model"]["weight"].tolist() == [0, 1, 2]
    assert torch.load(path, weights_only=True)["model"]["weight"].tolist() == [0, 1, 2]
    assert os.listdir(tmp_path) == [checkpoints.LAST]


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    checkpoints.write(path, {**WHOLE, "model": Malicious()})
    with pytest.raises(InputError, match="found code in the checkpoint"):
        checkpoints.read(path)
    assert not (tmp_path / "executed").exists()


def test_truncated_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, {**WHOLE, "model": torch.randn(1000)})
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
    checkpoints.write(path, {**WHOLE, "format": 99})
    with pytest.raises(InputError, match="found checkpoint format 99"):
        checkpoints.read(path)
    with pytest.raises(InputError, match="found no such file"):
        checkpoints.read(tmp_path / "nowhere.pt")


def test_a_flipped_byte_is_found_out(tmp_path: Path) -> None:
    """In a tensor's values as well, where it would make other weights and no error."""
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, {**WHOLE, "model": torch.full((5000,), 3.0), "progress": {"update": 7}})
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="corrupt"):
            checkpoints.read(path)


def test_a_broken_last_checkpoint_falls_back_to_the_one_before_and_then_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.read_latest(tmp_path) is None
    names = [checkpoints.LAST, "checkpoint_100.pt", "checkpoint_20.pt", checkpoints.BEST]
    for name in names:
        checkpoints.write(tmp_path / name, {**WHOLE, "progress": name})
    for name, following in pairwise(names):
        assert checkpoints.read_latest(tmp_path) == (tmp_path / name, {**WHOLE, "progress": name})
        (tmp_path / name).write_bytes(b"PK")
        latest = checkpoints.read_latest(tmp_path)
        assert latest is not None
        assert latest[0].name == following
        said = capsys.readouterr().err
        assert f"warning: {tmp_path / name}: found no valid checksum" in said
        assert said.endswith(f"; falling back to {tmp_path / following}\n")
    (tmp_path / checkpoints.BEST).write_bytes(b"")
    with pytest.raises(InputError, match="truncated, corrupt"):
        checkpoints.read_latest(tmp_path, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_snapshot_does_not_change_and_keeps_tied_tensors_one() -> None:
    weight = torch.arange(4.0)
    state = {"a": weight, "b": weight.detach(), "rest": [weight[1:], (3, "x", None)]}
    copy = checkpoints.snapshot(state)
    weight.zero_()
    assert copy["a"].tolist() == [0, 1, 2, 3]
    assert copy["a"] is copy["b"]
    assert copy["rest"][0].tolist() == [1, 2, 3]
    assert copy["rest"][1] == (3, "x", None)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from pytbptt.errors import RunError
from pytbptt import checkpoint as checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.write(path, {"model": torch.randn(1_000_000)})
except RunError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, {**WHOLE, "progress": 7})
    said = subprocess.run([sys.executable, "-c", FULL_DISK, path], text=True, capture_output=True, check=True).stdout
    assert said.startswith(f"could not save {path}: ")
    assert "the previous checkpoint is intact" in said
    assert len(said.splitlines()) == 1
    assert checkpoints.read(path)["progress"] == 7
    assert os.listdir(tmp_path) == [checkpoints.LAST]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not save"):
        checkpoints.write(tmp_path / "gone" / checkpoints.LAST, WHOLE)


def test_overrides_replace_fields_and_name_what_is_unknown() -> None:
    state = checkpoints.model_state(TransformerXLConfig(vocab_size=10, mem_len=3))
    config = checkpoints.model_config(state, {"mem_len": 640, "same_length": True, "dropout": 1})
    assert isinstance(config, TransformerXLConfig)
    assert (config.mem_len, config.same_length, config.vocab_size) == (640, True, 10)
    with pytest.raises(InputError, match=r"mem_lenn: unknown; did you mean mem_len\?"):
        checkpoints.model_config(state, {"mem_lenn": 640})
    with pytest.raises(InputError, match='mem_len: found "long", expected int'):
        checkpoints.model_config(state, {"mem_len": "long"})
    with pytest.raises(InputError, match="mem_len: found true, expected int"):
        checkpoints.model_config(state, {"mem_len": True})
    assert checkpoints.model_config(state, {"cutoffs": [2, 3]}).cutoffs == (2, 3)
    assert checkpoints.model_config(checkpoints.model_state(AWDLSTMConfig(alpha=3.0))) == AWDLSTMConfig(alpha=3.0)


def test_a_configuration_that_makes_no_model_is_a_users_mistake() -> None:
    with pytest.raises(InputError, match="same_length"):
        TransformerXLConfig(vocab_size=10, same_length=True, mem_len=0).build()
