"""CIFAR-10 and CIFAR-100 through torchvision; the only door to torchvision's datasets.

A copy counts as verified if every file has the MD5 sum that torchvision lists for the official
archive.  Any other copy is refused unless the user allows it, and its results say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.error import URLError

import numpy as np
import torch
import torchvision
from annotated_types import Ge, Gt, Lt
from torchvision.datasets.utils import check_integrity

from snnbench.data.augment import Name, pipeline
from snnbench.data.base import Data, Dataset, Split, balanced, stratified
from snnbench.errors import DataError


class Cifar(Dataset):
    """50,000 train and 10,000 test colour images, 32x32; validation is cut from train."""

    @dataclass(frozen=True)
    class Config:
        """`train_limit` and `test_limit` give fixed, class-balanced subsets.

        Validation holds `val_fraction` of train, stratified; augmentation is for train only.
        """

        augment: tuple[Name, ...] = ("crop", "flip")
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
        train_limit: Annotated[int, Ge(1)] | None = None
        test_limit: Annotated[int, Ge(1)] | None = None

    source = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"
    name: ClassVar[str]
    classes: ClassVar[int]
    official: ClassVar[type[torchvision.datasets.CIFAR10]]
    # Mean and deviation of the training pixels.
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits; raises DataError if the copy is missing, or not the official one."""
        verified = self._verify(root, allow_unverified)
        train_x, train_y = self._read(root, train=True)
        test_x, test_y = self._read(root, train=False)
        c = self.config
        val, rest = stratified(train_y, f"{self.name}-val", (c.val_fraction,))
        rest = rest[balanced(train_y[rest.numpy()], f"{self.name}-train", c.train_limit)]
        if c.train_limit is not None:
            # A tiny study needs no full validation split: keep the proportion.
            limit = max(self.classes, round(c.train_limit * c.val_fraction))
            val = val[balanced(train_y[val.numpy()], f"{self.name}-val", limit)]
        test = balanced(test_y, f"{self.name}-test", c.test_limit)
        fill = torch.tensor([round(255 * m) for m in self.mean], dtype=torch.uint8)
        return Data(
            _split(train_x, train_y, rest),
            _split(train_x, train_y, val),
            _split(test_x, test_y, test),
            classes=self.classes,
            mean=self.mean,
            std=self.std,
            verified=verified,
            augment=pipeline(c.augment, fill=fill) if c.augment else None,
        )

    def fetch(self, root: Path) -> str:
        """Download the official archive through torchvision; raises DataError if that fails."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.official(root, train=True, download=True)
        except (URLError, OSError, RuntimeError) as error:
            raise DataError(f"{self.name}: cannot be downloaded to {root}: {error}") from error
        return f"{self.name} is in {root / self.official.base_folder}"

    def _verify(self, root: Path, allow_unverified: bool) -> bool:
        folder = root / self.official.base_folder
        listed = [*self.official.train_list, *self.official.test_list]
        missing = [name for name, _ in listed if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"{self.name}: {folder / missing[0]} is missing; get the data with "
                f"`snnbench data fetch {self.name}`, or name the folder that holds "
                f"{self.official.base_folder}/ with --data-root or SNNBENCH_DATA"
            )
        odd = [name for name, md5 in listed if not check_integrity(str(folder / name), md5)]
        if odd and not allow_unverified:
            raise DataError(
                f"{self.name}: {folder / odd[0]} is not the official file (its MD5 sum differs, "
                f"{len(odd)} of {len(listed)} files); use the official copy, or, if you trust this "
                "one, --allow-unverified-data"
            )
        return not odd

    def _read(self, root: Path, train: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        # Checked by us a moment ago, and with a clearer message; nobody needs the classes' names.
        reader = type(
            self.name,
            (self.official,),
            {"_check_integrity": lambda _: True, "_load_meta": lambda _: None},
        )
        try:
            read = reader(root, train=train)
            return read.data, np.asarray(read.targets)
        except Exception as error:
            raise DataError(f"{self.name}: the copy in {root} cannot be read: {error}") from error


def _split(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], index: torch.Tensor) -> Split:
    """The chosen images as [N, C, H, W] and their labels."""
    images = torch.from_numpy(x[index.numpy()]).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.from_numpy(y[index.numpy()]).long())


class CIFAR10(Cifar):
    """50,000 + 10,000 colour images of 10 classes, 32x32; 5,000 of train are validation."""

    name = "cifar10"
    classes = 10
    official = torchvision.datasets.CIFAR10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100(Cifar):
    """50,000 + 10,000 colour images of 100 classes, 32x32; 5,000 of train are validation."""

    name = "cifar100"
    classes = 100
    official = torchvision.datasets.CIFAR100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
