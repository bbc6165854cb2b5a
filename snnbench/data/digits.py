"""The 1,797 handwritten digits, 8x8, that scikit-learn ships: no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from sklearn.datasets import load_digits

from snnbench.data.base import Data, Dataset, Split, balanced, stratified
from snnbench.spec import digest

SHA256 = (
    "631cb83de3a2ab62bb6a6377fd0959c2622ce06102218671940106ad649966d0"  # of all images and labels
)


class Digits(Dataset):
    """1,797 real 8x8 grey images of digits, embedded; 1,259 train, 179 validation, 359 test."""

    @dataclass(frozen=True)
    class Config:
        """Limits for tiny class-balanced subsets."""

        train_limit: Annotated[int, Ge(10)] | None = None
        test_limit: Annotated[int, Ge(10)] | None = None

    source = "Alpaydin & Kaynak 1998, UCI optical recognition of handwritten digits; scikit-learn"

    def load(self, root: Path, allow_unverified: bool) -> Data:
        """All three splits; grey levels 0..16 are stretched to 0..240."""
        bunch = load_digits()
        y = torch.as_tensor(bunch.target, dtype=torch.int64)
        x = (torch.as_tensor(bunch.images) * 15).to(torch.uint8).unsqueeze(1)
        test, val, train = stratified(bunch.target, "digits", (0.2, 0.1))
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
            verified=digest(x.numpy().tobytes(), y.numpy().tobytes()) == SHA256,
        )

    def fetch(self, root: Path) -> str:
        """Nothing to do."""
        return "digits is part of scikit-learn: nothing to download"
