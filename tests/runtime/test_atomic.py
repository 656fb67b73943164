"""File locks and fsync of directories, also on file systems that do not support them."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pytbptt.runtime.atomic import atomic_write_bytes, fsync_directory, try_lock, warn_once

pytestmark = pytest.mark.fault
fcntl = pytest.importorskip("fcntl")  # not on Windows


@pytest.fixture(autouse=True)
def _clear_warnings() -> None:
    warn_once.cache_clear()


def raise_oserror(error_number: int) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise OSError(error_number, os.strerror(error_number))

    return function


@pytest.mark.parametrize("error_number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("inherited", [True, False])
def test_missing_file_locks_warn_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inherited: bool,
    error_number: int,
) -> None:
    monkeypatch.setattr(fcntl, "flock", raise_oserror(error_number))
    monkeypatch.setattr(fcntl, "lockf", raise_oserror(error_number))
    with open(tmp_path / "file", "w+b") as first, open(tmp_path / "file", "r+b") as second:
        assert try_lock(first, inherited=inherited)
        assert try_lock(second, inherited=inherited)
    stderr = capsys.readouterr().err
    assert stderr.count("warning:") == 1
    assert f"{tmp_path}: cannot lock files here ({os.strerror(error_number)})" in stderr


@pytest.mark.parametrize("error_number", [errno.EAGAIN, errno.EACCES])
def test_lock_held_by_another_process_fails_without_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error_number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", raise_oserror(error_number))
    with open(tmp_path / "file", "w+b") as file:
        assert not try_lock(file)
    assert capsys.readouterr().err == ""


def test_lock_excludes_second_open_of_same_file(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as first, open(tmp_path / "file", "r+b") as second:
        assert try_lock(first)
        assert not try_lock(second)


@pytest.mark.parametrize("error_number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_unsupported_directory_fsync_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error_number: int
) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(error_number, os.strerror(error_number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for content in (b"1", b"2"):
        atomic_write_bytes(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert capsys.readouterr().err.count("warning:") == 1


def test_fsync_eio_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raise_oserror(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_directory(tmp_path)
