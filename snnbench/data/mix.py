"""Augmentation that mixes two images of a batch and their labels: CutMix and Mixup.

cutmix: Yun et al. 2019, ICCV, arXiv 1905.04899; a box of one image is pasted into the other.
mixup: Zhang et al. 2018, ICLR, arXiv 1710.09412; the pixels of both are averaged.

The partner of an image is its predecessor in the batch, whose order is random anyway, and one
weight holds for the whole batch, both as in `torchvision.transforms.v2`.  Alpha is 1, as in both
papers for CIFAR.  Every draw comes from a CPU generator and none depends on the pixels.

Shapes: B batch, K classes, samples [B, ..., H, W]; a recording's frames are mixed alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snnbench.data.base import Mix

Name = Literal["cutmix", "mixup"]
ALPHA = 1.0


def mixing(names: Sequence[str], classes: int) -> Mix | None:
    """A function of samples, labels [B] and a generator; None where no name is one of mixing.

    With both names each batch gets one of them, at even odds. The labels come back as class
    probabilities, float [B, K].
    """
    known = {"cutmix": cutmix, "mixup": mixup}
    chosen = [known[name] for name in names if name in known]
    if not chosen:
        return None

    def mix(x_B: Tensor, y_B: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        one = chosen[int(torch.randint(len(chosen), (), generator=g))]
        return one(x_B, F.one_hot(y_B, classes).float(), g)

    return mix


def mixup(x_B: Tensor, y_BK: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """weight * image + (1 - weight) * partner, rounded, and the labels in the same proportion."""
    weight = beta(ALPHA, g)
    partner = x_B.roll(1, 0).float()
    mixed = (x_B.float() * weight + partner * (1 - weight)).round().to(x_B.dtype)
    return mixed, blend(y_BK, weight)


def cutmix(x_B: Tensor, y_BK: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every image with a box of its partner; the labels in proportion to the areas.

    The box has (1 - weight) of the area and a uniform centre, and is clipped at the borders.
    """
    H, W = x_B.shape[-2:]
    weight = beta(ALPHA, g)
    column = int(torch.randint(W, (), generator=g))
    row = int(torch.randint(H, (), generator=g))
    half = 0.5 * math.sqrt(1 - weight)
    top, bottom = max(0, row - int(half * H)), min(H, row + int(half * H))
    left, right = max(0, column - int(half * W)), min(W, column + int(half * W))
    mixed = x_B.clone()
    mixed[..., top:bottom, left:right] = x_B.roll(1, 0)[..., top:bottom, left:right]
    return mixed, blend(y_BK, 1 - (bottom - top) * (right - left) / (H * W))


def blend(y_BK: Tensor, weight: float) -> Tensor:
    """weight * label + (1 - weight) * the partner's, [B, K]."""
    return y_BK * weight + y_BK.roll(1, 0) * (1 - weight)


def beta(alpha: float, g: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), by numpy, seeded from the generator."""
    seed = int(torch.randint(2**63 - 1, (), generator=g))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
