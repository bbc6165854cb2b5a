"""Reasons to end a suite early: signals, `snnbench cancel`, and runs that all fail alike."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from snnbench.store import FAILURES, SuiteFolder

GRACE_S = 8.0  # between SIGTERM and the end: whoever sends it kills after ten seconds or more


class Alike:
    """Counts whether the first runs of a command all fail in the same way."""

    def __init__(self, limit: int) -> None:
        self._limit, self.count, self._first = limit, 0, ""

    def too_often(self, row: Mapping[str, Any]) -> bool:
        """Whether this outcome was one too many."""
        if row["status"] in ("skipped", "interrupted"):
            return False
        way = re.sub(r"[0-9]+", "#", f"{row['status']}: {row['reason']}")
        if row["status"] not in FAILURES or (self._first and way != self._first):
            self._limit = 0  # not all alike
        self._first, self.count = way, self.count + 1
        return self.count == self._limit


class Cancel:
    """Requests of `snnbench cancel` that came after this command began."""

    def __init__(self, folder: SuiteFolder) -> None:
        self._folder = folder
        self._last = self._read().get("id")

    def asked(self) -> list[str | None]:
        """Ids of the runs that shall end; None among them means all."""
        request = self._read()
        if request.get("id") in (None, self._last):
            return []
        self._last = request["id"]
        return list(request.get("runs") or [None])

    def _read(self) -> dict[str, Any]:
        return self._folder.cancel_request()


class Interrupts:
    """Counts Ctrl-C and SIGTERM: the first asks for a clean end, the second for one at once.

    After SIGTERM the clean end has little time, since a kill follows.
    """

    def __init__(self) -> None:
        self.count = 0
        self.grace_s: float | None = None

    def __enter__(self) -> Interrupts:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if number == signal.SIGTERM:
            self.grace_s = GRACE_S
