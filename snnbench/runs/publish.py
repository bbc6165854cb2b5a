"""Files that are whole or not there: written beside their place, synced, then renamed or linked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snnbench.errors import ResultsError


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary file to be filled and then put in `place`; it is gone afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def place(temporary: Path, path: Path, only_first: bool = False) -> bool:
    """Put a file that was written beside its place there, in one step that survives a failure."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    placed = _place_first(temporary, path) if only_first else bool(temporary.replace(path))
    _sync_folder(path.parent)
    return placed


def publish(path: Path, write: Callable[[Path], object], only_first: bool = False) -> bool:
    """Let `write` fill a temporary file, then put it in place: whole or not at all.

    With `only_first`, a file that is there already stays as it is, and the answer is False.
    """
    with beside(path) as temporary:
        write(temporary)
        return place(temporary, path, only_first)


def _place_first(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that is taken, in one step."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return temporary.stat().st_nlink == 2  # a network file system may answer twice
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():  # a file system without links
            return False
        temporary.replace(path)
    return True


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a power failure, where the file system can promise that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; numbers that are not finite are refused."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    publish(path, lambda tmp: tmp.write_text(text, "utf-8"))


def storage_error(path: Path, error: OSError) -> ResultsError:
    """One clear line for a full, read-only or otherwise unusable results folder."""
    what = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EROFS: "the file system is read-only; name another folder with --results",
        errno.EACCES: "no permission to write; name another folder with --results",
        errno.ENOTDIR: "a file stands where a folder is needed; name another with --results",
        errno.EEXIST: "a file stands where a folder is needed; name another with --results",
    }.get(error.errno or 0, error.strerror or str(error))
    return ResultsError(f"{path}: cannot be written: {what}")
