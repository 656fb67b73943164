"""Locks and flushed folders, on file systems that have them and on those that have not."""

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
def _every_warning_anew() -> None:
    warn_once.cache_clear()


def refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("inherited", [True, False])
def test_without_locks_one_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inherited: bool, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    monkeypatch.setattr(fcntl, "lockf", refusing(number))
    with open(tmp_path / "file", "w+b") as first, open(tmp_path / "file", "r+b") as second:
        assert try_lock(first, inherited=inherited)
        assert try_lock(second, inherited=inherited)
    said = capsys.readouterr().err
    assert said.count("warning:") == 1
    assert f"{tmp_path}: cannot lock files here ({os.strerror(number)})" in said


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    with open(tmp_path / "file", "w+b") as file:
        assert not try_lock(file)
    assert capsys.readouterr().err == ""


def test_two_open_files_have_one_lock(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b") as first, open(tmp_path / "file", "r+b") as second:
        assert try_lock(first)
        assert not try_lock(second)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for content in (b"1", b"2"):
        atomic_write_bytes(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert capsys.readouterr().err.count("warning:") == 1


def test_a_failing_disk_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        fsync_directory(tmp_path)
