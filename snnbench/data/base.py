"""What a dataset hands to training: three splits in memory, their hash, and how to encode them.

Shapes: N samples, B batch, T timesteps, C H W channels, height, width.  Images are kept as uint8;
normalisation to float happens per batch on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from snnbench.spec import digest

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class Split:
    """Samples x uint8 [N, C, H, W] and labels y int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> Split:
        """The split on a device."""
        return Split(self.x.to(device), self.y.to(device))


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
    data_hash: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [p for s in (self.train, self.val, self.test) for p in (s.x, s.y)]
        self.data_hash = digest(*(p.contiguous().numpy().tobytes() for p in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample at one timestep, (C, H, W)."""
        return tuple(self.train.x.shape[1:])

    def encode(self, x_B: Tensor, T: int) -> Tensor:
        """Direct encoding: the normalised image at every timestep, float [T, B, C, H, W]."""
        mean = torch.tensor(self.mean, device=x_B.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=x_B.device).view(-1, 1, 1)
        x_B = (x_B.float() / 255 - mean) / std
        return x_B.expand(T, *x_B.shape)


class Dataset:
    """A named source of `Data`."""

    @dataclass(frozen=True)
    class Config:
        """Options, validated from the suite's [data] table."""

    source: ClassVar[str]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.Config() if config is None else config

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """Read it; raises DataError if it is missing, damaged or not what it claims to be."""
        raise NotImplementedError

    def fetch(self, root: Path) -> str:
        """Download it where that is needed; says where it is."""
        raise NotImplementedError


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
