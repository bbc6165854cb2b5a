"""Splits and subsets that are fixed for ever, and copies of data that are not what they claim."""

from __future__ import annotations

import hashlib
import pickle
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from event_files import write_idx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from snnbench.data.base import Data, Split, balanced, stratified
from snnbench.data.digits import Digits
from snnbench.data.vision import CIFAR10, CIFAR100, FashionMNIST
from snnbench.errors import DataError, ExitCode

NOWHERE = Path("/nowhere")
few_examples = settings(max_examples=50, derandomize=True, deadline=None, database=None)
labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def pixels(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.x}


@pytest.fixture(scope="module")
def digits() -> Data:
    return Digits().load(NOWHERE, False)


# --- splitting --------------------------------------------------------------------------------


@few_examples
@given(labels, st.lists(st.floats(0, 0.5), min_size=1, max_size=2))
def test_stratified_parts_are_disjoint_and_cover_everything(y, shares):
    parts = stratified(y, "salt", tuple(shares))
    assert len(parts) == len(shares) + 1
    everything = torch.cat(parts).tolist()
    assert sorted(everything) == list(range(len(y)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


@few_examples
@given(labels, st.floats(0, 1))
def test_stratified_parts_hold_their_share_of_every_class(y, share):
    part, rest = stratified(y, "salt", (share,))
    for label in set(y.tolist()):
        members = (y == label).sum()
        assert abs((y[part.numpy()] == label).sum() - share * members) <= 0.5
        assert (y[part.numpy()] == label).sum() + (y[rest.numpy()] == label).sum() == members


@few_examples
@given(labels)
def test_stratified_depends_on_the_salt_alone(y):
    first, torch_state = stratified(y, "salt", (0.5,)), torch.get_rng_state()
    torch.rand(3)
    again = stratified(y, "salt", (0.5,))
    torch.set_rng_state(torch_state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_another_salt_gives_another_split():
    y = np.zeros(100, dtype=int)
    assert not torch.equal(stratified(y, "a", (0.5,))[0], stratified(y, "b", (0.5,))[0])
    assert not torch.equal(balanced(y, "a", 50), balanced(y, "b", 50))


@few_examples
@given(labels, st.integers(1, 70))
def test_balanced_subsets(y, limit):
    chosen = balanced(y, "salt", limit).tolist()
    assert len(chosen) == min(limit, len(y))
    assert chosen == sorted(set(chosen))
    counts = {label: (y[chosen] == label).sum() for label in set(y.tolist())}
    most = max(counts.values())
    for label, count in counts.items():  # behind by more than one only if the class has no more
        assert count >= most - 1 or count == (y == label).sum()


@few_examples
@given(labels, st.integers(1, 30))
def test_a_smaller_subset_lies_within_a_larger_one(y, limit):
    small, large = balanced(y, "salt", limit), balanced(y, "salt", limit + 7)
    assert set(small.tolist()) <= set(large.tolist())


def test_no_limit_is_everything():
    assert balanced(np.array([1, 0, 1]), "salt", None).tolist() == [0, 1, 2]


# --- digits -----------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_three_disjoint_parts(digits):
    bunch = load_digits()
    test, val, train = stratified(bunch.target, "digits", (0.2, 0.1))
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1259, 179, 359)
    for split, index in ((digits.train, train), (digits.val, val), (digits.test, test)):
        assert split.x.dtype == torch.uint8
        assert split.x.shape == (len(index), 1, 8, 8)
        grey = (split.x.squeeze(1).double() / 15).numpy()
        assert (grey == bunch.images[index.numpy()]).all()
        assert (split.y.numpy() == bunch.target[index.numpy()]).all()
    assert not pixels(digits.test) & (pixels(digits.train) | pixels(digits.val))
    assert not pixels(digits.train) & pixels(digits.val)


def test_the_digits_split_is_fixed_for_ever(digits):
    parts = stratified(load_digits().target, "digits", (0.2, 0.1))
    assert [sha(part) for part in parts] == [
        "167826c2019607c4",
        "486787625903100d",
        "e502c50d8be77c54",
    ]
    assert digits.data_hash[:16] == "8b9ee9245bca2a56"
    subset = Digits(Digits.Config(train_limit=100, test_limit=50)).load(NOWHERE, False)
    assert subset.data_hash[:16] == "2f68e2b86da9cb81"


def test_every_digit_has_its_share_of_every_part(digits):
    whole = np.bincount(load_digits().target)
    for split, share in ((digits.train, 0.7), (digits.val, 0.1), (digits.test, 0.2)):
        assert np.abs(np.bincount(split.y) - share * whole).max() <= 1


@pytest.mark.parametrize(("train_limit", "test_limit"), [(100, 50), (105, 57), (1000, 300)])
def test_limits_of_digits_are_balanced_subsets(digits, train_limit, test_limit):
    small = Digits(Digits.Config(train_limit, test_limit)).load(NOWHERE, False)
    assert (len(small.train), len(small.val), len(small.test)) == (train_limit, 179, test_limit)
    for split in (small.train, small.test):
        assert np.ptp(np.bincount(split.y, minlength=10)) <= 1
    assert pixels(small.train) <= pixels(digits.train)
    assert pixels(small.test) <= pixels(digits.test)
    assert small.data_hash != digits.data_hash


def test_declared_mean_and_deviation_of_digits_are_the_measured_ones(digits):
    x = digits.train.x.double() / 255
    assert digits.mean == pytest.approx((x.mean().item(),), abs=1e-3)
    assert digits.std == pytest.approx((x.std().item(),), abs=1e-3)
    encoded = digits.encode(digits.train.x, 1)
    assert abs(encoded.mean().item()) < 0.01
    assert encoded.std().item() == pytest.approx(1, abs=0.01)


def test_direct_encoding_repeats_the_normalised_image(digits):
    x_TB = digits.encode(digits.test.x[:3], 4)
    assert x_TB.shape == (4, 3, 1, 8, 8)
    expected = (digits.test.x[:3].float() / 255 - 0.287) / 0.354
    for x_B in x_TB:
        torch.testing.assert_close(x_B, expected)


def test_the_data_hash_sees_every_split(digits):
    def data(**changed: Any) -> str:
        parts = {"train": digits.train, "val": digits.val, "test": digits.test} | changed
        return Data(**parts, classes=10, mean=(0.0,), std=(1.0,)).data_hash

    other_label = Split(digits.val.x, digits.val.y.roll(1))
    other_pixel = Split(digits.test.x.clone(), digits.test.y)
    other_pixel.x[5, 0, 3, 3] += 1
    shuffled = Split(digits.train.x.flip(0), digits.train.y.flip(0))
    hashes = [data(), data(val=other_label), data(test=other_pixel), data(train=shuffled)]
    assert len(set(hashes)) == 4
    assert data() == hashes[0] == digits.data_hash


# --- copies of CIFAR --------------------------------------------------------------------------

FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# The official batches.meta, 158 bytes: the names of the classes.
META = (
    b"\x80\x02}q\x01(U\x13num_cases_per_batchq\x02M\x10'U\x0blabel_namesq\x03]q\x04("
    + b"".join(
        b"U" + bytes([len(name)]) + name.encode() + b"q" + bytes([place])
        for place, name in enumerate(NAMES, 5)
    )
    + b"eU\x07num_visq\x0fM\x00\x0cu."
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder in the layout of CIFAR-10 with 6 x 20 images that nobody published."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in FILES:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = {"data": data, "labels": [*range(10), *range(10)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    assert hashlib.md5(META).hexdigest() == CIFAR10.official.meta["md5"]
    (folder / "batches.meta").write_bytes(META)
    return tmp_path


def without_augment(**options: Any) -> CIFAR10:
    return CIFAR10(CIFAR10.Config(augment=(), **options))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command_that_gets_it(copy, name):
    file = copy / "cifar-10-batches-py" / name
    file.unlink()
    with pytest.raises(DataError) as caught:
        without_augment().load(copy, True)
    message = str(caught.value)
    assert str(file) in message
    assert f"`snnbench data fetch cifar10 --data-root {copy}`" in message
    assert "\n" not in message
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize(("dataset", "first"), [(CIFAR10, "data_batch_1"), (CIFAR100, "train")])
def test_an_empty_folder_is_a_missing_file(tmp_path, dataset, first):
    with pytest.raises(DataError, match=f"{first} is missing"):
        dataset().load(tmp_path, True)


def test_a_copy_that_is_not_official_is_refused(copy):
    with pytest.raises(DataError) as caught:
        without_augment().load(copy, False)
    message = str(caught.value)
    assert "data_batch_1 is not the official file" in message
    assert "6 of 6 files" in message
    assert "--allow-unverified-data" in message
    assert "\n" not in message


def test_a_copy_that_is_not_official_is_marked_where_the_user_allows_it(copy):
    data = without_augment(val_fraction=0.2).load(copy, True)
    assert not data.verified
    assert (len(data.train), len(data.val), len(data.test)) == (80, 20, 20)
    stored = pickle.loads((copy / "cifar-10-batches-py" / "test_batch").read_bytes())  # noqa: S301
    assert (data.test.x.flatten(1).numpy() == stored["data"]).all()  # planes of red, green, blue
    assert data.test.y.tolist() == stored["labels"]


def test_the_names_of_the_classes_need_not_be_official_either(copy):
    meta = {"label_names": NAMES, "num_cases_per_batch": 20, "num_vis": 3072}
    (copy / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta))
    assert len(without_augment().load(copy, True).test) == 20


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_damaged_copy_is_one_clear_line(copy, name, content):
    (copy / "cifar-10-batches-py" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} cannot be read") as caught:
        without_augment().load(copy, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_truncated_copy_is_named(copy, name):
    file = copy / "cifar-10-batches-py" / name
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DataError, match=f"cifar10: .*/{name} cannot be read: ") as caught:
        without_augment().load(copy, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([*range(10), *range(9)], "data_batch_2 cannot be read: 20 images .uint8. and 19 labels"),
        ([*range(10), *range(1, 11)], "the training part in .* has a label 10; the 10 classes"),
        ([*range(10), *range(-1, 9)], "has a label -1"),
        (["cat"] * 20, "data_batch_2 cannot be read: .* labels .<U3"),
    ],
)
def test_labels_that_cannot_be(copy, labels, why):
    data = np.zeros((20, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": data, "labels": labels})
    (copy / "cifar-10-batches-py" / "data_batch_2").write_bytes(batch)
    with pytest.raises(DataError, match=why) as caught:
        without_augment().load(copy, True)
    assert "\n" not in str(caught.value)


def test_too_few_images_for_a_validation_split(copy):
    with pytest.raises(DataError, match="too few images a class for a validation split"):
        without_augment(val_fraction=0.01).load(copy, True)


@pytest.mark.parametrize("name", FashionMNIST.FILES)
def test_a_truncated_idx_file_is_named(tmp_path, name):
    home = tmp_path / "FashionMNIST" / "raw"
    for file in FashionMNIST.FILES:
        shape = (100, 28, 28) if "images" in file else (100,)
        write_idx(home / file, np.arange(100).repeat(prod(shape) // 100).reshape(shape) % 10)
    assert len(FashionMNIST().load(tmp_path, True).test) == 100
    (home / name).write_bytes((home / name).read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{name} cannot be read") as caught:
        FashionMNIST().load(tmp_path, True)
    assert "\n" not in str(caught.value)


# --- the real ones ----------------------------------------------------------------------------

SUBSET = {"train_limit": 512, "test_limit": 256}


@pytest.fixture(scope="module")
def cifar100(data_root) -> Data:
    return CIFAR100(CIFAR100.Config(**SUBSET)).load(data_root, False)


@pytest.fixture(scope="module")
def cifar10(data_root) -> Data:
    return CIFAR10(CIFAR10.Config(**SUBSET)).load(data_root, True)


def test_the_official_cifar100_is_verified_and_its_subset_fixed_for_ever(cifar100):
    assert cifar100.verified
    assert cifar100.data_hash[:16] == "beaaed78442c33bf"
    assert (len(cifar100.train), len(cifar100.val), len(cifar100.test)) == (512, 100, 256)
    assert cifar100.shape == (3, 32, 32)
    for split in (cifar100.train, cifar100.val, cifar100.test):
        assert np.ptp(np.bincount(split.y, minlength=100)) <= 1


def test_a_cifar10_that_is_not_official_needs_the_flag(data_root, cifar10):
    if cifar10.verified:
        pytest.skip("the CIFAR-10 here is the official one")
    with pytest.raises(DataError, match="is not the official file"):
        CIFAR10(CIFAR10.Config(**SUBSET)).load(data_root, False)
    assert (len(cifar10.train), len(cifar10.val), len(cifar10.test)) == (512, 51, 256)


def test_validation_is_cut_from_train(cifar10, cifar100):
    for data in (cifar10, cifar100):
        parts = [pixels(split) for split in (data.train, data.val, data.test)]
        assert [len(part) for part in parts] == [
            len(split) for split in (data.train, data.val, data.test)
        ]
        assert all(not a & b for a, b in pairwise([*parts, parts[0]]))


def test_a_subset_depends_on_no_seed(data_root, cifar100):
    torch.manual_seed(12345)
    np.random.seed(12345)
    again = CIFAR100(CIFAR100.Config(**SUBSET)).load(data_root, False)
    assert again.data_hash == cifar100.data_hash


def test_the_images_are_those_of_torchvision(data_root, cifar100):
    official = CIFAR100.official(data_root, train=False)
    pairs = zip(official.data, official.targets, strict=True)
    known = {image.tobytes(): label for image, label in pairs}
    for image, label in zip(cifar100.test.x, cifar100.test.y.tolist(), strict=True):
        assert known[image.permute(1, 2, 0).numpy().tobytes()] == label


def test_declared_mean_and_deviation_of_cifar_are_near_the_measured_ones(cifar10, cifar100):
    for data in (cifar10, cifar100):
        encoded = data.encode(data.train.x, 1)[0]
        assert encoded.mean((0, 2, 3)).abs().max() < 0.1  # 512 images only
        assert (encoded.std((0, 2, 3)) - 1).abs().max() < 0.1
