"""Recordings turned into frames: by hand, through tonic's readers, and wrong in every way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from event_files import DTYPE, recording, write_aedat4, write_atis, write_hdf5, write_npy
from tonic.io import read_mnist_file
from tonic.transforms import ToFrame

from snnbench.data import official, prepared
from snnbench.data.base import Data, unpack_bits
from snnbench.data.events import Frames, check
from snnbench.data.recordings import CIFAR10DVS, NMNIST, SHD, SSC, DVSGesture, NCaltech101
from snnbench.data.simulated import DigitsEvents, gaze, look, record, scene
from snnbench.errors import DataError

PLAIN = Frames(T=2, bins="events", value="count", size=None)
SENSOR = (4, 3, 2)  # width, height, polarities


def events(*rows: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    return np.array(list(rows), dtype=DTYPE)


def shas(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "manifest.json").read_text())["sha256"])


# --- frames, by hand --------------------------------------------------------------------------

FIVE = events((0, 0, 10, 1), (3, 2, 20, 0), (3, 2, 30, 0), (3, 2, 40, 0), (1, 1, 100, 1))


def test_equal_event_counts_leave_out_the_remainder() -> None:
    frames = PLAIN.make(FIVE, SENSOR)  # 5 // 2 = 2 events a frame, the fifth is left out
    assert frames.shape == (2, 2, 3, 4)
    assert frames.dtype == np.uint8
    assert frames[0, 1, 0, 0] == frames[0, 0, 2, 3] == 1
    assert frames[1, 0, 2, 3] == 2
    assert frames.sum() == 4


def test_equal_times() -> None:
    frames = replace(PLAIN, bins="time").make(FIVE, SENSOR)  # bins of (100 - 10) // 2 = 45 us
    assert frames[0].sum() == 4
    assert frames[0, 0, 2, 3] == 3
    # tonic leaves out what lies at the end of the last bin, as it does with the last event here.
    assert frames[1].sum() == 0


def test_each_frame_is_divided_by_its_own_maximum() -> None:
    frames = replace(PLAIN, T=1, value="max").make(FIVE, SENSOR)
    assert frames[0, 0, 2, 3] == 255
    assert frames[0, 1, 0, 0] == frames[0, 1, 1, 1] == 85  # 255 * 1 // 3
    empty = replace(PLAIN, bins="time", value="max").make(FIVE, SENSOR)[1]
    assert empty.max() == 0


def test_binary_frames_and_counts_beyond_a_byte() -> None:
    many = np.repeat(FIVE[:1], 300)
    assert replace(PLAIN, T=1).make(many, SENSOR).max() == 255
    binary = replace(PLAIN, T=1, value="binary").make(many, SENSOR)
    assert binary.sum() == 1


def test_the_resize_is_that_of_pillow_for_each_polarity() -> None:
    image = pytest.importorskip("PIL.Image")
    full = replace(PLAIN, T=3, value="max").make(
        recording(np.random.default_rng(0), 4000, 32), (32, 32, 2)
    )
    small = replace(PLAIN, T=3, value="max", size=12).make(
        recording(np.random.default_rng(0), 4000, 32), (32, 32, 2)
    )
    assert small.shape == (3, 2, 12, 12)
    for t in range(3):
        for p in range(2):
            resized = image.fromarray(full[t, p]).resize((12, 12), image.Resampling.BILINEAR)
            assert np.abs(np.asarray(resized).astype(int) - small[t, p]).max() <= 1


def test_frames_are_those_of_tonic() -> None:
    found = recording(np.random.default_rng(6), 5000, 32)
    for bins, words in (("events", {"n_event_bins": 7}), ("time", {"n_time_bins": 7})):
        frames = Frames(7, bins, "count", None).make(found, (32, 32, 2))  # type: ignore[arg-type]
        assert (frames == ToFrame(sensor_size=(32, 32, 2), **words)(found.copy())).all()


@pytest.mark.parametrize("most", [32_768, 65_536, 70_000])
def test_more_events_of_a_pixel_than_16_bits_hold(most: int) -> None:
    """Tonic's ToFrame would start again: a pixel of 65,536 events would have none."""
    hot = events(*[(0, 0, 1, 1)] * most, *[(2, 1, 1, 0)] * (most // 2))
    frames = replace(PLAIN, T=1, value="max").make(hot, SENSOR)
    assert frames[0, 1, 0, 0] == 255
    assert frames[0, 0, 1, 2] == 127
    for value, brightest in (("count", 255), ("binary", 1)):
        kept = Frames(1, "events", value, None).make(hot, SENSOR)  # type: ignore[arg-type]
        assert kept[0, 1, 0, 0] == kept[0, 0, 1, 2] == brightest
        assert kept.sum() == 2 * brightest


@pytest.mark.parametrize("size", [1, 7, 12, 16, 31, 32, 40])
def test_a_resize_loses_no_event_that_is_counted(size: int) -> None:
    found = recording(np.random.default_rng(7), 200, 32)
    frames = Frames(4, "events", "count", size).make(found, (32, 32, 2))
    assert frames.shape == (4, 2, size, size)
    assert frames.sum() == 200
    for t, part in enumerate(np.split(found, 4)):
        places = {(e["p"], e["y"] * size // 32, e["x"] * size // 32) for e in part}
        assert set(zip(*np.nonzero(frames[t]), strict=True)) == places


@pytest.mark.parametrize("last", [10, 11])
def test_a_recording_too_short_for_frames_of_equal_time(last: int) -> None:
    short = events((0, 0, 10, 1), (1, 1, 10, 1), (2, 2, last, 0))
    with pytest.raises(ValueError, match=f"{last - 10} us cannot be divided into 2 frames"):
        replace(PLAIN, bins="time").make(short, SENSOR)


def test_one_dimension() -> None:
    words = events((0, 0, 10, 1), (699, 0, 20, 1), (5, 0, 30, 1), (5, 0, 40, 1))
    frames = PLAIN.make(words[["t", "x", "p"]].copy(), (700, 1, 1))
    assert frames.shape == (2, 700)
    assert frames[0, [0, 699]].tolist() == [1, 1]
    assert frames[1, 5] == 2


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (events(), "an empty recording"),
        (events((4, 0, 1, 1)), "x = 4 on a sensor of 4"),
        (events((0, 3, 1, 1)), "y = 3 on a sensor of 3"),
        (events((-1, 0, 1, 1)), "x = -1"),
        (events((0, 0, 1, 2)), "p = 2"),
        (events((0, 0, 5, 1), (0, 0, 3, 1)), "backwards at event 1: 5 us, then 3 us"),
    ],
)
def test_what_cannot_be_a_recording(bad: np.ndarray[Any, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check(bad, SENSOR)


def test_fewer_events_than_frames() -> None:
    with pytest.raises(ValueError, match="1 events cannot be divided into 2 frames"):
        PLAIN.make(FIVE[:1], SENSOR)


# --- a synthetic N-MNIST through tonic's reader -----------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten recordings of each of two digits for training and two for test."""
    rng = np.random.default_rng(1)
    for part, count in (("Train", 10), ("Test", 2)):
        for digit in (0, 7):
            for i in range(count):
                file = tmp_path / "NMNIST" / part / str(digit) / f"{i + 1:05}.bin"
                write_atis(file, recording(rng))
    return tmp_path


def nmnist(**options: Any) -> NMNIST:
    return NMNIST(NMNIST.Config(**{"T": 4, "val_fraction": 0.2, **options}))


def test_a_loaded_set(root: Path) -> None:
    data = nmnist(value="count").load(root, True)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)
    assert data.train.x.shape == (16, 4, 2, 34, 34)
    assert data.shape == (2, 34, 34)
    assert not data.verified
    assert data.train.y.bincount().tolist() == [8, 0, 0, 0, 0, 0, 0, 8]
    assert (data.train.x.flatten(1).sum(1) == 60).all()  # 4 bins of 15 of 60 events
    x_TB = data.encode(data.test.x[:3], 4)
    assert x_TB.shape == (4, 3, 2, 34, 34)
    assert x_TB.is_contiguous()  # a layer flattens [T, B] without a copy
    assert torch.equal(x_TB[2, 1], data.test.x[1, 2].float())


def test_another_t_is_refused_in_one_line(root: Path) -> None:
    data = nmnist().load(root, True)
    with pytest.raises(DataError, match="prepared with T = 4 and cannot be run with T = 6") as e:
        data.encode(data.test.x, 6)
    assert "\n" not in str(e.value)


def test_bits_are_the_same_frames_in_an_eighth_of_the_room(root: Path) -> None:
    bits = nmnist(value="binary").load(root, True)
    counts = nmnist(value="count").load(root, True)
    assert bits.train.x.shape == (16, 4, 289)  # 2 * 34 * 34 / 8
    assert bits.shape == counts.shape
    frames = unpack_bits(bits.train.x, bits.shape)
    assert torch.equal(frames, counts.train.x.clamp(max=1))
    assert torch.equal(bits.encode(bits.test.x, 4), counts.encode(counts.test.x.clamp(max=1), 4))


def test_augmentation_treats_all_frames_alike_packed_or_not(root: Path) -> None:
    order, batch = torch.arange(16), 8
    seen = {}
    for value in ("binary", "count"):
        data = nmnist(value=value, augment=("flip", "roll")).load(root, True)
        g = torch.Generator().manual_seed(5)
        feed = data.train.batches(order, batch, data.augment, g, 4096)
        seen[value] = torch.cat([data.encode(x, 4) for x, _ in feed], 1)
        plain = data.encode(data.train.x, 4)
        assert not torch.equal(seen[value], plain)
        assert seen[value].sum() == plain.sum()  # moved, never lost
    assert torch.equal(seen["binary"], seen["count"].clamp(max=1))


def test_limits_are_balanced_subsets_of_one_store(root: Path) -> None:
    whole, few = nmnist().load(root, True), nmnist(train_limit=10, test_limit=2).load(root, True)
    assert (len(few.train), len(few.test)) == (10, 2)
    assert few.train.y.bincount()[[0, 7]].tolist() == [5, 5]
    assert whole.data_hash != few.data_hash
    assert len(list((root / "prepared").glob("nmnist-*"))) == 1
    manifest = json.loads(next((root / "prepared").glob("nmnist-*/manifest.json")).read_text())
    assert whole.split_hash == manifest["split"]
    assert nmnist(train_limit=16, test_limit=4).load(root, True).split_hash == whole.split_hash
    fewer = nmnist(train_limit=10, test_limit=3).load(root, True)
    hashes = {whole.split_hash, few.split_hash, fewer.split_hash}
    assert len(hashes) == 3
    assert all(len(h) == 64 for h in hashes)


def test_unverified_recordings_need_the_flag_prepared_or_not(root: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="--allow-unverified-data"):
            nmnist().load(root, False)
        nmnist().load(root, True)


@pytest.fixture
def official_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recordings with archives of them, as if just these had been published."""
    home, archives = root / "NMNIST", []
    for remote, part in zip(NMNIST.archives, ("Train", "Test"), strict=True):
        with zipfile.ZipFile(home / remote.name, "w") as packed:
            for file in sorted((home / part).rglob("*.bin")):
                packed.write(file, file.relative_to(home))
        md5 = hashlib.md5((home / remote.name).read_bytes()).hexdigest()
        archives.append(replace(remote, md5=md5))
    monkeypatch.setattr(NMNIST, "archives", tuple(archives))
    monkeypatch.setattr(NMNIST, "info", replace(NMNIST.info, sizes=(18, 2, 4)))
    return root


def test_official_archives_vouch_for_the_files_unpacked_from_them(official_root: Path) -> None:
    assert nmnist().load(official_root, False).verified
    assert nmnist().load(official_root, False).verified  # from what was measured
    verdict = nmnist().verify(official_root)
    assert verdict.verified
    assert "the official archive" in verdict.lines[0]
    assert verdict.lines[-1].endswith("20 samples for training and validation, 4 for test")


def change(home: Path) -> None:
    file = home / "Train/0/00003.bin"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def shorten(home: Path) -> None:
    file = home / "Test/7/00001.bin"
    file.write_bytes(file.read_bytes()[:-5])


def lose_one(home: Path) -> None:
    (home / "Train/7/00005.bin").unlink()


def add_one(home: Path) -> None:
    write_atis(home / "Train/7/00099.bin", recording(np.random.default_rng(5)))


def rename_one(home: Path) -> None:
    (home / "Train/0/00001.bin").rename(home / "Train/7/00099.bin")


def lose_archive(home: Path) -> None:
    (home / "test.zip").unlink()


def other_archive(home: Path) -> None:
    (home / "test.zip").write_bytes((home / "test.zip").read_bytes() + b"x")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (change, "1 files are not those of the archives .Train/0/00003.bin"),
        (shorten, "1 files are not those of the archives .Test/7/00001.bin"),
        (lose_one, "1 files are not those of the archives .Train/7/00005.bin"),
        (add_one, "1 files are not those of the archives .Train/7/00099.bin"),
        (rename_one, "2 files are not those of the archives .Train/7/00099.bin, Train/0/00001.bin"),
        (lose_archive, "test.zip: not there, so that nothing vouches for it"),
        (other_archive, "test.zip: not the official archive"),
    ],
)
@pytest.mark.parametrize("prepared_before", [False, True])
def test_a_run_and_the_command_judge_a_copy_alike(
    official_root: Path, harm: Callable[[Path], None], why: str, prepared_before: bool
) -> None:
    if prepared_before:
        assert nmnist().load(official_root, False).verified
    harm(official_root / "NMNIST")
    with pytest.raises(DataError, match=why) as caught:
        nmnist().load(official_root, False)
    assert "\n" not in str(caught.value)
    assert f"`snnbench data verify nmnist --data-root {official_root}`" in str(caught.value)
    assert not nmnist().load(official_root, True).verified
    verdict = nmnist().verify(official_root)
    assert not verdict.verified
    assert re.search(why, "\n".join(verdict.lines))


def test_official_archives_of_too_few_samples(
    official_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NMNIST, "info", replace(NMNIST.info, sizes=(54_000, 6_000, 10_000)))
    assert not nmnist().verify(official_root).verified
    with pytest.raises(DataError, match="the full set has 60,000 and 10,000"):
        nmnist().load(official_root, False)


def test_what_was_measured_is_not_measured_for_every_run(
    official_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nmnist().load(official_root, False)
    monkeypatch.setattr(official, "md5_of", lambda _: pytest.fail("read again"))
    assert nmnist().load(official_root, False).verified
    nmnist().clean(official_root)
    with pytest.raises(pytest.fail.Exception):
        nmnist().load(official_root, False)


# --- the prepared store -----------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "T": 5,
    "bins": "time",
    "value": "count",
    "size": 17,
    "val_fraction": 0.3,
}


def test_the_key_covers_every_argument_that_changes_a_byte() -> None:
    base = nmnist()
    fields = set(NMNIST.Config.__dataclass_fields__)
    assert fields == {*CHANGES, "augment", "train_limit", "test_limit"}
    keys = {prepared.key("nmnist", base.recipe())}
    for option, value in CHANGES.items():
        keys.add(prepared.key("nmnist", nmnist(**{option: value}).recipe()))
    keys.add(prepared.key("nmnist2", base.recipe()))
    keys.add(prepared.key("nmnist", {**base.recipe(), "tonic": "0"}))
    keys.add(prepared.key("nmnist", {**base.recipe(), "sensor": [1, 2, 3]}))
    assert len(keys) == 1 + len(CHANGES) + 3
    same = nmnist(augment=("flip",), train_limit=3, test_limit=4).recipe()
    assert prepared.key("nmnist", same) in keys


@pytest.mark.parametrize("option", CHANGES)
def test_every_argument_changes_the_store(root: Path, option: str) -> None:
    first = shas(Path(str(nmnist().prepare(root, True)["folder"])))
    other = Path(str(nmnist(**{option: CHANGES[option]}).prepare(root, True)["folder"]))
    assert shas(other) != first


def test_the_keys_of_other_sets_cover_their_own_options() -> None:
    for cls, change in ((DigitsEvents, {"threshold": 0.2}), (DigitsEvents, {"step_us": 500}),
                        (DVSGesture, {"val_users": (1,)})):  # fmt: skip
        assert cls().recipe() != cls(cls.Config(**change)).recipe()


def test_a_store_is_made_once_and_serves_without_its_recordings(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = nmnist().load(root, True)
    manifest = next((root / "prepared").glob("nmnist-*")) / "manifest.json"
    made = manifest.stat().st_mtime_ns
    shutil.rmtree(root / "NMNIST")
    after = nmnist().load(root, True)
    assert after.data_hash == before.data_hash
    assert after.split_hash == before.split_hash
    assert manifest.stat().st_mtime_ns == made
    with pytest.raises(DataError, match="what it was prepared from is gone"):
        nmnist().load(root, False)
    with pytest.raises(DataError, match="snnbench data fetch nmnist"):
        nmnist(T=3).load(root, True)


def damage_pixels(folder: Path) -> None:
    file = folder / "train.x.npy"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def other_recipe(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["T"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(folder: Path) -> None:
    file = folder / "test.x.npy"
    file.write_bytes(file.read_bytes()[:-100])


def lose(folder: Path) -> None:
    (folder / "val.y.npy").unlink()


@pytest.mark.parametrize("harm", [damage_pixels, damage_manifest, other_recipe, truncate, lose])
def test_a_damaged_store_is_made_again(root: Path, harm: Callable[[Path], None]) -> None:
    before = nmnist().load(root, True).data_hash
    folder = next((root / "prepared").glob("nmnist-*"))
    harm(folder)
    assert nmnist().load(root, True).data_hash == before
    assert shas(folder)


def test_a_store_of_other_recordings_is_made_again(root: Path) -> None:
    before = nmnist().load(root, True)
    write_atis(root / "NMNIST/Train/0/00011.bin", recording(np.random.default_rng(9)))
    after = nmnist().load(root, True)
    assert len(after.train) + len(after.val) == len(before.train) + len(before.val) + 1


def test_other_bytes_under_the_same_name_are_noticed(root: Path) -> None:
    before = nmnist().load(root, True)
    change(root / "NMNIST")  # of the same size
    after = nmnist().load(root, True)
    assert after.split_hash == before.split_hash
    assert after.data_hash != before.data_hash


def test_official_files_gone_vouch_for_nothing(official_root: Path) -> None:
    assert nmnist().load(official_root, False).verified
    shutil.rmtree(official_root / "NMNIST/Train")
    shutil.rmtree(official_root / "NMNIST/Test")
    with pytest.raises(DataError, match="what it was prepared from is gone"):
        nmnist().load(official_root, False)
    assert not nmnist().load(official_root, True).verified


def test_a_mapped_split_never_writes_back(root: Path) -> None:
    data = nmnist().load(root, True)
    data.train.x[:] = 0
    assert nmnist().load(root, True).train.x.sum() > 0


def _prepare(root: Path, ready: Any) -> None:
    def build(half: Path) -> dict[str, Any]:
        with (root / "built").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.5)  # the other one comes in the meantime
        np.save(half / "train.x.npy", np.zeros(4, np.uint8))
        return {"source": "same", "samples": {}}

    ready.wait(60)
    store = prepared.prepared(root, "set", {"T": 4}, "same", build)
    assert (store.folder / "train.x.npy").is_file()


def test_several_processes_make_one_store_once(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    workers = [context.Process(target=_prepare, args=(root, ready)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len((root / "built").read_text().splitlines()) == 1
    assert len([p for p in (root / "prepared").iterdir() if p.is_dir()]) == 1


def test_clean_deletes_the_stores_of_one_set(root: Path) -> None:
    nmnist().load(root, True)
    nmnist(T=2).load(root, True)
    (root / "prepared" / "shd-0123456789abcdef").mkdir()
    assert len(nmnist().clean(root)) == 2
    assert nmnist().clean(root) == []
    # Locks stay: one that is deleted while somebody waits for it protects nothing.
    left = [p.name for p in (root / "prepared").iterdir() if not p.name.endswith(".lock")]
    assert left == ["shd-0123456789abcdef"]


def test_a_binary_frame_keeps_a_lone_event_when_it_is_resized() -> None:
    lone = np.zeros(1, DTYPE)
    lone["x"], lone["y"], lone["t"], lone["p"] = 100, 37, 5, 1
    several = np.concatenate([lone] * 2)
    several["t"][1] = 9
    frames = Frames(T=2, bins="events", value="binary", size=48).make(several, (128, 128, 2))
    assert frames.reshape(2, -1).sum(1).tolist() == [1, 1]
    assert frames[0, 1, 37 * 48 // 128, 100 * 48 // 128] == 1


def test_a_small_subset_keeps_the_share_of_validation(
    digits_root: Path, digits_events: Data
) -> None:
    small = DigitsEvents.Config(T=5, train_limit=100, test_limit=20)
    data = DigitsEvents(small).load(digits_root, False)
    assert data.split_hash not in ("", digits_events.split_hash)
    assert (len(data.train), len(data.test)) == (100, 20)
    assert 10 <= len(data.val) <= 15


def test_a_full_disk_is_one_line_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DataError, match=r"disk is full.*100 are free") as caught:
        nmnist().load(root, True)
    assert "\n" not in str(caught.value)
    assert [p for p in (root / "prepared").iterdir() if p.is_dir()] == []


def test_a_data_root_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="name another folder with --data-root") as caught:
        DigitsEvents().load(file, False)
    assert "\n" not in str(caught.value)


# --- bad recordings ---------------------------------------------------------------------------


def backwards(file: Path) -> None:
    odd = recording(np.random.default_rng(3))
    write_atis(file, odd[::-1])


def off_the_sensor(file: Path) -> None:
    odd = recording(np.random.default_rng(3))
    odd["x"][5] = 34
    write_atis(file, odd)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-2]), "a truncated file: 298 bytes"),
        (lambda file: file.write_bytes(b""), "an empty recording"),
        (backwards, "time runs backwards at event 1"),
        (off_the_sensor, "x = 34 on a sensor of 34"),
        (lambda file: file.write_bytes(file.read_bytes()[:15]), "3 events cannot be divided"),
    ],
)
def test_a_bad_recording_is_named_and_leaves_no_store(
    root: Path, harm: Callable[[Path], None], why: str
) -> None:
    harm(root / "NMNIST/Test/7/00002.bin")
    with pytest.raises(DataError, match=f"NMNIST/Test/7/00002.bin: .*{why}") as caught:
        nmnist().load(root, True)
    assert "\n" not in str(caught.value)
    assert [p for p in (root / "prepared").iterdir() if p.is_dir()] == []


def test_missing_recordings(tmp_path: Path) -> None:
    for cls in (NMNIST, NCaltech101, CIFAR10DVS, DVSGesture, SHD, SSC):
        with pytest.raises(DataError) as caught:
            cls().load(tmp_path, True)
        assert f"`snnbench data fetch {cls.name} --data-root {tmp_path}`" in str(caught.value)
        assert not cls().present(tmp_path)


def test_a_part_that_is_missing_is_named_with_the_command_that_gets_it(root: Path) -> None:
    shutil.rmtree(root / "NMNIST/Test")
    with pytest.raises(DataError, match=r"no recording for test; .*data fetch nmnist --data-root"):
        nmnist().load(root, True)


# --- the other formats ------------------------------------------------------------------------


def names(part: Any) -> list[str]:
    return [name.partition("/")[2] for name in part.names]


def test_cifar10dvs_is_split_in_file_order(tmp_path: Path) -> None:
    pytest.importorskip("aedat", reason="tonic reads AEDAT 4 with the package aedat")
    rng, known = np.random.default_rng(2), {}
    for word in ("airplane", "truck"):
        for i in range(10):
            file = tmp_path / "CIFAR10DVS" / word / f"cifar10_{word}_{i}.aedat4"
            known[file.name] = recording(rng, 100, 128)
            write_aedat4(file, known[file.name])
    dataset = CIFAR10DVS(CIFAR10DVS.Config(T=2, size=None, value="count", val_fraction=0.34))
    source = dataset.open(tmp_path)
    # 9 comes last by number, though not by letters.
    assert names(source.test) == [f"{w}/cifar10_{w}_9.aedat4" for w in ("airplane", "truck")]
    assert source.test.labels.tolist() == [0, 9]
    assert (len(source.train), len(source.val)) == (12, 6)
    read = source.test.read(0)
    for axis in "xytp":
        assert (read[axis] == known["cifar10_airplane_9.aedat4"][axis]).all()
    data = dataset.load(tmp_path, True)
    assert data.train.x.shape == (12, 2, 2, 128, 128)
    assert (data.train.x.flatten(1).sum(1) == 100).all()


def test_gestures_are_split_by_person(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for part, users in (("Train", (1, 20, 22)), ("Test", (24, 29))):
        for user in users:
            for gesture in range(11):
                folder = tmp_path / "DVSGesture" / f"ibmGesture{part}" / f"user{user:02}_led"
                write_npy(folder / f"{gesture}.npy", recording(rng, 80, 128))
    dataset = DVSGesture(DVSGesture.Config(T=4, size=16))
    source = dataset.open(tmp_path)
    people = [{name.split("/")[2] for name in part.names}
              for part in (source.train, source.val, source.test)]  # fmt: skip
    assert people == [{"user01_led"}, {"user20_led", "user22_led"}, {"user24_led", "user29_led"}]
    data = dataset.load(tmp_path, True)
    assert data.train.x.shape == (11, 4, 2, 16, 16)
    assert data.train.y.tolist() == list(range(11))
    assert data.train.x.max() > 0


@pytest.mark.parametrize("folder", ["data", "Annotations"])
def test_ncaltech_labels_are_words_and_boxes_are_no_recordings(tmp_path: Path, folder: str) -> None:
    rng, tmp_path = np.random.default_rng(4), tmp_path / folder
    for word in ("ant", "zebra"):
        for i in range(10):
            file = tmp_path / "NCALTECH101" / "Caltech101" / word / f"image_{i:04}.bin"
            write_atis(file, recording(rng, 80, 100))
            box = tmp_path / "NCALTECH101" / "Caltech101_annotations" / word / f"a_{i:04}.bin"
            box.parent.mkdir(parents=True, exist_ok=True)
            box.write_bytes(b"box")
    data = NCaltech101(NCaltech101.Config(T=2)).load(tmp_path, True)
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
    assert data.train.x.shape == (14, 2, 2, 48, 48)
    assert set(data.train.y.tolist()) == {0, 1}


def spoken(tmp_path: Path, home: str, file: str, count: int) -> None:
    rng = np.random.default_rng(count)
    times = [np.sort(rng.random(50)) for _ in range(count)]
    units = [rng.integers(0, 700, 50) for _ in range(count)]
    write_hdf5(tmp_path / home / file, times, units, [i % 2 for i in range(count)])


def test_spoken_digits_are_bits_of_700_channels(tmp_path: Path) -> None:
    spoken(tmp_path, "SHD", "shd_train.h5", 20)
    spoken(tmp_path, "SHD", "shd_test.h5", 6)
    data = SHD(SHD.Config(T=10)).load(tmp_path, True)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6)
    assert data.shape == (700,)
    assert data.train.x.shape == (18, 10, 88)
    x_TB = data.encode(data.train.x[:5], 10)
    assert x_TB.shape == (10, 5, 700)
    assert set(x_TB.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="two dimensions"):
        SHD.Config(size=48)


def test_spoken_commands_have_an_official_validation(tmp_path: Path) -> None:
    for part, count in (("train", 8), ("valid", 4), ("test", 6)):
        spoken(tmp_path, "SSC", f"ssc_{part}.h5", count)
    data = SSC(SSC.Config(T=5)).load(tmp_path, True)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)


def test_a_damaged_hdf5_file_is_one_line(tmp_path: Path) -> None:
    spoken(tmp_path, "SHD", "shd_train.h5", 20)
    (tmp_path / "SHD" / "shd_test.h5").write_bytes(b"\x89HDF\r\n garbage")
    with pytest.raises(DataError, match="cannot be read") as caught:
        SHD().load(tmp_path, True)
    assert "\n" not in str(caught.value)


# --- digits-events ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def digits_events(digits_root: Path) -> Data:
    return DigitsEvents(DigitsEvents.Config(T=5)).load(digits_root, False)


def test_the_gaze_follows_a_triangle() -> None:
    assert gaze(0) == (0.0, 0.0)
    assert gaze(105_000) == (1.5, 3.0)
    assert gaze(210_000) == (3.0, 0.0)
    assert gaze(52_500) == (0.75, 1.5)
    assert gaze(315_000) == pytest.approx((0.0, 0.0), abs=1e-3)


def test_the_sensor_sees_the_screen_between_its_pixels() -> None:
    screen = torch.zeros(1, 20, 20, dtype=torch.float64)
    screen[0, 5, 7] = 1.0
    assert look(screen, 0, 0)[0, 5, 7] == 1
    assert look(screen, 2.0, 1.0)[0, 4, 5] == 1  # it looks right and down: things move left and up
    half = look(screen, 0.5, 0.25)[0]
    assert half[5, 7] == 0.375
    assert half[4, 6] == 0.125
    assert half.sum() == 1


def test_a_brightening_pixel_sends_one_event_for_each_threshold() -> None:
    """One bright digit pixel: ON where the edge arrives, OFF where it leaves, back to the start."""
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    x[0, 0, 3:5, 3:5] = 240
    (found,) = record(x, 0.3, 1_000, DigitsEvents.dtype)
    check(found, DigitsEvents.sensor)
    assert found["t"].max() < 315_000
    # The gaze returns to where it began: rises and falls of each pixel cancel, up to one threshold.
    net = np.zeros((16, 16))
    np.add.at(net, (found["y"], found["x"]), np.where(found["p"] == 1, 1, -1))
    assert np.abs(net).max() <= 1
    start = look(scene(x), 0, 0)[0]
    first = found[0]
    assert start[first["y"], first["x"]] > 0 or first["p"] == 1
    finer = record(x, 0.15, 1_000, DigitsEvents.dtype)[0]
    assert 1.6 < len(finer) / len(found) < 2.6


def test_digits_events_are_fixed_for_ever(digits_events: Data) -> None:
    assert digits_events.verified
    assert digits_events.train.x.shape == (1259, 5, 2, 16, 16)
    assert (len(digits_events.val), len(digits_events.test)) == (179, 359)
    assert digits_events.split_hash[:16] == "e5c9cf656425a6a7"
    assert digits_events.data_hash[:16] == "e86ecc8d8e2383c0"


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": 0.05}, {"step_us": 35_000}])
def test_the_camera_works_at_its_bounds(options: dict[str, Any]) -> None:
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    x[:, 0, 2:6, 2:6] = 240
    c = DigitsEvents.Config(**options)
    for found in record(x, c.threshold, c.step_us, DigitsEvents.dtype):
        check(found, DigitsEvents.sensor)
        assert Frames(4, "time", "count", None).make(found, DigitsEvents.sensor).sum() > 0


def test_no_recording_of_digits_stands_in_two_splits(digits_events: Data) -> None:
    report = digits_events.report()
    assert set(report["shared_samples"].values()) == {0}
    assert sum(report["per_class"]["test"]) == 359


# --- the real ones ----------------------------------------------------------------------------


def test_the_real_subset_of_nmnist(data_root: Path, tmp_path: Path) -> None:
    if not (data_root / "NMNIST").is_dir():
        pytest.skip("no NMNIST in the data root")
    (tmp_path / "NMNIST").symlink_to(data_root / "NMNIST")
    lines = "\n".join(NMNIST().verify(tmp_path).lines)
    if "SLAYER" not in lines:
        pytest.skip("the NMNIST here is not the subset of the SLAYER examples")
    data = NMNIST().load(tmp_path, True)
    assert (len(data.train), len(data.val), len(data.test)) == (900, 100, 100)
    assert data.split_hash[:16] == "90d30dcbe95db287"
    assert data.train.y.bincount(minlength=10).min() >= 70
    assert set(data.report()["shared_samples"].values()) == {0}


def test_real_gestures_of_128x128(data_root: Path) -> None:
    found = sorted((data_root / "DVSGesture_sample").glob("*.bin"))
    if not found:
        pytest.skip("no DVSGesture_sample in the data root")
    for path in found[:3]:
        recorded = read_mnist_file(str(path), dtype=DTYPE)
        check(recorded, (128, 128, 2))
        frames = Frames(10, "events", "max", 48).make(recorded, (128, 128, 2))
        assert frames.shape == (10, 2, 48, 48)
        assert (frames.reshape(10, -1).max(1) > 50).all()
        counts = Frames(10, "events", "count", None).make(recorded, (128, 128, 2))
        assert counts.max() < 255
        assert counts.sum() == len(recorded) // 10 * 10
