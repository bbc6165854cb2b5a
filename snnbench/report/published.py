"""Published accuracies beside those measured by the papers' own rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from snnbench.claims import Claim, published_claims
from snnbench.report.columns import percent
from snnbench.suite import load, shipped
from snnbench.summary import Cell

PUBLISHED_COLUMNS = [
    "method", "dataset", "model", "T", "published %", "measured, best test", "verdict", "source",
]  # fmt: skip


def published(suites: Sequence[str], cells: list[Cell], frame: pd.DataFrame) -> list[list[str]]:
    """Published figures beside those measured by the papers' rule, and the verdict."""
    rows = []
    settings = dict(zip(frame["settings_hash"], frame["settings"], strict=True))
    for claim in published_claims():
        if claim.suite not in suites:
            continue
        keys = ("dataset", "model", "method", "T")
        found = [c for c in cells if all(c.conditions[k] == getattr(claim, k) for k in keys)]
        options = claim.options or {}
        found = [
            c for c in found if options.items() <= json.loads(c.conditions["method_config"]).items()
        ]
        for cell in found:
            value = cell.estimates["test_acc_best_test"]
            recipe = json.loads(settings[cell.conditions["settings_hash"]])
            rows.append(
                [
                    cell.label,
                    claim.dataset,
                    claim.model,
                    str(claim.T),
                    f"{claim.value:.2f}" + ("" if claim.verified else " (unverified)"),
                    percent(value, n=True),
                    _verdict(claim, cell, recipe),
                    claim.source,
                ]
            )
    return rows


def _verdict(claim: Claim, cell: Cell, settings: dict[str, Any]) -> str:
    value = cell.estimates["test_acc_best_test"]
    epochs = cell.estimates["epochs"]
    if value is None or epochs is None:
        return "not measured"
    if epochs.mean != claim.epochs:
        return f"not comparable: {epochs.mean:g} epochs, not {claim.epochs}"
    if changed := _changed_recipe(claim.suite, settings):
        return f"not comparable: other {', '.join(changed)}"
    difference = 100 * value.mean - claim.value
    inside = abs(difference) <= claim.tolerance
    return f"{'inside' if inside else 'outside'} ±{claim.tolerance:g} ({difference:+.2f})"


def _changed_recipe(suite: str, settings: dict[str, Any]) -> list[str]:
    """Settings that differ from the shipped suite of that name, or that make the data smaller."""
    shipped_suite = next(s for s in map(load, shipped()) if s.name == suite)
    train = {k: v for k, v in asdict(shipped_suite.train).items() if k != "timeout_s"}
    wanted = {"train": train, "data": shipped_suite.data, "model": shipped_suite.model}
    wanted["data"] = {"train_limit": None, "test_limit": None, **wanted["data"]}
    wanted["model"] = {"width": 1.0, **wanted["model"]}
    mine = flat(settings)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in flat(wanted).items()}
    return [k for k, v in plain.items() if mine.get(k, v) != v]


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by their key paths."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}{key}"
        found |= flat(value, f"{where}.") if isinstance(value, dict) else {where: value}
    return found
