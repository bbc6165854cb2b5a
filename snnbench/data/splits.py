"""Which samples of a training set are for validation: fixed manifests, and the rule behind them.

A manifest `splits/NAME.json` freezes the validation indices of a dataset whose samples are known:
a compressed bit mask over its training samples, the hash of their labels (a copy in another order,
or another copy, has none), and the hash of the indices.  Where there is none, the same rule that
made the manifests decides: stratified, by SHA-256 of the salt and the index (`base.stratified`).
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snnbench.data.base import stratified
from snnbench.errors import DataError
from snnbench.spec import digest

FOLDER = Path(__file__).parent / "splits"
FROZEN = 0.1  # the share of train that the manifests hold


def hash_labels(labels: np.ndarray[Any, Any]) -> str:
    """SHA-256 of the labels as int64, in order."""
    return digest(np.ascontiguousarray(labels, dtype=np.int64).tobytes())


def hash_indices(*parts: Tensor | np.ndarray[Any, Any]) -> str:
    """SHA-256 of index sets as int64, each preceded by its length."""
    arrays = [np.ascontiguousarray(np.asarray(p), dtype=np.int64) for p in parts]
    return digest(*(b for a in arrays for b in (f"{len(a)}:", a.tobytes())))


def freeze(name: str, labels: np.ndarray[Any, Any], salt: str) -> dict[str, Any]:
    """The manifest of a dataset's validation split, as data."""
    val, _ = stratified(labels, salt, (FROZEN,))
    mask = np.zeros(len(labels), dtype=bool)
    mask[val.numpy()] = True
    return {
        "name": name,
        "rule": f"{FROZEN:.0%} of every class, in the order of SHA-256('{salt}:INDEX')",
        "samples": len(labels),
        "labels_sha256": hash_labels(labels),
        "val_samples": len(val),
        "val_sha256": hash_indices(val),
        "val_mask": base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode(),
    }


def frozen(name: str, labels: np.ndarray[Any, Any]) -> Tensor | None:
    """Validation indices of the manifest that fits these labels; None if none does.

    Raises DataError if a manifest is damaged.
    """
    for path in sorted(FOLDER.glob(f"{name}.json")) + sorted(FOLDER.glob(f"{name}@*.json")):
        try:
            known = json.loads(path.read_text("utf-8"))
            if known["labels_sha256"] != hash_labels(labels):
                continue
            packed = zlib.decompress(base64.b64decode(known["val_mask"]))
            mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))[: known["samples"]]
            val = torch.from_numpy(np.flatnonzero(mask))
            if hash_indices(val) != known["val_sha256"]:
                raise ValueError("its indices do not have its hash")
        except (OSError, ValueError, KeyError, zlib.error) as error:
            raise DataError(f"{path}: damaged; install snnbench again: {error}") from error
        return val
    return None


def validation(
    name: str, labels: np.ndarray[Any, Any], salt: str, fraction: float
) -> tuple[Tensor, Tensor]:
    """Indices of validation, and of the rest of train: from the manifest, or by its rule."""
    val = frozen(name, labels) if fraction == FROZEN else None
    if val is None:
        val, rest = stratified(labels, salt, (fraction,))
        return val, rest
    mask = np.ones(len(labels), dtype=bool)
    mask[val.numpy()] = False
    return val, torch.from_numpy(np.flatnonzero(mask))
