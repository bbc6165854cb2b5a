"""CutMix, Mixup and RandAugment: by hand, against torchvision, and through the training loop."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, v2
from torchvision.transforms.autoaugment import _apply_op

from snnbench.data import augment, mix
from snnbench.data.augment import decide_rand, flip, randaugment, roll
from snnbench.data.base import Data, Split
from snnbench.data.mix import beta, blend, cutmix, mixing, mixup
from snnbench.train import batches
from snnbench.training.recipe import smooth


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=gen(99))


def weighing(monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    monkeypatch.setattr(mix, "beta", lambda *_: weight)


LABELS = torch.eye(3)


def test_mixup_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    weighing(monkeypatch, 0.75)
    x = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1)
    mixed, y = mixup(x, LABELS, gen(0))
    assert mixed.flatten().tolist() == [50, 75, 175]  # the partner is the one before
    assert y.tolist() == [[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]]
    assert mixed.dtype == torch.uint8


def test_cutmix_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    weighing(monkeypatch, 0.75)  # a box of 1/4 of the area: half of each side
    centre = iter([4, 3])  # column, row
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(centre)))
    x = torch.stack([torch.full((1, 8, 8), value, dtype=torch.uint8) for value in (1, 2, 3)])
    mixed, y = cutmix(x, LABELS, gen(0))
    box = torch.zeros(8, 8, dtype=torch.bool)
    box[1:5, 2:6] = True
    for image, own, other in zip(mixed, (1, 2, 3), (3, 1, 2), strict=True):
        assert (image[0][box] == other).all()
        assert (image[0][~box] == own).all()
    torch.testing.assert_close(y[0], torch.tensor([0.75, 0, 0.25]))


def test_a_clipped_box_weighs_what_it_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    weighing(monkeypatch, 0.75)
    centre = iter([0, 7])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(centre)))
    x = torch.stack([torch.full((1, 8, 8), value, dtype=torch.uint8) for value in (1, 2, 3)])
    mixed, y = cutmix(x, LABELS, gen(0))
    assert (mixed[0] == 3).sum() == 6  # rows 5-7, columns 0-1
    torch.testing.assert_close(y[0], torch.tensor([1 - 6 / 64, 0, 6 / 64]))


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_the_same_decisions_give_what_torchvision_gives(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    x, labels = noise(6, 3, 16, 20), torch.tensor([0, 1, 2, 2, 1, 0])
    for seed in range(20):
        weight = beta(1.0, gen(seed))
        weighing(monkeypatch, weight)
        official = (v2.CutMix if kind == "cutmix" else v2.MixUp)(num_classes=3)
        monkeypatch.setattr(type(official._dist), "sample", lambda *_, w=weight: torch.tensor([w]))
        ours = cutmix if kind == "cutmix" else mixup
        torch.manual_seed(seed)
        expected_x, expected_y = official(x.float(), labels)
        mixed, y = ours(x, torch.eye(3)[labels], torch.random.default_generator.manual_seed(seed))
        torch.testing.assert_close(mixed.float(), expected_x, atol=0.501, rtol=0)
        torch.testing.assert_close(y, expected_y)


def test_weights_are_of_the_beta_distribution() -> None:
    drawn = np.array([beta(1.0, g) for g in [gen(3)] for _ in range(2000)])
    assert abs(drawn.mean() - 0.5) < 0.03
    assert abs(drawn.var() - 1 / 12) < 0.01  # alpha 1: uniform


def test_blending_keeps_the_sum() -> None:
    y = torch.rand(5, 4, generator=gen(0)).softmax(1)
    torch.testing.assert_close(blend(y, 0.3).sum(1), torch.ones(5))


@pytest.mark.parametrize("names", [("cutmix",), ("mixup",), ("cutmix", "mixup")])
def test_draws_depend_on_the_generator_only(names: tuple[str, ...]) -> None:
    change = mixing(names, 10)
    assert change is not None
    x, y, before = noise(8, 3, 16, 16), torch.arange(8), torch.get_rng_state()
    first, again, other = (change(x, y, gen(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)
    a, b = gen(4), gen(4)
    change(x, y, a)
    change(torch.zeros_like(x), y.flip(0), b)
    assert torch.equal(a.get_state(), b.get_state())
    assert first[1].shape == (8, 10)
    torch.testing.assert_close(first[1].sum(1), torch.ones(8))


def test_nothing_to_mix() -> None:
    assert mixing(("crop", "flip"), 10) is None


def test_frames_of_a_recording_are_mixed_alike() -> None:
    x = torch.stack([torch.full((5, 2, 8, 8), v, dtype=torch.uint8) for v in (10, 200)])
    mixed, _ = cutmix(x, torch.eye(2), gen(8))
    assert all(torch.equal(mixed[0, t], mixed[0, 0]) for t in range(5))


def test_smoothing_of_mixed_labels() -> None:
    y = torch.tensor([[0.75, 0.25, 0.0, 0.0]])
    expected = torch.tensor([[0.7, 0.25, 0.025, 0.025]])
    torch.testing.assert_close(smooth(y, 4, 0.1), expected)
    assert smooth(y, 4, 0.0) is y
    torch.testing.assert_close(
        smooth(torch.tensor([0]), 4, 0.1), torch.tensor([[0.925, 0.025, 0.025, 0.025]])
    )


# --- through the loop -------------------------------------------------------------------------


def mixed_data() -> Data:
    split = Split(noise(64, 3, 12, 12), torch.arange(64) % 4)
    return Data(
        split, split, split, 4, (0.5,) * 3, (0.25,) * 3,
        augment=augment.pipeline(("crop", "flip", "randaugment", "cutout")),
        mix=mixing(("cutmix", "mixup"), 4),
    )  # fmt: skip


def feed(seed: int, epoch: int) -> list[str]:
    data = mixed_data()
    return [
        hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
        for x, y in batches(data, data.train, torch.arange(64), 16, seed, epoch)
    ]


def test_the_seed_and_the_epoch_alone_decide_every_batch() -> None:
    first = feed(0, 0)
    torch.manual_seed(123)  # what a method may have done meanwhile
    torch.rand(5)
    assert feed(0, 0) == first
    assert len(set(first)) == 4
    assert not set(first) & set(feed(0, 1))
    assert not set(first) & set(feed(1, 0))


def test_mixed_batches_carry_probabilities() -> None:
    data = mixed_data()
    for x, y in batches(data, data.train, torch.arange(64), 16, 0, 0):
        assert x.shape == (16, 3, 12, 12)
        assert y.shape == (16, 4)
        torch.testing.assert_close(y.sum(1), torch.ones(16))


# --- RandAugment, and augmentation of frames --------------------------------------------------


@pytest.mark.parametrize("C", [1, 3])
def test_randaugment_gives_what_torchvision_gives(C: int) -> None:
    x = noise(80, C, 32, 32)
    choice, sign = decide_rand(len(x), gen(7))
    space = RandAugment()._augmentation_space(31, (32, 32))
    expected = []
    for image, ops, signs in zip(x, choice.tolist(), sign.tolist(), strict=True):
        result = image
        for op, minus in zip(ops, signs, strict=True):
            name, (levels, signed) = list(space.items())[op]
            magnitude = float(levels[9]) if levels.ndim else 0.0
            magnitude = -magnitude if signed and minus else magnitude
            result = _apply_op(result, name, magnitude, InterpolationMode.NEAREST, None)
        expected.append(result)
    assert torch.equal(randaugment(x, gen(7)), torch.stack(expected))
    assert choice.unique().tolist() == list(range(14))


def test_roll_moves_all_frames_of_a_sample_alike() -> None:
    x = noise(200, 3, 2, 12, 14)
    moved, seen = roll(x, gen(1)), set()
    for sample, source in zip(moved, x, strict=True):
        shifts = [
            (down, right)
            for down in range(-5, 6)
            for right in range(-5, 6)
            if torch.equal(sample, source.roll((down, right), (-2, -1)))
        ]
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert {d for d, _ in seen} == {r for _, r in seen} == set(range(-5, 6))


def test_flip_mirrors_all_frames_of_a_sample() -> None:
    x = noise(50, 4, 2, 6, 6)
    flipped = 0
    for sample, source in zip(flip(x, gen(2)), x, strict=True):
        mirrored = torch.equal(sample, source.flip(-1))
        assert mirrored or torch.equal(sample, source)
        flipped += mirrored
    assert 15 < flipped < 35


def test_images_and_frames_draw_alike() -> None:
    """An image is flipped where a recording of the same place in the batch is."""
    image = noise(20, 2, 6, 6)
    frames = copy.deepcopy(image).unsqueeze(1)
    assert torch.equal(flip(frames, gen(3)).squeeze(1), flip(image, gen(3)))
    assert torch.equal(roll(frames, gen(3)).squeeze(1), roll(image, gen(3)))
