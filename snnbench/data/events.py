"""Recordings of event cameras and cochleas, turned into frames; the only door to tonic.

An event is (x, y, t, p): a pixel's brightness changed at time t in microseconds, up or down.  T
frames are made of a recording by tonic's `ToFrame`: each counts events by pixel and polarity
  - of an equal number of events (`bins = "events"`; what remains of N // T is left out), or
  - of an equal time (`bins = "time"`; what remains of the duration // T is left out).
The counts become bytes: `value = "max"` divides each frame by its largest count (1 is then 255),
"count" keeps them up to 255, and "binary" keeps whether there was an event, one bit a pixel.
Equal event counts, "max" and a bilinear resize to 48x48 are the protocol of Deng et al. 2022 (TET),
arXiv 2202.11946, and of Yu et al. 2024 (rate), arXiv 2410.11488, for CIFAR10-DVS.

Shapes: T timesteps, P polarities, H W height, width of the frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from tonic import __version__ as tonic_version
from tonic.transforms import ToFrame

from snnbench.data.augment import pipeline
from snnbench.data.base import Data, Dataset, Info, Split, balanced, unpack_bits
from snnbench.data.fetch import make_folder
from snnbench.data.prepared import Part, Store, clean, exists, prepared, write_splits
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

        Raises ValueError where a count does not fit, or there are fewer events than frames.
        """
        if self.bins == "events" and len(events) < self.T:
            raise ValueError(f"{len(events)} events cannot be divided into {self.T} frames")
        number = {"n_event_bins": self.T} if self.bins == "events" else {"n_time_bins": self.T}
        counts = ToFrame(sensor_size=sensor, **number)(events)
        if counts.min() < 0:
            raise ValueError("more than 32,767 events of one pixel in one frame")
        frames = counts.reshape(self.T, *counts.shape[1:])
        if sensor[1] == 1:
            frames = frames.reshape(self.T, -1)
        if self.value == "max":
            most = frames.reshape(self.T, -1).max(1).reshape(-1, *[1] * (frames.ndim - 1))
            frames = 255 * frames.astype(np.int64) // np.maximum(most, 1)
        else:
            frames = np.minimum(frames, 1 if self.value == "binary" else 255)
        return self._resize(frames.astype(np.uint8))

    def _resize(self, frames: Array) -> Array:
        if self.size is None or frames.ndim == 2 or frames.shape[-2:] == (self.size, self.size):
            return frames
        whole, target = torch.from_numpy(frames), (self.size, self.size)
        if self.value == "binary":  # any event in the area; an average would round a lone one away
            return F.adaptive_max_pool2d(whole.float(), target).to(torch.uint8).numpy()
        return F.interpolate(whole, target, mode="bilinear", antialias=True).numpy()


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
    """All recordings of a set, and the indices of its three splits."""

    train: Recordings
    val: Recordings
    test: Recordings
    verify: Callable[[], tuple[bool, Mapping[str, str]]]  # reads it all: official, and MD5 sums

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


class EventSet(Dataset):
    """Recordings of events as T frames each, prepared once and then memory-mapped."""

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames; validation holds `val_fraction` of train, stratified."""

        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1

    name: ClassVar[str]
    classes: ClassVar[int]
    info: ClassVar[Info]
    sensor: ClassVar[Sensor]

    def open(self, root: Path) -> Source:
        """The recordings below `root`; raises DataError if they are missing."""
        raise NotImplementedError

    def is_there(self, root: Path) -> bool:
        """Whether the recordings are there, and not only what was prepared from them."""
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

    def prepare(self, root: Path, allow_unverified: bool) -> Mapping[str, Any]:
        """Make the store where it is missing; its folder and manifest."""
        store = self._store(root, allow_unverified)
        return {"folder": str(store.folder), **store.manifest}

    def clean(self, root: Path) -> Sequence[Path]:
        """Delete every store of this set, and what is left of half-made ones."""
        return clean(root, self.name)

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits from the store, prepared first where that is due."""
        c, store = self.config, self._store(root, allow_unverified)
        train, val, test = (store.split(name) for name in ("train", "val", "test"))
        whole = c.train_limit is None and c.test_limit is None
        if c.train_limit is not None:
            share = len(val) / (len(train) + len(val))  # of the whole split, kept in the small one
            limit = max(self.classes, round(c.train_limit * share))
            train = _limited(train, f"{self.name}-train", c.train_limit)
            val = _limited(val, f"{self.name}-val", limit)
        test = _limited(test, f"{self.name}-test", c.test_limit)
        packed = self.frames.shape(self.sensor) if c.value == "binary" else None
        return Data(
            train,
            val,
            test,
            classes=self.classes,
            mean=(0.0,),
            std=(1.0,),
            verified=bool(store.manifest["verified"]),
            augment=_augment(c.augment, packed),
            T=c.T,
            scale=255.0 if c.value == "max" else 1.0,
            packed=packed,
            split_hash=str(store.manifest["source"]) if whole else "",
        )

    def _store(self, root: Path, allow_unverified: bool) -> Store:
        made = exists(root, self.name, self.recipe())
        if not made:
            make_folder(root / "prepared")  # before the work of reading recordings
        there = self.is_there(root) or not made
        source = self.open(root) if there else None

        def build(half: Path) -> dict[str, Any]:
            # A store that is damaged needs its recordings again: `open` says where they are gone.
            found = source or self.open(root)
            verified, md5 = found.verify()
            self._allow(verified, allow_unverified)
            parts = {n: self._part(getattr(found, n)) for n in ("train", "val", "test")}
            return {
                "samples": write_splits(half, parts, f"prepare {self.name}", self.progress),
                "source": found.split_hash,
                "md5": dict(md5),
                "verified": verified,
                "shape": [self.config.T, *self.frames.shape(self.sensor)],
                "bits": self.config.value == "binary",
            }

        known = None if source is None else source.split_hash
        store = prepared(root, self.name, self.recipe(), known, build)
        self._allow(bool(store.manifest["verified"]), allow_unverified)
        return store

    def _allow(self, verified: bool, allow_unverified: bool) -> None:
        if not verified and not allow_unverified:
            raise DataError(
                f"{self.name}: the recordings are not known to be the official ones; `snnbench "
                f"data verify {self.name}` says what they are; use the official copy, or, if you "
                "trust this one, --allow-unverified-data"
            )

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


def _limited(split: Split, salt: str, limit: int | None) -> Split:
    if limit is None:
        return split
    index = balanced(split.y.numpy(), salt, limit)
    return Split(split.x[index], split.y[index])


def _augment(names: Sequence[str], packed: tuple[int, ...] | None) -> Any:
    if not names:
        return None
    change = pipeline(names)
    if packed is None:
        return change
    return lambda x, g: change(unpack_bits(x, packed), g)
