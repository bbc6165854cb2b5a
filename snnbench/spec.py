"""One run as data: its settings, their validation, its identity and its random seeds.

This is the only module that crosses from the suite to the worker: everything left of it knows
suites, everything right of it knows one run.  It is also the only door to pydantic.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

SCHEMA = 1
FIXED = (str, int, float, type(None))  # plain values: they need no copy
Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Memory = Literal["speed", "balanced", "smallest"]
Kind = Literal["train", "cost", "capacity"]


@dataclass(frozen=True)
class Inherit:
    """Time inheritance training: first `epochs` epochs at a smaller T, then the recipe at T.

    The second phase starts from the first one's weights, with a new optimizer and schedule.
    """

    T: Annotated[int, Ge(1)]
    epochs: Annotated[int, Ge(1)]
    lr: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True)
class Every:
    """Measure at the start, then after every so many epochs."""

    every: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured beyond the usual; None costs nothing.

    `target` is the test accuracy (0-1) whose time, energy, epochs and spikes are looked for.
    """

    gradient_fidelity: Every | None = None
    target: Annotated[float, Gt(0), Le(1)] | None = None


@dataclass(frozen=True)
class Capacity:
    """The memory that a training step shall fit into, and how far the search goes."""

    memory_gib: Annotated[float, Gt(0)] = 1.0
    most_T: Annotated[int, Ge(1)] = 1024
    most_batch: Annotated[int, Ge(1)] = 65536


@dataclass(frozen=True)
class TrainConfig:
    """The recipe that every method of a suite shares. Give `epochs` or `steps`, not both.

    `batch_size` is that of one update: it is shared out over `devices`, and taken in
    `batch_split` parts whose gradients are averaged (each part has its own BatchNorm statistics).
    `deterministic` makes CUDA kernels bit-reproducible, and slower; `graph` replays forward and
    backward of a step as one CUDA graph.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0)] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 0.0
    batch_size: Annotated[int, Ge(1)] = 128
    eval_batch_size: Annotated[int, Ge(1)] = 256
    epochs: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    step_epochs: Annotated[float, Gt(0)] = 100.0
    step_gamma: Annotated[float, Gt(0), Le(1)] = 0.1
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    clip_norm: Annotated[float, Gt(0)] | None = None
    eval_every: Annotated[int, Ge(1)] = 1
    timeout_s: Annotated[float, Gt(0)] | None = None
    inherit: Inherit | None = None
    devices: Annotated[int, Ge(1)] = 1
    batch_split: Annotated[int, Ge(1)] = 1
    deterministic: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "batch_split"):
            if self.graph and getattr(self, name) > 1:
                raise ValueError(f"graph = true holds one whole step: leave {name} at 1")
            if self.batch_size % getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)}: batch_size = {self.batch_size} cannot be "
                    "divided by it"
                )
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either 'epochs' or 'steps'")
        if self.inherit is not None and self.epochs is None:
            raise ValueError("'inherit' counts in 'epochs', not in 'steps'")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides the result of one run, with every default written out."""

    dataset: str
    data: dict[str, Any]
    model: str
    model_options: dict[str, Any]
    method: str
    method_config: dict[str, Any]
    neuron: dict[str, Any]
    T: int
    seed: int
    train: TrainConfig
    kernel: str = "auto"
    precision: Precision = "auto"
    memory: Memory = "speed"
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    kind: Kind = "train"
    capacity: Capacity | None = None  # of that kind only
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as written to spec.json."""
        copied: dict[str, Any] = _copied(self)
        return copied

    @classmethod
    def from_json(cls, values: Any) -> RunSpec:
        """Read spec.json back; raises ValueError for another schema or for garbage."""
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise ValueError(f"not a run spec of schema {SCHEMA}")
        errors: list[str] = []
        spec = validate(cls, values, errors)
        if spec is None:
            raise ValueError("; ".join(errors))
        return spec

    @property
    def run_id(self) -> str:
        """Readable slug and a hash of the canonical JSON: the same on any machine."""
        name = f"{self.dataset}-{self.model}-{self.method}-T{self.T}-s{self.seed}"
        slug = "".join(ch if ch.isascii() and (ch.isalnum() or ch in "._+") else "-" for ch in name)
        return f"{slug[:80]}-{digest(canonical(self.essence()))[:8]}"

    def essence(self) -> dict[str, Any]:
        """What makes it this run and no other, as plain data.

        A time limit changes no result; neither does a setting that was added after the first
        release, as long as it has its default.
        """
        values = self.to_json()
        del values["train"]["timeout_s"]
        for (*tables, key), default in ADDED.items():
            table = values
            for name in tables:
                table = table[name]
            if table[key] == default:
                del table[key]
        return values


# Settings that an older version did not know, by their path, and what it did.
ADDED: dict[tuple[str, ...], Any] = {
    ("kind",): "train",
    ("capacity",): None,
    ("measure", "target"): None,
    ("train", "devices"): 1,
    ("train", "batch_split"): 1,
    ("train", "deterministic"): False,
    ("train", "graph"): False,
}


def _copied(value: Any) -> Any:
    """Plain data of dataclasses; `asdict` copies even what cannot change, and takes much longer."""
    if isinstance(value, FIXED):
        return value
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    table = value if isinstance(value, dict) else vars(value)
    return {k: v if isinstance(v, FIXED) else _copied(v) for k, v in table.items()}


def canonical(values: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, as hex."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()


def sub_seed(seed: int, purpose: str) -> int:
    """Seed for one purpose. It never sees a method's name, so methods share their randomness."""
    return int(digest(f"{seed}:{purpose}")[:15], 16)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the options where none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; it can be: {', '.join(options)}" if options else ""


def validate(cls: type[Config], values: Any, errors: list[str], path: str = "") -> Config | None:
    """Build the dataclass from plain data; on failure append one line an error and give None.

    Types are not coerced, unknown keys are refused, and each line names the key path and value.
    """
    try:
        wanted: Any = cls
        found: Config = _adapter(wanted).validate_json(json.dumps(values, default=str), strict=True)
        return found
    except ValidationError as error:
        mistakes = _one_per_mistake([dict(e) for e in error.errors()])
        errors += [_explain(cls, e, path) for e in mistakes]
        return None


def plain_data_errors(values: Any, path: str = "") -> list[str]:
    """One line for each value that has no place in a record: dates, and numbers without end."""
    if isinstance(values, dict):
        parts = [(f"{path}.{k}".lstrip("."), v) for k, v in values.items()]
    elif isinstance(values, list):
        parts = [(f"{path}[{i}]", v) for i, v in enumerate(values)]
    elif isinstance(values, float) and not math.isfinite(values):
        return [f"{path} = {values}: must be a finite number"]
    elif values is not None and not isinstance(values, bool | int | float | str):
        return [f"{path} = {values}: must be a number, a string, true or false"]
    else:
        return []
    return [line for where, value in parts for line in plain_data_errors(value, where)]


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    for part in _dataclasses(cls):
        part.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(cls)


def _dataclasses(*types: Any) -> list[Any]:
    """The dataclasses in these types and, through their fields, in those."""
    found: list[Any] = []
    todo = list(types)
    while todo:
        item = todo.pop()
        if is_dataclass(item) and item not in found:
            found.append(item)
            todo += get_type_hints(item).values()
        todo += get_args(item)
    return found


def _one_per_mistake(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what only follows from another error.

    A bad item also makes its list too short. A union of dataclasses told apart by `name` complains
    once for each member: keep the member that was named, or one line that lists the names.
    """
    locs = [e["loc"] for e in errors]
    kept = []
    for e in errors:
        inner = any(len(loc) > len(e["loc"]) and loc[: len(e["loc"])] == e["loc"] for loc in locs)
        if not inner:
            kept.append(e)
    members: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    plain = []
    for e in kept:
        place = next((i for i, p in enumerate(e["loc"]) if str(p)[:1].isupper()), None)
        place = None if place is not None and str(e["loc"][place]) == "T" else place
        if place is None:
            plain.append(e)
            continue
        member = members.setdefault(e["loc"][:place], {}).setdefault(e["loc"][place], [])
        member.append({**e, "loc": e["loc"][:place] + e["loc"][place + 1 :]})
    for found in members.values():
        named = [m for m in found.values() if all(e["type"] != "literal_error" for e in m)]
        if named:
            plain += named[0]
        else:
            first = next(iter(found.values()))[0]
            names = sorted({e["ctx"]["expected"] for m in found.values() for e in m if "ctx" in e})
            plain.append({**first, "msg": f"it can be: {', '.join(names)}"})
    return plain


def _explain(cls: Any, error: dict[str, Any], path: str) -> str:
    kind, msg, loc, value = error["type"], error["msg"], error["loc"], error.get("input")
    where = path + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    where = where.lstrip(".")
    if kind == "unexpected_keyword_argument":
        return f"{where}: unknown key{did_you_mean(str(loc[-1]), _keys_at(cls, loc[:-1]))}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: missing"
    if kind == "value_error":
        msg = msg.removeprefix("Value error, ")
        return f"{where}: {msg}" if where else msg
    return f"{where} = {json.dumps(value, default=str)}: {msg[0].lower()}{msg[1:]}"


def _keys_at(cls: Any, loc: Sequence[int | str]) -> set[str]:
    """Names of the fields that may stand at this place of the data."""
    types = [cls]
    for part in loc:
        hints = {k: v for c in types if is_dataclass(c) for k, v in get_type_hints(c).items()}
        types = _outer_dataclasses(hints[part]) if part in hints else types
    return {f.name for c in types if is_dataclass(c) for f in fields(c)}


def _outer_dataclasses(hint: Any) -> list[Any]:
    """Dataclasses that a value of this type, or its items, can be."""
    if is_dataclass(hint):
        return [hint]
    return [c for arg in get_args(hint) for c in _outer_dataclasses(arg)]
