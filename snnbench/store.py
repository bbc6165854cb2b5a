"""Result folders: what lies where, written so that a kill at any moment loses nothing.

    results/<suite>/suite.json               the plan of the last `run`
    results/<suite>/runs.csv, epochs.csv     the tables (and layers.csv, fidelity.csv)
    results/<suite>/leases/<run_id>/         who works on the run
    results/<suite>/index.json               what is known of ended runs, to be read at once
    results/<suite>/cancel.json              the last `cancel`
    results/<suite>/slurm/                   scripts and output of cluster jobs
    results/<suite>/runs/<run_id>/           one run:
        spec.json       what to do
        events.jsonl    append-only: start, one line an epoch, interruptions
        checkpoint.pt   where training goes on from, and the one before; gone once done
        log.txt         whatever the process printed
        job.json        the cluster job that does the run
        result.json     written last and only once: its existence means that the run has ended

This is the only module that knows file names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from snnbench.errors import ResultsError, SchemaError
from snnbench.runs.publish import publish as publish
from snnbench.runs.publish import publish_json as publish_json
from snnbench.runs.publish import storage_error as storage_error
from snnbench.spec import SCHEMA, RunSpec

Status = Literal[
    "done", "oom", "timeout", "diverged", "failed", "skipped", "interrupted", "running", "missing"
]
ENDED: tuple[Status, ...] = ("done", "oom", "timeout", "diverged", "failed", "skipped")
FAILURES: tuple[Status, ...] = ("oom", "timeout", "diverged", "failed")

_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "epoch": {"epoch": int},
    "exit": {"wall_s": (int, float)},
    "interrupted": {"reason": str},
    "oom_retry": {"batch_split": int, "reason": str},
}

NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,127}")


def _is_event(event: dict[str, Any]) -> bool:
    """Whether the event has what readers count on."""
    needed = _NEEDED.get(str(event.get("event")), {})
    return all(isinstance(event.get(k), kind) for k, kind in needed.items())


def known_schema(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The record, if this version can read it; raises SchemaError.

    There has been one schema so far: nothing older is to be migrated.
    """
    schema = record.get("schema", SCHEMA)
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ValueError(f"schema = {schema!r}")
    if schema != SCHEMA:
        which = "a newer snnbench: update this one" if schema > SCHEMA else "an snnbench too old"
        raise SchemaError(
            f"{path}: schema {schema}, written by {which} (it reads schema {SCHEMA}), or name "
            "another folder with --results"
        )
    return record


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        """Its name."""
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        """Where training goes on from; written by the worker."""
        return self.path / "checkpoint.pt"

    @property
    def _older_checkpoint(self) -> Path:
        return self.path / "checkpoint.old.pt"

    @property
    def checkpoints(self) -> list[Path]:
        """The last two checkpoints, as far as there are any, the newest first."""
        return [p for p in (self.checkpoint, self._older_checkpoint) if p.is_file()]

    def save_checkpoint(self, content: bytes | memoryview) -> None:
        """Write the newest checkpoint, and keep the one before in case this one is damaged."""

        def write(temporary: Path) -> None:
            temporary.write_bytes(content)
            with contextlib.suppress(FileNotFoundError):
                self.checkpoint.replace(self._older_checkpoint)

        publish(self.checkpoint, write)

    def drop_checkpoints(self) -> None:
        """The run is done: nobody goes on from them."""
        for path in self.checkpoints:
            with contextlib.suppress(OSError):
                path.unlink()

    @property
    def log(self) -> Path:
        """Everything that the worker process printed."""
        return self.path / "log.txt"

    @property
    def job(self) -> Path:
        """Which cluster job does the run."""
        return self.path / "job.json"

    @property
    def _result(self) -> Path:
        return self.path / "result.json"

    @property
    def _events(self) -> Path:
        return self.path / "events.jsonl"

    def create(self, spec: RunSpec) -> None:
        """Make the folder and write down what to do."""
        file = self.path / "spec.json"
        if not file.exists():
            publish_json(file, spec.to_json())

    def spec(self) -> RunSpec:
        """What to do; raises ResultsError if spec.json is damaged and no result repeats it."""
        file = self.path / "spec.json"
        try:
            values = json.loads(file.read_text("utf-8"))
            return RunSpec.from_json(known_schema(values, file))
        except (OSError, ValueError, AttributeError) as error:
            with contextlib.suppress(ResultsError, ValueError):
                return RunSpec.from_json((self.result() or {}).get("spec"))
            raise ResultsError(f"{file}: not a readable run spec: {error}") from error

    def append(self, event: dict[str, Any]) -> None:
        """Add one event; a line that an earlier kill cut short stays a line of its own."""
        try:
            # A link is not followed: it could lead out of the folder.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with os.fdopen(os.open(self._events, flags, 0o644), "ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write((json.dumps(event, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise storage_error(self._events, error) from error

    def events(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All readable events, and one warning for each line that is not."""
        events, warnings = [], []
        try:
            lines = self._events.read_bytes().splitlines()
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise ResultsError(f"{self._events}: cannot be read: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not _is_event(event):
                    raise ValueError("not an event")
                events.append(event)
            except ValueError:
                warnings.append(f"{self._events}: line {number} is damaged and left out")
        return events, warnings

    def events_size(self) -> int:
        """Bytes of the event log: it has grown where something was added."""
        try:
            return self._events.stat().st_size
        except OSError:
            return 0

    def epochs(self) -> list[dict[str, Any]]:
        """One event per epoch; an epoch that was repeated after a kill counts once, the last."""
        latest = {e["epoch"]: e for e in self.events()[0] if e.get("event") == "epoch"}
        return [latest[n] for n in sorted(latest)]

    def finish(self, result: dict[str, Any]) -> bool:
        """Publish the result: from now on the run has ended. False if another was first."""
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        return publish(self._result, lambda tmp: tmp.write_text(text, "utf-8"), only_first=True)

    def result(self) -> dict[str, Any] | None:
        """The result of a run that has ended, else None; raises ResultsError if damaged."""
        try:
            result = json.loads(self._result.read_text("utf-8"))
            if not isinstance(result, dict) or result.get("status") not in ENDED:
                raise ValueError("no status in it")
            known_schema(result, self._result)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ResultsError(f"{self._result}: not a readable result: {error}") from error
        return result

    def fingerprint(self) -> list[int] | None:
        """Time and sizes of the files that tell how the run ended; None where it has not."""
        try:
            result, events = self._result.stat(), self._events.stat()
        except OSError:
            return None
        return [result.st_mtime_ns, result.st_size, events.st_size]

    def is_ended(self) -> bool:
        """Whether there is a result that can be read."""
        return self.status() in ENDED

    def set_aside_damaged_result(self) -> Path:
        """Keep a damaged result under another name, so that the run counts as missing."""
        aside = self._result.with_name(f"result.damaged-{time.time_ns()}.json")
        try:
            self._result.rename(aside)
        except OSError as error:
            raise storage_error(self._result, error) from error
        return aside

    def status(self) -> Status:
        """How far the run has come; `interrupted` is one that began and has no living worker.

        Raises SchemaError for a result that only another version of snnbench can read.
        """
        try:
            result = self.result()
        except SchemaError:
            raise
        except ResultsError:
            return "missing"
        if result is not None:
            status: Status = result["status"]
            return status
        if not self._events.exists():
            return "missing"
        return "running" if is_locked(self.path / ".lock") else "interrupted"

    def claim(self, wait_s: float) -> FileLock:
        """Hold this while working on the run; it is let go when the process ends, however.

        It keeps two workers of one machine apart; between machines there are leases.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=wait_s)
        except NotImplementedError:
            pass  # a network file system without locks
        except Timeout as error:
            raise ResultsError(f"{self.path}: another process is working on this run") from error
        except OSError as error:
            raise storage_error(self.path, error) from error
        return lock


@dataclass(frozen=True)
class SuiteFolder:
    """The folder of one suite's results."""

    path: Path

    @property
    def runs_csv(self) -> Path:
        """One row per run."""
        return self.path / "runs.csv"

    @property
    def epochs_csv(self) -> Path:
        """One row per run and epoch."""
        return self.path / "epochs.csv"

    @property
    def layers_csv(self) -> Path:
        """One row per finished run and layer."""
        return self.path / "layers.csv"

    @property
    def fidelity_csv(self) -> Path:
        """One row per run, epoch and layer, where gradients were compared with BPTT's."""
        return self.path / "fidelity.csv"

    @property
    def index(self) -> Path:
        """What is known of ended runs."""
        return self.path / "index.json"

    @property
    def cancel(self) -> Path:
        """Which runs shall end."""
        return self.path / "cancel.json"

    @property
    def jobs(self) -> Path:
        """Scripts and output of cluster jobs."""
        return self.path / "slurm"

    def leases(self, run_id: str) -> Path:
        """Who works on a run; raises ResultsError as `run`."""
        return self._inside("leases", run_id)

    def run(self, run_id: str) -> RunFolder:
        """The folder of a run, whether it exists or not.

        Raises ResultsError for a name or a link that leads out of the suite's folder.
        """
        return RunFolder(self._inside("runs", run_id))

    def _inside(self, kind: str, run_id: str) -> Path:
        path = self.path / kind / _safe(run_id)
        if linked := [p for p in (path, path.parent, self.path) if p.is_symlink()]:
            raise ResultsError(f"{linked[0]}: a link in place of a folder; it could lead anywhere")
        return path

    def run_ids(self) -> list[str]:
        """Names of all folders of runs, in order; whoever meddles here can add others."""
        try:
            with os.scandir(self.path / "runs") as found:
                return sorted(e.name for e in found if e.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ResultsError(f"{self.path}: cannot be read: {error.strerror}") from error

    def runs(self) -> Iterator[RunFolder]:
        """Folders of all runs that were ever begun here, by name."""
        for name in self.run_ids():
            path = self.path / "runs" / name
            if NAME.fullmatch(name) and (path / "spec.json").is_file():
                yield RunFolder(path)

    def set_aside(self, run: RunFolder) -> None:
        """Keep an old run under redone/, so that it can be done afresh and nothing is lost."""
        if run.path.exists():
            target = self.path / "redone" / f"{run.run_id}-{time.time_ns()}-{uuid.uuid4().hex[:6]}"
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(run.path, target)
            except OSError as error:
                raise storage_error(run.path, error) from error

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Remember what the last `run` set out to do."""
        publish_json(self.path / "suite.json", plan)

    def plan(self) -> dict[str, Any] | None:
        """What the last `run` set out to do; None where only tables were kept."""
        try:
            plan = json.loads((self.path / "suite.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return plan if isinstance(plan, dict) else None

    def planned_at(self) -> float:
        """When the last `run` began."""
        with contextlib.suppress(OSError):
            return (self.path / "suite.json").stat().st_mtime
        return 0.0

    @contextlib.contextmanager
    def writing(self, wait_s: float = 60.0) -> Iterator[bool]:
        """Hold this while the tables are written; False where another still writes them."""
        lock = FileLock(self.path / ".lock")
        held = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait_s)
            held = True
        except Timeout:
            pass
        except NotImplementedError:  # a network file system without locks: renaming must do
            held = True
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            yield held
        finally:
            lock.release()


def _safe(run_id: str) -> str:
    """The name of a run, if it is one; raises ResultsError."""
    if not NAME.fullmatch(run_id):
        raise ResultsError(f"{run_id[:200]!r} is no name of a run")
    return run_id


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # on a read-only file system nobody works
        return False


def suite_folders(results: Path) -> list[SuiteFolder]:
    """Folders of all suites with results, the most recently written last."""
    found = [SuiteFolder(p) for p in results.iterdir()] if results.is_dir() else []
    found = [f for f in found if f.runs_csv.is_file()]
    return sorted(found, key=lambda f: f.runs_csv.stat().st_mtime)
