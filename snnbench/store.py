"""Result folders: what lies where, written so that a kill at any moment loses nothing.

    results/<suite>/suite.json               the plan of the last `run`
    results/<suite>/runs.csv, epochs.csv     the tables (and fidelity.csv, where measured)
    results/<suite>/runs/<run_id>/           one run:
        spec.json       what to do
        events.jsonl    append-only: start, one line an epoch, interruptions
        checkpoint.pt   at the end of an epoch, 10 s or more after the last; gone once done
        log.txt         whatever the process printed
        result.json     written last, by rename: its existence means that the run has ended

This is the only module that knows file names.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from snnbench.errors import ResultsError
from snnbench.spec import RunSpec

Status = Literal[
    "done", "oom", "timeout", "diverged", "failed", "skipped", "interrupted", "running", "missing"
]
ENDED: tuple[Status, ...] = ("done", "oom", "timeout", "diverged", "failed", "skipped")
FAILURES: tuple[Status, ...] = ("oom", "timeout", "diverged", "failed")


_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "epoch": {"epoch": int},
    "exit": {"wall_s": (int, float)},
    "interrupted": {"reason": str},
}


def _is_event(event: dict[str, Any]) -> bool:
    """Whether the event has what readers count on."""
    needed = _NEEDED.get(str(event.get("event")), {})
    return all(isinstance(event.get(k), kind) for k, kind in needed.items())


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in place: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    def log(self) -> Path:
        """Everything that the worker process printed."""
        return self.path / "log.txt"

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
            return RunSpec.from_json(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError) as error:
            with contextlib.suppress(ResultsError, ValueError):
                return RunSpec.from_json((self.result() or {}).get("spec"))
            raise ResultsError(f"{file}: not a readable run spec: {error}") from error

    def append(self, event: dict[str, Any]) -> None:
        """Add one event; a line that an earlier kill cut short stays a line of its own."""
        try:
            with self._events.open("ab+") as file:
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

    def epochs(self) -> list[dict[str, Any]]:
        """One event per epoch; an epoch that was repeated after a kill counts once, the last."""
        latest = {e["epoch"]: e for e in self.events()[0] if e.get("event") == "epoch"}
        return [latest[n] for n in sorted(latest)]

    def finish(self, result: dict[str, Any]) -> None:
        """Publish the result: from now on the run has ended."""
        publish_json(self._result, result)

    def result(self) -> dict[str, Any] | None:
        """The result of a run that has ended, else None; raises ResultsError if damaged."""
        try:
            result = json.loads(self._result.read_text("utf-8"))
            if not isinstance(result, dict) or result.get("status") not in ENDED:
                raise ValueError("no status in it")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ResultsError(f"{self._result}: not a readable result: {error}") from error
        return result

    def set_aside_damaged_result(self) -> Path:
        """Keep a damaged result under another name, so that the run counts as missing."""
        aside = self._result.with_name(f"result.damaged-{time.time_ns()}.json")
        try:
            self._result.rename(aside)
        except OSError as error:
            raise storage_error(self._result, error) from error
        return aside

    def status(self) -> Status:
        """How far the run has come; `interrupted` is one that began and has no living worker."""
        try:
            result = self.result()
        except ResultsError:
            return "missing"
        if result is not None:
            status: Status = result["status"]
            return status
        if not self._events.exists():
            return "missing"
        return "running" if is_locked(self.path / ".lock") else "interrupted"

    def claim(self, wait_s: float) -> FileLock:
        """Hold this while working on the run; it is let go when the process ends, however."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=wait_s)
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
    def fidelity_csv(self) -> Path:
        """One row per run, epoch and layer, where gradients were compared with BPTT's."""
        return self.path / "fidelity.csv"

    def run(self, run_id: str) -> RunFolder:
        """The folder of a run, whether it exists or not."""
        return RunFolder(self.path / "runs" / run_id)

    def runs(self) -> Iterator[RunFolder]:
        """Folders of all runs that were ever begun here, by name."""
        folder = self.path / "runs"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if (path / "spec.json").is_file():
                yield RunFolder(path)

    def set_aside(self, run: RunFolder) -> None:
        """Keep an old run under redone/, so that it can be done afresh and nothing is lost."""
        if run.path.exists():
            target = self.path / "redone" / f"{run.run_id}-{time.time_ns()}"
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

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder for one `run`; raises ResultsError if another holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ResultsError(
                f"{self.path}: another `snnbench run` is working here; wait for it, or name "
                "another folder with --results"
            ) from error
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            yield
        finally:
            lock.release()


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
