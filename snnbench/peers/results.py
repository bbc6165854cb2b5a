"""What was found about the contestants, and what follows from it: ratios, rivals, goals.

A ratio of two contestants is the median of their step times' ratios in each round, with quartiles.
Every claim is made against the strongest configuration of a rival in the same run; its default
configuration is the second number.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FOREIGN = 0.08  # share of the CPU that other processes may use during a slice
HALF = {"bf16", "fp16"}
LEVELS = {"balanced", "smallest"}
NOT_PLAIN = {*HALF, *LEVELS, "tf32"}
ON_BEST = {"resnet18": ("G3", 1.4, 2.5), "vgg11": ("G5", 1.8, 3.0)}
# A neuron moves at least x, s | g, x, gx; with BatchNorm x (statistics); x, s | g, x; g, x, gx.
OF_A_LAYER = {"lif": ("G1", 5, 0.75, 1.8), "bn-lif": ("G2", 8, 0.7, 2.0)}
RATE_AT_MOST = {4: 0.6, 8: 0.5}  # by T
DEFAULTS = {"spikingjelly": "spikingjelly:multi", "snntorch": "snntorch:step",
            "norse": "norse:step", "published": "published:rate"}  # fmt: skip


class Ratio(NamedTuple):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


@dataclass
class Row:
    """One contestant: done, or absent or failed with the reason; None is not measured."""

    name: str
    status: str = "done"
    reason: str = ""
    version: str = ""
    warmup_s: float | None = None
    cold_warmup_s: float | None = None  # with no kernel in the cache
    parity: dict[str, Any] | None = None
    guess_ms: float = 0.0  # of a step, before the rounds
    round_ms: list[float] = field(default_factory=list)  # median step of each round
    foreign: list[float] = field(default_factory=list)  # others' share of the CPU in each round
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    saved_per_neuron_step: float | None = None
    aten_ops: int | None = None
    kernel_path: str = ""

    def take(self, found: dict[str, Any]) -> None:
        """Fill in figures by their names."""
        for key, value in found.items():
            assert hasattr(self, key), key
            setattr(self, key, value)

    @property
    def timed(self) -> bool:
        """Whether it went through the rounds."""
        return self.status == "done" and bool(self.round_ms)

    @property
    def who(self) -> list[str]:
        """Family, kind and, where it stands in the name, method."""
        return self.name.partition("+")[0].split(":")

    @property
    def settings(self) -> set[str]:
        """What follows the plus signs."""
        return set(self.name.split("+")[1:])

    @property
    def plain(self) -> bool:
        """In fp32, and with no level of memory but speed."""
        return not self.settings & NOT_PLAIN

    @property
    def half(self) -> bool:
        """In half precision, where it can be had."""
        return bool(self.settings & HALF)

    @property
    def disturbed(self) -> int:
        """Rounds in which others used too much of the CPU."""
        return sum(share > FOREIGN for share in self.foreign)

    @property
    def differing(self) -> float | None:
        """Share of the spikes that differ from our reference."""
        return None if self.parity is None else self.parity["differing"] / self.parity["spikes"]


@dataclass
class Result:
    """One network and all contestants on it."""

    net: str
    B: int
    T: int
    rounds: int
    device: str
    threads: int
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=dict)

    def timed(self, *who: str, plain: bool = True) -> list[Row]:
        """Contestants that went through the rounds, by family, kind and method; in fp32, or not."""
        fitting = [row for row in self.rows if row.timed and row.who[: len(who)] == list(who)]
        return [row for row in fitting if row.plain == plain]

    def named(self, who: str) -> Row | None:
        """The contestant as it is by default, without any setting."""
        return next((row for row in self.rows if row.timed and row.name == who), None)

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a GPU: there, what is tuned is in half precision."""
        return self.device != "cpu"

    @property
    def floor(self) -> Row | None:
        """The ANN on T * B images, tuned; of one layer alone, the copy."""
        return self._tuned(self._usual("floor", "ann") or self._usual("floor", "copy"))

    @property
    def ours(self) -> Row | None:
        """What our users get; else the fastest of ours, by BPTT in the usual precision."""
        return self._own([])

    @property
    def rate(self) -> Row | None:
        """The same by the rate-based method."""
        return self._own(["rate"])

    @property
    def half(self) -> Row | None:
        """Ours by BPTT in half precision."""
        return self.fastest_half("ours", method=[])

    def default(self, library: str) -> Row | None:
        """A library as it is by default: on a GPU torch's convolutions are in tf32 then."""
        name = DEFAULTS[library]
        return (self.named(f"{name}+tf32") if self.on_gpu else None) or self.named(name)

    def fastest_half(self, *who: str, method: Sequence[str] = ()) -> Row | None:
        """The fastest in half precision, recorded or compiled or not."""
        rows = [row for row in self.timed(*who, plain=False) if row.half]
        return _fastest([row for row in rows if row.who[2:] == list(method)])

    def _own(self, method: list[str]) -> Row | None:
        own = [row for row in self._usual("ours") if row.who[2:] == method]
        return self._tuned([row for row in own if row.who[1] == "auto"]) or _fastest(own)

    def _usual(self, *who: str) -> list[Row]:
        """Contestants in the precision that is usual on the device."""
        rows = self.timed(*who, plain=not self.on_gpu)
        return [row for row in rows if "fp16" in row.settings] if self.on_gpu else rows

    def _tuned(self, rows: list[Row]) -> Row | None:
        """The one with channels_last and, on a CPU, kept memory; not compiled or recorded."""
        other = {"tc", "cg", *LEVELS}
        fitting = [row for row in rows if "cl" in row.settings and not other & row.settings]
        return max(fitting, key=lambda row: "ma" in row.settings, default=None)


def unsuccessful(results: Sequence[Result]) -> bool:
    """Whether a contestant failed, or none at all could be had for one of the networks."""
    failed = any(row.status == "failed" for result in results for row in result.rows)
    return failed or any(all(row.status != "done" for row in r.rows) for r in results)


def _fastest(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: statistics.median(row.round_ms), default=None)


def ratio(a: Row, b: Row) -> Ratio:
    """Step time of a over that of b within each round."""
    return quartiles([x / y for x, y in zip(a.round_ms, b.round_ms, strict=True)])


def quartiles(values: Sequence[float]) -> Ratio:
    """Median and quartiles of at least one value, interpolated."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


class Rival(NamedTuple):
    """A library against ours: its strongest configuration, and the default as second number."""

    library: str
    strongest: Row
    by: Ratio  # its step over ours: above 1, ours is faster
    default: Row | None
    default_by: Ratio | None


def rivals(result: Result, half: bool = False) -> list[Rival]:
    """Every rival that was timed beside ours, by its strongest configuration of this run.

    With `half` both are in half precision; the default configuration is in fp32.  On a GPU ours is
    in half precision always, and the rival in whichever is its fastest.
    """
    found = []
    for library in DEFAULTS:
        rate = library == "published"
        ours = result.rate if rate else result.half if half else result.ours
        rows = [row for row in result.timed(library, plain=not half) if row.half == half]
        if result.on_gpu:
            ours = result.fastest_half("ours", method=["rate"] if rate else [])
            rows = [row for plain in (True, False) for row in result.timed(library, plain=plain)]
        if ours is None or not rows:
            continue
        by = {row.name: ratio(row, ours) for row in rows}
        strongest = min(rows, key=lambda row: by[row.name].median)
        default = result.default(library)
        default_by = None if default is None else ratio(default, ours)
        found.append(Rival(library, strongest, by[strongest.name], default, default_by))
    return found


class Goal(NamedTuple):
    """A bound, what was measured, and whether that meets it; None is not measured."""

    id: str
    what: str
    at_least: bool
    bound: float
    measured: Ratio | float | None

    @property
    def met(self) -> bool | None:
        """Whether the measured value, or the median, keeps the bound."""
        if self.measured is None:
            return None
        value = self.measured.median if isinstance(self.measured, Ratio) else self.measured
        return value >= self.bound if self.at_least else value <= self.bound


def goals(result: Result) -> list[Goal]:
    """The project's goals, from the rows."""
    return _goals_on_gpu(result) if result.on_gpu else _goals_on_cpu(result)


def _over(a: Row | None, b: Row | None) -> Ratio | None:
    return None if a is None or b is None else ratio(a, b)


def _goals_on_cpu(result: Result) -> list[Goal]:
    if result.net in OF_A_LAYER:
        return []
    ours, rate, half, floor = result.ours, result.rate, result.half, result.floor
    against = {rival.library: rival for rival in rivals(result)}
    sj, published = against.get("spikingjelly"), against.get("published")
    best = "" if sj is None else f" ({sj.strongest.name})"

    def saved(row: Row | None) -> float | None:
        return None if row is None else row.saved_per_neuron_step

    found = [
        Goal("C1", "step of SpikingJelly as it is by default, over ours", True, 2.0,
             None if sj is None else sj.default_by),
        Goal("C2", f"step of SpikingJelly at its strongest{best}, over ours", True, 1.15,
             None if sj is None else sj.by),
        Goal("C2", "seconds until ours has done its first step", False, 2.0,
             None if ours is None else ours.warmup_s),
        Goal("C3", "our step over that of the ANN on T * B images", False, 1.15,
             _over(ours, floor)),
        Goal("C4", "our rate-based step over our BPTT step", False, 0.75, _over(rate, ours)),
        Goal("C4", "rate-based step as published, at its strongest, over ours", True, 2.2,
             None if published is None else published.by),
        Goal("C5", "bytes saved for each neuron and timestep, fp32", False, 9.0, saved(ours)),
        Goal("C5", "bytes saved for each neuron and timestep, half", False, 4.6, saved(half)),
        Goal("C5", "bytes saved for each neuron and timestep, rate-based", False, 3.2, saved(rate)),
    ]  # fmt: skip
    if result.net == "vgg11":
        found.append(Goal("C5", "operations of our step", False, 900.0,
                          None if ours is None else ours.aten_ops))  # fmt: skip
    return found


def _goals_on_gpu(result: Result) -> list[Goal]:
    """Every part at its fastest in half precision; a rival, at its fastest in any."""
    ours, peer = result.half, "spikingjelly"
    rate, floor = result.fastest_half("ours", method=["rate"]), result.fastest_half("floor", "ann")
    rows = [row for plain in (True, False) for row in result.timed(peer, plain=plain)]
    best, tuned = _fastest(rows), result.named(f"{peer}:multi+cl+fp16")
    smallest = result.named("ours:auto+cl+fp16+smallest")

    def peak(row: Row | None) -> float | None:
        if row is None or tuned is None or not (row.peak_bytes and tuned.peak_bytes):
            return None
        return row.peak_bytes / tuned.peak_bytes

    of_best = "" if best is None else f" ({best.name})"
    if result.net in OF_A_LAYER:
        id, numbers, share, faster = OF_A_LAYER[result.net]
        copy = result.floor
        bandwidth = None
        if copy is not None and ours is not None:
            pairs = zip(copy.round_ms, ours.round_ms, strict=True)
            bandwidth = quartiles([numbers / 2 * copied / own for copied, own in pairs])
        return [
            Goal(id, f"our bandwidth over that of a copy, at {numbers} numbers for each neuron and "
                 "timestep", True, share, bandwidth),
            Goal(id, f"step of SpikingJelly at its strongest{of_best}, over ours", True, faster,
                 _over(best, ours)),
        ]  # fmt: skip
    found = [Goal("G4", "our step over that of the ANN on T * B images", False, 1.2,
                  _over(ours, floor))]  # fmt: skip
    if result.net in ON_BEST:
        id, strongest, default = ON_BEST[result.net]
        found += [
            Goal(id, f"step of SpikingJelly at its strongest{of_best}, over ours", True, strongest,
                 _over(best, ours)),
            Goal(id, "step of SpikingJelly as it is by default, over ours", True, default,
                 _over(result.default(peer), ours)),
        ]  # fmt: skip
    if result.T in RATE_AT_MOST:
        found.append(Goal("G6", f"our rate-based step over our BPTT step, T = {result.T}", False,
                          RATE_AT_MOST[result.T], _over(rate, ours)))  # fmt: skip
    found += [
        Goal("G7", "peak memory over that of SpikingJelly with autocast", False, 0.5,
             peak(result.named("ours:auto+cl+fp16"))),
        Goal("G7", "the same with memory = smallest", False, 0.3, peak(smallest)),
    ]  # fmt: skip
    return found
