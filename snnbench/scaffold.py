"""Skeletons of plugins and suites, filled in from the templates that come with the package."""

from __future__ import annotations

import json
import keyword
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from snnbench import __version__
from snnbench.errors import UsageError
from snnbench.registry import components
from snnbench.spec import did_you_mean
from snnbench.stats import fewest_seeds
from snnbench.suite import SUITE_NAME, load


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


@dataclass(frozen=True)
class Questions:
    """What a new suite is about; the defaults run in a minute on a laptop."""

    name: str = "mine"
    claim: str = "One sentence that this suite tests."
    dataset: str = "digits"
    model: str = "convnet"
    methods: str = "bptt,tet"
    T: str = "4"
    seeds: int = 6
    epochs: int = 5


def new_suite(answers: Questions, path: Path) -> Path:
    """Write a commented suite that is valid as it is; raises UsageError with a clear line."""
    names = {
        "datasets": _names(answers.dataset),
        "models": _names(answers.model),
        "methods": _names(answers.methods),
    }
    for kind, wanted in names.items():
        known = components(kind)
        parts = [p for name in wanted for p in (name.split("+") if kind == "methods" else [name])]
        for name in parts:
            if name not in known:
                raise UsageError(f"unknown {kind[:-1]} '{name}'{did_you_mean(name, known)}")
        if not wanted:
            raise UsageError(f"name at least one {kind[:-1]}")
    if not SUITE_NAME.fullmatch(answers.name):
        raise UsageError(f"'{answers.name}': use letters, digits, '.', '_' and '-', at most 64")
    steps = _names(answers.T)
    if not steps or not all(T.isascii() and T.isdigit() and int(T) > 0 for T in steps):
        raise UsageError(f"T = {answers.T}: timesteps are integers from 1, as 2,4,8")
    if answers.seeds < 1 or answers.epochs < 1:
        raise UsageError("seeds and epochs are integers from 1")
    if path.exists():
        raise UsageError(f"{path} exists already; name another file with --output")
    rivals = max(1, len(names["methods"]) - 1)  # Holm corrects over them
    template = files("snnbench") / "_templates" / "suite.toml.txt"
    text = Template(template.read_text("utf-8")).substitute(
        title=" ".join(answers.claim.split()),
        file=path,
        name=answers.name,
        name_toml=json.dumps(answers.name),
        claim=json.dumps(" ".join(answers.claim.split()), ensure_ascii=False),
        datasets=json.dumps(names["datasets"]),
        models=json.dumps(names["models"]),
        T=f"[{', '.join(str(int(T)) for T in steps)}]",
        seeds=json.dumps(list(range(answers.seeds))),
        fewest=fewest_seeds(rivals),
        rivals=f"{rivals} method{'s' * (rivals > 1)} beside the baseline",
        epochs=answers.epochs,
        methods="".join(f"\n[[method]]\nname = {json.dumps(m)}\n" for m in names["methods"]),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    load(str(path))
    return path


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
