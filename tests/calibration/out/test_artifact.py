"""A stage's folder appears whole or not at all, and damage is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from calibration.out.files import (
    StageWriter,
    file_records,
    locked,
    temporary,
    verify_files,
    write_json,
)
from calibration.out.json_file import read_json
from plugins.errors import InputError


def test_folder_appears_only_when_whole(tmp_path: Path) -> None:
    with StageWriter(tmp_path, "quant") as writer:
        (writer.path / "a.bin").write_bytes(b"new")
        assert not (tmp_path / "quant").exists()
    assert (tmp_path / "quant" / "a.bin").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["quant"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_failure_keeps_the_earlier_result(tmp_path: Path, error: BaseException) -> None:
    with StageWriter(tmp_path, "quant") as writer:
        (writer.path / "a.bin").write_bytes(b"old")
    with pytest.raises(type(error)), StageWriter(tmp_path, "quant") as writer:
        (writer.path / "a.bin").write_bytes(b"half")
        raise error
    assert (tmp_path / "quant" / "a.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["quant"]


def test_no_space_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        StageWriter(tmp_path, "onnx", needed_bytes=3_000_000, free_bytes=lambda _: 1_000_000)
    assert str(caught.value) == (
        f"{tmp_path / 'onnx'}: got 1 MB of free space, expected at "
        f"least 3 MB. "
        "Free some space or choose another --out."
    )
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_half_artefact(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, StageWriter(tmp_path, "onnx") as writer:
        (writer.path / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == (
        f"{tmp_path / 'onnx'}: got No space left on device while "
        f"writing, expected a writable folder with enough "
        "space. Check the disk and the permissions; earlier results are whole."
    )
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_tells_its_own_story(tmp_path: Path) -> None:
    for error in (
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "weights")),
    ):
        with pytest.raises(type(error)), StageWriter(tmp_path, "onnx"):
            raise error
    with pytest.raises(InputError) as caught, StageWriter(tmp_path, "onnx") as writer:
        (writer.path / "folder" / "file").write_bytes(b"")
    assert str(caught.value) == (
        f"{tmp_path / 'onnx'}: got No such file or directory while "
        f"writing, expected a writable folder with "
        "enough space. Check the disk and the permissions; earlier "
        "results are whole."
    )
    assert list(tmp_path.iterdir()) == []


def _made(out: Path, content: bytes) -> StageWriter:
    """A writer of OUT/quant whose file is written, on top of an earlier result."""
    with StageWriter(out, "quant") as writer:
        (writer.path / "a.bin").write_bytes(b"old")
    writer = StageWriter(out, "quant")
    (writer.__enter__().path / "a.bin").write_bytes(content)
    return writer


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("moment", ["fsync", "first rename", "second rename"])
def test_a_failing_commit_restores_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, moment: str
) -> None:
    writer = _made(tmp_path, b"new")
    rename, failed = Path.rename, "quant" if moment == "first rename" else ".quant.partial"

    def fail(*arguments: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr("os.fsync", fail)
        else:
            patch.setattr(
                Path,
                "rename",
                lambda self, target: fail() if self.name == failed else rename(self, target),
            )
        with pytest.raises(
            KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError
        ) as caught:
            writer.__exit__(None, None, None)
    if isinstance(caught.value, InputError):
        assert str(caught.value) == (
            f"{tmp_path / 'quant'}: got Input/output error while "
            f"writing, expected a writable folder with enough "
            "space. Check the disk and the permissions; earlier "
            "results are whole."
        )
    assert [path.name for path in tmp_path.iterdir()] == ["quant"]
    assert (tmp_path / "quant" / "a.bin").read_bytes() == b"old"


def test_a_process_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    writer = _made(tmp_path, b"new")
    writer.final.rename(tmp_path / ".quant.old")  # and here it dies
    with pytest.raises(ValueError, match="broken"), StageWriter(tmp_path, "quant"):
        raise ValueError("broken")
    assert [path.name for path in tmp_path.iterdir()] == ["quant"]
    assert (tmp_path / "quant" / "a.bin").read_bytes() == b"old"


def test_json_round_trip_and_corruption(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"b": 1, "a": [1, 2]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    2\n  ],\n  "b": 1\n}\n'
    assert read_json(path) == {"a": [1, 2], "b": 1}
    path.write_text(path.read_text()[:10])
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: got unreadable JSON (")
    assert str(caught.value).endswith(
        "expected a whole file. It is truncated or damaged: make this stage again."
    )
    path.write_text("[1]")
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value) == (
        f"{path}: got a JSON list, expected an object. It is truncated or damaged: make this stage "
        "again."
    )


def test_a_failed_write_keeps_the_old_json(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["manifest.json"]
    lost = tmp_path / "gone" / "a.json"
    with pytest.raises(InputError) as caught:
        write_json(lost, {})
    assert str(caught.value) == (
        f"{lost}: got No such file or directory while writing, "
        f"expected a writable folder with enough space. "
        "Check the disk and the permissions; earlier results are whole."
    )


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "got no such file, expected it from the manifest"),
        (
            lambda path: (path.unlink(), os.mkfifo(path)),
            "got a pipe, expected it from the manifest",
        ),
        (
            lambda path: (path.unlink(), path.mkdir()),
            "got a folder, expected it from the manifest",
        ),
        (
            lambda path: (path.unlink(), path.symlink_to(path)),
            "got Too many levels of symbolic links, expected it from the manifest",
        ),
        (lambda path: path.write_bytes(b"12"), "got 2 bytes, expected 3"),
        (
            lambda path: path.write_bytes(b"abd"),
            "got SHA-256 a52d159f262b..., expected ba7816bf8f01...",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, problem: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    records = file_records(tmp_path)
    verify_files(tmp_path, records)
    damage(tmp_path / "a.bin")  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        verify_files(tmp_path, records)
    fix = (
        "Check the path and the permissions"
        if "symbolic" in problem
        else "The artifact is damaged: make this stage again"
    )
    assert str(caught.value) == f"{tmp_path / 'a.bin'}: {problem}. {fix}."


# ---------------------------------------------------------------- symbolic links, locks


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside OUT that links lead to."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


def _kept(victim: Path) -> bool:
    return {path.name: path.read_text() for path in victim.iterdir()} == {
        "thesis.tex": "years of work"
    }


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, victim: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for target in (victim / "thesis.tex", victim / "new"):
        (out / ".lock").unlink(missing_ok=True)
        (out / ".lock").symlink_to(target)
        with pytest.raises(InputError) as caught, locked(out):
            raise AssertionError("a link was followed")
        assert str(caught.value) == (
            f"{out / '.lock'}: got a symbolic link, expected a file that can be written. "
            "Choose another --out."
        )
    assert _kept(victim)


def test_json_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    """Neither one in the file's place nor one that waits where a temporary file may come."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").symlink_to(victim / "thesis.tex")
    for name in (".manifest.json.tmp", ".manifest.json.0123456789abcdef.tmp"):
        (out / name).symlink_to(victim / "thesis.tex")
    write_json(out / "manifest.json", {"a": 1})
    assert read_json(out / "manifest.json") == {"a": 1}
    assert not (out / "manifest.json").is_symlink() and _kept(victim)
    with locked(out):
        assert sorted(path.name for path in out.iterdir()) == [
            ".lock",
            ".manifest.json.tmp",
            "manifest.json",
        ]
    assert _kept(victim)


@pytest.mark.parametrize("name", ["quant", ".quant.partial", ".quant.old"])
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_a_stage_is_not_written_through_a_link(
    tmp_path: Path, victim: Path, name: str, target: str
) -> None:
    out = tmp_path / "out"
    for content in (b"first", b"second"):
        if content == b"second" and name == "quant":
            (out / name).rename(tmp_path / "moved")  # to a larger disk, say
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).symlink_to(tmp_path / target)
        with StageWriter(out, "quant") as writer:
            (writer.path / "a.bin").write_bytes(content)
        assert [path.name for path in out.iterdir()] == ["quant"]
        assert not (out / "quant").is_symlink()
        assert (out / "quant" / "a.bin").read_bytes() == content
        assert _kept(victim) and not (tmp_path / "nowhere").exists()


def test_a_failing_stage_leaves_a_link_in_its_place(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "quant").symlink_to(victim)
    with pytest.raises(ValueError, match="broken"), StageWriter(tmp_path, "quant"):
        raise ValueError("broken")
    assert (tmp_path / "quant").readlink() == victim and _kept(victim)


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Where the file system has no locks."""
    path = tmp_path / "a.json"
    assert len({temporary(path) for _ in range(9)}) == 9
    assert temporary(path).parent == tmp_path and temporary(path).name.startswith(".a.json.")


def test_what_a_killed_process_left_is_swept_only_under_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = temporary(tmp_path / "manifest.json")
    left.write_text("half")
    told: list[str] = []

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        with locked(tmp_path, told.append):
            assert left.exists()
    assert told == [
        f"{tmp_path} lies on a file system without locks (No locks available): let no other process "
        "write it meanwhile"
    ]
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (folder := temporary(tmp_path / "own")).mkdir()  # nothing here makes such a folder
    with locked(tmp_path):
        assert folder.is_dir()
