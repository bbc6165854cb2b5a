"""Whether a copy is the official one: its archives, and the files unpacked from them, measured.

A copy is official if the publishers' archives lie beside it with their MD5 sums, if every file in
them is unpacked with its size and CRC (a plain .tar has no CRC), if no other file is read, and if
there are as many samples as were published.  `judge` says so for `snnbench data verify` and for a
run alike.  `verify` reads every byte again.  A run does so once: what was measured is kept in
`prepared/NAME.measured.json` and counts for as long as no file has another name, size or time.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias

from snnbench.data.base import Progress, Verdict
from snnbench.data.fetch import BLOCK, DAMAGE, Remote, cut_short, download, extract, md5_of
from snnbench.errors import DataError
from snnbench.spec import digest

Entry: TypeAlias = tuple[int, int | None]  # size, and CRC-32 where the archive has one
NAMED = 3  # files that are named of those that do not fit


@dataclass(frozen=True)
class Measured:
    """MD5 sums of the archives that are there, and names of files that do not fit them."""

    md5: Mapping[str, str]
    odd: Sequence[str]


@dataclass(frozen=True)
class Release:
    """The archives of one dataset, and where they are unpacked.

    `inside` gives the name in an archive of a file by its name below `into`.
    """

    name: str
    root: Path
    home: Path  # of the archives
    into: Path
    remotes: Sequence[Remote]
    inside: Callable[[str], str] = str

    @property
    def cut_short(self) -> bool:
        """Whether an unpacking did not come to its end."""
        return any(cut_short(remote.name, self.into) for remote in self.remotes)

    def fetch(self, progress: Progress | None) -> None:
        """Download what is missing; unpack what is not unpacked, or not whole."""
        for remote in self.remotes:
            archive = download(remote, self.home, progress)
            again = cut_short(remote.name, self.into)
            if again or misfits(contents(archive), self.into, {}, False):
                extract(archive, self.into)

    def measure(self, paths: Sequence[Path]) -> Measured:
        """Read all archives and, if they are official, all their files; `paths` are those used."""
        stamped, there = self._stamp(paths), self._archives()
        md5, odd = {path.name: md5_of(path) for path in there}, []
        if md5 == {remote.name: remote.md5 for remote in self.remotes}:
            listed = {k: v for path in there for k, v in contents(path).items()}
            used = {self.inside(p.relative_to(self.into).as_posix()): p for p in paths}
            odd = misfits(listed, self.into, used, True)
        found = Measured(md5, odd)
        self._remember(stamped, found)
        return found

    def measured(self, paths: Sequence[Path]) -> Measured:
        """As `measure`, or as it was remembered if no file has changed since."""
        try:
            known = json.loads(self._memory.read_text("utf-8"))
            if known["stamp"] == self._stamp(paths):
                return Measured(known["md5"], known["odd"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self.measure(paths)

    @property
    def _memory(self) -> Path:
        return self.root / "prepared" / f"{self.name}.measured.json"

    def _archives(self) -> list[Path]:
        return [p for p in (self.home / remote.name for remote in self.remotes) if p.is_file()]

    def _stamp(self, paths: Sequence[Path]) -> str:
        return digest(*(r.md5 for r in self.remotes), stamp([*self._archives(), *paths], self.root))

    def _remember(self, stamp: str, found: Measured) -> None:
        half = self._memory.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # of data that cannot be written, nothing is remembered
            half.parent.mkdir(parents=True, exist_ok=True)
            half.write_text(json.dumps({"stamp": stamp, **asdict(found)}) + "\n", "utf-8")
            half.replace(self._memory)

    def judge(
        self,
        found: Measured,
        counts: tuple[int, int],
        sizes: tuple[int, int | None, int | None],
        known: str | None = None,
    ) -> Verdict:
        """What the copy is: archives, files, numbers for training (and validation) and for test.

        `sizes` are those published, as in `Info`; `known` says what the copy is if not official.
        """
        lines, missing = [], []
        for remote in self.remotes:
            path, md5 = self.home / remote.name, found.md5.get(remote.name)
            if md5 == remote.md5:
                lines.append(f"{path}: the official archive, MD5 {md5}")
                continue
            what = f"not the official archive, MD5 {md5}, not {remote.md5}"
            what = "not there, so that nothing vouches for it" if md5 is None else what
            missing.append(f"{path}: {what}")
            lines.append(missing[-1])
        if found.odd:
            more = ", ..." if len(found.odd) > NAMED else ""
            missing.append(
                f"{len(found.odd):,} files are not those of the archives "
                f"({', '.join(found.odd[:NAMED])}{more})"
            )
            lines.append(f"{self.into}: {missing[-1]}")
        if known is not None:
            lines.append(f"{self.home}: {known}")
        seen, full, whole = _count(counts, sizes)
        lines.append(f"{self.name}: {seen}" + ("" if whole else f"; the full set has {full}"))
        if not whole:
            missing.append(f"{seen}, and the full set has {full}")
        if missing:
            lines.append(f"{self.name}: not official; a run needs --allow-unverified-data")
        return Verdict(not missing, lines, "; ".join(missing[:1]), found.md5)


def _count(
    counts: tuple[int, int], sizes: tuple[int, int | None, int | None]
) -> tuple[str, str, bool]:
    """Numbers that are there, numbers that should be, and whether they are the same."""
    train, val, test = sizes
    text = "{:,} samples for training and validation, {:,} for test"
    if test is None:  # all three parts are cut from what is there
        return f"{sum(counts):,} samples", f"{train:,}", sum(counts) == train
    full = (train + (val or 0), test)
    return text.format(*counts), "{:,} and {:,}".format(*full), counts == full


def stamp(paths: Sequence[Path], root: Path) -> str:
    """SHA-256 of the files' paths below `root`, sizes and times of their last change.

    Raises DataError where one cannot be looked at.
    """
    try:
        rows = [(str(p).removeprefix(str(root)), p.stat()) for p in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    return digest(*(f"{name}\n{s.st_size}\n{s.st_mtime_ns}\n" for name, s in rows))


def contents(archive: Path) -> dict[str, Entry]:
    """All files in a .zip or .tar by name, those in archives in it too; DataError if damaged.

    Of a .zip in a .zip the names are its own; a .tar in a .tar is a folder of its name.
    """
    found: dict[str, Entry] = {}
    try:
        with archive.open("rb") as file:
            _list(archive.name, file, found)
    except DAMAGE as error:
        raise DataError(f"{archive}: a damaged archive ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror or error}") from error
    return found


def _list(name: str, file: IO[bytes], found: dict[str, Entry]) -> None:
    if name.endswith(".zip"):
        with zipfile.ZipFile(file) as packed:
            for info in packed.infolist():
                if info.filename.endswith(".zip"):
                    with packed.open(info) as inner:
                        _list(info.filename, inner, found)
                elif not info.is_dir():
                    found[info.filename] = (info.file_size, info.CRC)
        return
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            place = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and place.suffix == ".tar":
                below: dict[str, Entry] = {}
                _list(place.name, content, below)
                found |= {f"{place.stem}/{k}": v for k, v in below.items()}
            elif content is not None:
                # What is compressed must be read anyway to find the next file.
                crc = None if name.endswith(".tar") else _crc(content)
                found[place.as_posix()] = (member.size, crc)


def misfits(
    listed: Mapping[str, Entry], into: Path, used: Mapping[str, Path], bytes_too: bool
) -> list[str]:
    """Names that are used and not listed; then of files that are missing, or not as listed.

    `used` has the place of some by name; the others are looked for at their names below `into`.
    """
    odd = [name for name in used if name not in listed]
    for name, (size, crc) in listed.items():
        path = used.get(name, into / name)
        try:
            fits = path.stat().st_size == size
            if fits and bytes_too and crc is not None:
                with path.open("rb") as file:
                    fits = _crc(file) == crc
        except OSError:
            fits = False
        if not fits:
            odd.append(name)
    return odd


def _crc(file: IO[Any]) -> int:
    crc = 0
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return crc
