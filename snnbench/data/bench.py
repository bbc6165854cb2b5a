"""How fast the loader is by itself: `python -m snnbench.data.bench [--images N] [--repeats N]`.

Two loaders deliver the same augmented, normalised CIFAR images: ours, which augments uint8 batches
where they lie, and the usual one, torchvision's transforms on single images in a `DataLoader` with
two worker processes (persistent, started before the clock).  They take turns.  Printed are images
per second and their ratio on this machine's CPU; and where there is a GPU, ours on it, and its
share of a training step of a spiking ResNet-18 with T = 4 and batch size 128.

The images are those of CIFAR-10 if SNNBENCH_DATA names a folder with it, else noise of that shape.
Run it on a machine that does nothing else: the spread that it prints says whether that was so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from snnbench import registry
from snnbench.data.augment import HOLE, PAD, pipeline
from snnbench.data.base import Data, Split
from snnbench.data.vision import CIFAR10
from snnbench.errors import DataError
from snnbench.neurons import LIF, neuron_options
from snnbench.spec import validate

BATCH, WORKERS, T, CHUNK = 128, 2, 4, 4096
RECIPES: Sequence[tuple[str, ...]] = (
    ("crop", "flip"),
    ("crop", "flip", "cutout"),
    ("crop", "flip", "autoaugment", "cutout"),
)


class Hole:
    """Cutout of one normalised image [C, H, W]: a square of zeros, clipped at the borders."""

    def __call__(self, x: Tensor) -> Tensor:
        """The image with its hole."""
        H, W = x.shape[1:]
        row, column = int(torch.randint(H, ())), int(torch.randint(W, ()))
        half = HOLE // 2
        x[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
        return x


class Single(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Single images through torchvision's transforms, as its own datasets hand them out."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor]) -> None:
        self.images = split.x.permute(0, 2, 3, 1).numpy()
        self.labels, self.transform = split.y.tolist(), transform
        self.to_image = transforms.ToPILImage()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.to_image(self.images[i])), self.labels[i]


def usual(data: Data, names: Sequence[str]) -> Callable[[], int]:
    """One epoch of torchvision's transforms in a DataLoader with worker processes."""
    known: dict[str, Any] = {
        "crop": transforms.RandomCrop(data.shape[1:], padding=PAD),
        "flip": transforms.RandomHorizontalFlip(),
        "autoaugment": transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
    }
    steps = [known[name] for name in names if name in known]
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    steps += [Hole()] if "cutout" in names else []
    dataset = Single(data.train, transforms.Compose(steps))
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    return lambda: sum(len(y) for _, y in loader)


def ours(data: Data, names: Sequence[str], device: torch.device) -> Callable[[], int]:
    """One epoch of our batches, as images delivered."""
    split, augment = data.train.to(device), pipeline(names)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> int:
        order = torch.randperm(len(split), generator=generator)
        return sum(
            data.encode(x, 1).shape[1]
            for x, _ in split.batches(order, BATCH, augment, generator, CHUNK)
        )

    return epoch


def rates(
    epochs: Sequence[Callable[[], int]], repeats: int, device: torch.device
) -> list[list[float]]:
    """Items per second of each, ascending, over some epochs after one that is not counted.

    They take turns, so that a machine that is busy with something else hits all of them alike.
    """
    found: list[list[float]] = [[] for _ in epochs]
    for epoch in epochs:
        epoch()
    for _ in range(repeats):
        for epoch, rows in zip(epochs, found, strict=True):
            _wait(device)
            began = time.perf_counter()
            count = epoch()
            _wait(device)
            rows.append(count / (time.perf_counter() - began))
    return [sorted(rows) for rows in found]


def shown(found: Sequence[float]) -> str:
    """Median, with the slowest and the fastest: far apart, they mean that nothing was measured."""
    return f"{statistics.median(found):9,.0f} img/s ({found[0]:,.0f} to {found[-1]:,.0f})"


def step_s(data: Data, device: torch.device, repeats: int) -> float:
    """Median seconds of a training step of a spiking ResNet-18, T = 4, by plain BPTT."""
    neuron = validate(LIF, neuron_options("rate"), [])
    model = registry.find("models", "resnet18").load()
    method = registry.find("methods", "bptt").load()()
    net: nn.Module = model(model.Config(), data.shape, data.classes, neuron).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x_B, y_B = data.train.x[:BATCH].to(device), data.train.y[:BATCH].to(device)

    def epoch() -> int:
        optimizer.zero_grad(set_to_none=True)
        method.backward(net, data.encode(x_B, T), y_B, 0.0)
        optimizer.step()
        return 1

    return 1 / statistics.median(rates([epoch], max(10, repeats), device)[0])


def images(count: int) -> tuple[Data, str]:
    """The first training images of CIFAR-10, or noise; and which of the two."""
    root = os.environ.get("SNNBENCH_DATA")
    try:
        data = CIFAR10(CIFAR10.Config(augment=())).load(Path(root or os.devnull), True)
        train, what = data.train, "CIFAR-10"
    except DataError:
        noise = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        train, what = Split(noise, torch.arange(count) % 10), "noise of the shape of CIFAR-10"
    train = Split(train.x[:count], train.y[:count])
    few = Split(train.x[:10], train.y[:10])
    return Data(train, few, few, 10, CIFAR10.mean, CIFAR10.std), what


def measure(count: int, repeats: int) -> list[str]:
    """The lines of the bench."""
    data, what = images(count)
    cpu = torch.device("cpu")
    threads, cores = torch.get_num_threads(), os.cpu_count()
    lines = [
        f"{len(data.train):,} images ({what}), batch {BATCH}, median of {repeats} epochs "
        f"(slowest to fastest); {cores} cores, {threads} torch threads, load "
        f"{os.getloadavg()[0]:.1f} at the beginning, torch {torch.__version__}"
    ]
    for names in RECIPES:
        theirs, mine = rates([usual(data, names), ours(data, names, cpu)], repeats, cpu)
        ratio = statistics.median(mine) / statistics.median(theirs)
        lines.append(
            f"cpu   {' + '.join(names):36} DataLoader with {WORKERS} workers {shown(theirs)}, "
            f"snnbench {shown(mine)}: ratio {ratio:.1f}"
        )
    if torch.cuda.is_available():
        cuda = torch.device("cuda")
        step = step_s(data, cuda, repeats)
        name = torch.cuda.get_device_name()
        lines.append(f"cuda  a ResNet-18 step, T = {T}: {1e3 * step:.1f} ms on {name}")
        for names in RECIPES:
            (mine,) = rates([ours(data, names, cuda)], repeats, cuda)
            share = BATCH / statistics.median(mine) / step
            lines.append(f"cuda  {' + '.join(names):36} snnbench {shown(mine)}: {share:.2%} of it")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m snnbench.data.bench")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for line in measure(max(BATCH, options.images), max(1, options.repeats)):
        sys.stdout.write(line + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
