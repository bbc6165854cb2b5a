"""Folders of JPEG files, a folder a class: what ImageNet and Tiny-ImageNet share, and the latter.

Tiny-ImageNet is decoded once (64x64, 1.4 GB) and then memory-mapped and augmented in batch like the
small sets.  ImageNet is too large for that: see `imagenet.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
from snnbench.data import mix, official
from snnbench.data.base import Data, Info, Verdict, get_it
from snnbench.data.fetch import Remote
from snnbench.data.prepared import Part, PreparedSet, write_splits
from snnbench.data.splits import hash_indices, validation
from snnbench.errors import DataError
from snnbench.spec import digest

Array: TypeAlias = np.ndarray[Any, Any]
NOTES = "val/val_annotations.txt"  # of Tiny-ImageNet
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
            (place, file)
            for place, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith((".jpeg", ".jpg"))
        )
        paths += [Path(*parts) for parts in found]
        labels += [label] * len(found)
    return Listing(paths, np.array(labels, dtype=np.int64))


def classes_in(folder: Path) -> list[str]:
    """Names of the folders in it, in order; none where it is missing."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def read(path: Path) -> bytes:
    """The content of a file; raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


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


class Folders(PreparedSet):
    """Images in folders by class, prepared once; validation is cut from train, stratified."""

    archives: ClassVar[tuple[Remote, ...]]

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Train, and the published validation set, which is the test set here."""
        raise NotImplementedError

    def release(self, root: Path) -> official.Release:
        """What the publishers offer."""
        raise NotImplementedError

    def files(self, root: Path) -> Sequence[Path]:
        """Files that are read beside the images."""
        return ()

    def recipe(self) -> dict[str, Any]:
        """Every argument that changes a byte of the prepared store."""
        return {"val_fraction": self.config.val_fraction, "torchvision": torchvision.__version__}

    def present(self, root: Path) -> bool:
        """Whether its folders are there, and not in part."""
        home = root / self.info.home
        whole = all((home / part).is_dir() for part in ("train", "val"))
        return whole and not self.release(root).cut_short

    def look(self, root: Path) -> tuple[str, Verdict]:
        """Names, sizes and times of all files, and the archives that vouch for them."""
        train, test, rest, val = self._split(root)
        paths = [*train.paths, *test.paths, *self.files(root)]
        release = self.release(root)
        counts = (len(train.paths), len(test.paths))
        verdict = release.judge(release.measured(paths), counts, self.info.sizes)
        return digest(official.stamp(paths, root), hash_indices(rest, val)), verdict

    def verify(self, root: Path) -> Verdict:
        """The archives, the files against them, and the number of images."""
        self._present(root)
        train, test = self.listings(root)
        release, counts = self.release(root), (len(train.paths), len(test.paths))
        measured = release.measure([*train.paths, *test.paths, *self.files(root)])
        return release.judge(measured, counts, self.info.sizes)

    def fetch(self, root: Path) -> str:
        """Download the archive and unpack it; where its licence forbids that, say what to do."""
        home = root / self.info.home
        if not self.info.manual:
            self.release(root).fetch(self.progress)
        elif not self.present(root):
            raise DataError(f"{self.name} cannot be fetched: {self.info.manual}")
        return f"{self.name} is in {home}"

    def _present(self, root: Path) -> None:
        home = root / self.info.home
        missing = [home / part for part in ("train", "val") if not (home / part).is_dir()]
        if not self.present(root):
            what = f"{missing[0]} is missing" if missing else f"{home} is half unpacked"
            raise DataError(f"{self.name}: {what}; {get_it(self.name, root, self.info.home)}")

    def _split(self, root: Path) -> tuple[Listing, Listing, Array, Array]:
        """Listings of train and test, and the indices of train and of validation in train."""
        self._present(root)
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

    def release(self, root: Path) -> official.Release:
        """The archive, which holds the folder that it lies in."""
        return official.Release(self.name, root, root / self.info.home, root, self.archives)

    def files(self, root: Path) -> Sequence[Path]:
        """The labels of the published validation set."""
        return (root / self.info.home / NOTES,)

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Train by folder; test by the file of annotations."""
        home = root / self.info.home
        classes, notes = classes_in(home / "train"), home / NOTES
        try:
            rows = [line.split("\t")[:2] for line in read(notes).decode().splitlines()]
            word_of = dict(rows)
        except ValueError as error:
            raise DataError(f"{notes}: cannot be read: {error}") from error
        if lost := {*word_of.values()} - {*classes}:
            get = get_it(self.name, root, self.info.home)
            raise DataError(f"{self.name}: {home / 'train' / min(lost)} is missing; {get}")
        label_of = {name: classes.index(word) for name, word in word_of.items()}
        names = sorted(label_of, key=lambda name: (label_of[name], name))
        test = Listing(
            [home / "val" / "images" / name for name in names],
            np.array([label_of[name] for name in names], dtype=np.int64),
        )
        return by_class(home / "train", classes), test

    def fill(self, root: Path, half: Path) -> dict[str, Any]:
        """Decode every image."""
        train, test, rest, val = self._split(root)

        def part(listing: Listing, index: Array) -> Part:
            paths = [listing.paths[i] for i in index]
            return Part((_pixels(path) for path in paths), listing.labels[index])

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
            "split": hash_indices(rest, val, everything),
        }

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits, memory-mapped."""
        names = self.config.augment
        store, verdict = self.store(root, allow_unverified)
        splits, split_hash = self.used(store)
        fill = torch.tensor([round(255 * m) for m in MEAN], dtype=torch.uint8)
        alone = [name for name in names if name not in ("cutmix", "mixup")]
        return Data(
            *splits,
            classes=self.classes,
            mean=MEAN,
            std=STD,
            verified=verdict.verified,
            augment=augmenting.pipeline(alone, fill=fill) if alone else None,
            mix=mix.mixing(names, self.classes),
            split_hash=split_hash,
        )


def _pixels(path: Path) -> Array:
    image = decode(read(path), path)
    if image.shape != (3, 64, 64):
        raise DataError(f"{path}: {tuple(image.shape)} and not 3x64x64")
    pixels: Array = image.numpy()
    return pixels
