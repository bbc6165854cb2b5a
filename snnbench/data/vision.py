"""Images of CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST; the only door to torchvision's datasets.

A copy counts as verified if every file has the MD5 sum of the official one.  Any other copy is
refused unless the user allows it, and its results say so.  Sets of this size are held in memory, on
the device, and augmented there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
import torchvision
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from snnbench.data import augment, mix
from snnbench.data.base import Data, Dataset, Info, Split, Verdict, balanced, get_it
from snnbench.data.fetch import Remote, download, extract, md5_of
from snnbench.data.splits import hash_indices, validation
from snnbench.errors import DataError

Name: TypeAlias = augment.Name | mix.Name
Array: TypeAlias = np.ndarray[Any, Any]
APPROXIMATE = "APPROXIMATE.json"  # beside a copy: its images that are not exact, by file


class Images(Dataset):
    """A train and a test set of small images in files of known MD5 sums; validation from train."""

    @dataclass(frozen=True)
    class Config:
        """`train_limit` and `test_limit` give fixed, class-balanced subsets.

        Validation holds `val_fraction` of train, stratified; augmentation is for train only.
        """

        augment: tuple[Name, ...] = ("crop", "flip")
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
        train_limit: Annotated[int, Ge(1)] | None = None
        test_limit: Annotated[int, Ge(1)] | None = None

    name: ClassVar[str]
    classes: ClassVar[int]
    info: ClassVar[Info]
    # Mean and deviation of the training pixels.
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    archives: ClassVar[tuple[Remote, ...]]

    def listed(self) -> list[tuple[str, str]]:
        """Every file below `info.home` that is read, with the MD5 sum of the official one."""
        raise NotImplementedError

    def read(self, root: Path, train: bool) -> tuple[Tensor, Array]:
        """Images, uint8 [N, C, H, W], and labels."""
        raise NotImplementedError

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits; raises DataError if the copy is missing, or not the official one."""
        verified = self.verify(root).allow(self.name, root, allow_unverified)
        (train_x, train_y), (test_x, test_y) = self._read(root, True), self._read(root, False)
        c = self.config
        val, rest = validation(self.name, train_y, f"{self.name}-val", c.val_fraction)
        if not len(val):
            raise DataError(f"{self.name}: too few images a class for a validation split")
        rest = rest[balanced(train_y[rest.numpy()], f"{self.name}-train", c.train_limit)]
        if c.train_limit is not None:
            # A tiny study needs no full validation split: keep the proportion.
            limit = max(self.classes, round(c.train_limit * c.val_fraction))
            val = val[balanced(train_y[val.numpy()], f"{self.name}-val", limit)]
        test = balanced(test_y, f"{self.name}-test", c.test_limit)
        fill = torch.tensor([round(255 * m) for m in self.mean], dtype=torch.uint8)
        alone = [name for name in c.augment if name not in ("cutmix", "mixup")]
        return Data(
            _split(train_x, train_y, rest),
            _split(train_x, train_y, val),
            _split(test_x, test_y, test),
            classes=self.classes,
            mean=self.mean,
            std=self.std,
            verified=verified,
            augment=augment.pipeline(alone, fill=fill) if alone else None,
            mix=mix.mixing(c.augment, self.classes),
            split_hash=hash_indices(rest, val, test),
        )

    def fetch(self, root: Path) -> str:
        """Download the official archives and unpack them; raises DataError if that fails."""
        home = root / self.info.home
        if self.present(root) and not self._odd(root):
            return f"{self.name} is in {home}"
        # CIFAR's archive holds its folder; those of MNIST are single files.
        into = home if len(self.archives) > 1 else root
        for remote in self.archives:
            extract(download(remote, into, self.progress), into)
        if missing := self._missing(root):
            raise DataError(f"{home / missing[0]} is missing even after unpacking")
        if odd := self._odd(root):
            raise DataError(f"{home / next(iter(odd))} is not official even after unpacking")
        return f"{self.name} is in {home}"

    def present(self, root: Path) -> bool:
        """Whether all its files are there."""
        return not self._missing(root)

    def verify(self, root: Path) -> Verdict:
        """Every file against its official MD5 sum; raises DataError if one is missing."""
        home, total = root / self.info.home, len(self.listed())
        if missing := self._missing(root):
            get = get_it(self.name, root, Path(self.info.home).parts[0])
            raise DataError(f"{self.name}: {home / missing[0]} is missing; {get}")
        odd = self._odd(root)
        lines = [
            f"{home / name}: not the official file, MD5 {odd[name]}, not {md5}"
            if name in odd
            else f"{home / name}: the official file, MD5 {md5}"
            for name, md5 in self.listed()
        ]
        if not odd:
            lines.append(f"{self.name}: all {total} files are the official bytes")
            return Verdict(True, lines)
        lines += _confessed(home)
        kind = f"{len(odd)} of {total} files are not the official bytes"
        lines.append(f"{self.name}: {kind}; a run needs --allow-unverified-data")
        first = home / next(iter(odd))
        why = f"{first} is not the official file (its MD5 sum differs; {len(odd)} of {total} files)"
        return Verdict(False, lines, why)

    def _missing(self, root: Path) -> list[str]:
        home = root / self.info.home
        return [name for name, _ in self.listed() if not (home / name).is_file()]

    def _odd(self, root: Path) -> dict[str, str]:
        """MD5 sums of the files that are not the official ones."""
        found = {name: md5_of(root / self.info.home / name) for name, _ in self.listed()}
        return {name: found[name] for name, md5 in self.listed() if found[name] != md5}

    def _read(self, root: Path, train: bool) -> tuple[Tensor, Array]:
        """Images and labels that fit each other, and the classes."""
        x, y = self.read(root, train)
        part = f"{self.name}: the {'training' if train else 'test'} part in {root / self.info.home}"
        if len(x) != len(y) or not len(y):
            raise DataError(f"{part} has {len(x):,} images and {len(y):,} labels")
        if y.min() < 0 or y.max() >= self.classes:
            wrong = y.min() if y.min() < 0 else y.max()
            raise DataError(f"{part} has a label {wrong}; the {self.classes} classes begin at 0")
        return x, y


def _reading(name: str, path: Path, read: Callable[[], Any]) -> Any:
    """What a reader of torchvision gives; raises DataError, with the file's name, if it cannot."""
    try:
        return read()
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: {path} cannot be read: {why}") from error


def _confessed(home: Path) -> list[str]:
    """What a copy says of itself in APPROXIMATE.json: images that are not exact, by file."""
    path = home / APPROXIMATE
    if not path.is_file():
        return []
    try:
        listed = {str(k): len(v) for k, v in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return [f"{path}: cannot be read: {error}"]
    counts = ", ".join(f"{name} {n}" for name, n in listed.items())
    return [f"{path}: by its own account {sum(listed.values())} images are approximate ({counts})"]


def _split(x: Tensor, y: Array, index: Tensor) -> Split:
    """The chosen images and their labels."""
    return Split(x[index].contiguous(), torch.from_numpy(y[index.numpy()]).long())


class Cifar(Images):
    """50,000 train and 10,000 test colour images, 32x32; validation is cut from train."""

    source = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
    official: ClassVar[type[torchvision.datasets.CIFAR10]]

    def listed(self) -> list[tuple[str, str]]:
        """The batch files, with the MD5 sums that torchvision lists."""
        return [(n, m) for n, m in (*self.official.train_list, *self.official.test_list)]

    def read(self, root: Path, train: bool) -> tuple[Tensor, Array]:
        """Images by torchvision's reader, and labels."""
        # Checked by us a moment ago, and with a clearer message; nobody needs the classes' names.
        known = {"_check_integrity": lambda _: True, "_load_meta": lambda _: None}
        images, labels = [], []
        for name, md5 in self.official.train_list if train else self.official.test_list:
            # One file at a time, so that a damaged one can be named.
            one = {"train_list": [(name, md5)], "test_list": [(name, md5)]}
            reader = type(self.name, (self.official,), {**known, **one})
            path = root / self.info.home / name
            part = _reading(self.name, path, partial(reader, root, train=train))
            x, y = np.moveaxis(part.data, 3, 1), np.asarray(part.targets)
            if x.dtype != np.uint8 or y.dtype.kind not in "iu" or len(x) != len(y):
                raise DataError(
                    f"{self.name}: {path} cannot be read: {len(x):,} images ({x.dtype}) and "
                    f"{len(y):,} labels ({y.dtype})"
                )
            images.append(x)
            labels.append(y)
        return torch.from_numpy(np.concatenate(images)), np.concatenate(labels)


CIFAR_LICENCE = "none stated; the authors ask for the citation"


class CIFAR10(Cifar):
    """50,000 + 10,000 colour images of 10 classes, 32x32; 5,000 of train are validation."""

    name = "cifar10"
    classes = 10
    official = torchvision.datasets.CIFAR10
    info = Info(
        "images", 10, (45_000, 5_000, 10_000), "3x32x32", CIFAR_LICENCE, "cifar-10-batches-py"
    )
    archives = (Remote(official.filename, official.tgz_md5, (official.url,), 170_498_071),)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100(Cifar):
    """50,000 + 10,000 colour images of 100 classes, 32x32; 5,000 of train are validation."""

    name = "cifar100"
    classes = 100
    official = torchvision.datasets.CIFAR100
    info = Info(
        "images", 100, (45_000, 5_000, 10_000), "3x32x32", CIFAR_LICENCE, "cifar-100-python"
    )
    archives = (Remote(official.filename, official.tgz_md5, (official.url,), 169_001_437),)
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)


class Idx(Images):
    """60,000 train and 10,000 test grey images, 28x28, in IDX files; validation from train."""

    source = "the IDX file format of LeCun, Cortes, Burges"
    md5s: ClassVar[tuple[str, str, str, str]]  # in the order of FILES

    FILES = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def listed(self) -> list[tuple[str, str]]:
        """The four unpacked files."""
        return list(zip(self.FILES, self.md5s, strict=True))

    def read(self, root: Path, train: bool) -> tuple[Tensor, Array]:
        """Images and labels by torchvision's readers."""
        images, labels = self.FILES[:2] if train else self.FILES[2:]
        home = root / self.info.home
        x = _reading(self.name, home / images, lambda: read_image_file(str(home / images)))
        y = _reading(self.name, home / labels, lambda: read_label_file(str(home / labels)))
        return x.unsqueeze(1), y.numpy()


def _gz(mirrors: tuple[str, ...], sums: list[tuple[str, str]], sizes: tuple[int, ...]) -> Any:
    return tuple(
        Remote(name, md5, tuple(m + name for m in mirrors), size)
        for (name, md5), size in zip(sums, sizes, strict=True)
    )


class MNIST(Idx):
    """60,000 + 10,000 handwritten digits, 28x28; 6,000 of train are validation."""

    @dataclass(frozen=True)
    class Config(Images.Config):
        """As for other images; no augmentation by default, since digits are not symmetric."""

        augment: tuple[Name, ...] = ()

    source = "LeCun, Bottou, Bengio, Haffner 1998, Gradient-Based Learning, Proc. IEEE 86(11)"
    name = "mnist"
    classes = 10
    info = Info("images", 10, (54_000, 6_000, 10_000), "1x28x28", "CC BY-SA 3.0", "MNIST/raw")
    archives = _gz(
        tuple(torchvision.datasets.MNIST.mirrors),
        torchvision.datasets.MNIST.resources,
        (9_912_422, 28_881, 1_648_877, 4_542),
    )
    md5s = (
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    )
    mean = (0.1307,)
    std = (0.3081,)


class FashionMNIST(Idx):
    """60,000 + 10,000 grey images of clothes, 28x28; 6,000 of train are validation."""

    source = "Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747"
    name = "fashion-mnist"
    classes = 10
    info = Info("images", 10, (54_000, 6_000, 10_000), "1x28x28", "MIT", "FashionMNIST/raw")
    archives = _gz(
        (
            *torchvision.datasets.FashionMNIST.mirrors,
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        torchvision.datasets.FashionMNIST.resources,
        (26_421_880, 29_515, 4_422_102, 5_148),
    )
    md5s = (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    )
    mean = (0.2860,)
    std = (0.3530,)
