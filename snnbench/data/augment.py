"""Random augmentation of whole batches of uint8 images on any device.

crop and flip: the usual recipe for CIFAR (He et al. 2016, CVPR, arXiv 1512.03385, section 4.2).
cutout: DeVries & Taylor 2017, arXiv 1708.04552.
autoaugment: Cubuk et al. 2019, CVPR, arXiv 1805.09501, the CIFAR-10 policy as in torchvision.
randaugment: Cubuk et al. 2020, NeurIPS, arXiv 1909.13719, as in torchvision: 2 operations of 14,
magnitude 9 of 30.
roll: cyclic shifts by up to 5 pixels, for frames of events, as in TET's code (Deng et al. 2022).

Shapes: N images, C H W channels, height, width; flip and roll also take frames [N, T, C, H, W], of
which all of one sample are treated alike.  Every draw comes from a CPU generator, so that the draws
are the same whatever the device; none depends on the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    InterpolationMode,
    RandAugment,
)
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2.functional import equalize

from snnbench.data.base import Augment

Name = Literal["crop", "flip", "autoaugment", "randaugment", "cutout"]
Op = tuple[str, float]
PAD = 4
HOLE = 16
ROLL = 5
RAND_OPS, RAND_MAGNITUDE, RAND_BINS = 2, 9, 31


def pipeline(names: Sequence[str], fill: Tensor | int = 0) -> Augment:
    """A function of images [N, C, H, W] and a CPU generator that augments in the order of `names`.

    `fill` is the colour of the holes of `cutout`. Raises ValueError for an unknown name.
    """
    known: dict[str, Augment] = {
        "crop": crop,
        "flip": flip,
        "autoaugment": autoaugment,
        "randaugment": randaugment,
        "roll": roll,
        "cutout": partial(cutout, fill=fill),
    }
    for name in names:
        if name not in known:
            options = ", ".join((*get_args(Name), "roll"))
            raise ValueError(f"unknown augmentation '{name}'; it can be: {options}")
    steps = [known[name] for name in names]

    def augment(x: Tensor, g: torch.Generator) -> Tensor:
        for step in steps:
            x = step(x, g)
        return x

    return augment


def crop(x: Tensor, g: torch.Generator) -> Tensor:
    """A random HxW window of every image padded by 4 black pixels a side, [N, C, H, W]."""
    H, W = x.shape[-2:]
    top, left = torch.randint(2 * PAD + 1, (2, len(x)), generator=g).to(x.device)
    # All windows as a view without memory of its own, [N, C, top, left, H, W].
    windows = F.pad(x, (PAD,) * 4).unfold(2, H, 1).unfold(3, W, 1)
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def flip(x: Tensor, g: torch.Generator) -> Tensor:
    """Every image, or all frames of a sample, mirrored left to right with probability 1/2."""
    chosen = torch.randint(2, (len(x), *[1] * (x.dim() - 1)), generator=g).bool().to(x.device)
    return torch.where(chosen, x.flip(-1), x)


def roll(x: Tensor, g: torch.Generator) -> Tensor:
    """All frames of a sample shifted alike by -5..5 pixels each way; what leaves comes back in.

    The pixel at (row, column) of the result stood at (row - down, column - right) before.
    """
    H, W = x.shape[-2:]
    down, right = torch.randint(-ROLL, ROLL + 1, (2, len(x), 1), generator=g).to(x.device)
    row = ((torch.arange(H, device=x.device) - down) % H).view(-1, 1, H, 1)
    column = ((torch.arange(W, device=x.device) - right) % W).view(-1, 1, 1, W)
    flat = x.reshape(len(x), -1, H, W)
    flat = flat.gather(2, row.expand_as(flat)).gather(3, column.expand_as(flat))
    return flat.view_as(x)


def cutout(x: Tensor, g: torch.Generator, fill: Tensor | int = 0) -> Tensor:
    """Every image with a 16x16 hole of colour `fill`, clipped at the borders, [N, C, H, W].

    The hole's centre is uniform over the image.  The paper fills with 0 after normalisation, which
    is the mean colour: for that, give the channel means in uint8, [C]; one number fills them all.
    """
    C, H, W = x.shape[1:]
    row = torch.randint(H, (len(x), 1, 1, 1), generator=g).to(x.device)
    column = torch.randint(W, (len(x), 1, 1, 1), generator=g).to(x.device)
    dy = torch.arange(H, device=x.device).view(-1, 1) - row
    dx = torch.arange(W, device=x.device) - column
    half = HOLE // 2
    # All bits of a byte where the hole is: selecting by bits is twice as fast as where() on a CPU.
    hole = _all_bits((dy >= -half) & (dy < half)) & _all_bits((dx >= -half) & (dx < half))
    # expand, because this would silently broadcast a grey image to a colour of three channels.
    colour = torch.as_tensor(fill, dtype=x.dtype, device=x.device).view(-1, 1, 1).expand(C, 1, 1)
    return x ^ ((x ^ colour) & hole)


def _all_bits(chosen: Tensor) -> Tensor:
    return chosen.to(torch.uint8) * 255


def autoaugment(x: Tensor, g: torch.Generator) -> Tensor:
    """Every image after the two operations of a random CIFAR-10 policy, [N, C, H, W]; C is 1 or 3.

    An image gets what `torchvision.transforms.AutoAugment` gives for the same decisions.  On grey
    images Color changes nothing, as in torchvision; all other operations work on them.
    """
    ops, op_index, chance = _policies(*x.shape[-2:])
    policy, u, sign = decide(len(x), g)
    for i in range(2):
        applied = u[:, i] <= chance[policy, i]
        x = _apply_each(ops, torch.where(applied, op_index[policy, i, sign[:, i]], 0), x)
    return x


def randaugment(x: Tensor, g: torch.Generator) -> Tensor:
    """Every image after 2 random operations of magnitude 9 of 30, [N, C, H, W]; C is 1 or 3.

    An image gets what `torchvision.transforms.RandAugment` gives for the same decisions.
    """
    ops, op_index = _rand_ops(*x.shape[-2:])
    choice, sign = decide_rand(len(x), g)
    for i in range(RAND_OPS):
        x = _apply_each(ops, op_index[choice[:, i], sign[:, i]], x)
    return x


def _apply_each(ops: Sequence[Op], choice: Tensor, x: Tensor) -> Tensor:
    """Every image after the operation of its number; number 0 leaves it alone.

    Images with the same operation stand together, so that it runs once on all of them.
    """
    sizes = choice.bincount(minlength=len(ops)).tolist()
    parts = torch.split(choice.argsort().to(x.device), sizes)
    out = x.clone()
    for op, part in zip(ops[1:], parts[1:], strict=True):
        if len(part):
            out[part] = _apply(op, x[part])
    return out


def decide(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """AutoAugment's draws for n images: policy [n], uniforms [n, 2], signs [n, 2] with 0 for minus.

    An operation is applied where its uniform is at most its probability.
    """
    policy = torch.randint(len(_policies(1, 1)[2]), (n,), generator=g)
    return policy, torch.rand(n, 2, generator=g), torch.randint(2, (n, 2), generator=g)


def decide_rand(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """RandAugment's draws for n images: operations [n, 2], and signs [n, 2] with 0 for plus."""
    number = len(_rand_ops(1, 1)[1])
    choice = torch.randint(number, (n, RAND_OPS), generator=g)
    return choice, torch.randint(2, (n, RAND_OPS), generator=g)


@cache
def _rand_ops(H: int, W: int) -> tuple[list[Op], Tensor]:
    """Torchvision's table: operations, and their index [operation, sign]; number 0 is none."""
    space = RandAugment()._augmentation_space(RAND_BINS, (H, W))
    ops: list[Op] = [("Identity", 0.0)]
    index = torch.zeros(len(space), 2, dtype=torch.int64)
    for k, (name, (levels, signed)) in enumerate(space.items()):
        magnitude = float(levels[RAND_MAGNITUDE]) if levels.ndim else 0.0
        for sign in range(2):
            op = (name, -magnitude if signed and sign else magnitude)
            if op not in ops:
                ops.append(op)
            index[k, sign] = ops.index(op)
    return ops, index


@cache
def _policies(H: int, W: int) -> tuple[list[Op], Tensor, Tensor]:
    """Torchvision's tables: operations, their index [policy, 2, sign], probabilities [policy, 2].

    An operation is a name and a signed magnitude.  Number 0 is to leave the image alone.
    """
    table = AutoAugment(AutoAugmentPolicy.CIFAR10)
    space = table._augmentation_space(10, (H, W))
    ops: list[Op] = [("Identity", 0.0)]
    index = torch.zeros(len(table.policies), 2, 2, dtype=torch.int64)
    chance = torch.tensor([[p for _, p, _ in policy] for policy in table.policies])
    for k, policy in enumerate(table.policies):
        for i, (name, _, level) in enumerate(policy):
            levels, signed = space[name]
            magnitude = 0.0 if level is None else float(levels[level])
            for sign in range(2):
                op = (name, -magnitude if signed and sign == 0 else magnitude)
                if op not in ops:
                    ops.append(op)
                index[k, i, sign] = ops.index(op)
    return ops, index, chance


def _apply(op: Op, x: Tensor) -> Tensor:
    """One operation on images [N, C, H, W], each treated by itself."""
    name, magnitude = op
    if name == "Equalize":
        # The same bytes from one kernel; the older function loops over images and channels.
        result: Tensor = equalize(x)
    else:
        result = _apply_op(x, name, magnitude, InterpolationMode.NEAREST, None)
    return result
