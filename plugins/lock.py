"""A lock file: one process at a time in a folder that several may write."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BusyError", "locked"]

# What a file system answers that cannot lock: NFS without a lock daemon, FUSE, Lustre without -o flock.
_CANNOT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class BusyError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(
    file: Path, *, wait: bool = False, say: Callable[[str], None] | None = None
) -> Iterator[bool]:
    """Hold a lock file, which is made if need be and whose content is left alone.

    A file system that has no locks is worked on without one.

    Args:
        file: in a folder that exists.
        wait: for another process that holds it; else that is an error.
        say: told where there is no lock.

    Yields:
        Whether it is held: not where there are no locks.

    Raises:
        BusyError: another process holds it.
        OSError: it is a symbolic link, or cannot be opened.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _TAKEN:
                raise BusyError from None
            if error.errno not in _CANNOT:
                raise
            held = False
            if say is not None:
                say(
                    f"{file.parent} lies on a file system without locks ({error.strerror}): let no "
                    "other process write it meanwhile"
                )
        yield held
    finally:
        os.close(descriptor)
