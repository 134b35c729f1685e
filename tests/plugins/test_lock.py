"""One process at a time where the file system can lock, and a word where it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from plugins.lock import BusyError, locked


def test_a_second_one_is_told_and_a_later_one_gets_it(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file) as held:
        assert held
        with pytest.raises(BusyError), locked(file):
            raise AssertionError("two at a time")
    with locked(file), pytest.raises(BusyError), locked(file):
        raise AssertionError("two at a time")


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wait: bool
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    told: list[str] = []
    with locked(tmp_path / ".lock", wait=wait, say=told.append) as held:
        assert not held
    assert told == [
        f"{tmp_path} lies on a file system without locks ({os.strerror(number)}): let no other "
        "process write it meanwhile"
    ]
    with locked(tmp_path / ".lock", wait=wait):
        pass


def test_any_other_error_is_none_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock"):
        raise AssertionError("not locked")


def test_nothing_is_cut_off_or_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("years of work")
    with locked(target):
        pass
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError) as caught, locked(tmp_path / ".lock"):
        raise AssertionError("a link was followed")
    assert caught.value.errno == errno.ELOOP and target.read_text() == "years of work"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError), locked(tmp_path / "dangling"):
        raise AssertionError("a link was followed")
    assert not (tmp_path / "nowhere").exists()
