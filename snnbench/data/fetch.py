"""Downloads that can be trusted: resumed where they broke off, checked, and tried elsewhere.

A file is written as `NAME.part` and renamed when its size and MD5 sum are those expected, so that a
file of the right name is the right file.  What was got before an interruption is kept and resumed
with an HTTP Range request.  Some hosts answer a program with an empty body (status 202, a web
firewall) or with a page of HTML: that is an error of that address, and the next one is tried.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from snnbench import __version__
from snnbench.data.base import Progress
from snnbench.errors import DataError

BLOCK = 1 << 20
TIMEOUT_S = 60.0
ATTEMPTS = 4  # at one address, as long as each brings something new
# What the readers of archives raise where one is damaged.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError)


@dataclass(frozen=True)
class Remote:
    """A file to download: its name, MD5 sum, addresses in order, and size where it is known."""

    name: str
    md5: str
    urls: tuple[str, ...]
    size: int | None = None


class _AddressError(Exception):
    """This address does not give the file; another one may."""


def download(remote: Remote, folder: Path, progress: Progress | None = None) -> Path:
    """The file in `folder`, downloaded unless it is there; raises DataError if that fails."""
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    make_folder(folder)
    with locked(folder / f".{remote.name}.lock"):
        if target.is_file() and md5_of(target) == remote.md5:
            return target
        told = []
        for url in remote.urls:
            try:
                _from(url, remote, part, progress)
                part.replace(target)
                return target
            except _AddressError as error:
                told.append(f"{url}: {error}")
            except OSError as error:
                raise cannot_write(part, error) from error
        kept = part.stat().st_size if part.is_file() else 0
        resume = (
            f"; {kept:,} bytes are kept in {part}, and the same command goes on" if kept else ""
        )
        raise DataError(f"{remote.name} cannot be downloaded: {'; '.join(told)}{resume}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with this lock file; raises DataError where it cannot be written."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """The folder, made where it is missing; raises DataError if it cannot be, or is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written with "
            "--data-root or SNNBENCH_DATA"
        ) from error


def extract(archive: Path, folder: Path) -> None:
    """Unpack a .zip (and those in it), .tar.gz or .gz into `folder`; DataError if damaged.

    Everything is unpacked into a folder beside, and then renamed into its place.  That folder goes
    last: while it is there, `cut_short` says that what was unpacked may not be all.
    """
    make_folder(folder)
    half = _half(archive.name, folder)
    with locked(archive.with_name(f".{archive.name}.lock")):
        try:
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            _unpack(archive, half)
            for inner in sorted(half.rglob("*.zip")):
                _unpack(inner, half)
                inner.unlink()
        except BaseException as error:
            shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, DAMAGE):
                raise DataError(
                    f"{archive}: a damaged archive, nothing was unpacked "
                    f"({' '.join(str(error).split())}); delete it and fetch it again"
                ) from error
            if isinstance(error, OSError):
                raise cannot_write(folder, error) from error
            raise
        try:
            for item in sorted(half.iterdir()):
                _move_into(item, folder / item.name)
            shutil.rmtree(half)
        except OSError as error:
            raise cannot_write(folder, error) from error


def cut_short(archive: str, folder: Path) -> bool:
    """Whether an unpacking of the archive into the folder has not come to its end."""
    return _half(archive, folder).exists()


def _half(archive: str, folder: Path) -> Path:
    return folder / f".{archive}.extracting"


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    elif archive.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    else:
        with gzip.open(archive) as source, (folder / archive.stem).open("wb") as out:
            shutil.copyfileobj(source, out, BLOCK)


def md5_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """MD5 sum of a file, as hex."""
    h = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            h.update(block)
            if progress is not None:
                progress(len(block))
    return h.hexdigest()


def _from(url: str, remote: Remote, part: Path, progress: Progress | None) -> None:
    """Bring `part` to its full and right content from one address."""
    for _ in range(ATTEMPTS):
        before = part.stat().st_size if part.is_file() else 0
        done, why = _go_on(url, remote, part, progress)
        if done:
            break
        if part.stat().st_size <= before:
            raise _AddressError(why)
    else:
        raise _AddressError(f"{why}, {ATTEMPTS} times")
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        part.unlink()
        raise _AddressError(f"{size:,} bytes came, {remote.size:,} are right; thrown away")
    found = md5_of(part)
    if found != remote.md5:
        part.unlink()
        raise _AddressError(f"the MD5 sum is {found}, {remote.md5} is right; thrown away")


def _go_on(url: str, remote: Remote, part: Path, progress: Progress | None) -> tuple[bool, str]:
    """Append what is missing; whether all that the server announced has come, and why not."""
    have = part.stat().st_size if part.is_file() else 0
    if remote.size is not None and have == remote.size:
        return True, ""
    request = urllib.request.Request(url, headers={"User-Agent": f"snnbench/{__version__}"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing lies beyond: complete, or a rest of another file
            if remote.size is None and md5_of(part) == remote.md5:
                return True, ""
            part.unlink()
            return _go_on(url, remote, part, progress)
        raise _AddressError(f"the server says {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _AddressError(f"no connection ({getattr(error, 'reason', error)})") from error
    with response:
        if response.status not in (200, 206):
            raise _AddressError(
                f"the server says {response.status} {response.reason} and sends no file; "
                "a web firewall, as it seems"
            )
        if response.headers.get_content_type() == "text/html" and "html" not in remote.name:
            raise _AddressError("the server sends a web page and not the file")
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else remote.size
        if total == 0:
            raise _AddressError("the server sends an empty file; a web firewall, as it seems")
        check_room(part.parent, (total or 0) - start)
        with part.open("ab" if resumed else "wb") as file:
            while True:
                try:
                    block = response.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    return False, f"the connection broke after {start:,} bytes ({error})"
                if not block:
                    break
                file.write(block)
                start += len(block)
                if progress is not None:
                    progress(remote.name, start, total)
    if total is not None and start < total:
        return False, f"the connection broke after {start:,} of {total:,} bytes"
    return True, ""


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError where the folder's disk has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")


def cannot_write(path: Path, error: OSError) -> DataError:
    """One line that says why, and what to do about it."""
    what = "the disk is full: " if error.errno == errno.ENOSPC else ""
    return DataError(f"{path}: cannot be written: {what}{error.strerror or error}; make room, or "
                     "name another folder with --data-root or SNNBENCH_DATA")  # fmt: skip


def _move_into(item: Path, target: Path) -> None:
    """Rename a file or a folder to its place; its parts, where a folder is there already."""
    if item.is_dir() and target.is_dir():
        for inner in sorted(item.iterdir()):
            _move_into(inner, target / inner.name)
    else:
        item.replace(target)
