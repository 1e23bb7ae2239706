"""One process at a time in the folder of a run or an evaluation, by a lock that the system releases when it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smtune.errors import InputError

LOCK = ".lock"
"""Stands in the folder while a process writes there, and holds its pid. A killed one leaves the file, but no lock."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be; afterwards an empty one is removed again.

    Where the file system knows no locks, nobody is kept out.

    Raises:
        InputError: another process has the lock, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    try:
        handle = _take(path)
    except OSError as error:
        raise InputError(
            f"Expected an output that can be written. {error.filename or folder}: {error.strerror}: choose another."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: who comes next makes a file of its own
        os.close(handle)
        with suppress(OSError):  # not empty: something was written
            for empty in made:
                empty.rmdir()


def _take(path: Path) -> int:
    """The open lock file, locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(handle, 20).decode() or "unknown"
            os.close(handle)
            raise InputError(
                f"Expected a folder that no other process writes to. One (pid {pid}) is at work in {path.parent}: wait "
                "for it or stop it, or choose another output."
            ) from None
        except OSError:
            pass  # no locks on this file system
        if _is_open_at(handle, path):
            with suppress(OSError):  # a full disk: then the pid is unknown
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)  # another process had the lock, and has just removed the file


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
