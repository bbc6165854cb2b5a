"""Every command and code block of the README works as written."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = {
    lang: re.findall(rf"```{lang}\n(.*?)```", README, re.S)
    for lang in ("bash", "toml", "python", "yaml")
}
# pip and fetch need a network, and cifar10 a GPU; the others are run with snnbench installed.
COMMANDS = [
    part.strip()
    for block in BLOCKS["bash"]
    for line in block.splitlines()
    for part in line.partition("#")[0].split("&&")
]
OURS = [c for c in COMMANDS if c.startswith("snnbench")]
NEED_DATA = [c for c in OURS if "cifar10" in c]
OTHER = next(c for c in OURS if c.endswith("--results other"))
# These take minutes as written; here they do a part of their work.
SHORTER = {
    "snnbench run suites/smoke.toml": "--only seed=0,seed=1",
    "snnbench run smoke": "--only seed=0,seed=1",
    "snnbench run scaling": "--set train.steps=2 --set axes.T=[1,2] --only seed=0,method=rate",
    "snnbench run capacity": "--only method=bptt --set capacity.memory_gib=[0.1] "
    "--set capacity.most_T=2 --set capacity.most_batch=8",
    "snnbench run digits-events": "--set train.epochs=1 --only method=bptt,seed=0",
    "snnbench peers": "--net digits --batch 4 --rounds 1 --steps 1 --only "
    "ours:auto,spikingjelly:multi --output peers",
    OTHER: "--only seed=0",
}
# These two are run as they are written by `.ci/run`.
MAIN = COMMANDS[1:3]
GATES = [c for c in OURS if c.startswith("snnbench gate")]
RUN_HERE = [c for c in OURS if c not in NEED_DATA + GATES and "my_loss" not in c]


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the suites beside it, as in a clone."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "suites").symlink_to(ROOT / "suites")
    return folder


def run(command, folder):
    words = [sys.executable, "-m", *shlex.split(command)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900)


def test_the_readme_has_the_commands_we_promise():
    assert COMMANDS[:3] == [
        'pip install ".[report]"', "snnbench run suites/smoke.toml", "snnbench report --format md",
    ]  # fmt: skip
    assert 'pip install -e ".[dev]"' in COMMANDS
    assert len(RUN_HERE) >= 20
    assert set(SHORTER) <= set(RUN_HERE)


def test_every_command_works_in_the_order_of_the_readme(folder):
    for command in RUN_HERE:
        done = run(f"{command} {SHORTER.get(command, '')}", folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    report = json.loads(run("snnbench report smoke --format json", folder).stdout)
    reached = {cell["label"]: cell["test_acc"] for cell in report["cells"]}
    assert set(reached) == {"bptt", "tet", "shortcut", "rate", "grad_scale", "ann"}
    assert all(accuracy > 0.95 for accuracy in reached.values()), reached
    assert all(cell["n"] == 2 for cell in report["cells"])


def test_what_is_shortened_here_is_run_in_full_by_the_project_itself():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert [c for c in (*MAIN, *GATES) if c not in script] == []
    assert len(GATES) == 1


def test_the_tiny_suite_runs_on_real_cifar(folder, data_root):
    command = next(c for c in NEED_DATA if "tiny" in c) + f" --data-root {data_root}"
    command += " --set model.width=0.1 --set data.train_limit=128 --set data.test_limit=64"
    command += " --only method=bptt,method=rate"
    done = run(command, folder)
    # The official copy runs; any other is refused until it is allowed.
    if done.returncode != 0:
        assert "is not the official file" in done.stderr
        done = run(f"{command} --retry-failed --allow-unverified-data", folder)
    assert done.returncode == 0, done.stderr


def test_the_full_suite_is_valid(folder):
    assert run("snnbench check cifar10", folder).returncode == 0


def test_the_suite_of_the_readme_runs(folder):
    (folder / "mine.toml").write_text(BLOCKS["toml"][0])
    done = run("snnbench run mine.toml --only seed=0,T=4", folder)
    assert done.returncode == 0, done.stderr
    planned = json.loads(run("snnbench plan mine.toml --json", folder).stdout)
    assert len(planned["runs"]) == 12  # three variants, two T, three seeds, less tet at T = 2


def test_the_run_table_of_the_readme_shows_the_defaults():
    from snnbench.runs.policy import RunPolicy
    from snnbench.spec import validate

    errors = []
    shown = validate(RunPolicy, tomllib.loads(BLOCKS["toml"][1])["run"], errors)
    assert errors == []
    mine = {"jobs": None, "oom_retry": RunPolicy().oom_retry}  # the two that are examples
    assert dataclasses.replace(shown, **mine) == RunPolicy()


def test_the_method_of_the_readme_keeps_the_contract():
    from snnbench.methods.contract import check

    space = {}
    exec(BLOCKS["python"][0], space)
    method = space["MyLoss"]
    checks = check(lambda options: method(method.Config(**options)), method.bptt_limit[0])
    assert [c.name for c in checks if not c.ok] == []


def test_the_method_of_the_readme_works_where_the_readme_says(tmp_path):
    """The skeleton, with the README's code pasted over it, is installed and checked."""
    made, _, checked = (c for c in COMMANDS if "my_loss" in c or "my-loss" in c)
    assert run(made, tmp_path).returncode == 0
    path = re.search(r"`(snnbench-my-loss/\S+)`", README)[1]
    assert (tmp_path / path).is_file()
    (tmp_path / path).write_text(BLOCKS["python"][0])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--target", "site", "./snnbench-my-loss"]
    subprocess.run(pip, cwd=tmp_path, check=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [sys.executable, "-m", *shlex.split(checked)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pass") == 8


def test_the_readme_shows_the_committed_smoke_table():
    shown = README.split("<!-- smoke table: begin -->")[1].split("<!-- smoke table: end -->")[0]
    committed = (ROOT / "results" / "smoke" / "report.md").read_text("utf-8")
    table = [line for line in committed.splitlines() if line.startswith("| ")]
    assert [line for line in shown.splitlines() if line.startswith("| ")] == table


RESULTS = sorted(p.parent.name for p in ROOT.glob("results/*/runs.csv"))


@pytest.mark.parametrize("name", RESULTS)
def test_committed_reports_are_what_the_command_prints(name):
    """They were written from the tables beside them by the command that the README shows."""
    done = run(f"snnbench report results/{name} --format md", ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "results" / name / "report.md").read_text("utf-8")


def test_the_findings_quote_the_committed_tables():
    """No row of a table in results/README.md was written by hand."""
    reports = "\n".join(p.read_text("utf-8") for p in ROOT.glob("results/*/report.md"))
    lines = (ROOT / "results" / "README.md").read_text("utf-8").splitlines()
    quoted = [line for line in lines if line.startswith("| ")]
    assert len(quoted) > 10
    assert [line for line in quoted if line not in reports] == []


def test_all_results_can_be_had_again_with_one_command():
    """Each suite of results/rerun.sh exists, and is what the committed folder was made of."""
    script = (ROOT / "results" / "rerun.sh").read_text("utf-8")
    subprocess.run(["bash", "-n", ROOT / "results" / "rerun.sh"], check=True)
    *suites, last = re.search('all="(.*)"', script)[1].split()
    assert last == "peers"
    folders = {"scaling-cpu" if n == "scaling" else n: n for n in suites}
    assert set(RESULTS) <= {*folders, "digits-study"}
    for folder in set(RESULTS) & set(folders):
        planned = json.loads(run(f"snnbench plan {folders[folder]} --json", ROOT).stdout)["runs"]
        kept = (ROOT / "results" / folder / "runs.csv").read_text()
        assert all(one["run_id"] in kept for one in planned), folder


def test_the_actions_of_the_readme_gate_as_its_command_does():
    """`.ci/run` runs that command; the file that the summary is added to is GitHub's."""
    actions = [line.partition("run: ")[2] for line in BLOCKS["yaml"][0].splitlines()]
    (gate,) = [c for c in actions if c.startswith("snnbench gate")]
    assert "pip install ." in actions
    assert gate.split(" -o ")[0] == GATES[0]
