"""The shipped manifests: what they hold, that the rule gives the same, and what fits none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from snnbench.data import splits
from snnbench.data.base import Data, Split, stratified
from snnbench.data.splits import FOLDER, freeze, frozen, hash_indices, hash_labels, validation
from snnbench.data.vision import CIFAR10, CIFAR100, FashionMNIST
from snnbench.errors import DataError

# Changing one of these changes every result on that dataset.
FIXED = {
    "cifar10": "d568f5105a796596",
    "cifar100": "70f0715e22337bb9",
    "cifar10dvs": "95f7c0660492fe19",
    "fashion-mnist": "4f44e4da0d6d7a21",
    "nmnist": "e086f3e25fa29c6a",
    "nmnist@slayer": "239ea70f0806ce28",
}
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # recordings a class


def manifests() -> dict[str, dict[str, object]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}


def test_the_manifests_are_fixed_for_ever() -> None:
    assert {name: str(m["val_sha256"])[:16] for name, m in manifests().items()} == FIXED


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("nmnist", np.repeat(np.arange(10), MNIST_TRAIN)),
        ("cifar10dvs", np.repeat(np.arange(10), 900)),
    ],
)
def test_manifests_of_known_labels(name: str, labels: np.ndarray) -> None:
    val = frozen(name, labels)
    assert val is not None
    assert torch.equal(val, stratified(labels, f"{name}-val", (0.1,))[0])
    share = np.bincount(labels[val.numpy()]) / np.bincount(labels)
    assert np.abs(share - 0.1).max() < 0.001


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100, FashionMNIST])
def test_manifests_of_the_real_sets(cls: type[CIFAR10], data_root: Path) -> None:
    if not (data_root / cls.info.home).is_dir():
        pytest.skip(f"no {cls.info.home} in the data root")
    _, labels = cls().read(data_root, True)
    val = frozen(cls.name, labels)
    assert val is not None
    assert torch.equal(val, stratified(labels, f"{cls.name}-val", (0.1,))[0])
    data = cls().load(data_root, True)
    assert data.val.y.tolist() == labels[val.numpy()].tolist()
    assert len(data.train) + len(data.val) == len(labels)


def test_other_labels_and_other_shares_go_by_the_rule() -> None:
    labels = np.repeat(np.arange(10), 900)
    assert frozen("cifar10dvs", labels[::-1]) is None
    assert frozen("another", labels) is None
    val, rest = validation("cifar10dvs", labels, "cifar10dvs-val", 0.2)
    assert len(val) == 1800
    assert sorted(torch.cat([val, rest]).tolist()) == list(range(9000))
    first, others = validation("cifar10dvs", labels, "unused where a manifest fits", 0.1)
    assert torch.equal(first, stratified(labels, "cifar10dvs-val", (0.1,))[0])
    assert sorted(torch.cat([first, others]).tolist()) == list(range(9000))


@pytest.mark.parametrize("harm", ["mask", "hash", "text"])
def test_a_damaged_manifest_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    labels = np.arange(200) % 10
    manifest = freeze("set", labels, "salt")
    if harm == "mask":
        manifest["val_mask"] = freeze("set", labels, "other salt")["val_mask"]
    elif harm == "hash":
        manifest["val_sha256"] = "0"
    text = "{" if harm == "text" else json.dumps(manifest)
    (tmp_path / "set.json").write_text(text)
    monkeypatch.setattr(splits, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="damaged; install snnbench again") as caught:
        frozen("set", labels)
    assert "\n" not in str(caught.value)


def test_hashes_see_order_and_borders() -> None:
    assert hash_labels(np.array([1, 2])) != hash_labels(np.array([2, 1]))
    assert hash_labels(np.array([1, 2], dtype=np.int32)) == hash_labels(np.array([1, 2]))
    one, two = torch.tensor([1]), torch.tensor([1, 2])
    assert hash_indices(one, two) != hash_indices(two, one)
    assert hash_indices(torch.tensor([1, 1]), torch.tensor([2])) != hash_indices(one, two.flip(0))


def test_the_leak_check_sees_bytes_and_not_places() -> None:
    x = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    y = torch.arange(10) % 2

    def shared(train: list[int], val: list[int], test: list[int]) -> dict[str, int]:
        parts = [Split(x[i], y[i]) for i in (train, val, test)]
        found = Data(*parts, classes=2, mean=(0.0,), std=(1.0,)).report()["shared_samples"]
        return dict(found)

    assert shared([0, 1, 2], [3, 4], [5, 6]) == {"train/val": 0, "train/test": 0, "val/test": 0}
    assert shared([0, 1, 2], [2, 4], [1, 2, 4, 4]) == {
        "train/val": 1, "train/test": 2, "val/test": 3,
    }  # fmt: skip
