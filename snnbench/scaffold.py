"""Skeletons of plugins, filled in from the templates that come with the package."""

from __future__ import annotations

import keyword
from importlib.resources import files
from pathlib import Path
from string import Template

from snnbench import __version__
from snnbench.errors import UsageError
from snnbench.registry import components


def new_method(name: str, into: Path) -> Path:
    """Write the package `snnbench-NAME` below `into`; its folder. Raises UsageError."""
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        raise UsageError(f"'{name}' is no Python name; use letters, digits and '_'")
    if name in components("methods"):
        raise UsageError(f"a method '{name}' is installed already; choose another name")
    package = f"snnbench_{name}"
    folder = into / f"snnbench-{name.replace('_', '-')}"
    if folder.exists():
        raise UsageError(f"{folder} exists already")
    words = {
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "package": package,
        "version": __version__,
    }
    try:
        for template in sorted((files("snnbench") / "_templates" / "method").iterdir(), key=str):
            path = folder / template.name.removesuffix(".txt").replace("__package__", package)
            path = folder / package / "__init__.py" if path.stem == package else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(template.read_text("utf-8")).substitute(words), "utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder
