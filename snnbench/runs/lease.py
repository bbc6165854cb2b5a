"""Who works on a run: leases that expire, so that several machines may do one suite together.

    leases/<run_id>/<n>     the n-th lease of the run; the highest number counts

A lease is taken by creating the file of the next number, which only one process can do, and only
where the last one was given back or has expired.  The number is also the fencing token: a process
that was suspended, wakes up and finds a higher number has lost the run, and publishes nothing.

No two clocks are compared.  The holder counts a `beat` up; a lease has expired once somebody has
watched its file for `ttl_s` of his own steady (monotonic) clock without seeing it change.  Clocks
that jump, or that differ between machines, therefore change nothing.  On the holder's own machine
a lease is over as soon as its process is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snnbench.runs.publish import storage_error

BEATS_PER_TTL = 6


@dataclass
class Lease:
    """The right to work on one run, until it is given back or lost."""

    folder: Path
    token: int
    owner: str
    ttl_s: float = 60.0
    beat: int = 0
    lost: bool = False

    @property
    def file(self) -> Path:
        """Where it is written."""
        return self.folder / str(self.token)

    def ticket(self) -> dict[str, Any]:
        """What a worker process needs to know to check that the run is still ours."""
        return {"folder": str(self.folder), "token": self.token, "owner": self.owner}

    @classmethod
    def of(cls, ticket: Mapping[str, Any]) -> Lease:
        """The lease of a ticket."""
        return cls(Path(ticket["folder"]), int(ticket["token"]), str(ticket["owner"]))

    def holds(self) -> bool:
        """Whether nobody has taken the run over."""
        if not self.lost:
            newest = newest_token(self.folder)
            found = read(self.folder, newest)
            self.lost = newest != self.token or found is None or found["owner"] != self.owner
        return not self.lost

    def renew(self) -> bool:
        """Show that the holder lives; False once the run has been taken over."""
        if self.holds():
            self.beat += 1
            try:
                # In place and of constant length: needs no space on a full disk.
                with self.file.open("r+b") as file:
                    file.write(_text(self))
            except FileNotFoundError:
                self.lost = True
            except OSError as error:
                raise storage_error(self.file, error) from error
        return not self.lost

    def release(self) -> None:
        """Give the run back: the next may have it at once."""
        with contextlib.suppress(OSError):
            if self.holds():
                with self.file.open("r+b") as file:
                    file.write(_text(self, released=True))
        self.lost = True


@dataclass
class Watch:
    """What one process has seen of the leases of others, by its own steady clock."""

    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, tuple[bytes | None, float]] = field(default_factory=dict)

    def expired(self, file: Path) -> bool:
        """Whether the lease in this file is over: given back, its process gone, or too long
        without a beat while we watched.
        """
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            return False  # a newer one has replaced it
        except OSError as error:
            raise storage_error(file, error) from error
        now = self.clock()
        before, since = self._seen.get(file, (None, now))
        if before != text:
            self._seen[file] = (text, now)
            since = now
        content = _parse(text)
        if content is None:  # its owner was killed between making and filling it
            return now - since >= 2.0
        if content["released"] or _gone(content):
            self._seen.pop(file, None)
            return True
        return bool(now - since >= content["ttl_s"])


def claim(folder: Path, watch: Watch, ttl_s: float = 60.0) -> Lease | None:
    """Take the run if nobody has it, or whoever had it is gone; else None. Raises ResultsError."""
    newest = newest_token(folder)
    if newest and not watch.expired(folder / str(newest)):
        return None
    lease = Lease(folder, newest + 1, uuid.uuid4().hex, ttl_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(lease.file, flags, 0o644), "wb") as file:
            file.write(_text(lease))
    except FileExistsError:
        if folder.is_dir():
            return None  # another was faster
        raise storage_error(folder, NotADirectoryError(20, "Not a directory")) from None
    except OSError as error:
        with contextlib.suppress(OSError):
            lease.file.unlink()
        raise storage_error(lease.file, error) from error
    if newest_token(folder) != lease.token:  # we had looked before two others came and went
        lease.file.unlink(missing_ok=True)
        return None
    for token in range(newest, 0, -1):  # the highest always stays, so no number is used twice
        try:
            (folder / str(token)).unlink()
        except OSError:
            break
    return lease


def is_free(folder: Path, watch: Watch) -> bool:
    """Whether a claim has a chance now."""
    newest = newest_token(folder)
    return newest == 0 or watch.expired(folder / str(newest))


def newest_token(folder: Path) -> int:
    """Number of the lease that counts; 0 where there never was one."""
    try:
        return max((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), default=0)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise storage_error(folder, error) from error


def read(folder: Path, token: int) -> dict[str, Any] | None:
    """Content of a lease; None if it is damaged or gone."""
    try:
        return _parse((folder / str(token)).read_bytes())
    except OSError:
        return None


def held(folder: Path) -> dict[str, Any] | None:
    """The lease that counts, unless it was given back or its process of this machine is gone."""
    newest = newest_token(folder)
    content = read(folder, newest) if newest else None
    return None if content is None or content["released"] or _gone(content) else content


def holder(folder: Path) -> str | None:
    """`pid on host` of whoever seems to work on the run, for people to read; else None.

    Between machines this goes by the file's age, and so by their clocks: it decides nothing.
    """
    content = held(folder)
    if content is None:
        return None
    if _place() != content["place"]:
        with contextlib.suppress(OSError):
            age = time.time() - (folder / str(content["token"])).stat().st_mtime
            if age > 2 * content["ttl_s"]:
                return None
    return f"{content['pid']} on {content['host']}"


class Keeper:
    """Renews leases in the background until they are given back."""

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for lease in self._leases:
            lease.release()

    def keep(self, lease: Lease) -> None:
        """Renew this one from now on."""
        with self._guard:
            self._leases.append(lease)

    def release(self, lease: Lease) -> None:
        """Give it back."""
        with self._guard:
            self._leases = [kept for kept in self._leases if kept is not lease]
            lease.release()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(0.2):
            if time.monotonic() >= due:
                with self._guard:
                    for lease in self._leases:
                        # A folder that cannot be written now is the worker's to report.
                        with contextlib.suppress(Exception):
                            lease.renew()
                    ttl_s = min((lease.ttl_s for lease in self._leases), default=1.0)
                due = time.monotonic() + ttl_s / BEATS_PER_TTL


def _text(lease: Lease, released: bool = False) -> bytes:
    """The lease as JSON of constant length; once it is given back nobody's name is left in it."""
    content = {
        "token": lease.token,
        "owner": lease.owner,
        "ttl_s": lease.ttl_s,
        "beat": lease.beat,
        "released": released,
        "host": "" if released else socket.gethostname(),
        "pid": 0 if released else os.getpid(),
        "started": 0 if released else _started(os.getpid()),
        "place": "" if released else _place(),
    }
    return json.dumps(content).encode().ljust(511) + b"\n"


def _parse(text: bytes) -> dict[str, Any] | None:
    kinds: dict[str, Any] = {
        "token": int, "owner": str, "ttl_s": (int, float), "beat": int, "released": bool,
        "host": str, "pid": int, "started": int, "place": str,
    }  # fmt: skip
    try:
        content = json.loads(text)
        if isinstance(content, dict) and all(
            isinstance(content.get(k), t) for k, t in kinds.items()
        ):
            return content
    except ValueError:
        pass
    return None


def _gone(content: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    if not content["place"] or content["place"] != _place():
        return False
    started = _started(content["pid"])
    return started == 0 or started != content["started"]


def _place() -> str:
    """This boot of this machine, and the space in which its process ids count; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process began, in ticks since the boot; 0 if there is none, or only a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
