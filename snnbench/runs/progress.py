"""How far the runs of a suite have come; a run is read again only where its files have changed.

What is known of ended runs is kept in the suite's index, under the size and time of their files:
the state of ten thousand runs then costs a look at each, and not the reading of each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from snnbench import registry
from snnbench.errors import ResultsError, SchemaError
from snnbench.runs import lease
from snnbench.runs.publish import publish_json
from snnbench.spec import RunSpec, canonical, digest
from snnbench.store import ENDED, RunFolder, Status, SuiteFolder

INDEX = 1  # version of the index; another one is made anew
OF_A_RUN = ("method", "method_config", "T", "seed")  # the others say which runs are alike


@dataclass(frozen=True)
class Known:
    """What `plan` and `status` need of a run. `work` says which runs take equally long."""

    status: Status
    reason: str = ""
    source_hash: str | None = None
    wall_s: float | None = None
    work: str | None = None
    method: str | None = None
    T: int | None = None

    @property
    def stale(self) -> bool:
        """Whether the result was computed by other code than this."""
        ended = self.status in ENDED
        return ended and self.source_hash not in (None, registry.source_hash())


class Ledger:
    """The state of all runs in a folder."""

    def __init__(self, folder: SuiteFolder) -> None:
        self._folder = folder
        self._kept = _read(folder.index)
        self._fresh = False

    def look(self, run_id: str) -> Known:
        """How far the run has come; raises SchemaError, or ResultsError for a hostile name."""
        run = self._folder.run(run_id)
        print_ = run.fingerprint()
        if print_ is not None:
            kept = self._kept.get(run_id)
            if kept is None or kept[0] != print_:
                known = _read_run(run)
                if known.status not in ENDED:
                    return known
                kept = self._kept[run_id] = [print_, *_values(known)]
                self._fresh = True
            return Known(*kept[1:])
        if lease.holder(self._folder.leases(run_id)):
            return Known("running")
        return Known(run.status())

    def past(self) -> Iterable[Known]:
        """All runs that are done here, whether or not a suite still holds them."""
        for run_id in self._folder.run_ids():
            with contextlib.suppress(ResultsError):
                known = self.look(run_id)
                if known.status == "done" and known.wall_s:
                    yield known

    def save(self) -> None:
        """Keep what was learned, where the folder can be written."""
        if self._fresh:
            with contextlib.suppress(ResultsError):
                publish_json(self._folder.index, {"index": INDEX, "runs": self._kept})
            self._fresh = False


def work_of(spec: RunSpec) -> str:
    """Hash of all that decides how long a run takes, but for method, T and seed."""
    values = spec.to_json()
    for name in OF_A_RUN:
        del values[name]
    values["train"].pop("timeout_s")
    return digest(canonical(values))[:12]


def run_state(suite: SuiteFolder, run_id: str, known: Known) -> dict[str, Any]:
    """One run for `status`: with its progress, and who works on it, while it is running."""
    state: dict[str, Any] = {"run_id": run_id, "status": known.status, "stale": known.stale}
    if known.status in ("running", "interrupted"):
        epochs = suite.run(run_id).epochs()
        if epochs:
            state |= {"epoch": epochs[-1]["epoch"], "epochs": epochs[-1].get("epochs")}
    if known.status == "running":
        state["worker"] = lease.holder(suite.leases(run_id))
    if known.reason:
        state["reason"] = known.reason
    return state


def _read_run(run: RunFolder) -> Known:
    try:
        result = run.result()
    except SchemaError:
        raise
    except ResultsError:
        return Known("missing")
    if result is None:
        return Known(run.status())
    status: Status = result["status"]
    times = [e["wall_s"] for e in run.events()[0] if e.get("event") == "exit"]
    work = method = T = None
    if status == "done":
        with contextlib.suppress(ResultsError, ValueError, LookupError, TypeError):
            values = result.get("spec")
            if not isinstance(values, dict):
                values = run.spec().to_json()
            kept = {k: v for k, v in values.items() if k not in OF_A_RUN}
            work, method, T = _work(canonical(kept)), str(values["method"]), int(values["T"])
    reason = " ".join(str(result.get("reason", "")).split())[:200]
    source = result.get("source_hash")
    wall_s = sum(times) if times else None
    return Known(status, reason, None if source is None else str(source), wall_s, work, method, T)


@lru_cache(maxsize=256)
def _work(kept: str) -> str:
    """`work_of` all runs with these settings: reading a spec takes longer than its result."""
    of_a_run = {"method": "", "method_config": {}, "T": 1, "seed": 0}
    return work_of(RunSpec.from_json(json.loads(kept) | of_a_run))


def _values(known: Known) -> list[Any]:
    return [getattr(known, name) for name in Known.__dataclass_fields__]


def _read(path: Path) -> dict[str, list[Any]]:
    """The index; empty where there is none that can be read."""
    try:
        content: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        if content["index"] == INDEX and isinstance(content["runs"], dict):
            fields = len(Known.__dataclass_fields__)
            return {k: v for k, v in content["runs"].items() if _is_entry(v, fields)}
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return {}


def _is_entry(value: Any, fields: int) -> bool:
    if not isinstance(value, list) or len(value) != fields + 1 or value[1] not in ENDED:
        return False
    _, _, reason, source, wall_s, work, method, T = value
    texts = all(v is None or isinstance(v, str) for v in (source, work, method))
    numbers = all(v is None or isinstance(v, int | float) for v in (wall_s, T))
    return texts and numbers and isinstance(reason, str)
