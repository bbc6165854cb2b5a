"""The prepared store: recordings turned into frames once, then memory-mapped.

A store is a folder `prepared/NAME-KEY` below the data root: one `SPLIT.x.npy` (uint8, a byte or a
bit a pixel) and one `SPLIT.y.npy` (int64) a split, or shards of whole files, and a `manifest.json`.
The key is a hash of the recipe: every argument that changes a byte.  The manifest repeats the
recipe and adds where the samples came from, the hash of the split, checksums of the files, and
library versions.

A store appears whole or not at all: it is written under another name and renamed.  A lock keeps
processes that want the same one from making it twice.  A store that does not fit its manifest, or
was made of files with other names, sizes or times of their last change, is made again.  Whether
those files are official does not stand in it: that is looked at anew for each run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock

from snnbench import __version__
from snnbench.data.base import Dataset, Info, Progress, Split, Verdict, balanced
from snnbench.data.fetch import cannot_write, check_room
from snnbench.data.splits import hash_indices
from snnbench.spec import canonical, digest

FORMAT = 3
KEY_DIGITS = 16
SPLITS = ("train", "val", "test")
Array = np.ndarray[Any, np.dtype[Any]]
Build = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """One split to be written: samples, uint8 and all of one shape, and their labels."""

    samples: Iterable[Array]
    labels: Array


@dataclass(frozen=True)
class Store:
    """A store on disk that fits its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    def split(self, name: str) -> Split:
        """The split, memory-mapped: changes stay in memory."""
        x, y = (np.load(self.folder / f"{name}.{part}.npy", mmap_mode="c") for part in "xy")
        return Split(torch.from_numpy(x), torch.from_numpy(np.array(y)))


class PreparedSet(Dataset):
    """A dataset that is read once, into a store for each set of options."""

    name: ClassVar[str]
    classes: ClassVar[int]
    info: ClassVar[Info]

    def recipe(self) -> dict[str, Any]:
        """Every argument that changes a byte of the store."""
        raise NotImplementedError

    def look(self, root: Path) -> tuple[str, Verdict]:
        """Hash of the files it is made of and of their split, and what `verify` says of them.

        What was measured of files that have not changed since is remembered.
        Raises DataError if they are missing.
        """
        raise NotImplementedError

    def fill(self, root: Path, half: Path) -> Mapping[str, Any]:
        """Write a new store; its `samples`, `shape` and `split`, the hash of the split."""
        raise NotImplementedError

    def store(self, root: Path, allow_unverified: bool) -> tuple[Store, Verdict]:
        """The store, made where it is missing or made of other files; and what those files are.

        A store serves when its files are gone; but then nothing vouches for it.
        """
        gone = not self.present(root) and exists(root, self.name, self.recipe())
        nothing = Verdict(False, [], "what it was prepared from is gone, or half unpacked")
        source, verdict = (None, nothing) if gone else self.look(root)
        verdict.allow(self.name, root, allow_unverified)

        def build(half: Path) -> dict[str, Any]:
            # A store that is damaged needs its files again, and `look` says that they are gone.
            made_of = source or self.look(root)[0]
            return {**self.fill(root, half), "source": made_of, "md5": dict(verdict.md5)}

        return prepared(root, self.name, self.recipe(), source, build), verdict

    def prepare(self, root: Path, allow_unverified: bool) -> Mapping[str, Any]:
        """Make the store where it is missing; its folder and manifest."""
        store, verdict = self.store(root, allow_unverified)
        return {"folder": str(store.folder), "verified": verdict.verified, **store.manifest}

    def clean(self, root: Path) -> Sequence[Path]:
        """Delete every store of this set, and what is left of half-made ones."""
        return clean(root, self.name)

    def chosen(self, labels: Mapping[str, Array]) -> dict[str, Array]:
        """Places in each split of the samples that are used, by the limits of the options.

        A small training set has a small validation set: its share of the whole split.
        """
        c, share = self.config, len(labels["val"]) / (len(labels["train"]) + len(labels["val"]))
        val = None if c.train_limit is None else max(self.classes, round(c.train_limit * share))
        limits = {"train": c.train_limit, "val": val, "test": c.test_limit}
        return {n: balanced(labels[n], f"{self.name}-{n}", limits[n]).numpy() for n in SPLITS}

    def used(self, store: Store) -> tuple[tuple[Split, Split, Split], str]:
        """The three splits, cut to the limits of the options, and the hash of what is in them."""
        whole = {name: store.split(name) for name in SPLITS}
        index = self.chosen({name: split.y.numpy() for name, split in whole.items()})

        def cut(name: str) -> Split:
            split, i = whole[name], torch.from_numpy(index[name])
            # What is used whole stays mapped, and takes no memory.
            return split if len(i) == len(split) else Split(split.x[i], split.y[i])

        parts, split_hash = (cut("train"), cut("val"), cut("test")), str(store.manifest["split"])
        if any(len(index[name]) < len(split) for name, split in whole.items()):
            split_hash = digest(split_hash, hash_indices(*index.values()))
        return parts, split_hash


def key(name: str, recipe: Mapping[str, Any]) -> str:
    """Name of the store's folder: the dataset, and a hash of all that changes a byte of it."""
    return f"{name}-{digest(canonical({'format': FORMAT, 'name': name, **recipe}))[:KEY_DIGITS]}"


def stores(root: Path, name: str) -> list[Path]:
    """Folders of the dataset's stores, half-made ones included."""
    home, exact = root / "prepared", f"{name}-{'?' * KEY_DIGITS}"
    return [p for kind in (exact, f".{exact}") for p in sorted(home.glob(kind)) if p.is_dir()]


def prepared(
    root: Path,
    name: str,
    recipe: Mapping[str, Any],
    source: str | None,
    build: Build,
) -> Store:
    """The store of that recipe, made by `build` if there is none that fits.

    `source` is a hash of the files that it is made of, or None where those are gone: a store made
    of others does not fit.  `build` fills a folder, by `write_splits` or with shards *.bin and an
    index *.npy, and gives facts for the manifest, that hash among them, as "source".
    Raises DataError if the folder cannot be written, or the disk is full.
    """
    folder = root / "prepared" / key(name, recipe)
    store = _open(folder, source)
    if store is not None:
        return store
    with _writing(folder), _lock(folder):
        store = _open(folder, source)
        if store is None:
            _make(folder, name, recipe, build)
            store = _open(folder, source)
    assert store is not None, "a store just made fits its manifest"
    return store


def exists(root: Path, name: str, recipe: Mapping[str, Any]) -> bool:
    """Whether there is a store of that recipe, fitting or not."""
    return (root / "prepared" / key(name, recipe) / "manifest.json").is_file()


def clean(root: Path, name: str) -> list[Path]:
    """Delete the dataset's stores, and what was measured of it; the stores that were there."""
    gone, measured = stores(root, name), root / "prepared" / f"{name}.measured.json"
    with _writing(measured):
        measured.unlink(missing_ok=True)
    for folder in gone:
        # Whoever is at work on the store is waited for.
        with _writing(folder), _lock(folder.with_name(folder.name.lstrip("."))):
            shutil.rmtree(folder, ignore_errors=not folder.exists())
    return [p for p in gone if not p.name.startswith(".")]


def _open(folder: Path, source: str | None) -> Store | None:
    """The store if it is whole: every file has the checksum that the manifest gives."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["format"] != FORMAT or key(manifest["name"], manifest["recipe"]) != folder.name:
            return None
        if source is not None and manifest["source"] != source:
            return None
        for file, sha in manifest["sha256"].items():
            if _sha256(folder / file) != sha:
                return None
        for file, size in manifest["bytes"].items():
            if (folder / file).stat().st_size != size:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Store(folder, manifest)


def _make(folder: Path, name: str, recipe: Mapping[str, Any], build: Build) -> None:
    """Fill the store under another name, then rename it; nothing is left if that fails."""
    half = folder.with_name(f".{folder.name}")  # the lock is held: what lies there is dead
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        facts = build(half)
        manifest = {
            "format": FORMAT,
            "name": name,
            "recipe": recipe,
            **facts,
            "sha256": {p.name: _sha256(p) for p in sorted(half.glob("*.npy"))},
            "bytes": {p.name: p.stat().st_size for p in sorted(half.glob("*.bin"))},
            "versions": {
                "snnbench": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
            },
        }
        (half / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        half.rename(folder)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def write_splits(
    half: Path, parts: Mapping[str, Part], what: str, progress: Progress | None
) -> dict[str, int]:
    """Write every split into the folder; how many samples each has."""
    total, done = sum(len(p.labels) for p in parts.values()), 0
    for split, part in parts.items():
        done = _write(half / f"{split}.x.npy", part, done, total, what, progress)
        np.save(half / f"{split}.y.npy", part.labels.astype(np.int64))
    return {split: len(part.labels) for split, part in parts.items()}


def _write(
    path: Path, part: Part, done: int, total: int, what: str, progress: Progress | None
) -> int:
    """One array of all samples, written as they come; how many samples are done now.

    Written, not mapped: a full disk is then an error, and not the end of the process.
    """
    n, shape = len(part.labels), None
    with path.open("wb") as file:
        for count, sample in enumerate(part.samples, 1):
            if shape is None:
                shape = sample.shape
                check_room(path.parent, n * sample.nbytes)
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            assert sample.dtype == np.uint8
            assert sample.shape == shape
            assert count <= n
            file.write(np.ascontiguousarray(sample).tobytes())
            if progress is not None:
                progress(what, done + count, total)
        assert shape is not None, "no split is empty"
        assert count == n
        file.flush()
        os.fsync(file.fileno())
    return done + n


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say in one line why the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise cannot_write(folder, error) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
