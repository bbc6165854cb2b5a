"""What a dataset hands to training: three splits, their hash, and how to encode them.

Shapes: N samples, B batch, T timesteps, C H W channels, height, width, F features, K classes.
Images are kept as uint8 [N, C, H, W].  Samples that vary over time are kept as uint8
[N, T, C, H, W], or [N, T, F] in one dimension, and their T is fixed when they are prepared.
Normalisation to float happens per batch on the device.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from snnbench.errors import DataError
from snnbench.spec import digest

Augment = Callable[[Tensor, torch.Generator], Tensor]
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Progress = Callable[[str, int, int | None], None]  # what, done so far, in all where that is known

CHUNK_BYTES = 2**28  # worked on at a time, so that long recordings do not fill the memory


@dataclass
class Split:
    """Samples x uint8 [N, C, H, W], or [N, T, ...] over time, and labels y int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Split:
        """The split on a device."""
        return Split(self.x.to(device), self.y.to(device))

    def content_hashes(self) -> list[str]:
        """SHA-256 of every sample's bytes."""
        return [digest(self.x[i].contiguous().cpu().numpy().tobytes()) for i in range(len(self))]

    def batches(
        self,
        order: Tensor,
        batch: int,
        augment: Augment | None,
        generator: torch.Generator,
        chunk: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches in that order, augmented; what remains of the order is left out.

        About `chunk` samples are augmented at a time: each operation of a policy then runs once for
        all the samples that drew it.
        """
        order = order[: len(order) // batch * batch].to(self.y.device)
        at_once = min(chunk, CHUNK_BYTES // max(1, prod(self.x.shape[1:])))
        for index in order.split(max(1, at_once // batch) * batch):
            x, y = self.x[index], self.y[index]
            x = x if augment is None else augment(x, generator)
            yield from zip(x.split(batch), y.split(batch), strict=True)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once: to bring it there in every step would wait for the device."""
    return torch.tensor(values, device=device)


@dataclass
class Data:
    """A loaded dataset. The test split never takes part in a choice."""

    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    verified: bool = False  # byte for byte the official copy, as far as checksums tell
    augment: Augment | None = None
    mix: Mix | None = None  # of a batch's samples and labels, after augmentation
    T: int | None = None  # timesteps that the samples were prepared with; None for images
    scale: float = 255.0  # the uint8 value that is 1.0 before normalisation
    packed: tuple[int, ...] | None = None  # one timestep's shape where x holds one bit a pixel
    split_hash: str = ""  # of the indices of the three splits
    data_hash: str = ""  # of all samples and labels; computed where it is not given

    def __post_init__(self) -> None:
        self.data_hash = self.data_hash or hash_splits(self.train, self.val, self.test)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample at one timestep, (C, H, W) or (F,)."""
        if self.packed is not None:
            return self.packed
        return tuple(self.train.x.shape[1 if self.T is None else 2 :])

    def encode(self, x_B: Tensor, T: int) -> Tensor:
        """Normalised input, float [T, B, ...].

        An image stands still: the same at every timestep, [T, B, C, H, W] (direct encoding). Frames
        of a recording follow one another, contiguous in that order. Raises DataError where they
        were prepared with another T.
        """
        if self.T is None:
            x_B = self._normalise(x_B)
            return x_B.expand(T, *x_B.shape)
        if self.T != T:
            raise DataError(
                f"this data was prepared with T = {self.T} and cannot be run with T = {T}; set "
                f"data.T = {T}, or axes.T = [{self.T}]"
            )
        if self.packed is not None and x_B.shape[2:] != self.packed:
            x_B = unpack_bits(x_B, self.packed)
        # Turned round while it is one byte a pixel: a layer then flattens [T, B] without a copy.
        return self._normalise(x_B.transpose(0, 1).contiguous())

    def _normalise(self, x: Tensor) -> Tensor:
        places = (-1, *[1] * (len(self.shape) - 1))
        mean, std = (_constant(v, x.device).view(places) for v in (self.mean, self.std))
        normalised: Tensor = (x.float() / self.scale - mean) / std
        return normalised

    def report(self) -> dict[str, Any]:
        """The split's hash, its counts per class, and samples that two splits share, as data."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        hashes = {name: split.content_hashes() for name, split in splits.items()}
        return {
            "split_hash": self.split_hash,
            "data_hash": self.data_hash,
            "verified": self.verified,
            "samples": {name: len(split) for name, split in splits.items()},
            "per_class": {
                name: split.y.bincount(minlength=self.classes).tolist()
                for name, split in splits.items()
            },
            "shared_samples": {
                f"{a}/{b}": sum(h in set_a for h in hashes[b])
                for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
                for set_a in [set(hashes[a])]
            },
        }


def hash_splits(*splits: Split) -> str:
    """SHA-256 of all samples and labels, in order."""
    h = hashlib.sha256()
    for part in (p for s in splits for p in (s.x, s.y)):
        # A piece at a time: a memory-mapped split need not fit into memory.
        for piece in part.split(max(1, CHUNK_BYTES // max(1, prod(part.shape[1:])))):
            h.update(piece.contiguous().cpu().numpy().tobytes())
    return h.hexdigest()


def unpack_bits(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The zeros and ones, uint8 [N, T, *shape], of frames packed by `numpy.packbits`."""
    shift = torch.arange(7, -1, -1, dtype=torch.uint8, device=x.device)
    bits: Tensor = (x.unsqueeze(-1) >> shift) & 1
    frames: Tensor = bits.flatten(2)[..., : prod(shape)].unflatten(-1, tuple(shape))
    return frames


@dataclass(frozen=True)
class Info:
    """What a list of datasets says of one; `source` is the citation."""

    kind: str  # images, events, or simulated events
    classes: int
    # Samples of train, validation and test; None where those are cut here from the ones before.
    sizes: tuple[int, int | None, int | None]
    shape: str  # of a sample as it is published, as 3x32x32
    licence: str
    home: str = ""  # folder or files below the data root
    manual: str = ""  # what to do by hand where it cannot be fetched


@dataclass(frozen=True)
class Verdict:
    """What a copy of a dataset is: one line for each thing looked at.

    `why` is one clause where it is not the official copy; `md5` has the sums of its archives.
    """

    verified: bool
    lines: Sequence[str]
    why: str = ""
    md5: Mapping[str, str] = field(default_factory=dict)

    def allow(self, name: str, root: Path, allow_unverified: bool) -> bool:
        """Whether it is verified; raises DataError if it is not, and the user does not allow it."""
        if not self.verified and not allow_unverified:
            raise DataError(
                f"{name}: {self.why}; {command('verify', name, root)} says what this copy is; use "
                "the official one, or, if you trust this one, --allow-unverified-data"
            )
        return self.verified


def command(verb: str, name: str, root: Path) -> str:
    """The whole command, as a user can paste it."""
    return f"`snnbench data {verb} {name} --data-root {shlex.quote(str(root))}`"


def get_it(name: str, root: Path, holds: str) -> str:
    """What to do about data that is not there; `holds` is what a data root has of it."""
    return (
        f"get the data with {command('fetch', name, root)}, or name the folder that holds {holds}/ "
        "with --data-root or SNNBENCH_DATA"
    )


class Dataset:
    """A named source of `Data`."""

    @dataclass(frozen=True)
    class Config:
        """Options, validated from the suite's [data] table."""

    source: ClassVar[str]
    info: ClassVar[Info | None] = None

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config
        self.progress: Progress | None = None  # told of downloads and preparation

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """Read it; raises DataError if it is missing, damaged or not what it claims to be."""
        raise NotImplementedError

    def fetch(self, root: Path) -> str:
        """Download it where that is needed; says where it is."""
        raise NotImplementedError

    def verify(self, root: Path) -> Verdict:
        """What the copy below `root` is, all of it read; raises DataError if there is none.

        Of a dataset that is loaded, `verified` is what this says.
        """
        verified = self.load(root, True).verified
        return Verdict(verified, ["every checksum fits" if verified else "checksums differ"])

    def prepare(self, root: Path, allow_unverified: bool) -> Mapping[str, Any]:
        """Do ahead what `load` would do once; what was made, as data. Empty if there is nothing."""
        return {}

    def clean(self, root: Path) -> Sequence[Path]:
        """Delete what `prepare` made, with any options; what that was."""
        return []

    def present(self, root: Path) -> bool:
        """Whether something of it lies below `root`, or nothing is needed."""
        return self.info is None or not self.info.home or (root / self.info.home).is_dir()


def stratified(labels: np.ndarray[Any, Any], salt: str, parts: tuple[float, ...]) -> list[Tensor]:
    """Disjoint index sets with the given shares of every class, then the rest.

    Within a class, samples are taken in the order of SHA-256(salt:index): fixed for ever, the same
    with every library version, and independent of any seed.
    """
    chosen: list[list[int]] = [[] for _ in range(len(parts) + 1)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: digest(f"{salt}:{i}"))
        start = 0
        for part, share in enumerate(parts):
            end = start + round(share * len(members))
            chosen[part] += members[start:end]
            start = end
        chosen[-1] += members[start:]
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in chosen]


def balanced(labels: np.ndarray[Any, Any], salt: str, limit: int | None) -> Tensor:
    """Indices of a fixed, class-balanced subset of `limit` samples; all of them for None.

    Classes differ by at most one sample where `limit` is no multiple of their number.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    queues = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        queues.append(sorted(members, key=lambda i: digest(f"{salt}:{i}")))
    ranked = sorted((rank, queue[rank], queue) for queue in queues for rank in range(len(queue)))
    return torch.tensor(sorted(index for _, index, _ in ranked[:limit]), dtype=torch.int64)
