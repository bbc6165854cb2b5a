"""The 1,797 handwritten digits, 8x8, that scikit-learn ships: no download."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from snnbench.data.base import Data, Dataset, Info, Split, balanced, stratified
from snnbench.data.splits import hash_indices
from snnbench.errors import DataError
from snnbench.spec import digest

SHA256 = (
    "631cb83de3a2ab62bb6a6377fd0959c2622ce06102218671940106ad649966d0"  # of all images and labels
)


def images() -> tuple[Tensor, Tensor]:
    """All images, uint8 [1797, 1, 8, 8], grey levels 0..16 stretched to 0..240, and labels."""
    # Only scikit-learn's file is wanted: to import it would cost every command two seconds.
    file = str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz"))
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: scikit-learn's digits cannot be read ({error}); install scikit-learn again"
        ) from None
    x = torch.as_tensor(table[:, :-1] * 15).reshape(-1, 1, 8, 8)
    return x, torch.as_tensor(table[:, -1], dtype=torch.int64)


def official(x: Tensor, y: Tensor) -> bool:
    """Whether images and labels are those known, bit for bit."""
    return digest(x.numpy().tobytes(), y.numpy().tobytes()) == SHA256


def parts(y: Tensor) -> list[Tensor]:
    """Indices of test, validation and train, fixed for ever."""
    return stratified(y.numpy(), "digits", (0.2, 0.1))


class Digits(Dataset):
    """1,797 real 8x8 grey images of digits, embedded; 1,259 train, 179 validation, 359 test."""

    @dataclass(frozen=True)
    class Config:
        """Limits for tiny class-balanced subsets."""

        train_limit: Annotated[int, Ge(10)] | None = None
        test_limit: Annotated[int, Ge(10)] | None = None

    source = "Alpaydin & Kaynak 1998, UCI optical recognition of handwritten digits; scikit-learn"

    info = Info("images", 10, (1259, 179, 359), "1x8x8", "BSD-3-Clause, as part of scikit-learn")

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits; grey levels 0..16 are stretched to 0..240."""
        x, y = images()
        test, val, train = parts(y)
        train = train[balanced(y[train].numpy(), "digits-train", self.config.train_limit)]
        test = test[balanced(y[test].numpy(), "digits-test", self.config.test_limit)]
        # Mean and deviation of all training pixels of the full split.
        return Data(
            Split(x[train], y[train]),
            Split(x[val], y[val]),
            Split(x[test], y[test]),
            classes=10,
            mean=(0.287,),
            std=(0.354,),
            verified=official(x, y),
            split_hash=hash_indices(train, val, test),
        )

    def fetch(self, root: Path) -> str:
        """Nothing to do."""
        return "digits is part of scikit-learn: nothing to download"
