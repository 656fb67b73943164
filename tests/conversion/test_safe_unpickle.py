"""Pickles are read as tensors, plain containers and opaque objects; none of their code runs."""

import collections
import functools
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from pytbptt.conversion import safe_unpickle
from pytbptt.errors import InputError
from tests.common.malicious import Malicious

ATTACKS = {
    "posix.system": Malicious(os.system, "touch executed"),
    "builtins.eval": Malicious(eval, "open('executed', 'w')"),
    "builtins.exec": Malicious(exec, "open('executed', 'w')"),
    "builtins.getattr": Malicious(getattr, Malicious(__import__, "os"), "system"),
    "functools.partial": Malicious(functools.partial, os.system, "touch executed"),
    "torch.storage._load_from_bytes": Malicious(torch.storage._load_from_bytes, b"pickle"),
    "torch.serialization.load": Malicious(torch.load, "file.pt"),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("file_format", ["pickle", "zip", "legacy"])
def test_pickled_code_is_reported_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file_format: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path, value = tmp_path / "file", {"weight": torch.ones(2), "attack": ATTACKS[name]}
    if file_format == "pickle":
        path.write_bytes(pickle.dumps({"attack": ATTACKS[name]}))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=file_format == "zip")
    contents = safe_unpickle.read(path)
    assert isinstance(contents.value["attack"], safe_unpickle.OpaqueObject)
    assert name in [blocked.replace("__builtin__", "builtins") for blocked in contents.blocked_globals]
    assert contents.value.get("weight", torch.ones(2)).tolist() == [1.0, 1.0]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_round_trip_others_become_opaque(tmp_path: Path, protocol: int) -> None:
    plain = {"numbers": [1, 2.5, None, True], "text": "ä", "tuple": (1, b"x"[:0]), "set": {3}}
    ordered = collections.OrderedDict(one=1)
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps([plain, ordered, collections.Counter("aab"), Path("x")], protocol=protocol))
    found_plain, found_ordered, counter, other = safe_unpickle.read(path).value
    assert found_plain["numbers"] == plain["numbers"]
    assert found_plain["text"] == "ä"
    assert found_ordered == ordered
    assert isinstance(counter, safe_unpickle.OpaqueObject)
    assert isinstance(other, safe_unpickle.OpaqueObject)


def test_invalid_files_raise_one_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    torch.save({"weight": torch.ones(100)}, path)
    content = path.read_bytes()
    for invalid in (b"", b"hello\n", content[:300], content[:-100], pickle.dumps(3)[:-1]):
        path.write_bytes(invalid)
        with pytest.raises(InputError) as error:
            safe_unpickle.read(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match="found no such file"):
        safe_unpickle.read(tmp_path / "nowhere")


def test_torchscript_and_tar_files_are_rejected(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "a") as script:
        script.writestr("script/constants.pkl", b"")
    with pytest.raises(InputError, match="found TorchScript, which is code"):
        safe_unpickle.read(tmp_path / "script.pt")
    (tmp_path / "storages").write_bytes(pickle.dumps(0))
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises(InputError, match="found a tar file"):
        safe_unpickle.read(tmp_path / "old.tar")
