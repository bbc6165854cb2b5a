"""One run as data: its settings, their validation, its identity and its random seeds.

This is the only module that crosses from the suite to the worker: everything left of it knows
suites, everything right of it knows one run.  It is also the only door to pydantic.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

SCHEMA = 1
Config = TypeVar("Config")
Precision = Literal["fp32", "tf32", "bf16"]


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
    """What is measured beyond the usual; None costs nothing."""

    gradient_fidelity: Every | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The recipe that every method of a suite shares. Give `epochs` or `steps`, not both."""

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

    def __post_init__(self) -> None:
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
    precision: Precision = "fp32"
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as written to spec.json."""
        return asdict(self)

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
        return f"{slug[:80]}-{digest(canonical(self.to_json()))[:8]}"


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
        text = json.dumps(values, default=str)
        return _adapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        for e in error.errors():
            errors.append(_explain(cls, e["type"], e["msg"], e["loc"], e.get("input"), path))
        return None


def _adapter(cls: type[Config]) -> TypeAdapter[Config]:
    for part in _dataclasses(cls):
        part.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)
    return TypeAdapter(cls)


def _dataclasses(cls: Any) -> list[Any]:
    """The dataclass itself and those in its annotations; types are resolved by pydantic later."""
    import typing

    found, todo = [], [cls]
    while todo:
        item = todo.pop()
        if is_dataclass(item) and item not in found:
            found.append(item)
            todo += typing.get_type_hints(item).values()
        todo += [a for a in typing.get_args(item) if a is not item]
    return found


def _explain(cls: Any, kind: str, msg: str, loc: Sequence[int | str], value: Any, path: str) -> str:
    where = path + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    where = where.lstrip(".") or "the file"
    if kind == "unexpected_keyword_argument":
        known = {f.name for c in _dataclasses(cls) for f in fields(c)}
        return f"{where}: unknown key{did_you_mean(str(loc[-1]), known)}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: missing"
    if kind == "value_error":
        return f"{where}: {msg.removeprefix('Value error, ')}"
    return f"{where} = {json.dumps(value, default=str)}: {msg[0].lower()}{msg[1:]}"
