"""Suites that train, that only measure a step, and that search for what fits; and the doctor."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from snnbench.errors import SuiteError
from snnbench.planner import specs_of
from snnbench.spec import Capacity
from snnbench.tables import _to_target


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("suite", "settings", "message"),
    [
        ("smoke", ["kind=cost"], "kind = 'cost' times train.steps = N steps; give no epochs"),
        ("smoke", ["kind=capacity"], r"a \[capacity\] table belongs to kind = 'capacity'"),
        ("capacity", ["kind=cost"], r"a \[capacity\] table belongs to kind = 'capacity'"),
        ("capacity", ["capacity.memory_gib=[]"], "capacity.memory_gib"),
        ("capacity", ["capacity.memory_gib=[-1]"], r"capacity.memory_gib\[0\] = -1"),
        ("smoke", ["kind=speed"], 'kind = "speed"'),
        ("smoke", ["measure.target=95"], "measure.target = 95"),
        ("smoke", ["train.batch_split=7"], "batch_split = 7: batch_size = 64 cannot be divided"),
    ],
)
def test_settings_that_do_not_fit_a_kind(suite, settings, message):
    with pytest.raises(SuiteError, match=message):
        specs_of(suite, settings)


def test_every_memory_is_a_search_of_its_own():
    _, specs = specs_of("capacity", ["capacity.memory_gib=[1, 2.5]", "capacity.most_T=8"])
    rooms = [spec.capacity for spec in specs]
    assert rooms.count(Capacity(1.0, 8, 4096)) == rooms.count(Capacity(2.5, 8, 4096)) == 5
    assert len({spec.run_id for spec in specs}) == len(specs)


def test_rounds_of_a_cost_suite_go_through_all_methods():
    _, specs = specs_of("scaling", ["axes.T=[2]"])
    order = [(spec.seed, spec.method) for spec in specs]
    assert order == [
        (seed, method)
        for seed in (0, 1, 2)
        for method in ("bptt", "tet", "shortcut", "rate", "grad_scale")
    ]


# --- time to target by hand -------------------------------------------------------------------


def epoch(
    number: int, test: float | None, spikes: float | None = 10.0, T: int = 4
) -> dict[str, Any]:
    return {
        "epoch": number, "T": T, "test_acc": test, "train_s": 2.0, "energy_j": 3.0 * number,
        "samples": 100 * number, "spikes_per_sample": spikes,
    }  # fmt: skip


def to_target(history: list[dict[str, Any]], target: float | None = 0.9) -> dict[str, Any]:
    return _to_target(target, {"status": "done", "history": history}, 4)


def test_what_a_target_costs_is_summed_up_to_the_epoch_that_reaches_it():
    history = [epoch(1, 0.5), epoch(2, None, None), epoch(3, 0.9, 20.0), epoch(4, 0.99)]
    assert to_target(history) == {
        "target": 0.9,
        "time_to_target_s": 6.0,
        "energy_to_target_j": 9.0,
        "epochs_to_target": 3,
        # 100 samples at 10 spikes, then 200 at 20: those after the epoch that was evaluated
        "spikes_to_target": 100 * 10 + 200 * 20,
    }


def test_a_miss_is_infinity_and_no_target_is_nothing():
    missed = to_target([epoch(1, 0.5)])
    assert {v for k, v in missed.items() if k != "target"} == {math.inf}
    assert to_target([epoch(1, 1.0)], None) == {"target": None}
    assert _to_target(0.5, {"status": "failed"}, 4) == {"target": 0.5}


def test_an_epoch_at_a_smaller_T_costs_and_reaches_nothing():
    """As in a run that inherits a network trained at T = 2."""
    found = to_target([epoch(1, 0.95, T=2), epoch(2, 0.5), epoch(3, 0.92)])
    assert (found["epochs_to_target"], found["time_to_target_s"]) == (3, 6.0)


def test_a_network_without_spikes_has_none_to_count():
    assert to_target([epoch(1, 1.0, None)])["spikes_to_target"] is None


# --- from the command line --------------------------------------------------------------------


def test_a_cost_suite_shows_what_grows_with_T(bench, tmp_path):
    done = bench.run(
        "run", "scaling", "--set", "axes.T=[2,8]", "--set", "axes.seed=[0]", "--set",
        "train.steps=3", "--set", "model.width=8", "--set", "train.batch_size=16",
        "--only", "method=bptt,method=rate", "--results", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {(row["method"], row["T"]): row for row in rows(tmp_path / "scaling" / "runs.csv")}
    saved = {cell: int(row["saved_bytes"]) for cell, row in found.items()}
    assert saved["rate", "8"] == saved["rate", "2"]
    assert saved["bptt", "8"] > 3 * saved["bptt", "2"]
    for row in found.values():
        assert row["test_acc"] == ""
        assert json.loads(row["null_reasons"])["test_acc"] == "not trained: kind = 'cost'"
        assert int(row["steps_timed"]) == 3
        assert float(row["peak_bytes"]) > float(row["activations_bytes"]) > 0


def test_a_capacity_suite_finds_what_fits(bench, tmp_path):
    done = bench.run(
        "run", "capacity", "--only", "method=bptt", "--set", "capacity.memory_gib=[0.25]",
        "--set", "capacity.most_T=4", "--set", "capacity.most_batch=8", "--set", "model.width=4",
        "--results", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "done: largest T 4, largest batch 8" in done.stderr
    (row,) = rows(tmp_path / "capacity" / "runs.csv")
    assert (row["largest_T"], row["largest_batch"]) == ("4", "8")
    assert row["capacity_bound"] == "T, batch"
    assert row["memory_gib"] == "0.25"


def test_a_run_in_parts_deterministic_with_a_target(bench, tmp_path):
    done = bench.run(
        "run", "smoke", "--only", "method=bptt,method=ann", "--set", "axes.seed=[0]",
        "--set", "train.epochs=2", "--set", "train.batch_split=4", "--set",
        "train.deterministic=true", "--set", "measure.target=0.3", "--results", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for row in rows(tmp_path / "smoke" / "runs.csv"):
        assert float(row["test_acc"]) > 0.8
        assert float(row["time_to_target_s"]) > 0
        assert row["epochs_to_target"] in ("1", "2")
        assert (row["spikes_to_target"] == "") == (row["method"] == "ann")
        assert float(row["energy_ac_mac_nj_per_sample"]) > 0
    layers = rows(tmp_path / "smoke" / "layers.csv")
    assert [row["layer"] for row in layers if row["method"] == "bptt"] == [
        "conv1", "conv2", "readout",
    ]  # fmt: skip
    assert all(float(row["grad_norm"]) > 0 for row in layers)


def test_the_doctor_looks_and_says_what_to_do(bench, tmp_path):
    done = bench.run("doctor", "--json", "--data-root", tmp_path, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    checks = {check["name"]: check for check in seen["checks"]}
    assert checks["kernel reference"]["seen"].startswith("works")
    assert {"threads", "load", "memory", "results folder", "energy counter"} <= set(checks)
    assert seen["machine"]["versions"]["torch"]


def test_the_doctor_has_no_gpu_to_look_at(bench):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bench.run("doctor", "--device", "cuda")
    assert done.returncode == 2
    assert "no CUDA device is available here" in done.stderr
