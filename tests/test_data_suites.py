"""Every shipped tiny suite, run as a user would, on a few samples in the format of its dataset."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bench
from event_files import recording, write_aedat4, write_atis, write_idx, write_npy
from torchvision.io import encode_jpeg, write_file

from snnbench.data.vision import FashionMNIST

SUITES = Path(__file__).parents[1] / "suites"
DVS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pixels(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def cifar10(root: Path, rng: np.random.Generator) -> None:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": pixels(rng, 20, 3072), "labels": [*range(10)] * 2}
        pickled(root / "cifar-10-batches-py" / name, batch)


def cifar100(root: Path, rng: np.random.Generator) -> None:
    for name, each in (("train", 6), ("test", 1)):
        batch = {"data": pixels(rng, 100 * each, 3072), "fine_labels": [*range(100)] * each}
        pickled(root / "cifar-100-python" / name, batch)


def pickled(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def fashion(root: Path, rng: np.random.Generator) -> None:
    for name in FashionMNIST.FILES:
        n = 300 if "train" in name else 20
        values = pixels(rng, n, 28, 28) if "images" in name else np.arange(n) % 10
        write_idx(root / "FashionMNIST" / "raw" / name, values)


def nmnist(root: Path, rng: np.random.Generator) -> None:
    for part, each in (("Train", 8), ("Test", 2)):
        for i in range(10 * each):
            file = root / "NMNIST" / part / str(i % 10) / f"{i + 1:05}.bin"
            write_atis(file, recording(rng))


def cifar10dvs(root: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("aedat", reason="tonic reads AEDAT 4 with the package aedat")
    for word in DVS:
        for i in range(10):
            file = root / "CIFAR10DVS" / word / f"cifar10_{word}_{i}.aedat4"
            write_aedat4(file, recording(rng, 200, 128))


def dvsgesture(root: Path, rng: np.random.Generator) -> None:
    for part, user in (("Train", 1), ("Train", 20), ("Test", 24)):
        folder = root / "DVSGesture" / f"ibmGesture{part}" / f"user{user:02}_led"
        for gesture in range(11):
            write_npy(folder / f"{gesture}.npy", recording(rng, 200, 128))


def imagenet(root: Path, rng: np.random.Generator) -> None:
    for part, each in (("train", 13), ("val", 1)):
        for word in ("n01", "n02"):
            for i in range(each):
                file = root / "imagenet" / part / word / f"{word}_{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_file(str(file), encode_jpeg(torch.from_numpy(pixels(rng, 3, 64, 80))))


# These take more than ten seconds each; another of the same kind runs by default.
SLOW = ("cifar100-tiny", "cifar10dvs-tiny", "imagenet-tiny")
# How to write it, how many samples of train, validation and test a run uses, and what is set.
Case = tuple[Callable[[Path, np.random.Generator], None], tuple[int, int, int], tuple[str, ...]]
CASES: dict[str, Case] = {
    "cifar10-tiny": (cifar10, (64, 10, 20), ("data.train_limit=64",)),
    "cifar100-tiny": (cifar100, (100, 100, 20), ("data.train_limit=100", "data.test_limit=20")),
    "fashion-mnist-tiny": (fashion, (270, 30, 20), ()),
    "nmnist-tiny": (nmnist, (70, 10, 20), ()),
    "cifar10dvs-tiny": (cifar10dvs, (20, 10, 10), ("data.train_limit=20", "train.batch_size=4")),
    "dvsgesture-tiny": (dvsgesture, (11, 11, 11), ("train.batch_size=4",)),
    "imagenet-tiny": (imagenet, (8, 2, 2), ("data.train_limit=8", "train.batch_size=4")),
}


def test_every_tiny_suite_has_its_case() -> None:
    assert {path.stem for path in SUITES.glob("*-tiny.toml")} == {*CASES}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_a_tiny_suite_trains_and_gives_a_record(bench: Bench, tmp_path: Path, name: str) -> None:
    write, samples, settings = CASES[name]
    root, results = tmp_path / "data", tmp_path / "results"
    write(root, np.random.default_rng(0))
    done = bench.run(
        "run", SUITES / f"{name}.toml", "--only", "method=bptt",
        "--results", results, "--data-root", root,
        "--allow-unverified-data", "--device", "cpu", "--set", "train.epochs=1",
        *(word for setting in settings for word in ("--set", setting)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = results.glob(f"{name}/runs/*/result.json")
    record = json.loads(path.read_text())
    assert record["status"] == "done", record["reason"]
    assert record["samples"] == dict(zip(("train", "val", "test"), samples, strict=True))
    assert record["data_verified"] is False
    assert len(record["split_hash"]) == 16
    assert np.isfinite([epoch["train_loss"] for epoch in record["history"]]).all()
    assert record["steps_timed"] >= 1
