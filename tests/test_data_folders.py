"""Tiny-ImageNet and ImageNet: small folders of real JPEG files, packed, decoded, augmented."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import ImageReadMode, decode_image, encode_jpeg, read_file, write_file
from torchvision.transforms import v2

from snnbench.data import imagenet
from snnbench.data.folders import TinyImageNet
from snnbench.data.imagenet import ImageNet, ImageSplit, middle
from snnbench.errors import DataError

CPU = torch.device("cpu")


def photo(seed: int, H: int, W: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=g) * 255
    return torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")[0].to(torch.uint8)


def jpeg(path: Path, seed: int, H: int = 64, W: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(str(path), encode_jpeg(photo(seed, H, W), quality=95))


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    home = tmp_path / "tiny-imagenet-200"
    notes = []
    for k, word in enumerate(("n02", "n01")):
        for i in range(10):
            jpeg(home / "train" / word / "images" / f"{word}_{i}.JPEG", 100 * k + i)
        for i in range(2):
            jpeg(home / "val" / "images" / f"val_{k}{i}.JPEG", 1000 + 10 * k + i)
            notes.append(f"val_{k}{i}.JPEG\t{word}\t0\t0\t62\t62")
    (home / "val" / "val_annotations.txt").write_text("\n".join(notes) + "\n")
    return tmp_path


def test_tiny_imagenet(tiny_root: Path) -> None:
    data = TinyImageNet().load(tiny_root, True)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 4)
    assert data.shape == (3, 64, 64)
    assert data.test.y.tolist() == [0, 0, 1, 1]  # n01 is class 0
    file = tiny_root / "tiny-imagenet-200" / "val" / "images" / "val_10.JPEG"
    assert torch.equal(data.test.x[0], decode_image(read_file(str(file)), ImageReadMode.RGB))
    assert not data.verified
    assert set(data.report()["shared_samples"].values()) == {0}
    shutil.rmtree(tiny_root / "tiny-imagenet-200")
    assert TinyImageNet().load(tiny_root, True).data_hash == data.data_hash


def test_tiny_imagenet_needs_the_flag_or_its_archive(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="--allow-unverified-data"):
        TinyImageNet().load(tiny_root, False)
    assert [p for p in (tiny_root / "prepared").iterdir() if p.is_dir()] == []
    lines = TinyImageNet().verify(tiny_root).lines
    assert "not there" in lines[0]
    assert "20 samples for training and validation, 4 for test; the full set has" in lines[1]


@pytest.fixture
def official_tiny(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with an archive of it, as if just this had been published."""
    (remote,) = TinyImageNet.archives
    home = tiny_root / "tiny-imagenet-200"
    files = sorted(p for p in home.rglob("*") if p.is_file())
    with zipfile.ZipFile(home / remote.name, "w") as packed:
        for file in files:
            packed.write(file, file.relative_to(tiny_root))
    md5 = hashlib.md5((home / remote.name).read_bytes()).hexdigest()
    monkeypatch.setattr(TinyImageNet, "archives", (replace(remote, md5=md5, size=None),))
    monkeypatch.setattr(TinyImageNet, "info", replace(TinyImageNet.info, sizes=(18, 2, 4)))
    return tiny_root


def other_pixels(home: Path) -> None:
    file = home / "train/n01/images/n01_3.JPEG"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


def other_labels(home: Path) -> None:
    notes = home / "val/val_annotations.txt"
    notes.write_text(notes.read_text().replace("val_00.JPEG\tn02", "val_00.JPEG\tn01"))


def one_more(home: Path) -> None:
    jpeg(home / "train/n01/images/n01_99.JPEG", 5)


@pytest.mark.parametrize(
    ("harm", "odd"),
    [
        (other_pixels, "train/n01/images/n01_3.JPEG"),
        (other_labels, "val/val_annotations.txt"),
        (one_more, "train/n01/images/n01_99.JPEG"),
    ],
)
def test_the_archive_of_tiny_imagenet_vouches_for_what_is_in_it(
    official_tiny: Path, harm: Callable[[Path], None], odd: str
) -> None:
    before = TinyImageNet().load(official_tiny, False)
    assert before.verified
    assert TinyImageNet().verify(official_tiny).verified
    harm(official_tiny / "tiny-imagenet-200")
    with pytest.raises(DataError, match=f"1 files are not those of the archives .*{odd}"):
        TinyImageNet().load(official_tiny, False)
    assert not TinyImageNet().verify(official_tiny).verified
    after = TinyImageNet().load(official_tiny, True)
    assert after.data_hash != before.data_hash


def test_a_tiny_imagenet_in_part_is_unpacked_again(official_tiny: Path) -> None:
    home = official_tiny / "tiny-imagenet-200"
    (home / "train/n02/images/n02_3.JPEG").unlink()
    assert not TinyImageNet().verify(official_tiny).verified
    (home / "val/images/val_11.JPEG").unlink()
    with pytest.raises(DataError, match=r"val_11\.JPEG: cannot be read"):
        TinyImageNet().verify(official_tiny)
    shutil.rmtree(home / "train/n01")
    with pytest.raises(DataError, match=r"train/n01 is missing; .*data fetch tiny-imagenet"):
        TinyImageNet().verify(official_tiny)
    TinyImageNet().fetch(official_tiny)
    assert TinyImageNet().verify(official_tiny).verified


def test_the_split_hash_names_what_is_used(tiny_root: Path) -> None:
    whole = TinyImageNet().load(tiny_root, True)
    few = [TinyImageNet(TinyImageNet.Config(train_limit=n)).load(tiny_root, True) for n in (4, 6)]
    assert [len(data.train) for data in few] == [4, 6]
    assert len({whole.split_hash, *(data.split_hash for data in few)}) == 3


def test_a_file_that_cannot_be_read_is_no_folder_that_cannot_be_written(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "n01_3.JPEG":
            raise OSError(errno.EIO, "Input/output error")
        return usual(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(DataError, match=r"n01_3\.JPEG: cannot be read: Input/output error"):
        TinyImageNet().load(tiny_root, True)


def empty(home: Path) -> None:
    (home / "train/n01/images/n01_3.JPEG").write_bytes(b"")


def wide(home: Path) -> None:
    jpeg(home / "train/n01/images/n01_3.JPEG", 0, 32)


def no_notes(home: Path) -> None:
    (home / "val/val_annotations.txt").unlink()


def no_val(home: Path) -> None:
    shutil.rmtree(home / "val")


def dangling(home: Path) -> None:
    (home / "train/n01/images/n01_99.JPEG").symlink_to("nothing")


def cut_short(home: Path) -> None:
    (home.parent / ".tiny-imagenet-200.zip.extracting").mkdir()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (empty, "n01_3.JPEG: no image"),
        (wide, r"\(3, 32, 64\) and not"),
        (no_notes, "annotations.txt: cannot be read"),
        (no_val, "data fetch tiny-imagenet --data-root"),
        (dangling, r"n01_99\.JPEG: cannot be read"),
        (cut_short, "half unpacked; .*data fetch tiny-imagenet --data-root"),
    ],
)
def test_a_damaged_folder_is_one_line(tiny_root: Path, harm: Any, why: str) -> None:
    harm(tiny_root / "tiny-imagenet-200")
    with pytest.raises(DataError, match=why) as caught:
        TinyImageNet().load(tiny_root, True)
    assert "\n" not in str(caught.value)
    if (tiny_root / "prepared").is_dir():
        assert [p for p in (tiny_root / "prepared").iterdir() if p.is_dir()] == []


@pytest.fixture(scope="module")
def net_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for k, word in enumerate(("n01", "n02")):
        for i in range(8):
            jpeg(root / "imagenet/train" / word / f"{word}_{i}.JPEG", 100 * k + i, 260 + i, 300)
        jpeg(root / "imagenet/val" / word / "val.JPEG", 900 + k, 300, 270)
    return root


@pytest.fixture
def few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def imagenet_of(root: Path, **options: Any) -> Any:
    return ImageNet(ImageNet.Config(**{"val_fraction": 0.25, **options})).load(root, True)


def test_imagenet_is_packed_and_read_back(
    net_root: Path, few_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "SHARD_BYTES", 40_000)
    data = imagenet_of(net_root)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 2)
    assert data.shape == (3, 224, 224)
    folder = next((net_root / "prepared").glob("imagenet-*"))
    assert len(list(folder.glob("images.*.bin"))) > 1
    file = net_root / "imagenet/val/n02/val.JPEG"
    image = middle()(decode_image(read_file(str(file)), ImageReadMode.RGB))
    assert torch.equal(data.test.x[1:2][0], image)
    assert torch.equal(torch.cat(list(data.test.x.split(1)))[1], image)
    assert data.test.y.tolist() == [0, 1]
    assert set(data.report()["shared_samples"].values()) == {0}
    assert imagenet_of(net_root).data_hash == data.data_hash
    assert imagenet_of(net_root, train_limit=4).data_hash != data.data_hash


def batches(data: Any, workers: int, seed: int) -> list[torch.Tensor]:
    split: ImageSplit = data.train.to(CPU)
    split.x.workers = workers
    g = torch.Generator().manual_seed(seed)
    feed = split.batches(torch.arange(12).flip(0), 5, data.augment, g, 4096)
    seen = list(feed)
    assert [tuple(x.shape) for x, _ in seen] == [(5, 3, 224, 224)] * 2
    assert torch.cat([y for _, y in seen]).tolist() == data.train.y.flip(0)[:10].tolist()
    return [x for x, _ in seen]


def test_workers_change_no_pixel(net_root: Path, few_workers: None) -> None:
    data = imagenet_of(net_root)
    state = torch.get_rng_state()
    alone, many, other = batches(data, 0, 1), batches(data, 2, 1), batches(data, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))
    assert not torch.equal(alone[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_augmentation_is_that_of_torchvision(net_root: Path, few_workers: None) -> None:
    data = imagenet_of(net_root)
    (first, *_) = batches(data, 0, 3)
    seeds = torch.randint(2**62, (10,), generator=torch.Generator().manual_seed(3))
    image = data.train.x.shards[int(data.train.x.numbers[11])]
    known = decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds[0]))
        expected = v2.Compose([v2.RandomResizedCrop(224, antialias=True),
                               v2.RandomHorizontalFlip()])(known)  # fmt: skip
    assert torch.equal(first[0], expected)


def test_imagenet_cannot_be_fetched_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image-net\.org.*ILSVRC2012_img_train\.tar") as caught:
        ImageNet().fetch(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"imagenet/train is missing"):
        ImageNet().load(tmp_path, True)


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def test_the_archives_of_imagenet_vouch_for_names_and_sizes(
    net_root: Path, few_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "imagenet"
    shutil.copytree(net_root / "imagenet", home)
    (home / "val/n01/val.JPEG").rename(home / "val/n01/val_1.JPEG")
    classes = {
        f"{word}.tar": write_tar(
            tmp_path / "class.tar",
            {p.name: p.read_bytes() for p in sorted((home / "train" / word).iterdir())},
        )
        for word in ("n01", "n02")
    }
    val = {p.name: p.read_bytes() for p in sorted((home / "val").rglob("*.JPEG"))}
    archives = []
    for remote, files in zip(ImageNet.archives, (classes, val), strict=True):
        content = write_tar(home / remote.name, files)
        archives.append(replace(remote, md5=hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(ImageNet, "archives", tuple(archives))
    monkeypatch.setattr(ImageNet, "info", replace(ImageNet.info, sizes=(16, None, 2)))

    def load(allow: bool) -> Any:
        return ImageNet(ImageNet.Config(val_fraction=0.25)).load(tmp_path, allow)

    before = load(False)
    assert before.verified
    assert ImageNet().verify(tmp_path).verified
    jpeg(home / "train/n01/n01_0.JPEG", 7, 100, 100)  # another image of the same name
    with pytest.raises(DataError, match=r"not those of the archives .n01/n01_0\.JPEG"):
        load(False)
    assert load(True).data_hash != before.data_hash
    shutil.copy(net_root / "imagenet/train/n01/n01_0.JPEG", home / "train/n01/n01_0.JPEG")
    assert load(False).data_hash == before.data_hash
    (home / "train/n01/n01_0.JPEG").rename(home / "train/n02/n01_0.JPEG")  # of another class
    with pytest.raises(DataError, match="2 files are not those of the archives"):
        load(False)


def test_a_lost_shard_is_packed_again(net_root: Path, few_workers: None, tmp_path: Path) -> None:
    shutil.copytree(net_root / "imagenet", tmp_path / "imagenet")
    before = imagenet_of(tmp_path).data_hash
    shard = next((tmp_path / "prepared").glob("imagenet-*/images.00000.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert imagenet_of(tmp_path).data_hash == before
    assert len(imagenet_of(tmp_path).test.x[:2]) == 2
