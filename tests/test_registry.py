"""Names, descriptions and plugins, without importing what is behind them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from snnbench import __version__, registry
from snnbench.errors import UsageError, WorkerError

BUILT_IN = [(kind, name) for kind, names in registry.BUILT_IN.items() for name in names]


@dataclass(frozen=True)
class Dist:
    name: str
    version: str


@dataclass(frozen=True)
class Point:
    """What importlib.metadata gives for an entry point, as far as it is used."""

    group: str
    name: str
    value: str
    dist: Dist | None = Dist("guest", "2.1")


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Install entry points, and write the modules behind them: `install(*points, file=text)`."""

    def do(*points: Point, **modules: str) -> None:
        for name, text in modules.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(textwrap.dedent(text), "utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [p for p in points if p.group == group]
        )
        registry.components.cache_clear()
        registry._read_docs.cache_clear()

    before = set(sys.modules)
    yield do
    registry.components.cache_clear()
    registry._read_docs.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("guest"):
            del sys.modules[name]


GUEST = '''
"""A guest's file."""

class Base:
    source = "Guest 2030"

class Method(Base):
    """A guest's method.

    More of it.
    """
'''


# --- built-in ---------------------------------------------------------------------------------


def test_listing_imports_nothing_heavy() -> None:
    code = """
        import sys
        from snnbench import registry
        for kind in registry.BUILT_IN:
            assert registry.components(kind)
            for component in registry.components(kind).values():
                assert component.describe()["summary"]
        heavy = {"torch", "torchvision", "numpy", "pandas", "scipy", "sklearn", "tonic"}
        print(heavy & set(sys.modules))
    """
    code = textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_description_is_that_of_the_loaded_code(kind: str, name: str) -> None:
    component = registry.find(kind, name)
    loaded, found = component.load(), component.describe()
    assert found["summary"]
    assert found["summary"] == loaded.__doc__.strip().partition("\n")[0]
    assert found["source"]
    assert found["source"] == loaded.source
    assert (found["name"], found["distribution"]) == (name, "snnbench")
    assert found["version"] == __version__


def test_every_method_is_in_the_table() -> None:
    files = {f.stem for f in (Path(registry.__file__).parent / "methods").glob("[!_]*.py")}
    assert files - {"base", "contract", "compose"} == set(registry.BUILT_IN["methods"])


@pytest.mark.parametrize("kind", registry.BUILT_IN)
def test_unknown_name(kind: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {kind[:-1]} 'zzzz'; it can be: "):
        registry.find(kind, "zzzz")


def test_unknown_name_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="unknown method 'gradscale'; did you mean 'grad_scale'"):
        registry.find("methods", "gradscale")


def test_source_hash_is_stable_and_covers_the_numeric_rooms() -> None:
    first = registry.source_hash()
    registry.source_hash.cache_clear()
    assert registry.source_hash() == first
    assert len(first) == 16
    package = Path(registry.__file__).parent
    assert all((package / r).is_dir() or (package / f"{r}.py").is_file() for r in registry.NUMERIC)


# --- plugins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["methods", "models", "datasets"])
def test_plugin_is_found_described_and_loaded(install: Install, kind: str) -> None:
    install(Point(f"snnbench.{kind}", "guest", "guest_a:Method"), guest_a=GUEST)
    assert set(registry.components(kind)) == {*registry.BUILT_IN[kind], "guest"}
    component = registry.find(kind, "guest")
    assert component.describe() == {
        "name": "guest",
        "summary": "A guest's method.",
        "source": "Guest 2030",
        "distribution": "guest",
        "version": "2.1",
    }
    assert "guest_a" not in sys.modules
    assert component.load().__name__ == "Method"


def test_plugin_of_one_kind_is_none_of_another(install: Install) -> None:
    install(Point("snnbench.methods", "guest", "guest_a:Method"), guest_a=GUEST)
    assert "guest" not in registry.components("models")


def test_real_entry_points_have_what_is_read_here(install: Install) -> None:
    install(EntryPoint("guest", "guest_a:Method", "snnbench.methods"), guest_a=GUEST)  # type: ignore[arg-type]
    assert registry.find("methods", "guest").distribution == "an unknown distribution"


def test_package_of_a_plugin_is_not_run_to_describe_it(install: Install) -> None:
    point = Point("snnbench.methods", "guest", "guest_pkg.m:Method")
    install(point, **{"guest_pkg/__init__": "raise RuntimeError", "guest_pkg/m": GUEST})
    assert registry.find("methods", "guest").describe()["summary"] == "A guest's method."
    assert "guest_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (
            [Point("snnbench.methods", "tet", "guest_a:Method")],
            f"'tet' is offered by both snnbench {__version__} and guest 2.1",
        ),
        (
            [
                Point("snnbench.methods", "new", "guest_a:Method"),
                Point("snnbench.methods", "new", "guest_b:Method", Dist("other", "0.3")),
            ],
            "'new' is offered by both guest 2.1 and other 0.3",
        ),
    ],
)
def test_name_twice_names_both_distributions(
    install: Install, points: list[Point], words: str
) -> None:
    install(*points)
    with pytest.raises(UsageError) as caught:
        registry.components("methods")
    assert words in str(caught.value)


BROKEN: dict[str, Any] = {
    "syntax": ("guest_a:Method", {"guest_a": "def ("}),
    "import": ("guest_a:Method", {"guest_a": "import no_such_module_anywhere"}),
    "crash": ("guest_a:Method", {"guest_a": "1 / 0"}),
    "missing class": ("guest_a:Nope", {"guest_a": GUEST}),
    "missing module": ("guest_nope:Method", {}),
    "missing package": ("guest_nope.m:Method", {}),
    "empty": ("", {}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_is_named(install: Install, case: str) -> None:
    target, modules = BROKEN[case]
    install(Point("snnbench.methods", "guest", target), **modules)
    component = registry.find("methods", "guest")
    with pytest.raises(WorkerError) as caught:
        component.load()
    assert str(caught.value).startswith("method 'guest' of guest 2.1 cannot be loaded from ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_can_be_listed(install: Install, case: str) -> None:
    target, modules = BROKEN[case]
    install(Point("snnbench.methods", "guest", target), **modules)
    found = [c.describe() for c in registry.components("methods").values()]
    assert found[-1]["name"] == "guest"
    assert len(found) == len(registry.BUILT_IN["methods"]) + 1
