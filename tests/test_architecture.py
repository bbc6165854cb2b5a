"""Who may import whom: the table of the architecture, held by a walk over the code.

A module may import only from rows above its own, or the `base` / `layer` of its own shelf.
Imports under `if TYPE_CHECKING` are free: they cost nothing and bind nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

import snnbench

PACKAGE = Path(snnbench.__file__).parent
FILES = {
    ".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f
    for f in sorted(PACKAGE.rglob("*.py"))
}

# The first pattern that fits counts.
ROWS = [
    (
        0,
        [
            "__init__",
            "commands",
            "errors",
            "runs",
            "training",
            "training.allocator",
            "peers",
            "runs.policy",
        ],
    ),
    (0.5, ["runs.publish", "training.isolated"]),
    (
        1,
        [
            "spec",
            "stats",
            "neurons",
            "machine",
            "peers.results",
            "training.group",
            "runs.lease",
        ],
    ),
    (2, ["registry", "store", "kernels", "kernels.*"]),
    (2.1, ["entries", "training.graph", "training.oom", "training.warm"]),
    (2.12, ["training.team", "peers.lineup"]),
    (2.15, ["suite"]),
    (2.2, ["claims"]),
    (2.5, ["models.layer"]),
    (2.7, ["models", "models.*", "methods", "methods.*", "data", "data.*", "training.recipe"]),
    (3, ["measure.nvml"]),
    (3.2, ["measure", "measure.*", "peers.libraries"]),
    (3.5, ["training.engine"]),
    (3.6, ["training.checkpoint", "training.job"]),
    (3.7, ["training.evaluate", "doctor"]),
    (4, ["train", "training.cost", "training.build"]),
    (4.9, ["executors.base"]),
    (5, ["worker", "tables", "peers.tables", "peers.contestants", "runs.progress"]),
    (5.05, ["peers.alone"]),
    (5.1, ["runs.scale_worker", "executors", "executors.local", "executors.queue", "runs.collect"]),
    (5.2, ["executors.slurm", "summary", "planner", "runs.attempt", "runs.stopping"]),
    (5.4, ["report.columns", "report.source", "report.canvas", "runs.overview"]),
    (5.6, ["report.findings", "report.published", "runs.node"]),
    (5.8, ["report.content"]),
    (5.9, ["report.data", "report.markdown", "report.latex", "report.plots", "report.compare"]),
    (6, ["runner", "report", "report.*", "console", "scaffold", "peers.bench", "peers.child"]),
    (6.2, ["report.html", "report.export", "report.gate"]),
    (6.5, ["runs.scale"]),
    (7, ["commands.data"]),
    (7.1, ["commands.run", "commands.peers"]),
    (7.2, ["commands.report", "commands.doctor"]),
    (7.4, ["commands.judge"]),
    (7.6, ["cli"]),
    (8, ["__main__"]),
]
# Within one row; everything else sideways is an error.
SIDEWAYS = {
    ("machine", "spec"),
    *(("kernels.fused", f"kernels.{m}") for m in ("pooling", "rates", "reference")),
    ("kernels.pooling", "kernels.rates"),
    ("kernels.reference", "kernels.rates"),
    ("kernels.rates", "kernels.pointwise"),
    *(("kernels.choice", f"kernels.{m}") for m in ("fused", "reference")),
    ("runner", "planner"),
    ("measure.gradients", "methods.base"),
    *((m, "methods.base") for m in FILES if m.startswith("methods.")),
    *((m, "data.base") for m in FILES if m.startswith("data.")),
    ("kernels.triton", "kernels.triton_launch"),
    ("kernels.triton_launch", "kernels.triton_rows"),
    ("kernels.triton_rows", "kernels.triton_code"),
    *(
        (f"data.{a}", f"data.{b}")
        for a, bs in {
            "bench": "augment vision",
            "digits": "splits",
            "events": "augment prepared splits",
            "folders": "augment fetch mix official prepared splits",
            "imagenet": "fetch folders mix official prepared splits",
            "official": "fetch",
            "prepared": "fetch splits",
            "recordings": "events fetch official splits",
            "simulated": "digits events",
            "vision": "augment fetch mix splits",
        }.items()
        for b in bs.split()
    ),
    *((m, "report.content") for m in FILES if m.startswith("report.")),
}
TORCH_FREE = [
    "errors", "spec", "suite", "registry", "store", "runner", "executors", "executors.*", "tables",
    "stats", "report", "report.*", "console", "cli", "commands.*", "planner", "summary", "entries",
    "claims", "training.oom", "peers", "peers.bench", "peers.lineup", "peers.results",
    "peers.tables",
    *(m for m in FILES if m.startswith("runs.") and m != "runs.scale_worker"),
]  # fmt: skip
METHOD_SEES = {
    "neurons", "models.layer", "methods.base", "training.group", "kernels.rates",
    "kernels.pointwise",
}  # fmt: skip
NOT_A_METHOD = {"methods", "methods.base", "methods.contract", "methods.compose"}
DOORS = {
    "typer": ["cli", "commands.*"],
    "click": ["cli"],
    "rich": ["console"],
    "tomllib": ["suite"],
    "pydantic": ["spec"],
    "filelock": ["store", "data.fetch", "data.prepared"],
    "torchvision": ["data.vision", "data.augment", "data.bench", "data.folders", "data.imagenet"],
    "sklearn": [],
    "pandas": ["tables", "summary", "report.*", "peers.tables"],
    "scipy": ["stats", "measure.*"],
    "platformdirs": ["planner", "commands.data", "kernels.native"],
    "submitit": ["executors.slurm", "runs.node"],
    "tonic": ["data.events", "data.recordings"],
    "h5py": ["data.recordings"],
    "matplotlib": ["report.canvas"],
    "jinja2": ["report.html"],
    "markupsafe": ["report.html"],
    "pynvml": ["measure.nvml"],
    "multiprocessing": ["executors.local", "training.isolated", "training.team"],
    "subprocess": ["executors.queue", "kernels.native", "peers.bench", "report.compare"],
    "triton": ["kernels.triton", "kernels.triton_code", "kernels.triton_rows"],
}
LINES, METHOD_LINES = 425, 240


def fits(module: str, patterns: list[str]) -> bool:
    return any(fnmatch(module, pattern) for pattern in patterns)


def row(module: str) -> float:
    fitting = [n for n, names in ROWS if fits(module, names)]
    assert fitting, f"{module} has no row: give it one in ROWS and in architecture.md"
    return fitting[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs, those inside functions too."""
    yield node
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield from walk(other)
        else:
            yield from walk(child)


@cache
def imports(text: str) -> set[str]:
    """Dotted names that the text imports, `from a import b` as a.b."""
    found = set()
    for node in walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str) -> set[str]:
    """Modules of snnbench that this one imports."""
    found = set()
    for name in imports(FILES[module].read_text("utf-8")):
        if name.partition(".")[0] != "snnbench":
            continue
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in FILES:
            parts.pop()
        found.add(".".join(parts) or "__init__")
    return found


def outside(module: str) -> set[str]:
    """Distributions and standard modules that this one imports."""
    return {name.partition(".")[0] for name in imports(FILES[module].read_text("utf-8"))}


def test_the_walk_sees_what_it_should() -> None:
    text = """
import a.b
from c import d as e
def f():
    from g import h
if TYPE_CHECKING:
    import hidden
else:
    import i
class K:
    import j
"""
    assert imports(text) == {"a.b", "c.d", "g.h", "i", "j"}
    assert within("cli") >= {"__init__", "errors", "runner", "console", "registry", "suite"}
    assert "torch" in outside("train")


@pytest.mark.parametrize("module", FILES)
def test_every_module_has_a_row(module: str) -> None:
    assert row(module) >= 0


@pytest.mark.parametrize("module", FILES)
def test_imports_come_from_rows_above(module: str) -> None:
    wrong = [
        name
        for name in sorted(within(module))
        if row(name) >= row(module) and (module, name) not in SIDEWAYS
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [m for m in FILES if fits(m, ["methods.*"])])
def test_methods_see_neurons_and_layers_only(module: str) -> None:
    if module not in NOT_A_METHOD:
        assert within(module) <= METHOD_SEES


def test_the_loop_sees_contracts_only() -> None:
    concrete = [m for m in within("train") if fits(m, ["methods.*", "models.*", "data.*"])]
    assert set(concrete) <= {"methods.base", "models.layer", "data.base"}


@pytest.mark.parametrize("module", [m for m in FILES if fits(m, TORCH_FREE)])
def test_torch_free_for_ever(module: str) -> None:
    assert not outside(module) & {"torch", "torchvision", "tonic"}
    heavy = ["neurons", "machine", "kernels*", "models*", "methods*", "data*", "measure*", "train"]
    assert not [name for name in within(module) if fits(name, [*heavy, "worker"])]


def test_torch_free_through_everything_they_import() -> None:
    names = [f"snnbench.{m}" for m in FILES if fits(m, TORCH_FREE)]
    code = f"import sys, importlib\nfor n in {names}: importlib.import_module(n)\n"
    code += "print([m for m in ('torch', 'torchvision', 'tonic', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dependency", DOORS)
def test_one_door_per_dependency(dependency: str) -> None:
    users = [m for m in FILES if dependency in outside(m)]
    assert [m for m in users if not fits(m, DOORS[dependency])] == []


def test_no_rooms_without_a_purpose() -> None:
    names = {part for module in FILES for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "helper", "core", "common", "misc"}


@pytest.mark.parametrize("module", FILES)
def test_modules_stay_short(module: str) -> None:
    a_method = fits(module, ["methods.*"]) and module not in NOT_A_METHOD
    limit = METHOD_LINES if a_method else LINES
    assert len(FILES[module].read_text("utf-8").splitlines()) <= limit


def test_init_holds_the_version_only() -> None:
    tree = ast.parse(FILES["__init__"].read_text("utf-8"))
    assert [type(node).__name__ for node in tree.body] == ["Expr", "Assign"]
