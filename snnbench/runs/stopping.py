"""Reasons to end a suite early: signals, `snnbench cancel`, and runs that all fail alike."""

from __future__ import annotations

import json
import re
import signal
import uuid
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from snnbench.runs.publish import publish_json
from snnbench.spec import SCHEMA
from snnbench.store import FAILURES, SuiteFolder

GRACE_S = 6.0  # between SIGTERM and the end: whoever sends it kills after ten seconds or more


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


def ask_to_cancel(folder: SuiteFolder, run_ids: Sequence[str] | None) -> None:
    """Ask whoever works on these runs, or on any, to end."""
    runs = None if run_ids is None else list(run_ids)
    publish_json(folder.cancel, {"schema": SCHEMA, "id": uuid.uuid4().hex, "runs": runs})


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
        """The last request; empty where there was none."""
        try:
            request = json.loads(self._folder.cancel.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return request if isinstance(request, dict) else {}


class AskedToStop(Exception):
    """Ctrl-C or SIGTERM before any run has begun."""


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

    def check(self) -> None:
        """Raise AskedToStop if there was one: where nothing has begun, there is nothing to save."""
        if self.count:
            raise AskedToStop

    def _note(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if number == signal.SIGTERM:
            self.grace_s = GRACE_S
