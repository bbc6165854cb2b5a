"""Packages of others, really installed: the one in tests/plugin, and a freshly written skeleton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import fresh_cache

SUITE = """
schema = 1
name = "guest"
claim = "A guest's method and model run like our own."
[axes]
dataset = ["digits"]
model = ["tiny"]
T = [2]
seed = [0]
[data]
train_limit = 100
[train]
epochs = 1
[[method]]
name = "bptt"
[[method]]
name = "last_step"
share = 0.5
[[method]]
name = "last_step+shortcut"
"""


def install(source, target):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    install(Path(__file__).parent / "plugin", target)
    return target


def snnbench(*arguments, cwd, site):
    if not (cache := cwd / "cache").exists():
        fresh_cache(cache)
    env = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "snnbench", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_a_guest_is_listed_with_its_distribution(demo, tmp_path):
    listed = snnbench("list", "methods", "--json", cwd=tmp_path, site=demo)
    guest = next(m for m in json.loads(listed.stdout)["methods"] if m["name"] == "last_step")
    assert (guest["distribution"], guest["version"]) == ("snnbench-demo", "1.2.3")
    assert guest["summary"].startswith("Cross-entropy of the last")


def test_a_guest_proves_that_it_keeps_the_contract(demo, tmp_path):
    done = snnbench("check", "last_step", cwd=tmp_path, site=demo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pass") == 8


def test_a_guest_runs_beside_and_composed_with_our_own(demo, tmp_path):
    (tmp_path / "guest.toml").write_text(SUITE)
    done = snnbench("run", "guest.toml", cwd=tmp_path, site=demo)
    assert done.returncode == 0, done.stderr
    runs = json.loads(snnbench("plan", "guest.toml", "--json", cwd=tmp_path, site=demo).stdout)[
        "runs"
    ]
    assert {r["method"]: r["status"] for r in runs} == {
        "bptt": "done",
        "last_step": "done",
        "last_step+shortcut": "skipped",  # one hidden layer: nowhere to attach a head
    }
    shown = snnbench("show", runs[1]["run_id"], "--json", cwd=tmp_path, site=demo)
    component = json.loads(shown.stdout)["result"]["components"]["method"]
    assert (component["distribution"], component["version"]) == ("snnbench-demo", "1.2.3")


def test_an_unknown_option_of_a_guest_is_explained(demo, tmp_path):
    (tmp_path / "guest.toml").write_text(SUITE.replace("share = 0.5", "shar = 0.5"))
    done = snnbench("check", "guest.toml", cwd=tmp_path, site=demo)
    assert done.returncode == 3
    assert done.stderr == (
        "error: guest.toml: method[1] (last_step).shar: unknown key; did you mean 'share'?\n"
    )


def test_a_new_skeleton_installs_and_passes_its_own_test(tmp_path):
    made = snnbench("new", "method", "my_loss", cwd=tmp_path, site=tmp_path)
    assert made.returncode == 0, made.stderr
    site = tmp_path / "site"
    install(tmp_path / "snnbench-my-loss", site)
    checked = snnbench("check", "my_loss", cwd=tmp_path, site=site)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path / "snnbench-my-loss",
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "1 passed" in tested.stdout


@pytest.mark.parametrize(
    ("name", "why"),
    [("tet", "installed already"), ("2fast", "no Python name"), ("class", "no Python name")],
)
def test_names_that_a_skeleton_cannot_have(name, why, tmp_path):
    made = snnbench("new", "method", name, cwd=tmp_path, site=tmp_path)
    assert made.returncode == 2
    assert why in made.stderr
    assert list(tmp_path.glob("snnbench-*")) == []


def test_a_skeleton_never_overwrites(tmp_path):
    (tmp_path / "snnbench-mine").mkdir()
    made = snnbench("new", "method", "mine", cwd=tmp_path, site=tmp_path)
    assert made.returncode == 2
    assert "exists already" in made.stderr
