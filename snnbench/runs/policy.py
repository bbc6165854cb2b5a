"""How runs are executed: the tables [run] and [slurm] of a suite; they change no figure, no id."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt

# These words are written into a script: no spaces, quotes or line ends.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:|&+*@=/\[\]()-]{0,199}")
MEMORY = re.compile(r"\d+[KMGT]?")
MAX_ARRAY = 1000  # Slurm's own limit, unless its administrator raised it


@dataclass(frozen=True)
class OomRetry:
    """What to try when memory does not suffice; nothing by default.

    `batch_split` doubles the number of parts that a batch is taken in, until a part is one sample.
    """

    batch_split: bool = False


@dataclass(frozen=True)
class RunPolicy:
    """The table [run]: where runs are executed, and what happens when one fails.

    `jobs` is how many run at a time (None: one a GPU, or one on a CPU). `retries` is how often a
    run whose process was killed from outside is taken up again. `heartbeat_s` is the longest time
    without a step before a process counts as hung. `lease_s` is how long another machine waits
    for a sign of life before it takes a run over. `checkpoint_s` is the time between checkpoints
    within an epoch.
    """

    executor: Literal["local", "slurm"] = "local"
    jobs: Annotated[int, Ge(1)] | None = None
    retries: Annotated[int, Ge(0)] = 2
    heartbeat_s: Annotated[float, Gt(0)] = 1800.0
    stop_after_same_failures: Annotated[int, Ge(0)] = 3
    oom_retry: OomRetry = field(default_factory=OomRetry)
    lease_s: Annotated[float, Ge(1)] = 60.0
    checkpoint_s: Annotated[float, Ge(0)] = 60.0


@dataclass(frozen=True)
class SlurmOptions:
    """The table [slurm]: what each job asks the cluster for.

    `time` is in minutes, `memory` as 16G, `at_once` the most jobs of an array at a time, and
    `signal_s` how many seconds before the end of its time a run is told to save itself.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: Annotated[int, Ge(0)] = 0
    cpus: Annotated[int, Ge(1)] | None = None
    memory: str | None = None
    time: Annotated[int, Ge(1)] = 60
    at_once: Annotated[int, Ge(1)] = 256
    array: Annotated[int, Ge(1)] = MAX_ARRAY
    signal_s: Annotated[int, Ge(5)] = 90
    requeues: Annotated[int, Ge(0)] = 100

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            pattern = MEMORY if name == "memory" else WORD
            if isinstance(value, str) and not pattern.fullmatch(value):
                raise ValueError(f"{name} = {value!r}: not a word that Slurm could know")
