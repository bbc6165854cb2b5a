"""Small files in the formats of the published sets, for readers that are not ours."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np

DTYPE = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])


def recording(
    rng: np.random.Generator, n: int = 60, size: int = 34, last_us: int = 300_000
) -> np.ndarray[Any, Any]:
    """Random events on a sensor of that size, in order of time."""
    events = np.zeros(n, dtype=DTYPE)
    events["x"], events["y"] = rng.integers(0, size, (2, n))
    events["t"] = np.sort(rng.integers(0, last_us, n))
    events["p"] = rng.integers(0, 2, n)
    return events


def write_atis(path: Path, events: np.ndarray[Any, Any]) -> None:
    """N-MNIST's .bin: x, y, then one bit of polarity and 23 of time, five bytes an event."""
    path.parent.mkdir(parents=True, exist_ok=True)
    word = (events["p"].astype(np.int64) << 23) | events["t"]
    columns = [events["x"], events["y"], word >> 16 & 255, word >> 8 & 255, word & 255]
    path.write_bytes(np.stack(columns, 1).astype(np.uint8).tobytes())


def write_npy(path: Path, events: np.ndarray[Any, Any]) -> None:
    """DVS Gesture as tonic's archive has it: columns x, y, p, t in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [events["x"], events["y"], events["p"], events["t"] // 1000]
    np.save(path, np.stack(columns, 1).astype(np.float64))


def write_hdf5(path: Path, times_s: list[Any], units: list[Any], labels: list[int]) -> None:
    """SHD's file: times in seconds and channels, of a length of their own for each word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values, kind in (("times", times_s, np.float16), ("units", units, np.uint16)):
            rows = file.create_dataset(
                f"spikes/{name}", (len(values),), dtype=h5py.vlen_dtype(np.dtype(kind))
            )
            for i, row in enumerate(values):
                rows[i] = np.asarray(row, dtype=kind)
        file["labels"] = np.asarray(labels, dtype=np.uint16)
        file["extra/keys"] = np.array([b"zero", b"one"])
        file["extra/speaker"] = np.zeros(len(labels), dtype=np.uint16)


def write_aedat4(path: Path, events: np.ndarray[Any, Any]) -> None:
    """CIFAR10-DVS as tonic's archive has it: one uncompressed packet of AEDAT 4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = (
        b'<dv version="2.0"><node name="outInfo" path="/o/"><node name="0" path="/o/0/">'
        b'<attr key="compression" type="string">NONE</attr>'
        b'<attr key="typeIdentifier" type="string">EVTS</attr>'
        b'<node name="info" path="/o/0/info/"><attr key="sizeX" type="int">128</attr>'
        b'<attr key="sizeY" type="int">128</attr></node></node></node></dv>'
    )
    rows = b"".join(
        struct.pack("<qhh?xxx", int(e["t"]), int(e["x"]), int(e["y"]), bool(e["p"])) for e in events
    )
    packet = _flatbuffer(b"EVTS", [("vector", rows, len(events))])
    header = _flatbuffer(b"IOHE", [("int", 0, 0), ("long", -1, 0), ("string", info, len(info))])
    path.write_bytes(b"#!AER-DAT4.0\r\n" + header + struct.pack("<ii", 0, len(packet)) + packet)


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    """MNIST's file: type and number of dimensions, their sizes, then a byte a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def _flatbuffer(identifier: bytes, fields: list[tuple[str, Any, int]]) -> bytes:
    """A size-prefixed FlatBuffer of one table, whose fields follow it in order."""
    sizes = {"int": 4, "long": 8, "vector": 4, "string": 4}
    # Positions count from after the size: root offset, identifier, vtable, table, then contents.
    vtable = 8
    start = -(-(vtable + 4 + 2 * len(fields)) // 8) * 8 + 4  # fields of 8 bytes are aligned
    places, at = [], 4
    for kind, _, _ in fields:
        at = -(-(start + at) // sizes[kind]) * sizes[kind] - start
        places.append(at)
        at += sizes[kind]
    end = start + at
    body = bytearray(end)
    struct.pack_into("<I4s", body, 0, start, identifier)
    struct.pack_into(f"<HH{len(fields)}H", body, vtable, 4 + 2 * len(fields), at, *places)
    struct.pack_into("<i", body, start, start - vtable)
    for (kind, value, count), place in zip(fields, places, strict=True):
        if kind in ("int", "long"):
            struct.pack_into("<i" if kind == "int" else "<q", body, start + place, value)
            continue
        while (len(body) + 4) % 8:  # elements are aligned, their count stands before them
            body.append(0)
        struct.pack_into("<I", body, start + place, len(body) - (start + place))
        body += struct.pack("<I", count) + value + (b"\0" if kind == "string" else b"")
    while len(body) % 8:
        body.append(0)
    return struct.pack("<I", len(body)) + bytes(body)
