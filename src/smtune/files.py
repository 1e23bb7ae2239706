"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, making its folder. Whatever goes wrong, what stood there before stays.

    It is on the disk when this returns, before anything that is written later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path`, new or empty, once all of it is on the disk.

    Raises:
        OSError: also where `path` holds something by then; that stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        settle(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(temporary: Path, path: Path) -> None:
    """Give a folder the name `path`, once all that is in it is on the disk, with the usual rights."""
    let_read(temporary)
    sync_folder(temporary)
    temporary.rename(path)
    sync(path.parent)


def let_read(folder: Path) -> None:
    """Give a folder and all in it the usual rights: temporary folders and safetensors' files are for one user alone."""
    umask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def not_writable(path: Path) -> str | None:
    """What keeps a file from being written at `path`, or None. Nothing is made."""
    if path.is_dir():
        return f"Expected a file to write. {path} is a folder."
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return f"Expected a folder for {path}. {place} is a file."
    return None if os.access(place, os.W_OK) else f"Expected a place that can be written. {place} cannot."


def sync_folder(folder: Path) -> None:
    """`sync` for all that is in a folder, and for itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before what is written next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync of folders
            raise
    finally:
        os.close(handle)
