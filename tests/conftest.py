"""Shared by the tests: the folder of real data, one torch thread, and snnbench as a command."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

# Two test processes share the cores: more threads each would wait for one another, not work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of commands are started: each would compile all of snnbench again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Columns that a clock or the operating system decides; all others must be reproducible.
TIMING = {
    "train_s", "eval_s", "wall_s", "overhead_s", "measure_s", "worker_s", "setup_s", "step_ms_p25",
    "step_ms_p50", "step_ms_p75", "steps_timed", "peak_bytes", "activations_bytes", "warm_up_s",
    "data_share", "forward_share", "backward_share", "optimizer_share", "images_per_s",
    "timing_warning", "warnings", "peak_nvml_bytes", "energy_j", "energy_measured_j",
}  # fmt: skip
GUEST = Path(__file__).parent / "plugin_faulty"
CLOCK = Path(__file__).parent / "jumping_clock"
# The longest files; begun first, they do not keep one process waiting for the other at the end.
LONGEST = [f"test_{name}.py" for name in
           ("readme", "faults", "slurm", "guests", "runs", "kinds", "scale", "plugins", "views",
            "triton", "html", "gate", "train", "kernels", "schedules", "security")]  # fmt: skip
PATIENCE_S = 180.0  # the machine may be busy with something else

SUITE = """
schema = 1
name = "tiny"
claim = "For tests."
[axes]
dataset = ["digits"]
model = ["{model}"]
T = [2]
seed = {seeds}
[data]
train_limit = 100
test_limit = 50
[model]
{options}
[train]
lr = 0.1
batch_size = 32
epochs = {epochs}
{train}
{methods}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; xdist hands files out in this order."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


class Bench:
    """Runs `snnbench` as a user would, each command in a process group of its own."""

    def __init__(self, cache: Path) -> None:
        hidden = ("SNNBENCH_RESULTS", "SNNBENCH_DATA", "SNNBENCH_DEBUG")
        self._env = {k: v for k, v in os.environ.items() if k not in hidden}
        self._env |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self, *args: object, guest: bool = False, jumping_clock: bool = False
    ) -> subprocess.Popen[str]:
        """Begin a command; with `guest`, the plugin of tests/plugin_faulty is installed."""
        path = [str(GUEST)] if guest else []
        path += [str(CLOCK)] if jumping_clock else []
        path += [p for p in [self._env.get("PYTHONPATH")] if p]
        process = subprocess.Popen(
            [sys.executable, "-m", "snnbench", *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._env | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *args: object, guest: bool = False) -> subprocess.CompletedProcess[str]:
        """Do a command."""
        return self.wait(self.start(*args, guest=guest))

    def wait(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """How the command ended."""
        out, err = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def clean_up(self) -> None:
        """End what is left of every command."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_S)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._started.clear()


def fresh_cache(folder: Path) -> Path:
    """A user's cache folder that holds nothing but the CPU kernel, if that is built already."""
    built = platformdirs.user_cache_path("snnbench") / "native"
    if built.is_dir():
        shutil.copytree(built, folder / "snnbench" / "native")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder, for this session only."""
    return fresh_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bench(cache: Path) -> Iterator[Bench]:
    """The command line."""
    commands = Bench(cache)
    yield commands
    commands.clean_up()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets."""
    if "SNNBENCH_DATA" not in os.environ:
        pytest.skip("SNNBENCH_DATA names no folder with CIFAR")
    return Path(os.environ["SNNBENCH_DATA"])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: a barrier on a busy machine costs more than tiny tensors."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_suite(
    path: Path,
    methods: str | list[str],
    seeds: str = "[0]",
    epochs: int = 2,
    train: str = "",
    model: str = "convnet",
    options: str = "width = 4",
) -> Path:
    """A suite file; a method is its name, or a name with lines of options below."""
    names = [methods] if isinstance(methods, str) else methods
    tables = []
    for method in names:
        name, _, more = method.partition("\n")
        tables.append(f'[[method]]\nname = "{name}"\n{more}\n')
    text = SUITE.format(
        model=model, seeds=seeds, options=options, epochs=epochs, train=train,
        methods="\n".join(tables),
    )  # fmt: skip
    path.write_text(text)
    return path


def rows(folder: Path, table: str = "runs.csv") -> list[dict[str, str]]:
    """A table of results as text cells."""
    with (folder / table).open(newline="") as file:
        return list(csv.DictReader(file))


def cells(folder: Path) -> dict[str, Any]:
    """Everything of both tables and all results that no clock decides."""
    return {
        "runs": [without_timing(row) for row in rows(folder)],
        "epochs": [without_timing(row) for row in rows(folder, "epochs.csv")],
        "results": {
            path.parent.name: without_timing(json.loads(path.read_text()))
            for path in sorted(folder.glob("runs/*/result.json"))
        },
    }


def without_timing(value: Any) -> Any:
    """The value without what a clock decides, at every depth."""
    if isinstance(value, dict):
        return {k: without_timing(v) for k, v in value.items() if k not in TIMING}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def events(folder: Path, name: str = "") -> list[dict[str, Any]]:
    """Whole lines of the event logs of all runs whose id holds the name."""
    found = []
    for path in folder.glob(f"runs/*{name}*/events.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and line.startswith("{"):
                found.append(json.loads(line))
    return found
