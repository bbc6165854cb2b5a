"""A suite: TOML text -> `Suite` -> list of `RunSpec`.

What a key *means* to a method, model or dataset is known to that component alone; this module
checks the shape of the file, and `expand` takes the components' validated options as given.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Len

from snnbench.entries import method_errors, unknown_names
from snnbench.errors import SuiteError, UsageError
from snnbench.runs.policy import RunPolicy, SlurmOptions
from snnbench.spec import (
    Capacity,
    Kind,
    MeasureConfig,
    Memory,
    Precision,
    RunSpec,
    TrainConfig,
    did_you_mean,
    plain_data_errors,
    validate,
)

Names = Annotated[tuple[str, ...], Len(1)]
KEYS = ("dataset", "model", "T", "seed", "kernel", "precision", "memory", "method")
SUITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Axes:
    """Every combination of these values is run with every method."""

    dataset: Names
    model: Names
    T: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1)]
    seed: Annotated[tuple[Annotated[int, Ge(0)], ...], Len(1)]
    kernel: Names = ("auto",)
    precision: Annotated[tuple[Precision, ...], Len(1)] = ("auto",)
    memory: Annotated[tuple[Memory, ...], Len(1)] = ("speed",)


@dataclass(frozen=True)
class Capacities:
    """The memories that a suite of kind "capacity" asks about, and how far it searches."""

    memory_gib: Annotated[tuple[Annotated[float, Gt(0)], ...], Len(1)] = (1.0,)
    most_T: Annotated[int, Ge(1)] = 1024
    most_batch: Annotated[int, Ge(1)] = 65536

    def each(self) -> list[Capacity]:
        """One search per memory."""
        return [Capacity(gib, self.most_T, self.most_batch) for gib in self.memory_gib]


@dataclass(frozen=True)
class Suite:
    """The content of a suite file."""

    schema: Annotated[int, Ge(1), Le(1)]
    name: str
    claim: str
    axes: Axes
    train: TrainConfig
    method: Annotated[tuple[dict[str, Any], ...], Len(1)]
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    neuron: dict[str, Any] | str = field(default_factory=dict)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    kind: Kind = "train"
    capacity: Capacities | None = None
    exclude: tuple[dict[str, Any], ...] = ()
    run: RunPolicy = field(default_factory=RunPolicy)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    def __post_init__(self) -> None:
        if not SUITE_NAME.fullmatch(self.name):
            raise ValueError("name: use letters, digits, '.', '_' and '-', at most 64 of them")
        if (self.kind == "capacity") != (self.capacity is not None):
            raise ValueError("a [capacity] table belongs to kind = 'capacity', and to no other")
        if self.kind == "cost" and self.train.steps is None:
            raise ValueError("kind = 'cost' times train.steps = N steps; give no epochs")
        for axis, values in asdict(self.axes).items():
            if len(set(values)) < len(values):
                raise ValueError(f"axes.{axis}: the same run stands in it twice")

    def to_json(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """The options of a suite's components, validated by them, with every default written out."""

    data: Mapping[str, dict[str, Any]]
    model: Mapping[str, dict[str, Any]]
    neuron: dict[str, Any]
    methods: Sequence[dict[str, Any]]


def shipped_folder() -> Path:
    """Where the suites are that come with snnbench."""
    installed = Path(str(files("snnbench"))) / "_suites"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "suites"


def shipped() -> dict[str, Path]:
    """Suites that come with snnbench, by name."""
    folder = shipped_folder()
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*.toml"))
        if path.name != "claims.toml"
    }


def claim_of(path: Path) -> str:
    """The claim of a suite file, for lists."""
    return str(read(path).get("claim", ""))


def locate(name: str) -> Path:
    """The file of a suite given by path or by the name of a shipped one."""
    path = Path(name)
    with contextlib.suppress(OSError):  # a name too long for a file
        if path.is_file():
            return path
    if name in shipped():
        return shipped()[name]
    if path.suffix == ".toml":
        raise UsageError(f"{name}: no such file; `snnbench list suites` shows those shipped")
    raise UsageError(f"unknown suite '{name}'{did_you_mean(name, shipped())}")


def name_of(given: str) -> str:
    """The name under which the results of a suite lie, which its file may have another one than."""
    with contextlib.suppress(SuiteError, UsageError):
        if isinstance(found := read(locate(given)).get("name"), str):
            return found
    return Path(given).stem if given.endswith(".toml") else given


def load(name: str, settings: Iterable[str] = ()) -> Suite:
    """Read a suite with `key=value` settings over it; raises SuiteError, one line per mistake."""
    path = locate(name)
    document = read(path)
    for setting in settings:
        _set(document, setting)
    errors = [_with_method_names(document, line) for line in plain_data_errors(document)]
    suite = None if errors else validate(Suite, document, errors)
    if suite is not None:
        errors += method_errors(suite) or [*unknown_names(suite), *_rule_errors(suite)]
    fail(path, errors)
    assert suite is not None
    return suite


def _with_method_names(document: Mapping[str, Any], line: str) -> str:
    """`method[1].lamb` as `method[1] (tet).lamb`."""
    found = re.match(r"method\[(\d+)\]", line)
    if found is None:
        return line
    return f"{found[0]} ({document['method'][int(found[1])].get('name')}){line[found.end() :]}"


def fail(path: Path | str, errors: Sequence[str]) -> None:
    """Raise SuiteError if there are errors, each on a line of its own that names the file."""
    if errors:
        raise SuiteError("\n".join(f"{path}: {e}" for e in errors))


def method_variants(suite: Suite) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method with one value per hyper-parameter, and its key path in the file."""
    for i, entry in enumerate(suite.method):
        options = {
            k: v if isinstance(v, list) else [v] for k, v in entry.items() if k not in ("name", "T")
        }
        for values in itertools.product(*options.values()):
            variant = {"name": entry["name"], **dict(zip(options, values, strict=True))}
            yield f"method[{i}] ({entry['name']})", variant


def _timesteps(suite: Suite) -> Iterator[Sequence[int]]:
    """Timesteps of every method variant: those of the axis, or the method's own `T`."""
    entries = {f"method[{i}] ({e['name']})": e.get("T") for i, e in enumerate(suite.method)}
    for path, _ in method_variants(suite):
        own = entries[path]
        yield suite.axes.T if own is None else own if isinstance(own, list) else [own]


def expand(suite: Suite, options: Options) -> list[RunSpec]:
    """All runs of the suite. Seeds turn slowest and methods fastest, so that an unfinished suite
    holds comparable cells, and slow drift of the machine hits all methods alike.
    """
    a = suite.axes
    methods = list(zip(_timesteps(suite), options.methods, strict=True))
    rooms = [None] if suite.capacity is None else suite.capacity.each()
    steps = dict.fromkeys([*a.T, *itertools.chain.from_iterable(own for own, _ in methods)])
    specs = [
        RunSpec(
            dataset=dataset,
            data=options.data[dataset],
            model=model,
            model_options=options.model[model],
            method=method["name"],
            method_config={k: v for k, v in method.items() if k != "name"},
            neuron=options.neuron,
            T=T,
            seed=seed,
            train=suite.train,
            kernel=kernel,
            precision=precision,
            memory=memory,
            measure=suite.measure,
            kind=suite.kind,
            capacity=room,
        )
        for seed, dataset, model, T, kernel, precision, memory, room, (own, method) in (
            itertools.product(
                a.seed, a.dataset, a.model, steps, a.kernel, a.precision, a.memory, rooms, methods
            )
        )
        if T in own
    ]
    specs = [s for s in specs if not any(matches(s, rule) for rule in suite.exclude)]
    if not specs:
        raise SuiteError(f"suite '{suite.name}': 'exclude' leaves no run")
    early = suite.train.inherit
    if early is not None and (late := [s.T for s in specs if s.T <= early.T]):
        raise SuiteError(
            f"suite '{suite.name}': train.inherit.T = {early.T} must be below every T of the "
            f"suite; it has T = {min(late)}"
        )
    if len({s.run_id for s in specs}) < len(specs):
        raise SuiteError(
            f"suite '{suite.name}': the same run stands in it twice; look for a "
            "repeated value in [axes] or a repeated [[method]]"
        )
    return specs


def matches(spec: RunSpec, rule: Mapping[str, Any]) -> bool:
    """Whether a run has all the values of a rule; a list means any of its values."""
    return all(
        getattr(spec, key) in (value if isinstance(value, list) else [value])
        for key, value in rule.items()
    )


def parse_only(rules: Iterable[str]) -> dict[str, list[Any]]:
    """`method=tet,T=4` -> {"method": ["tet"], "T": [4]}; a repeated key means any of its values."""
    wanted: dict[str, list[Any]] = {}
    for rule in itertools.chain.from_iterable(r.split(",") for r in rules):
        key, equals, value = (part.strip() for part in rule.partition("="))
        if not equals or key not in KEYS:
            raise UsageError(f"--only {rule}: write key=value; the keys are {', '.join(KEYS)}")
        wanted.setdefault(key, []).append(_value(value))
    return wanted


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The document, laid over the one it extends."""
    if path.resolve() in seen:
        raise SuiteError(f"{path}: 'extends' goes round in a circle")
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}") from error
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise SuiteError(f"{path}: extends = {parent!r}: name one suite or file")
    if "name" not in document:
        raise SuiteError(
            f"{path}: name: missing; without its own, results would mix with the "
            f"results of '{parent}'"
        )
    beside = path.parent / parent
    try:
        base = beside if beside.is_file() else locate(parent)
    except UsageError as error:
        raise SuiteError(f"{path}: extends: {error}") from error
    return _merge(read(base, (*seen, path.resolve())), document)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are laid over each other key by key, everything else is replaced."""
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            base[key] = _merge(old, value)
        else:
            base[key] = value
    # One budget replaces the other.
    for this, other in (("epochs", "steps"), ("steps", "epochs")):
        if this in over and other not in over:
            base.pop(other, None)
    return base


def _set(document: dict[str, Any], setting: str) -> None:
    """Apply one `key.path=value`; `method.NAME.key` addresses a method by its name."""
    key, equals, text = setting.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UsageError(f"--set {setting}: write key=value, as in --set train.epochs=5")
    target: Any = document
    if path[0] == "method" and len(path) == 3:
        listed = document.get("method")
        entries = [m for m in (listed if isinstance(listed, list) else []) if isinstance(m, dict)]
        named = [m for m in entries if m.get("name") == path[1]]
        if not named:
            names = (str(m.get("name")) for m in entries)
            raise UsageError(f"--set {setting}: no such method{did_you_mean(path[1], names)}")
        for entry in named:
            entry[path[2]] = _value(text)
        return
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UsageError(f"--set {setting}: '{part}' is no table")
    _merge(target, {path[-1]: _value(text)})


def _value(text: str) -> Any:
    """A TOML value; bare words count as strings, since shells eat quotes."""
    text = text.strip()
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        pass
    if text.startswith("[") and text.endswith("]"):
        return [_value(part) for part in text[1:-1].split(",") if part.strip()]
    return text


def _rule_errors(suite: Suite) -> list[str]:
    """Rules of [[exclude]] that cannot fit any run."""
    possible: dict[str, set[Any]] = {k: set(v) for k, v in asdict(suite.axes).items()}
    possible["method"] = {entry["name"] for entry in suite.method}
    possible["T"] |= set(itertools.chain.from_iterable(_timesteps(suite)))
    errors = []
    for i, rule in enumerate(suite.exclude):
        for key, value in rule.items():
            if key not in KEYS:
                errors.append(f"exclude[{i}].{key}: unknown key{did_you_mean(key, KEYS)}")
                continue
            for one in value if isinstance(value, list) else [value]:
                if one not in possible[key]:
                    options = (str(v) for v in possible[key])
                    errors.append(
                        f"exclude[{i}].{key} = {json.dumps(one)}: no run has it"
                        f"{did_you_mean(str(one), options)}"
                    )
    return errors
