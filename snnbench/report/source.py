"""What a report is made of: the tables of one or several results folders, and their plans."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from snnbench.errors import ResultsError, UsageError
from snnbench.spec import did_you_mean
from snnbench.store import RunFolder, SuiteFolder, suite_folders
from snnbench.tables import TEXT_COLUMNS, read_runs

SPEC_COLUMNS = ("dataset", "model", "method", "method_config", "T", "seed", "kernel", "precision",
                "memory", "kind")  # fmt: skip
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # a terminal would obey them
EMPTY = pd.DataFrame({"run_id": pd.Series(dtype="string")})


@dataclass(frozen=True)
class Source:
    """Rows of runs, and everything that belongs to them.

    The column `results` of every table says which folder a row came from; `apart` is whether runs
    of one id stand in several folders, so that they must not be pooled.
    """

    folders: Sequence[SuiteFolder]
    runs: pd.DataFrame
    apart: bool
    where: Mapping[str, Sequence[str]]

    @cached_property
    def plans(self) -> list[dict[str, Any]]:
        """The plan of each folder; empty where only tables were kept."""
        return [folder.plan() or {} for folder in self.folders]

    @property
    def suites(self) -> list[str]:
        """Names of the suites, once each."""
        named = zip(self.plans, self.folders, strict=True)
        names = (str(_suite(p).get("name", f.path.name)) for p, f in named)
        return list(dict.fromkeys(re.sub(CONTROL, "", name) for name in names))

    @property
    def title(self) -> str:
        """Their names."""
        return ", ".join(self.suites)

    @property
    def claim(self) -> str:
        """What was to be tested."""
        claims = (re.sub(CONTROL, "", str(_suite(p).get("claim", ""))) for p in self.plans)
        return " / ".join(dict.fromkeys(c for c in claims if c))

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """One row per run and epoch."""
        return self._table([f.epochs_csv for f in self.folders])

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per run and layer; empty where that was not kept."""
        return self._table([f.runs_csv.with_name("layers.csv") for f in self.folders])

    @cached_property
    def fidelity(self) -> pd.DataFrame:
        """One row per run, epoch and layer; empty where gradients were not compared."""
        return self._table([f.fidelity_csv for f in self.folders])

    def run_folder(self, row: Mapping[str, Any]) -> RunFolder:
        """The folder of a row of `runs`, whether it was kept or not."""
        return SuiteFolder(Path(str(row["results"]))).run(str(row["run_id"]))

    def missing(self) -> int:
        """Runs that were planned and have not begun; those that a filter hides do not count."""
        if self.where:
            return 0
        planned = {
            (f.path, r) for f, p in zip(self.folders, self.plans, strict=True) for r in _ids(p)
        }
        begun = zip(self.runs["results"].map(Path), self.runs["run_id"], strict=True)
        return len(planned - set(begun))

    def planned(self) -> int:
        """How many runs were planned."""
        return sum(len(_ids(p)) for p in self.plans)

    def _table(self, paths: Sequence[Path]) -> pd.DataFrame:
        frames = []
        for folder, path in zip(self.folders, paths, strict=True):
            mine = self.runs[self.runs["results"] == str(folder.path)]
            frame = _read(path)
            frame = frame[frame["run_id"].isin(set(mine["run_id"]))]
            frames.append(frame.assign(results=str(folder.path)))
        # An empty part would decide the types of columns that it does not fill.
        return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)


def read(
    folders: Sequence[SuiteFolder], where: Mapping[str, Sequence[str]] | None = None
) -> Source:
    """Read the tables, without the control characters that a message may have brought along.

    Raises ResultsError, or UsageError for a filter that names no column or that no run fits.
    """
    folders = list({f.path.resolve(): f for f in folders}.values())
    frames = [read_runs(f).assign(results=str(f.path)) for f in folders]
    runs = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
    if "kind" in runs:
        runs["kind"] = runs["kind"].fillna("train")
    for name in TEXT_COLUMNS:
        if name in runs and pd.api.types.is_string_dtype(runs[name]):
            runs[name] = runs[name].str.replace(CONTROL, "", regex=True)
    runs = fitting(runs, where or {})
    apart = bool(runs["run_id"].duplicated().any())
    return Source(tuple(folders), runs.reset_index(drop=True), apart, dict(where or {}))


def fitting(runs: pd.DataFrame, where: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows that have one of the wanted values in each column; raises UsageError.

    That no row of several does is an error as well, so that no report is empty by a slip.
    """
    all_ = len(runs)
    for column, values in where.items():
        if column not in runs:
            raise UsageError(
                f"--where {column}: no such column{did_you_mean(column, runs.columns)}"
            )
        runs = runs[[_fits(value, values) for value in runs[column]]]
    if all_ and runs.empty:
        rules = ",".join(f"{k}={v}" for k, values in where.items() for v in values)
        raise UsageError(f"--where {rules}: no run fits, of {all_}")
    return runs


def find_row(results: Path, run_id: str) -> tuple[SuiteFolder, dict[str, Any]] | None:
    """What the tables know of a run of that id, or of the only id that begins so."""
    fitting_rows = []
    for folder in suite_folders(results):
        runs = read_runs(folder)
        for _, row in runs[runs["run_id"].str.startswith(run_id)].iterrows():
            fitting_rows.append((folder, row))
    exact = [(f, r) for f, r in fitting_rows if r["run_id"] == run_id]
    if len(exact or fitting_rows) != 1:
        return None
    folder, row = (exact or fitting_rows)[0]
    known = {str(k): v for k, v in row.dropna().items()}
    known |= {k: v.item() for k, v in known.items() if hasattr(v, "item")}
    spec = {k: known.pop(k) for k in SPEC_COLUMNS if k in known}
    settings = json.loads(str(known.pop("settings", "{}")))
    spec |= {f"{k}_options" if k in spec else k: v for k, v in settings.items()}
    epochs = read([folder], {"run_id": [str(row["run_id"])]}).epochs
    return folder, {
        "run_id": row["run_id"],
        "folder": str(folder.path),
        "status": row["status"],
        "spec": spec,
        "result": known,
        "epochs": epochs.drop(columns=["results", "run_id"]).dropna(axis=1).to_dict("records"),
    }


def parse_where(rules: Iterable[str]) -> dict[str, list[str]]:
    """`T=4,method=tet` -> {"T": ["4"], "method": ["tet"]}; a repeated key means any of them."""
    wanted: dict[str, list[str]] = {}
    for part in (p for rule in rules for p in rule.split(",")):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals or not key:
            raise UsageError(f"--where {part}: write column=value, as method=tet,T=4")
        wanted.setdefault(key, []).append(value)
    return wanted


def _fits(value: Any, wanted: Sequence[str]) -> bool:
    if pd.isna(value):
        return "" in wanted
    if str(value) in wanted or str(value).lower() in wanted:  # a truth value is False in a table
        return True
    try:
        return any(float(w) == float(value) for w in wanted)
    except (TypeError, ValueError):
        return False


def _suite(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    suite = plan.get("suite")
    return suite if isinstance(suite, dict) else {}


def _ids(plan: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(map(str, plan.get("runs") or [])))


def _read(path: Path) -> pd.DataFrame:
    """A table beside runs.csv; empty where there is none."""
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, "string"))
    except FileNotFoundError:
        return EMPTY
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a readable table: {error}") from error
    return frame if "run_id" in frame else EMPTY
