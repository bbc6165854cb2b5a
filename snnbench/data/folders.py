"""Folders of JPEG files, a folder a class: what ImageNet and Tiny-ImageNet share, and the latter.

Tiny-ImageNet is decoded once (64x64, 1.4 GB) and then memory-mapped and augmented in batch like the
small sets.  ImageNet is too large for that: see `imagenet.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
import torchvision
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from snnbench.data import augment as augmenting
from snnbench.data import mix
from snnbench.data.base import Data, Dataset, Info, Split, Verdict, balanced
from snnbench.data.fetch import Remote, download, extract, md5_of
from snnbench.data.prepared import Part, Store, clean, exists, prepared, write_splits
from snnbench.data.splits import hash_indices, validation
from snnbench.errors import DataError

Array: TypeAlias = np.ndarray[Any, Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training pixels


@dataclass(frozen=True)
class Listing:
    """Files of a split, by class then name, and their labels."""

    paths: Sequence[Path]
    labels: Array


def by_class(folder: Path, classes: Sequence[str]) -> Listing:
    """The images in `folder/CLASS`, or below it, for each class."""
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            p for p in (folder / name).rglob("*") if p.suffix.lower() in (".jpeg", ".jpg")
        )
        paths += found
        labels += [label] * len(found)
    return Listing(paths, np.array(labels, dtype=np.int64))


def decode(content: bytes | Array, name: object) -> Tensor:
    """The image of a JPEG file, uint8 [3, H, W]; raises DataError if it is none."""
    try:
        data = torch.from_numpy(np.frombuffer(bytes(content), dtype=np.uint8).copy())
        image: Tensor = decode_image(data, ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{name}: no image, or a damaged one: {str(error).splitlines()[0]}"
        ) from None
    return image


class Folders(Dataset):
    """Images in folders by class, prepared once; validation is cut from train, stratified."""

    name: ClassVar[str]
    classes: ClassVar[int]
    info: ClassVar[Info]
    archives: ClassVar[tuple[Remote, ...]]

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Train, and the published validation set, which is the test set here."""
        raise NotImplementedError

    def build(self, root: Path, half: Path) -> dict[str, Any]:
        """Fill the store's folder; `samples` and `split` for the manifest."""
        raise NotImplementedError

    def recipe(self) -> dict[str, Any]:
        """Every argument that changes a byte of the prepared store."""
        return {"val_fraction": self.config.val_fraction, "torchvision": torchvision.__version__}

    def store(self, root: Path, allow_unverified: bool) -> Store:
        """The prepared store, made where it is missing."""

        def build(half: Path) -> dict[str, Any]:
            md5 = self._md5(root)
            verified = md5 == {remote.name: remote.md5 for remote in self.archives}
            self._allow(verified, allow_unverified)
            return {**self.build(root, half), "md5": md5, "verified": verified}

        if not exists(root, self.name, self.recipe()):
            self._present(root)
        store = prepared(root, self.name, self.recipe(), None, build)
        self._allow(bool(store.manifest["verified"]), allow_unverified)
        return store

    def prepare(self, root: Path, allow_unverified: bool) -> Mapping[str, Any]:
        """Make the store where it is missing; its folder and manifest."""
        store = self.store(root, allow_unverified)
        return {"folder": str(store.folder), **store.manifest}

    def clean(self, root: Path) -> Sequence[Path]:
        """Delete every store of this set."""
        return clean(root, self.name)

    def verify(self, root: Path) -> Verdict:
        """The archives against their MD5 sums, and the number of images."""
        self._present(root)
        home, found = root / self.info.home, self._md5(root)
        lines = []
        for remote in self.archives:
            md5 = found.get(remote.name)
            what = "not there, so that nothing vouches for it"
            if md5 is not None:
                what = f"{'the' if md5 == remote.md5 else 'not the'} official archive, MD5 {md5}"
            lines.append(f"{home / remote.name}: {what}")
        train, test = self.listings(root)
        sizes = (sum(self.info.sizes[:2]), self.info.sizes[2])
        whole = (len(train.paths), len(test.paths)) == sizes
        seen = f"{len(train.paths):,} images for training and {len(test.paths):,} for test"
        lines.append(
            f"{self.name}: {seen}"
            + ("" if whole else "; the full set has {:,} and {:,}".format(*sizes))
        )
        verified = whole and all(found.get(r.name) == r.md5 for r in self.archives)
        if not verified:
            lines.append(f"{self.name}: not official; a run needs --allow-unverified-data")
        return Verdict(verified, lines)

    def fetch(self, root: Path) -> str:
        """Download the archive and unpack it; where its licence forbids that, say what to do."""
        home = root / self.info.home
        if not (home / "train").is_dir():
            if self.info.manual:
                raise DataError(f"{self.name} cannot be fetched: {self.info.manual}")
            for remote in self.archives:
                extract(download(remote, home, self.progress), root)
        return f"{self.name} is in {home}"

    def _present(self, root: Path) -> None:
        home = root / self.info.home
        for part in ("train", "val"):
            if not (home / part).is_dir():
                raise DataError(
                    f"{self.name}: {home / part} is missing; get the data with "
                    f"`snnbench data fetch {self.name}`, or name the folder that holds "
                    f"{self.info.home}/ with --data-root or SNNBENCH_DATA"
                )

    def _md5(self, root: Path) -> dict[str, str]:
        there = [root / self.info.home / remote.name for remote in self.archives]
        return {path.name: md5_of(path) for path in there if path.is_file()}

    def _allow(self, verified: bool, allow_unverified: bool) -> None:
        if not verified and not allow_unverified:
            raise DataError(
                f"{self.name}: its archive is not there, or not the official one, so that nothing "
                "vouches for these images; if you trust them, --allow-unverified-data"
            )

    def _split(self, root: Path) -> tuple[Listing, Listing, Array, Array]:
        """Listings of train and test, and the indices of train and of validation in train."""
        train, test = self.listings(root)
        if not len(train.paths) or not len(test.paths):
            raise DataError(f"{self.name}: {root / self.info.home} holds no JPEG files")
        val, rest = validation(
            self.name, train.labels, f"{self.name}-val", self.config.val_fraction
        )
        if not len(val):
            raise DataError(f"{self.name}: too few images a class for a validation split")
        return train, test, rest.numpy(), val.numpy()


class TinyImageNet(Folders):
    """100,000 + 10,000 colour images of 200 classes, 64x64; the published validation set is test.

    The published test set has no labels.
    """

    @dataclass(frozen=True)
    class Config:
        """As for CIFAR: augmentation for train only, validation cut from train, tiny subsets."""

        augment: tuple[augmenting.Name | mix.Name, ...] = ("crop", "flip")
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
        train_limit: Annotated[int, Ge(1)] | None = None
        test_limit: Annotated[int, Ge(1)] | None = None

    source = "Le & Yang 2015, Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N"
    name = "tiny-imagenet"
    classes = 200
    info = Info(
        "images",
        200,
        (90_000, 10_000, 10_000),
        "3x64x64",
        "images as in ImageNet: research only",
        "tiny-imagenet-200",
    )
    archives = (
        Remote(
            "tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
            248_100_043,
        ),
    )

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Train by folder; test by the file of annotations."""
        home = root / self.info.home
        classes = sorted(p.name for p in (home / "train").iterdir() if p.is_dir())
        notes = home / "val" / "val_annotations.txt"
        try:
            rows = [line.split("\t")[:2] for line in notes.read_text("utf-8").splitlines()]
            label_of = {name: classes.index(word) for name, word in rows}
        except (OSError, ValueError) as error:
            raise DataError(f"{notes}: cannot be read: {error}") from error
        names = sorted(label_of, key=lambda name: (label_of[name], name))
        test = Listing(
            [home / "val" / "images" / name for name in names],
            np.array([label_of[name] for name in names], dtype=np.int64),
        )
        return by_class(home / "train", classes), test

    def build(self, root: Path, half: Path) -> dict[str, Any]:
        """Decode every image."""
        train, test, rest, val = self._split(root)

        def part(listing: Listing, index: Array) -> Part:
            paths = [listing.paths[i] for i in index]
            return Part((_read(path) for path in paths), listing.labels[index])

        everything = np.arange(len(test.paths))
        parts = {
            "train": part(train, rest),
            "val": part(train, val),
            "test": part(test, everything),
        }
        samples = write_splits(half, parts, f"prepare {self.name}", self.progress)
        return {
            "samples": samples,
            "shape": [3, 64, 64],
            "source": hash_indices(rest, val, everything),
        }

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits, memory-mapped."""
        c, store = self.config, self.store(root, allow_unverified)
        train, val, test = (store.split(s) for s in ("train", "val", "test"))
        limit = None
        if c.train_limit is not None:
            limit = max(self.classes, round(c.train_limit * c.val_fraction))
        fill = torch.tensor([round(255 * m) for m in MEAN], dtype=torch.uint8)
        alone = [name for name in c.augment if name not in ("cutmix", "mixup")]
        return Data(
            _limited(train, f"{self.name}-train", c.train_limit),
            _limited(val, f"{self.name}-val", limit),
            _limited(test, f"{self.name}-test", c.test_limit),
            classes=self.classes,
            mean=MEAN,
            std=STD,
            verified=bool(store.manifest["verified"]),
            augment=augmenting.pipeline(alone, fill=fill) if alone else None,
            mix=mix.mixing(c.augment, self.classes),
            split_hash=str(store.manifest["source"]),
        )


def _read(path: Path) -> Array:
    image = decode(path.read_bytes(), path)
    if image.shape != (3, 64, 64):
        raise DataError(f"{path}: {tuple(image.shape)} and not 3x64x64")
    pixels: Array = image.numpy()
    return pixels


def _limited(split: Split, salt: str, limit: int | None) -> Split:
    if limit is None:
        return split
    index = balanced(split.y.numpy(), salt, limit)
    return Split(split.x[index], split.y[index])
