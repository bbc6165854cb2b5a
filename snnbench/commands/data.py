"""The commands below `snnbench data`: parse, call one method of the dataset, render."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from platformdirs import user_cache_dir

from snnbench.errors import DataError, ExitCode, SuiteError, UsageError

data_app = typer.Typer(
    help="Datasets: where they are, whether they are genuine, how they are split.",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="A dataset, as `snnbench data list` shows it.")]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="SNNBENCH_DATA", help="Folder of the datasets."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the dataset, as T=10."),
]
Json = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
AllowUnverified = Annotated[
    bool,
    typer.Option(
        help="Use a copy that is not the official bytes. Reading one can run code in it: allow "
        "only what you trust."
    ),
]
REDRAW_S = 0.1


@data_app.command("list")
def list_(data_root: DataRoot = None, as_json: Json = False) -> None:
    """List the datasets: what they hold, where they are, whom to cite."""
    from snnbench import console, registry

    root = data_root_of(data_root)
    rows = []
    for name, component in registry.components("datasets").items():
        dataset = component.load()()
        row: dict[str, Any] = {"name": name, "source": component.describe()["source"]}
        if dataset.info is not None:
            i = dataset.info
            row |= {
                "kind": i.kind,
                "classes": i.classes,
                "samples": list(i.sizes),
                "shape": i.shape,
                "licence": i.licence,
                "here": dataset.present(root),
                "home": str(root / i.home) if i.home else "embedded",
            }
        rows.append(row)
    if as_json:
        console.print_json({"data_root": str(root), "datasets": rows})
        return
    columns = ["name", "kind", "classes", "train + val + test", "shape", "here", "licence", "cite"]
    table = [
        [
            row["name"],
            row.get("kind", ""),
            str(row.get("classes", "")),
            _samples(row.get("samples", ())),
            row.get("shape", ""),
            _where(row),
            row.get("licence", ""),
            row["source"],
        ]
        for row in rows
    ]
    console.print_table(columns, table, right=["classes"], wrap=["licence", "cite"])
    console.say(f"the data root is {root}")
    words = _words(data_root)
    console.hint(f"snnbench data fetch NAME{words}, or snnbench data verify NAME{words}")


@data_app.command()
def fetch(name: Name, data_root: DataRoot = None) -> None:
    """Download a dataset: resumed where it broke off, checked, and unpacked."""
    from snnbench import console

    console.say(_dataset(name, ()).fetch(data_root_of(data_root)))
    console.hint(f"snnbench data verify {name}{_words(data_root)}")


@data_app.command()
def verify(name: Name, data_root: DataRoot = None, as_json: Json = False) -> None:
    """Say what a copy is: the official bytes, or what else. Exit code 4 where it is not."""
    from snnbench import console

    verdict = _dataset(name, ()).verify(data_root_of(data_root))
    if as_json:
        console.print_json(
            {"dataset": name, "verified": verdict.verified, "seen": list(verdict.lines)}
        )
    else:
        console.print_data("\n".join(verdict.lines))
    if not verdict.verified:
        raise typer.Exit(ExitCode.DATA)


@data_app.command()
def prepare(
    name: Name,
    set_: Set = None,
    data_root: DataRoot = None,
    allow_unverified_data: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Turn recordings into frames ahead of the first run, with the options of its [data] table."""
    from snnbench import console

    made = _dataset(name, set_ or ()).prepare(data_root_of(data_root), allow_unverified_data)
    if as_json:
        console.print_json({"dataset": name, **made})
    elif made:
        counts = ", ".join(f"{n:,} {split}" for split, n in made["samples"].items())
        console.say(f"{name}: {counts}, each {made['shape']}, in {made['folder']}")
    else:
        console.say(f"{name}: nothing to prepare; it is read straight from its files")
    words = _words(data_root, set_ or (), allow_unverified_data)
    console.hint(f"snnbench data split {name} --show{words}")


@data_app.command()
def split(
    name: Name,
    show: Annotated[
        bool, typer.Option("--show", help="Counts per class and the leak check too.")
    ] = False,
    set_: Set = None,
    data_root: DataRoot = None,
    allow_unverified_data: AllowUnverified = False,
    as_json: Json = False,
) -> None:
    """Print the hash of a dataset's split into train, validation and test."""
    from snnbench import console

    data = _dataset(name, set_ or ()).load(data_root_of(data_root), allow_unverified_data)
    seen = data.report() if show or as_json else {"split_hash": data.split_hash}
    if as_json:
        console.print_json({"dataset": name, **seen})
        return
    console.print_data(f"{name}: split {data.split_hash}")
    if not show:
        return
    console.print_data(f"{name}: samples and labels {data.data_hash}")
    counts = seen["per_class"]
    rows = [[str(k), *(str(counts[s][k]) for s in counts)] for k in range(data.classes)]
    rows.append(["all", *(str(seen["samples"][s]) for s in counts)])
    console.print_table(["class", *counts], rows, right=["class", *counts])
    for pair, shared in seen["shared_samples"].items():
        first, _, second = pair.partition("/")
        text = "none" if shared == 0 else f"{shared:,}"
        console.print_data(f"samples of {second} that stand in {first} too: {text}")


@data_app.command()
def clean(name: Name, data_root: DataRoot = None) -> None:
    """Delete everything prepared from a dataset; what was downloaded stays."""
    from snnbench import console

    gone = _dataset(name, ()).clean(data_root_of(data_root))
    for folder in gone:
        console.say(f"deleted: {folder}")
    if not gone:
        console.say(f"{name}: nothing was prepared")


def data_root_of(given: Path | None) -> Path:
    """The folder of the datasets: the one given, or one in the user's cache.

    Raises DataError if it is something else than a folder.
    """
    root = given if given is not None else Path(user_cache_dir("snnbench")) / "data"
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: is no folder; name one with --data-root or SNNBENCH_DATA")
    return root


def _dataset(name: str, settings: tuple[str, ...] | list[str]) -> Any:
    """The dataset with options laid over its defaults; raises SuiteError for a wrong one."""
    from snnbench import registry
    from snnbench.spec import validate

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {setting}: write key=value, as in --set T=10")
        values[key.strip().removeprefix("data.")] = _value(text.strip())
    cls = registry.find("datasets", name).load()
    errors: list[str] = []
    config = validate(cls.Config, values, errors, "data")
    if config is None:
        raise SuiteError("\n".join(errors))
    dataset = cls(config)
    dataset.progress = _progress()
    return dataset


def _value(text: str) -> Any:
    """A JSON value; bare words count as strings, since shells eat quotes."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    return text


def _progress() -> Callable[[str, int, int | None], None] | None:
    """A line on the terminal that is written over, at most ten times a second; None in a pipe."""
    if not sys.stderr.isatty():
        return None
    drawn = 0.0

    def draw(what: str, done: int, total: int | None) -> None:
        nonlocal drawn
        now = time.monotonic()
        last = done == total
        if now - drawn >= REDRAW_S or last:
            drawn = now
            share = "" if not total else f"{done / total:6.1%} of {total:,}"
            typer.echo(f"\r{what}: {share or f'{done:,}'}\033[K", err=True, nl=last)

    return draw


def _where(row: dict[str, Any]) -> str:
    if "here" not in row:
        return ""
    return "embedded" if row["home"] == "embedded" else ("yes" if row["here"] else "no")


def _samples(sizes: Sequence[int | None]) -> str:
    """Numbers of train, validation and test; those of a part that is cut here are not published."""
    if list(sizes[1:]) == [None, None]:
        return f"{sizes[0]:,} in all"
    return " + ".join("of train" if n is None else f"{n:,}" for n in sizes)


def _words(root: Path | None, settings: Sequence[str] = (), allow: bool = False) -> str:
    """The user's own options, to be said again in the next command."""
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--allow-unverified-data"] if allow else []
    words += [] if root is None else ["--data-root", str(root)]
    return "".join(f" {shlex.quote(word)}" for word in words)
