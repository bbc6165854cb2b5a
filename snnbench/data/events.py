"""Recordings of event cameras and cochleas, turned into frames; the only door to tonic.

An event is (x, y, t, p): a pixel's brightness changed at time t in microseconds, up or down.  T
frames are made of a recording as tonic slices it: each counts events by pixel and polarity
  - of an equal number of events (`bins = "events"`; what remains of N // T is left out), or
  - of an equal time (`bins = "time"`; what remains of the duration // T is left out).
They are counted here, since tonic's `ToFrame` counts in 16 bits and starts again beyond 32,767.
The counts become bytes: `value = "max"` divides each frame by its largest count (1 is then 255) and
resizes it, bilinear; "count" keeps them up to 255, and "binary" keeps whether there was an event,
one bit a pixel.  These two are counted in the pixels of the smaller frame, so that none is lost.
Equal event counts, "max" and a bilinear resize to 48x48 are the protocol of Deng et al. 2022 (TET),
arXiv 2202.11946, and of Yu et al. 2024 (rate), arXiv 2410.11488, for CIFAR10-DVS.

Shapes: T timesteps, P polarities, H W height, width of the frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from tonic import __version__ as tonic_version
from tonic.slicers import slice_events_by_event_bins, slice_events_by_time_bins

from snnbench.data.augment import pipeline
from snnbench.data.base import Data, unpack_bits
from snnbench.data.prepared import Part, PreparedSet, write_splits
from snnbench.data.splits import hash_indices
from snnbench.errors import DataError
from snnbench.spec import digest

Array: TypeAlias = np.ndarray[Any, Any]
Sensor: TypeAlias = tuple[int, int, int]  # width, height, polarities
Change: TypeAlias = Literal["flip", "roll"]
Value: TypeAlias = Literal["max", "count", "binary"]


@dataclass(frozen=True)
class Frames:
    """How a recording becomes T frames; `size` is their height and width, None for the sensor's."""

    T: int
    bins: Literal["events", "time"]
    value: Value
    size: int | None

    def shape(self, sensor: Sensor) -> tuple[int, ...]:
        """Shape of one frame: [P, H, W], or [F] of a sensor in one dimension."""
        width, height, polarities = sensor
        if height == 1:
            return (polarities * width,)
        return (polarities, self.size or height, self.size or width)

    def make(self, events: Array, sensor: Sensor) -> Array:
        """The frames of one recording, uint8 [T, *shape(sensor)].

        Raises ValueError where there are fewer events, or microseconds, than frames.
        """
        if self.bins == "events":
            if len(events) < self.T:
                raise ValueError(f"{len(events)} events cannot be divided into {self.T} frames")
            slices = slice_events_by_event_bins(events, self.T)
        else:
            lasts = int(events["t"][-1]) - int(events["t"][0])
            if lasts < self.T:
                raise ValueError(f"{lasts} us cannot be divided into {self.T} frames")
            slices = slice_events_by_time_bins(events, self.T)
        width, height, polarities = sensor
        small = (self.size or height, self.size or width) if height > 1 else (1, width)
        at_once = (height, width) if self.value == "max" else small
        grid = (polarities, *at_once)
        counts = np.stack([_count(part, sensor, grid) for part in slices])
        if self.value == "max":
            counts = 255 * counts // np.maximum(counts.max(axis=(1, 2, 3), keepdims=True), 1)
        frames = np.minimum(counts, 1 if self.value == "binary" else 255).astype(np.uint8)
        if at_once != small:
            large = torch.from_numpy(frames)
            frames = F.interpolate(large, small, mode="bilinear", antialias=True).numpy()
        shaped: Array = frames.reshape(self.T, *self.shape(sensor))
        return shaped


def _count(events: Array, sensor: Sensor, grid: tuple[int, int, int]) -> Array:
    """How many events each pixel of the grid [P, H, W] holds, int64: each event is in one."""
    width, height, _ = sensor
    polarities, H, W = grid
    column = events["x"].astype(np.int64) * W // width
    row = events["y"].astype(np.int64) * H // height if "y" in (events.dtype.names or ()) else 0
    p = events["p"].astype(np.int64) if polarities > 1 else 0
    counts: Array = np.bincount((p * H + row) * W + column, minlength=polarities * H * W)
    return counts.reshape(grid)


def check(events: Array, sensor: Sensor) -> None:
    """Raise ValueError for an empty recording, events off the sensor, or time running backwards."""
    if len(events) == 0:
        raise ValueError("an empty recording")
    names = events.dtype.names or ()
    for axis, size in zip("xyp", sensor, strict=True):
        if axis not in names:
            continue
        values = events[axis].astype(np.int64)
        if values.min() < 0 or values.max() >= max(size, 2 if axis == "p" else size):
            odd = values.min() if values.min() < 0 else values.max()
            raise ValueError(f"an event with {axis} = {odd} on a sensor of {size}")
    t = events["t"].astype(np.int64)
    if (backwards := np.flatnonzero(np.diff(t) < 0)).size:
        i = int(backwards[0])
        raise ValueError(f"time runs backwards at event {i + 1}: {t[i]} us, then {t[i + 1]} us")


@dataclass(frozen=True)
class Recordings:
    """Recordings in a fixed order: their names and labels, and how to read one as events."""

    names: Sequence[str]
    labels: Array
    read: Callable[[int], Array]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """All recordings of a set in its three splits."""

    train: Recordings
    val: Recordings
    test: Recordings

    @property
    def split_hash(self) -> str:
        """SHA-256 of the names in each split, and of the labels."""
        parts = (self.train, self.val, self.test)
        names = [f"{len(p)}:" + "\n".join(p.names) for p in parts]
        return digest(*names, hash_indices(*(p.labels for p in parts)))


def subset(recordings: Recordings, index: Iterable[Any]) -> Recordings:
    """The recordings of these indices, in that order."""
    chosen = [int(i) for i in index]
    return Recordings(
        [recordings.names[i] for i in chosen],
        recordings.labels[chosen],
        lambda i: recordings.read(chosen[i]),
    )


@dataclass(frozen=True)
class FrameConfig:
    """How recordings become frames (`T`, `bins`, `value`, `size`), and which are used.

    `train_limit` and `test_limit` give fixed, class-balanced subsets; augmentation is for train
    only and treats all frames of a sample alike.
    """

    T: Annotated[int, Ge(1)] = 10
    bins: Literal["events", "time"] = "events"
    value: Value = "max"
    size: Annotated[int, Ge(1)] | None = None
    augment: tuple[Change, ...] = ()
    train_limit: Annotated[int, Ge(1)] | None = None
    test_limit: Annotated[int, Ge(1)] | None = None


OF_LOADING = ("augment", "train_limit", "test_limit")  # options that change no prepared byte


class EventSet(PreparedSet):
    """Recordings of events as T frames each, prepared once and then memory-mapped."""

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames; validation holds `val_fraction` of train, stratified."""

        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1

    sensor: ClassVar[Sensor]

    def open(self, root: Path) -> Source:
        """The recordings below `root`; raises DataError if they are missing."""
        raise NotImplementedError

    @property
    def frames(self) -> Frames:
        """How a recording becomes frames."""
        c = self.config
        return Frames(c.T, c.bins, c.value, c.size)

    def recipe(self) -> dict[str, Any]:
        """Every argument that changes a byte of the prepared store."""
        options = {k: v for k, v in asdict(self.config).items() if k not in OF_LOADING}
        return {**options, "sensor": list(self.sensor), "tonic": tonic_version}

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits from the store, prepared first where that is due."""
        c = self.config
        store, verdict = self.store(root, allow_unverified)
        splits, split_hash = self.used(store)
        packed = self.frames.shape(self.sensor) if c.value == "binary" else None
        return Data(
            *splits,
            classes=self.classes,
            mean=(0.0,),
            std=(1.0,),
            verified=verdict.verified,
            augment=_augment(c.augment, packed),
            T=c.T,
            scale=255.0 if c.value == "max" else 1.0,
            packed=packed,
            split_hash=split_hash,
        )

    def fill(self, root: Path, half: Path) -> dict[str, Any]:
        """Turn every recording into frames."""
        source = self.open(root)
        parts = {name: self._part(getattr(source, name)) for name in ("train", "val", "test")}
        return {
            "samples": write_splits(half, parts, f"prepare {self.name}", self.progress),
            "split": source.split_hash,
            "shape": [self.config.T, *self.frames.shape(self.sensor)],
            "bits": self.config.value == "binary",
        }

    def _part(self, recordings: Recordings) -> Part:
        def samples() -> Iterator[Array]:
            for i, name in enumerate(recordings.names):
                try:
                    events = recordings.read(i)
                    check(events, self.sensor)
                    frames = self.frames.make(events, self.sensor)
                except DataError:
                    raise
                except Exception as error:
                    why = " ".join(str(error).split()) or type(error).__name__
                    raise DataError(f"{self.name}: {name}: {why}") from error
                if self.config.value == "binary":
                    frames = np.packbits(frames.reshape(len(frames), -1), axis=-1)
                yield frames

        return Part(samples(), recordings.labels)


def _augment(names: Sequence[str], packed: tuple[int, ...] | None) -> Any:
    if not names:
        return None
    change = pipeline(names)
    if packed is None:
        return change
    return lambda x, g: change(unpack_bits(x, packed), g)
