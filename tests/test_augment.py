from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from snnbench.data import augment
from snnbench.data.augment import autoaugment, crop, cutout, flip, pipeline, randaugment, roll

NAMES = get_args(augment.Name)
STEPS: list[Callable[..., Tensor]] = [
    crop,
    flip,
    autoaugment,
    randaugment,
    cutout,
    roll,
    pipeline(NAMES),
]
steps = pytest.mark.parametrize("step", STEPS, ids=[*NAMES, "roll", "all"])
quick = settings(derandomize=True, max_examples=15, deadline=None)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int = 64, C: int = 3, H: int = 32, W: int = 32) -> Tensor:
    return torch.randint(256, (n, C, H, W), dtype=torch.uint8, generator=gen(99))


def photos(n: int, C: int = 3, H: int = 32, W: int = 32) -> Tensor:
    """Smooth images of different contrast, the first one constant: statistics vary by image."""
    coarse = torch.rand(n, C, 5, 5, generator=gen(98))
    span = torch.linspace(0, 200, n).view(-1, 1, 1, 1)
    return (20 + span * F.interpolate(coarse, (H, W), mode="bilinear")).to(torch.uint8)


@steps
def test_the_seed_decides_every_byte(step: Callable[..., Tensor]) -> None:
    x = noise()
    assert torch.equal(step(x, gen(3)), step(x, gen(3)))
    assert not torch.equal(step(x, gen(3)), step(x, gen(4)))


@steps
def test_only_the_given_generator_moves(step: Callable[..., Tensor]) -> None:
    x, g = noise(), gen(0)
    x_before, g_before, global_before = x.clone(), g.get_state(), torch.get_rng_state()
    out = step(x, g)
    assert torch.equal(torch.get_rng_state(), global_before)
    assert not torch.equal(g.get_state(), g_before)
    assert torch.equal(x, x_before)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@steps
def test_works_where_the_images_are(step: Callable[..., Tensor]) -> None:
    # The meta device has no values, but it refuses CPU tensors as a GPU would.
    assert step(noise().to("meta"), gen(0)).is_meta


@steps
def test_draws_do_not_depend_on_the_pixels(step: Callable[..., Tensor]) -> None:
    a, b = gen(5), gen(5)
    step(noise(8), a)
    step(torch.zeros(8, 1, 16, 20, dtype=torch.uint8), b)
    assert torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))


@quick
@given(
    n=st.integers(0, 9),
    C=st.sampled_from([1, 3]),
    H=st.integers(5, 40),
    W=st.integers(5, 40),
    names=st.lists(st.sampled_from(NAMES)),
)
def test_shape_and_type_are_kept(n: int, C: int, H: int, W: int, names: list[str]) -> None:
    out = pipeline(names)(noise(n, C, H, W), gen(n))
    assert out.shape == (n, C, H, W)
    assert out.dtype == torch.uint8


def test_crop_is_a_window_of_the_padded_image() -> None:
    x = noise(600, 3, 8, 10) | 1  # no black pixel, so that the padding cannot hide
    padded, found = F.pad(x, (4, 4, 4, 4)), []
    for image, source in zip(crop(x, gen(1)), padded, strict=True):
        hits = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(image, source[:, top : top + 8, left : left + 10])
        ]
        assert len(hits) == 1
        found += hits
    assert {top for top, _ in found} == {left for _, left in found} == set(range(9))
    assert len(set(found)) == 81, "the two offsets must be independent"


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = noise(2000, 1, 4, 6)
    once = flip(x, gen(2))
    kept = (once == x).flatten(1).all(1)
    mirrored = (once == x.flip(-1)).flatten(1).all(1)
    assert torch.all(kept ^ mirrored)
    assert 0.45 < mirrored.float().mean() < 0.55
    assert torch.equal(flip(once, gen(2)), x), "the same draws twice undo each other"


@quick
@given(H=st.integers(1, 40), W=st.integers(1, 40), seed=st.integers(0, 99))
def test_cutout_leaves_one_clipped_hole_about_a_pixel(H: int, W: int, seed: int) -> None:
    x = torch.full((20, 3, H, W), 7, dtype=torch.uint8)
    hole = cutout(x, gen(seed)) == 0
    assert torch.equal(hole.any(1), hole.all(1)), "all channels alike"
    assert torch.equal(hole.any(3, keepdim=True) & hole.any(2, keepdim=True), hole), "a rectangle"
    for size, lines in ((H, hole.any(3)[:, 0]), (W, hole.any(2)[:, 0])):
        allowed = set()
        for centre in range(size):
            allowed.add((max(centre - 8, 0), min(centre + 8, size)))
        for line in lines:
            where = line.nonzero().flatten().tolist()
            assert (where[0], where[-1] + 1) in allowed
            assert where == list(range(where[0], where[-1] + 1))


def test_cutout_centres_cover_the_image() -> None:
    x = torch.ones(3000, 1, 32, 32, dtype=torch.uint8)
    hole = cutout(x, gen(0)) == 0
    for across in (2, 3):
        sizes = hole.any(across).sum(-1).flatten()
        assert set(sizes.tolist()) == set(range(8, 17)), "half a hole at a border, all of it inside"
    assert (hole.flatten(1).sum(1) == 256).float().mean() == pytest.approx((17 / 32) ** 2, abs=0.03)


def test_cutout_fill() -> None:
    x = torch.full((30, 3, 20, 20), 7, dtype=torch.uint8)
    colour = torch.tensor([125, 123, 114], dtype=torch.uint8)
    hole = cutout(x, gen(1)) == 0
    want = torch.where(hole, colour.view(3, 1, 1), x)
    assert torch.equal(cutout(x, gen(1), colour), want)
    assert torch.equal(pipeline(["cutout"], fill=colour)(x, gen(1)), want)
    assert torch.equal(cutout(x, gen(1), 9) == 9, hole)
    with pytest.raises(RuntimeError, match="expand"):
        cutout(x[:, :1], gen(1), colour)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 24, 33)])
def test_autoaugment_gives_what_torchvision_gives(shape: tuple[int, int, int]) -> None:
    x = photos(300, *shape)
    policy, u, sign = augment.decide(len(x), gen(6))
    assert set(policy.tolist()) == set(range(25))
    reference = AutoAugment(AutoAugmentPolicy.CIFAR10)
    want = []
    for n, image in enumerate(x):
        decisions = (int(policy[n]), u[n], sign[n])
        reference.get_params = lambda _, decisions=decisions: decisions
        want.append(reference(image))
    assert torch.equal(autoaugment(x, gen(6)), torch.stack(want))


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("op", augment._policies(32, 32)[0], ids=lambda op: f"{op[0]}{op[1]:+.2f}")
def test_each_operation_treats_images_one_by_one(op: tuple[str, float], C: int) -> None:
    x = torch.cat([photos(6, C), noise(3, C)])
    before, batch = x.clone(), augment._apply(op, x)
    for image, result in zip(x, batch, strict=True):
        assert torch.equal(_apply_op(image, *op, InterpolationMode.NEAREST, None), result)
    assert torch.equal(x, before)
    unchanged = op[0] == "Identity" or (op[0] == "Color" and (C == 1 or op[1] == 0))
    assert torch.equal(batch, x) == unchanged


def test_the_policy_is_the_published_one() -> None:
    ops, index, chance = augment._policies(32, 32)
    assert index.shape == (25, 2, 2)
    # Cubuk et al. 2019, table 7 (appendix): sub-policies 0 and 1.
    assert [ops[k] for k in index[0, 0]] == [("Invert", 0.0)] * 2
    assert [ops[k] for k in index[0, 1]] == [("Contrast", pytest.approx(s * 0.6)) for s in (-1, 1)]
    assert [ops[k][0] for k in index[1, :, 0]] == ["Rotate", "TranslateX"]
    assert chance[:2].flatten().tolist() == pytest.approx([0.1, 0.2, 0.7, 0.3])


def test_the_pipeline_keeps_the_order() -> None:
    x = photos(32)
    g = gen(8)
    by_hand = cutout(flip(crop(x, g), g), g)
    assert torch.equal(pipeline(["crop", "flip", "cutout"])(x, gen(8)), by_hand)
    assert not torch.equal(pipeline(["cutout", "flip", "crop"])(x, gen(8)), by_hand)
    assert pipeline([])(x, g) is x


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'blur'.*crop, flip, autoaugment, randaugment"):
        pipeline(["crop", "blur"])
