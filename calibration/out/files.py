"""Writes artefact folders, one process at a time, so that a reader sees a whole stage or none of
it; checks what it reads back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.out.layout import LOCK, old, partial
from calibration.out.regular import check_regular
from plugins.errors import InputError
from plugins.lock import BusyError
from plugins.lock import locked as lock_file

__all__ = [
    "StageWriter",
    "discard",
    "file_records",
    "folder_bytes",
    "free_bytes",
    "locked",
    "remove",
    "sha256_file",
    "temporary",
    "verify_files",
    "write_json",
]

_CHUNK = 1 << 22
_TEMPORARY = f".*.{'[0-9a-f]' * 16}.tmp"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@contextmanager
def locked(out: Path, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """One writing process at a time in an OUT folder, which is made if need be.

    Args:
        out: the folder.
        say: told where the file system has no locks.

    Raises:
        InputError: another process writes it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lock_file(out / LOCK, say=say))
        except BusyError:
            raise InputError(
                str(out),
                "got a folder that another process is writing, expected a free one",
                "Wait for it to end or choose another --out",
            ) from None
        except OSError as error:
            link = error.errno == errno.ELOOP
            raise InputError(
                str(out / LOCK if link else out),
                f"got {'a symbolic link' if link else error.strerror}, "
                f"expected {'a file' if link else 'a folder'} that can be written",
                "Choose another --out",
            ) from error
        if held:  # nobody else is writing what a killed process left
            for path in out.glob(_TEMPORARY):
                if path.is_symlink() or not path.is_dir():  # a folder is none of ours
                    path.unlink()
        yield


def temporary(path: Path) -> Path:
    """A new name beside `path` for what will take its place; nobody else uses or foresees it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a symbolic link, whose target stays; it may be
    missing.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove what nobody needs; what the system does not let go stays."""
    with suppress(OSError):
        remove(path)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; the old file stays whole until the new one is on disk.

    Raises:
        InputError: it cannot be written.
    """
    unfinished = temporary(path)
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        discard(unfinished)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        str(path),
        f"got {error.strerror or error} while writing, expected a "
        f"writable folder with enough space",
        "Check the disk and the permissions; earlier results are whole",
    )


def file_records(folder: Path, only: str = "*") -> dict[str, dict[str, Any]]:
    """{relative name: {"bytes": n, "sha256": hex}} of every file below `folder` whose name matches,
    in name order.
    """
    files = sorted(path for path in folder.rglob(only) if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }


def verify_files(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that every recorded file is there with its size and checksum.

    Raises:
        InputError: a file is missing, truncated or changed; the message names the first.
    """
    fix = "The artifact is damaged: make this stage again"
    for name, record in records.items():
        path = folder / name
        size = check_regular(path, "it from the manifest", fix)
        if size != record.get("bytes", size):
            raise InputError(str(path), f"got {size} bytes, expected {record['bytes']}", fix)
        if (got := sha256_file(path)) != record["sha256"]:
            raise InputError(
                str(path), f"got SHA-256 {got[:12]}..., expected {record['sha256'][:12]}...", fix
            )


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder is, or is to be."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


def folder_bytes(folder: Path, only: str = "*", besides: Path | None = None) -> int:
    """Of the files in a folder, not below it; 0 where there is none. Another process may be removing
    them.

    Args:
        folder: with the files.
        only: the names that count, as a pattern.
        besides: a folder that stays; files that have a second name there do not count.
    """
    total = 0
    for path in folder.glob(only):
        with suppress(FileNotFoundError):
            if path.is_file() and not (besides and _same_file(path, besides / path.name)):
                total += path.stat().st_size
    return total


def _same_file(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


class StageWriter:
    """Context manager for one stage's folder: written under a temporary name, renamed when whole.

    An error or Ctrl-C inside the block removes the temporary folder and leaves an earlier result
    untouched. Nothing is written through a symbolic link in OUT: one in the stage's place is replaced
    by the new folder, and what it leads to stays.

    Args:
        out: the artefact folder OUT.
        stage: the stage's folder below it, such as "quant".
        needed_bytes: estimate of what will be written; checked against the free space first.

    Raises:
        InputError: too little space, or OUT cannot be written.
    """

    def __init__(
        self,
        out: Path,
        stage: str,
        needed_bytes: int = 0,
        free_bytes: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.final = out / stage
        self.path = out / partial(stage)
        self._old = out / old(stage)
        free = free_bytes(out)
        if free < needed_bytes:
            raise InputError(
                str(self.final),
                f"got {free / 1e6:.0f} MB of free space, expected "
                f"at least {needed_bytes / 1e6:.0f} MB",
                "Free some space or choose another --out",
            )

    def __enter__(self) -> StageWriter:
        try:
            self._restore()  # a process killed between the two renames left no final folder
            remove(self.path)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise _unwritable(self.final, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as failure:
            raise _unwritable(self.final, failure) from failure
        finally:
            discard(self.path)  # gone already where the commit went well
        if isinstance(error, OSError) and self._concerns(error):
            raise _unwritable(self.final, error) from error

    def sync(self) -> None:
        """Put every file written so far on the disk."""
        for path in self.path.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _commit(self) -> None:
        self.sync()
        remove(self._old)
        try:
            if os.path.lexists(self.final):
                self.final.rename(self._old)
            self.path.rename(self.final)
        finally:
            self._restore()
        discard(self._old)

    def _restore(self) -> None:
        if os.path.lexists(self._old) and not os.path.lexists(self.final):
            self._old.rename(self.final)

    def _concerns(self, error: OSError) -> bool:
        """Whether an error is about the disk or about a file of this stage; any other has its own
        story to tell.
        """
        names = (
            name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
        )
        folder = self.path.absolute()
        return error.errno in _DISK_ERRORS or any(
            Path(os.fsdecode(name)).absolute().is_relative_to(folder) for name in names
        )
