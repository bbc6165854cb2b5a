"""ImageNet from shards: JPEG files packed into large ones, decoded and augmented by workers.

Reading some large files in any order is fast where 1.3 million small ones are slow.  Worker
processes decode and augment one image at a time, by `torchvision.transforms.v2`: a random crop of
8% to 100% of the area, resized to 224, and a flip, for training; the middle 224 of a short side of
256 for validation and test (He et al. 2016, CVPR, arXiv 1512.03385, section 3.4, and the usual
code).  Each image has a seed of its own, drawn in order from the generator of the epoch, so that
the number of workers changes no pixel.

Shapes: N images, B batch, C H W channels, height, width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from snnbench.data import mix, official
from snnbench.data.base import Augment, Data, Info, Split
from snnbench.data.fetch import Remote, check_room
from snnbench.data.folders import (
    MEAN,
    STD,
    Array,
    Folders,
    Listing,
    by_class,
    classes_in,
    decode,
    read,
)
from snnbench.data.prepared import SPLITS, Store
from snnbench.data.splits import hash_indices
from snnbench.errors import DataError
from snnbench.spec import digest

SHARD_BYTES = 2**30
LARGE, SIDE = 256, 224
AHEAD = 4  # batches that each worker prepares before they are asked for
Step: TypeAlias = Literal["crop", "flip", "randaugment"]


class Shards:
    """JPEG files by number, from shards on disk; index int64 [N, 3]: shard, offset, length."""

    def __init__(self, folder: Path, index: Array) -> None:
        self.folder, self.index = folder, index
        self._open: dict[int, Array] = {}

    def __getitem__(self, i: int) -> bytes:
        shard, offset, length = (int(n) for n in self.index[i])
        if shard not in self._open:
            self._open[shard] = np.memmap(self.folder / shard_name(shard), np.uint8, "r")
        return self._open[shard][offset : offset + length].tobytes()


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"images.{number:05}.bin"


def pack(
    listings: Sequence[Listing], folder: Path, tell: Callable[[int, int], None], size: int
) -> Array:
    """Write all files into shards of about `size` bytes, in order; their index, int64 [N, 3]."""
    paths = [path for listing in listings for path in listing.paths]
    check_room(folder, sum(path.stat().st_size for path in paths))
    index = np.empty((len(paths), 3), dtype=np.int64)
    shard, offset, file = 0, 0, (folder / shard_name(0)).open("wb")
    try:
        for i, path in enumerate(paths):
            content = read(path)
            if not content.startswith(b"\xff\xd8"):
                decode(content, path)  # some of ImageNet's .JPEG files are PNG; others are damaged
            if offset and offset + len(content) > size:
                file.close()
                shard, offset = shard + 1, 0
                file = (folder / shard_name(shard)).open("wb")
            file.write(content)
            index[i] = shard, offset, len(content)
            offset += len(content)
            tell(i + 1, len(paths))
    finally:
        file.close()
    return index


class Decoded(torch.utils.data.Dataset[Tensor]):
    """Images by (number, seed): decoded, then transformed by torchvision with that seed."""

    def __init__(self, shards: Shards, transform: v2.Transform) -> None:
        self.shards, self.transform = shards, transform

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        number, seed = item
        image = decode(self.shards[number], f"image {number}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed: Tensor = self.transform(image)
        return changed


class Images:
    """The images of a split as training sees them: `x[index]` and `x.split(size)`, never all.

    Without augmentation: the middle 224x224. It stands where small sets have one tensor.
    """

    def __init__(self, shards: Shards, numbers: Tensor, device: torch.device, workers: int) -> None:
        self.shards, self.numbers, self.device, self.workers = shards, numbers, device, workers
        self.shape = (len(numbers), 3, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Tensor:
        """The images of a slice or of an index tensor, uint8 [B, 3, 224, 224]."""
        dataset = Decoded(self.shards, middle())
        chosen = self.numbers[index.cpu() if isinstance(index, Tensor) else index]
        images = [dataset[(int(n), 0)] for n in chosen.reshape(-1)]
        return torch.stack(images).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, by batches of that size, decoded ahead by the workers."""
        return self.load(self.numbers, torch.zeros_like(self.numbers), size, middle())

    def load(
        self, numbers: Tensor, seeds: Tensor, batch: int, transform: v2.Transform
    ) -> Iterator[Tensor]:
        """Batches of images, in the order of the numbers."""
        items = list(zip(numbers.tolist(), seeds.tolist(), strict=True))
        loader = DataLoader(
            Decoded(self.shards, transform),
            batch_sampler=[items[i : i + batch] for i in range(0, len(items), batch)],
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one, which is the method's
        )
        for x_B in loader:
            yield x_B.to(self.device, non_blocking=True)


@dataclass
class ImageSplit(Split):
    """A split whose images are read when they are needed."""

    x: Any  # Images
    transform: v2.Transform

    def to(self, device: torch.device) -> Split:
        """The split with its batches delivered to a device."""
        images = Images(self.x.shards, self.x.numbers, device, self.x.workers)
        return ImageSplit(images, self.y.to(device), self.transform)

    def batches(
        self,
        order: Tensor,
        batch: int,
        augment: Augment | None,
        generator: torch.Generator,
        chunk: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches in that order, augmented by the workers; the rest is left out."""
        order = order[: len(order) // batch * batch]
        seeds = torch.randint(2**62, (len(order),), generator=generator)
        feed = self.x.load(self.x.numbers[order], seeds, batch, self.transform)
        yield from zip(feed, self.y[order.to(self.y.device)].split(batch), strict=True)

    def content_hashes(self) -> list[str]:
        """SHA-256 of every image's file."""
        return [digest(self.x.shards[int(n)]) for n in self.x.numbers]


def middle() -> v2.Transform:
    """The middle 224x224 of a short side of 256."""
    return v2.Compose([v2.Resize(LARGE, antialias=True), v2.CenterCrop(SIDE)])


def random(names: Sequence[str]) -> v2.Transform:
    """The augmentations in that order, or the middle where no crop is among them."""
    known: dict[str, Callable[[], v2.Transform]] = {
        "crop": lambda: v2.RandomResizedCrop(SIDE, antialias=True),
        "flip": v2.RandomHorizontalFlip,
        "randaugment": v2.RandAugment,
    }
    steps = [known[name]() for name in names if name in known]
    return v2.Compose(steps if "crop" in names else [middle(), *steps])


class ImageNet(Folders):
    """1,281,167 + 50,000 photographs of 1,000 classes; the published validation set is test.

    Validation is cut from train: 4% of each class, about 50 images.
    """

    @dataclass(frozen=True)
    class Config:
        """`crop` is a random resized crop to 224; other options as for CIFAR."""

        augment: tuple[Step | mix.Name, ...] = ("crop", "flip")
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.04
        train_limit: Annotated[int, Ge(1)] | None = None
        test_limit: Annotated[int, Ge(1)] | None = None

    source = "Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge, IJCV 115"
    name = "imagenet"
    classes = 1000
    info = Info(
        "images",
        1000,
        (1_281_167, None, 50_000),
        "3x224x224 of any size",
        "research only, after registration",
        "imagenet",
        "its licence asks each user to register: log in at https://image-net.org/download, get "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, and unpack them as "
        "imagenet/train/WNID/*.JPEG and imagenet/val/WNID/*.JPEG below the data root, with the two "
        "archives in imagenet/",
    )
    archives = (
        Remote("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", ()),
        Remote("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", ()),
    )

    def release(self, root: Path) -> official.Release:
        """The two archives that a user unpacks: of train an archive a class, val without folders.

        They hold no labels of val: that its images lie in the right folders is not known.
        """

        def inside(path: str) -> str:
            part, _, name = path.partition("/")
            return name if part == "train" else name.rpartition("/")[2]

        home = root / self.info.home
        return official.Release(self.name, root, home, home, self.archives, inside)

    def listings(self, root: Path) -> tuple[Listing, Listing]:
        """Train and published validation by folder."""
        home = root / self.info.home
        classes = classes_in(home / "train")
        unknown = {*classes_in(home / "val")} - {*classes}
        if unknown:
            raise DataError(f"{home / 'val' / min(unknown)}: {home / 'train'} has no such class")
        return by_class(home / "train", classes), by_class(home / "val", classes)

    def fill(self, root: Path, half: Path) -> dict[str, Any]:
        """Pack every file into shards; the index of all, and the numbers of each split."""
        train, test, rest, val = self._split(root)

        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"prepare {self.name}", done, total)

        np.save(half / "index.npy", pack([train, test], half, tell, SHARD_BYTES))
        np.save(half / "labels.npy", np.concatenate([train.labels, test.labels]))
        numbers = {"train": rest, "val": val, "test": len(train.paths) + np.arange(len(test.paths))}
        for name, chosen in numbers.items():
            np.save(half / f"{name}.npy", chosen.astype(np.int64))
        names = [p.name for p in (*train.paths, *test.paths)]
        return {
            "samples": {name: len(chosen) for name, chosen in numbers.items()},
            "shape": [3, SIDE, SIDE],
            "split": hash_indices(*numbers.values()),
            "names": digest("\n".join(names)),
        }

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits, read when needed."""
        c = self.config
        store, verdict = self.store(root, allow_unverified)
        index, labels = (np.load(store.folder / f"{n}.npy") for n in ("index", "labels"))
        shards, workers = Shards(store.folder, index), min(8, os.cpu_count() or 1)
        numbers = {name: np.load(store.folder / f"{name}.npy") for name in SPLITS}
        index = self.chosen({name: labels[n] for name, n in numbers.items()})
        numbers = {name: n[index[name]] for name, n in numbers.items()}

        def split(chosen: Array) -> ImageSplit:
            images = Images(shards, torch.from_numpy(chosen), torch.device("cpu"), workers)
            return ImageSplit(images, torch.from_numpy(labels[chosen]), random(c.augment))

        split_hash = hash_indices(*numbers.values())
        return Data(
            split(numbers["train"]),
            split(numbers["val"]),
            split(numbers["test"]),
            classes=self.classes,
            mean=MEAN,
            std=STD,
            verified=verdict.verified,
            mix=mix.mixing(c.augment, self.classes),
            split_hash=split_hash,
            data_hash=_hash(store, split_hash),
        )


def _hash(store: Store, chosen: str) -> str:
    """Hash of which files there are, how long each is, and which of them are used."""
    return digest(store.manifest["names"], store.manifest["sha256"]["index.npy"], chosen)
