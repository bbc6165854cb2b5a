"""The tables of a suite while it runs: what this command does, and what others do meanwhile."""

from __future__ import annotations

import time
from typing import Any

from snnbench.store import RunFolder, SuiteFolder


class Tables:
    """The tables of the suite's folder: written now and then, and at the end."""

    def __init__(self, suite: str, folder: SuiteFolder) -> None:
        from snnbench.tables import Writer  # pandas: half a second that `plan` need not wait

        self._folder = folder
        self._seen = {i: folder.run(i).fingerprint() for i in folder.run_ids()}
        self._writer = Writer(suite, folder)
        self._dirty = False
        self._due = time.monotonic()
        if self._seen:  # the first time all are read, while the server of the runs warms up
            self.write(0.0)

    def read(self, folder: RunFolder) -> dict[str, Any]:
        """Take in what the run's folder holds now; its row."""
        self._seen[folder.run_id] = folder.fingerprint()
        self._dirty = True
        return self._writer.read(folder)

    def write_if_due(self) -> None:
        """Write if something is new, for at most a twentieth of the time."""
        if self._dirty and time.monotonic() >= self._due:
            self.write(0.0)

    def write(self, wait_s: float) -> None:
        """Write what we and others have done; left out if another is writing, who does the same."""
        began = time.monotonic()
        with self._folder.writing(wait_s) as held:
            if held:
                self._read_others()
                self._writer.write()
                self._dirty = False
        self._due = time.monotonic() + max(2.0, 20 * (time.monotonic() - began))

    def _read_others(self) -> None:
        for run_id in self._folder.run_ids():
            run = self._folder.run(run_id)
            found = run.fingerprint()
            if found is not None and found != self._seen.get(run_id):
                self._seen[run_id] = found
                self._writer.read(run)
