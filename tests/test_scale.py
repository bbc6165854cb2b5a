"""Many runs: what a suite costs beyond training grows with their number, and no faster."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, events, rows, write_suite

from snnbench import planner
from snnbench.runner import OTHERS_S
from snnbench.runs import overview, scale
from snnbench.runs.progress import Ledger, work_of
from snnbench.spec import RunSpec, TrainConfig
from snnbench.store import SuiteFolder

SPEC = RunSpec(
    dataset="digits", data={}, model="mlp", model_options={}, method="bptt", method_config={},
    neuron={}, T=2, seed=0, train=TrainConfig(epochs=1),
)  # fmt: skip


def test_the_documented_bench_does_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cost = scale.measure(30, tmp_path)
    assert cost.runs == 30
    assert all(
        value > 0 for name, value in dataclasses.asdict(cost).items() if name != "growth_mib"
    )
    assert cost.growth_mib < 10
    assert cost.run_ms < 2000  # on a busy machine; see the bench for real figures


@pytest.fixture
def thousand(tmp_path: Path) -> SuiteFolder:
    """A folder with a thousand finished runs."""
    suite = SuiteFolder(tmp_path / "s")
    specs = [dataclasses.replace(SPEC, seed=seed) for seed in range(1000)]
    suite.write_plan({"runs": [s.run_id for s in specs]})
    for spec in specs:
        run = suite.run(spec.run_id)
        run.path.mkdir(parents=True)
        (run.path / "spec.json").write_text(json.dumps(spec.to_json()))
        (run.path / "events.jsonl").write_text('{"event": "exit", "wall_s": 2.0}\n')
        (run.path / "result.json").write_text('{"status": "done", "source_hash": "x"}')
    return suite


def test_ended_runs_are_read_once(thousand: SuiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = overview.look(thousand)
    assert seen.counts == {"done": 1000}
    assert seen.stale == 1000
    read: list[Path] = []
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a: read.append(p) or real(p, *a))
    began = time.perf_counter()
    assert overview.look(thousand).counts == {"done": 1000}
    assert time.perf_counter() - began < 2.0
    assert {p.parent for p in read} == {thousand.path}  # the plan and the index, and no run
    changed = thousand.run(SPEC.run_id)
    (changed.path / "result.json").write_text('{"status": "failed", "reason": "changed"}')
    assert overview.look(thousand).counts == {"failed": 1, "done": 999}


def test_runs_that_are_done_are_looked_at_once_for_all_estimates(
    thousand: SuiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    overview.look(thousand)
    ledger = Ledger(thousand)
    looked: list[str] = []
    real = ledger.look
    monkeypatch.setattr(ledger, "look", lambda run_id: looked.append(run_id) or real(run_id))
    past = planner.Past(ledger)
    assert looked == []  # nobody has asked for an estimate
    for seed in range(1000, 2000):
        assert past.estimate(dataclasses.replace(SPEC, seed=seed)) == 2.0
    assert len(looked) == len(set(looked)) == 1000


def test_status_and_plan_tell_of_stale_results_and_run_does_them_again(
    bench: Bench, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path / "tiny.toml", ["bptt", "tet"], epochs=1)
    both = bench.run("run", suite, "--results", tmp_path, "--jobs", 2)
    assert both.returncode == 0, both.stderr
    assert "their times are marked by parallel_jobs" in both.stderr
    for path in (tmp_path / "tiny" / "runs").glob("*/result.json"):
        assert json.loads(path.read_text())["parallel_jobs"] == 2
    (old,) = (tmp_path / "tiny" / "runs").glob("*-bptt-*/result.json")
    record = json.loads(old.read_text())
    old.write_text(json.dumps(record | {"source_hash": "of another time"}))

    planned = json.loads(bench.run("plan", suite, "--results", tmp_path, "--json").stdout)
    assert [r["stale"] for r in planned["runs"]] == [True, False]
    assert (planned["stale"], planned["todo"]) == (1, 0)
    state = bench.run("status", "tiny", "--results", tmp_path)
    assert "2 runs: 2 done; 1 stale: computed by other code" in state.stderr
    assert state.stdout.count("done, stale") == 1
    kept = bench.run("run", suite, "--results", tmp_path)
    assert "1 results were computed by other code: --redo-stale" in kept.stderr

    again = bench.run("run", suite, "--results", tmp_path, "--redo-stale", "--json")
    assert json.loads(again.stdout)["runs"] == {"done": 1}
    planned = json.loads(bench.run("plan", suite, "--results", tmp_path, "--json").stdout)
    assert planned["stale"] == 0
    assert len(list((tmp_path / "tiny" / "redone").iterdir())) == 1
    assert {row["status"] for row in rows(tmp_path / "tiny")} == {"done"}


def test_a_suite_that_two_commands_do_is_seen_and_can_be_cancelled(
    bench: Bench, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path / "tiny.toml", "steady\ndelay_s = 0.1", seeds="[0, 1]", epochs=500)
    both = [bench.start("run", suite, "--results", tmp_path, guest=True) for _ in range(2)]
    deadline = time.monotonic() + 120
    while len({e["run_id"] for e in events(tmp_path / "tiny") if e["event"] == "start"}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not [e for e in events(tmp_path / "tiny") if e["event"] == "epoch"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def status() -> Any:
        command = ("status", "tiny", "--results", tmp_path, "--json")
        return json.loads(bench.run(*command, guest=True).stdout)

    state = status()
    assert state["counts"] == {"running": 2}
    assert len({run["worker"] for run in state["runs"]}) == 2
    assert [run for run in state["runs"] if run.get("epochs") == 500]

    one = state["runs"][0]["run_id"]
    done = bench.run("cancel", "tiny", "--run", one, "--results", tmp_path, guest=True)
    assert done.returncode == 0, done.stderr
    time.sleep(2 * OTHERS_S)  # time for the other command to take it up, which it must not
    state = status()
    assert {r["run_id"]: r["status"] for r in state["runs"]}[one] == "interrupted"
    assert state["counts"] == {"interrupted": 1, "running": 1}

    assert bench.run("cancel", "tiny", "--results", tmp_path, guest=True).returncode == 0
    for process in both:
        ended = bench.wait(process)
        assert ended.returncode == 130, ended.stderr
    assert {row["status"] for row in rows(tmp_path / "tiny")} == {"interrupted"}
    assert len([e for e in events(tmp_path / "tiny") if e["event"] == "start"]) == 2


def test_a_first_plan_reads_of_each_run_its_result_and_events_only(
    thousand: SuiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [dataclasses.replace(SPEC, seed=seed) for seed in range(50)]
    for spec in specs:
        result = {"status": "done", "spec": spec.to_json()}
        (thousand.run(spec.run_id).path / "result.json").write_text(json.dumps(result))
    read: list[str] = []
    real = Path.read_bytes, Path.read_text
    monkeypatch.setattr(Path, "read_bytes", lambda p: read.append(p.name) or real[0](p))
    monkeypatch.setattr(Path, "read_text", lambda p, *a: read.append(p.name) or real[1](p, *a))
    ledger = Ledger(thousand)
    found = {ledger.look(spec.run_id) for spec in specs}
    assert sorted(set(read)) == ["events.jsonl", "index.json", "result.json"]
    assert len(read) == 1 + 2 * len(specs)
    (known,) = found  # the seed decides nothing here
    assert (known.work, known.method, known.T) == (work_of(SPEC), "bptt", 2)


def test_a_result_without_a_spec_or_with_a_strange_one_still_counts(thousand: SuiteFolder) -> None:
    ledger = Ledger(thousand)
    assert ledger.look(SPEC.run_id).work == work_of(SPEC)  # of spec.json
    for seed, spec, work in ((1, [1], work_of(SPEC)), (2, {"method": 3}, None)):
        run = thousand.run(dataclasses.replace(SPEC, seed=seed).run_id)
        (run.path / "result.json").write_text(json.dumps({"status": "done", "spec": spec}))
        assert (ledger.look(run.run_id).status, ledger.look(run.run_id).work) == ("done", work)


def test_a_copied_spec_is_what_asdict_gives() -> None:
    spec = dataclasses.replace(SPEC, data={"a": [1, {"b": (2.5, None)}], "c": True})
    copied = spec.to_json()
    assert copied == dataclasses.asdict(spec)
    copied["data"]["a"][1]["b"] = copied["train"]["lr"] = 0
    assert spec.data["a"][1]["b"] == (2.5, None)
    assert spec.train.lr == TrainConfig(epochs=1).lr


def test_a_child_imports_and_collects_nothing_of_the_server() -> None:
    """What every run would do again is done once by the server that the runs are forked from."""
    code = """
import json
from snnbench.executors.local import LocalExecutor
executor = LocalExecutor(["snnbench.data.digits"], "guest_of_scale")
print(json.dumps(executor.call("look", {})))
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    seen = json.loads(done.stdout)
    assert seen["imported"] == []
    assert seen["frozen"] > 100_000
    assert seen["described"] == 1
