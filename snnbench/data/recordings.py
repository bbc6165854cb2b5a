"""Published recordings of events: N-MNIST, N-Caltech101, CIFAR10-DVS, DVS128 Gesture, SHD and SSC.

Files are read by tonic's classes. Their order is ours: tonic leaves it to the file system where
this changes the split. Tonic needs no archive; but only the publishers' archives beside the
recordings can vouch for them (`official.py`), and other copies are refused unless the user allows
them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import h5py
import numpy as np
import tonic.datasets
from annotated_types import Ge, Gt, Le, Lt

from snnbench.data import official
from snnbench.data.base import Info, Verdict, get_it, stratified
from snnbench.data.events import (
    Change,
    EventSet,
    FrameConfig,
    Recordings,
    Source,
    Value,
    subset,
)
from snnbench.data.fetch import Remote
from snnbench.data.splits import validation
from snnbench.errors import DataError
from snnbench.spec import digest

Array: TypeAlias = np.ndarray[Any, Any]
ATIS_BYTES = 5  # an event in the .bin files of N-MNIST and N-Caltech101
SMALL = 5_000  # recordings; a set of fewer is no full set, and may be one of KNOWN
# SHA-256 of names and bytes of subsets that are known, and what they are.
SLAYER = "feb6567aea3d4d566bb0a5ffa0b7425a12e8af8081e173769266c00f6d986b85"
KNOWN: Mapping[str, str] = {
    SLAYER: "the N-MNIST subset of the SLAYER examples (Shrestha & Orchard 2018), byte for byte: "
    "recordings 1-1000 of train and 1-100 of test"
}
ZENKE = "https://zenkelab.org/datasets/"


def _figshare(dataset: Any, name: str, url: str, md5: str) -> Remote:
    """A file of figshare: its API first, since its download host answers programs with nothing."""
    official = str(getattr(dataset, url))
    number = official.rpartition("/")[2]
    mirrors = (
        f"https://api.figshare.com/v2/file/download/{number}",
        f"https://ndownloader.figshare.com/files/{number}",
        official,
    )
    return Remote(getattr(dataset, name), getattr(dataset, md5), mirrors)


class Published(EventSet):
    """Recordings in files below one folder, from archives of known MD5 sums."""

    pattern: ClassVar[str]  # of the recordings' files
    archives: ClassVar[tuple[Remote, ...]]

    def tonic_set(self, root: Path, **options: Any) -> Any:
        """Tonic's dataset of the files below `root`, archive or no archive."""
        official = getattr(tonic.datasets, self.info.home)
        reader = type(self.info.home, (official,), {"_check_exists": lambda _: True})
        return reader(str(root), **options)

    def release(self, root: Path) -> official.Release:
        """What the publishers offer."""
        home = root / self.info.home
        return official.Release(self.name, root, home, home, self.archives)

    def present(self, root: Path) -> bool:
        """Whether recordings are there, and not in part."""
        found = next(recordings(root / self.info.home, self.pattern), None)
        return found is not None and not self.release(root).cut_short

    def open(self, root: Path) -> Source:
        """The recordings below `root`; raises DataError if they are missing."""
        home = root / self.info.home
        if not self.present(root):
            what = "half unpacked" if self.release(root).cut_short else f"no {self.pattern}"
            raise DataError(f"{self.name}: {what} in {home}; {self._get_it(root)}")
        try:
            source = Source(*self.parts(root))
        except DataError:
            raise
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.name}: {home} cannot be read: {why}") from error
        for name, part in (("training", source.train), ("validation", source.val),
                           ("test", source.test)):  # fmt: skip
            if not len(part):
                raise DataError(
                    f"{self.name}: {home} has no recording for {name}; {self._get_it(root)}"
                )
        return source

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """Train, validation and test."""
        raise NotImplementedError

    def look(self, root: Path) -> tuple[str, Verdict]:
        """Names, sizes and times of all recordings, and the archives that vouch for them."""
        source, paths = self.open(root), self._files(root)
        verdict = self._judge(root, source, self.release(root).measured(paths), None)
        return digest(official.stamp(paths, root), source.split_hash), verdict

    def fetch(self, root: Path) -> str:
        """Download the archives and unpack them, and the archives in them."""
        self.release(root).fetch(self.progress)
        if not self.present(root):
            raise DataError(f"{self.name}: the archives hold no {self.pattern}")
        return f"{self.name} is in {root / self.info.home}"

    def verify(self, root: Path) -> Verdict:
        """The archives, the files against them, and the number of recordings."""
        source, known = self.open(root), None
        paths = self._files(root)
        if sum(len(p) for p in (source.train, source.val, source.test)) < SMALL:
            known = KNOWN.get(_content(root / self.info.home, paths))
        return self._judge(root, source, self.release(root).measure(paths), known)

    def _judge(
        self, root: Path, source: Source, measured: official.Measured, known: str | None
    ) -> Verdict:
        counts = (len(source.train) + len(source.val), len(source.test))
        return self.release(root).judge(measured, counts, self.info.sizes, known)

    def _files(self, root: Path) -> list[Path]:
        return sorted(recordings(root / self.info.home, self.pattern))

    def _get_it(self, root: Path) -> str:
        return get_it(self.name, root, self.info.home)


def recordings(home: Path, pattern: str) -> Iterator[Path]:
    """Files of that pattern; not what an unpacking that was cut short left behind."""
    for folder, below, names in os.walk(home):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(folder, n) for n in names if fnmatch(n, pattern) and n[0] != ".")


def files(dataset: Any, root: Path, kind: str) -> Recordings:
    """The recordings of a tonic set that holds paths, in order of label and number in the name."""
    paths = [Path(p) for p in dataset.data]
    labels = np.unique(np.asarray(dataset.targets), return_inverse=True)[1]
    if np.asarray(dataset.targets).dtype.kind in "iu":
        labels = np.asarray(dataset.targets)
    names = [p.relative_to(root).as_posix() for p in paths]
    order = sorted(range(len(paths)), key=lambda i: (labels[i], _number(names[i]), names[i]))

    def read(i: int) -> Array:
        if kind == "atis" and paths[i].stat().st_size % ATIS_BYTES:
            size = paths[i].stat().st_size
            raise ValueError(f"a truncated file: {size} bytes are no multiple of {ATIS_BYTES}")
        if paths[i].stat().st_size == 0:
            raise ValueError("an empty recording")
        try:
            events: Array = dataset[i][0]
        except ModuleNotFoundError as error:
            raise DataError(
                f"{names[i]} cannot be read without {error.name}: pip install {error.name}"
            ) from error
        return events

    return subset(Recordings(names, labels, read), order)


def _number(name: str) -> int:
    found = re.findall(r"\d+", name.rpartition("/")[2].partition(".")[0])
    return int(found[-1]) if found else -1


def _content(home: Path, paths: Sequence[Path]) -> str:
    """SHA-256 of names and bytes of all recordings."""
    return digest(*(b for p in paths for b in (p.relative_to(home).as_posix(), p.read_bytes())))


class NMNIST(Published):
    """60,000 + 10,000 recordings of MNIST on a screen, three saccades each; 34x34, 0.3 s."""

    source = "Orchard, Jayawant, Cohen, Thakor 2015, Frontiers in Neuroscience 9:437"
    name = "nmnist"
    classes = 10
    sensor = (34, 34, 2)
    pattern = "*.bin"
    info = Info("events", 10, (54_000, 6_000, 10_000), "2x34x34", "CC BY-SA 4.0", "NMNIST")
    archives = (
        Remote("train.zip", tonic.datasets.NMNIST.train_md5, (tonic.datasets.NMNIST.train_url,)),
        Remote("test.zip", tonic.datasets.NMNIST.test_md5, (tonic.datasets.NMNIST.test_url,)),
    )

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """The official test part; validation from train, stratified."""
        train, test = (
            files(self.tonic_set(root, train=part), root, "atis") for part in (True, False)
        )
        val, rest = validation(
            self.name, train.labels, f"{self.name}-val", self.config.val_fraction
        )
        return subset(train, rest), subset(train, val), test


class NCaltech101(Published):
    """8,709 recordings of Caltech-101 on a screen, three saccades each; up to 240x180, 0.3 s.

    There is no official split: test holds 20% and validation 10% of each class, fixed for ever.
    """

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames, which are of one size."""

        size: Annotated[int, Ge(1)] | None = 48

    source = "Orchard, Jayawant, Cohen, Thakor 2015, Frontiers in Neuroscience 9:437"
    name = "ncaltech101"
    classes = 101
    sensor = (240, 180, 2)
    pattern = "*.bin"
    info = Info("events", 101, (8_709, None, None), "2x180x240", "CC BY 4.0", "NCALTECH101")
    archives = (
        Remote(
            tonic.datasets.NCALTECH101.filename,
            tonic.datasets.NCALTECH101.file_md5,
            (tonic.datasets.NCALTECH101.url,),
        ),
    )

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """Shares of every class."""
        found = self.tonic_set(root)
        # The archive also has boxes around the objects, in files that end alike.
        below = [Path(p).relative_to(root).as_posix().lower() for p in found.data]
        real = [i for i, name in enumerate(below) if "annotation" not in name]
        found.data = [found.data[i] for i in real]
        found.targets = [found.targets[i] for i in real]
        whole = files(found, root, "atis")
        test, val, train = stratified(whole.labels, self.name, (0.2, 0.1))
        return subset(whole, train), subset(whole, val), subset(whole, test)


class CIFAR10DVS(Published):
    """10,000 recordings of CIFAR-10 moving on a screen; 128x128, 1.3 s.

    There is no official split: in each class the first 900 files, by number, are train and the last
    100 test, as in the code of Deng et al. 2022 (TET); validation is cut from train.
    """

    @dataclass(frozen=True)
    class Config(EventSet.Config):
        """As for all event sets; by default the protocol of TET."""

        size: Annotated[int, Ge(1)] | None = 48
        augment: tuple[Change, ...] = ("flip", "roll")

    source = "Li, Liu, Ji, Li, Shi 2017, Frontiers in Neuroscience 11:309"
    name = "cifar10dvs"
    classes = 10
    sensor = (128, 128, 2)
    pattern = "*.aedat4"
    info = Info("events", 10, (8_100, 900, 1_000), "2x128x128", "CC BY 4.0", "CIFAR10DVS")
    archives = (_figshare(tonic.datasets.CIFAR10DVS, "filename", "url", "file_md5"),)

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """The first 90% of each class, without validation; validation; the last 10%."""
        whole = files(self.tonic_set(root), root, "aedat4")
        first, last = [], []
        for label in np.unique(whole.labels):
            members = np.flatnonzero(whole.labels == label)
            cut = round(0.9 * len(members))
            first += members[:cut].tolist()
            last += members[cut:].tolist()
        val, rest = validation(
            self.name, whole.labels[first], f"{self.name}-val", self.config.val_fraction
        )
        train = subset(whole, first)
        return subset(train, rest), subset(train, val), subset(whole, last)


class DVSGesture(Published):
    """1,341 recordings of 11 gestures by 29 people; 128x128, about 6 s.

    The official split is by person: 1-23 are train, 24-29 test. Validation is the people named in
    `val_users`, so that no person stands on both sides.
    """

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames; validation by person."""

        T: Annotated[int, Ge(1)] = 16
        size: Annotated[int, Ge(1)] | None = 48
        val_users: tuple[Annotated[int, Ge(1), Le(23)], ...] = (20, 21, 22, 23)

    source = "Amir et al. 2017, A Low Power, Fully Event-Based Gesture Recognition System, CVPR"
    name = "dvsgesture"
    classes = 11
    sensor = (128, 128, 2)
    pattern = "*.npy"
    info = Info("events", 11, (1_077, None, 264), "2x128x128", "CC BY 4.0", "DVSGesture")
    archives = (
        _figshare(tonic.datasets.DVSGesture, "train_filename", "train_url", "train_md5"),
        _figshare(tonic.datasets.DVSGesture, "test_filename", "test_url", "test_md5"),
    )

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """People that are neither in validation nor in test; those of validation; of test."""
        train, test = (
            files(self.tonic_set(root, train=part), root, "npy") for part in (True, False)
        )
        users = [int(re.findall(r"user(\d+)_", name)[0]) for name in train.names]
        held = [user in self.config.val_users for user in users]
        return (
            subset(train, np.flatnonzero(~np.array(held))),
            subset(train, np.flatnonzero(held)),
            test,
        )


class Cochlea(Published):
    """Spoken words as spikes of 700 channels of an artificial cochlea, in one HDF5 file a split."""

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames; by default 100 of equal time, one bit a channel."""

        T: Annotated[int, Ge(1)] = 100
        bins: Literal["events", "time"] = "time"
        value: Value = "binary"
        augment: tuple[Change, ...] = ()

        def __post_init__(self) -> None:
            if self.size is not None or self.augment:
                raise ValueError("size and augment are for frames of two dimensions")

    source = "Cramer, Stradmann, Schemmel, Zenke 2020, IEEE TNNLS, arXiv 1910.07407"
    sensor = (700, 1, 1)
    pattern = "*.h5"

    def whole(self, root: Path, **options: Any) -> Recordings:
        """All recordings of one file."""
        dataset = self.tonic_set(root, **options)
        path = Path(dataset.location_on_system) / dataset.data_filename
        with h5py.File(path, "r") as file:
            labels = np.asarray(file["labels"]).astype(np.int64)
        names = [f"{path.relative_to(root).as_posix()}[{i}]" for i in range(len(labels))]
        return Recordings(names, labels, lambda i: dataset[i][0])


class SHD(Cochlea):
    """10,420 spoken digits in German and English, as spikes of 700 channels, up to 1.4 s."""

    @dataclass(frozen=True)
    class Config(Cochlea.Config):
        """As for cochlea sets; validation holds `val_fraction` of train, stratified."""

        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1

    name = "shd"
    classes = 20
    info = Info("events", 20, (8_156, None, 2_264), "700", "CC BY 4.0", "SHD")
    archives = (
        Remote("shd_train.h5.zip", tonic.datasets.SHD.train_md5, (ZENKE + "shd_train.h5.zip",)),
        Remote("shd_test.h5.zip", tonic.datasets.SHD.test_md5, (ZENKE + "shd_test.h5.zip",)),
    )

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """The official test file; validation from train, stratified."""
        train = self.whole(root, train=True)
        val, rest = validation(
            self.name, train.labels, f"{self.name}-val", self.config.val_fraction
        )
        return subset(train, rest), subset(train, val), self.whole(root, train=False)


class SSC(Cochlea):
    """105,829 spoken commands as spikes of 700 channels, about 1 s; official validation."""

    name = "ssc"
    classes = 35
    info = Info("events", 35, (75_466, 9_981, 20_382), "700", "CC BY 4.0", "SSC")
    archives = (
        Remote("ssc_train.h5.zip", tonic.datasets.SSC.train_md5, (ZENKE + "ssc_train.h5.zip",)),
        Remote("ssc_valid.h5.zip", tonic.datasets.SSC.valid_md5, (ZENKE + "ssc_valid.h5.zip",)),
        Remote("ssc_test.h5.zip", tonic.datasets.SSC.test_md5, (ZENKE + "ssc_test.h5.zip",)),
    )

    def parts(self, root: Path) -> tuple[Recordings, Recordings, Recordings]:
        """The three official files."""
        train, val, test = (self.whole(root, split=s) for s in ("train", "valid", "test"))
        return train, val, test
