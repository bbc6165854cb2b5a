"""Events simulated from the embedded digits: an event dataset without a download.

The recording protocol of N-MNIST (Orchard et al. 2015, Frontiers in Neuroscience 9:437): the image
stands still on a screen and the camera looks along a triangle in three saccades of 105 ms, 1/8 of
the image right and 1/4 down, 1/8 right and 1/4 up, 1/4 left, back to where it began.  The camera
is the usual model (Lichtsteiner et al. 2008, IEEE JSSC 43(2)): a pixel sends an event whenever
log(intensity + 0.1) has changed by a threshold since its last one; its time is interpolated within
the step of the simulation.  There is no noise: the same digits always give the same events.

Shapes: N samples, H W sensor, in pixels; t in microseconds, x to the right, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from snnbench.data.base import Info, Verdict
from snnbench.data.digits import images, official, parts
from snnbench.data.events import EventSet, FrameConfig, Recordings, Source, subset
from snnbench.spec import digest

Array: TypeAlias = np.ndarray[Any, Any]
SACCADE_US = 105_000
SENSOR = 16
IMAGE = 12  # a digit of 8x8 fills 12x12 pixels of the sensor
CORNERS = ((0.0, 0.0), (IMAGE / 8, IMAGE / 4), (IMAGE / 4, 0.0), (0.0, 0.0))  # gaze, (x, y)
DARK = 0.1
UNIT = 2**16
AT_ONCE = 100  # digits: what is computed of them stays in the processor's cache


def gaze(t_us: int) -> tuple[float, float]:
    """Where the camera looks at a time, in pixels to the right and down from the beginning."""
    saccade, within = divmod(min(t_us, 3 * SACCADE_US - 1), SACCADE_US)
    share = within / SACCADE_US
    (x0, y0), (x1, y1) = CORNERS[saccade], CORNERS[saccade + 1]
    return x0 + share * (x1 - x0), y0 + share * (y1 - y0)


def scene(x: Tensor) -> Tensor:
    """Digits uint8 [N, 1, 8, 8] on the screen, double [N, H, W] in 0..1, dark all around."""
    large = F.interpolate(x.double() / 255, (IMAGE, IMAGE), mode="bilinear", align_corners=False)
    before = (SENSOR - IMAGE) // 2 + 1  # the gaze begins up and left of the middle
    after = SENSOR + IMAGE // 4 + 1 - IMAGE - before
    return F.pad(large.squeeze(1), (before, after, before, after))


def look(screen: Tensor, right: float, down: float) -> Tensor:
    """What the sensor sees, [N, H, W], bilinear between pixels of the screen."""
    i, j = int(down), int(right)
    v, u = down - i, right - j
    rows = screen[:, i : i + SENSOR] * (1 - v) + screen[:, i + 1 : i + 1 + SENSOR] * v
    return rows[..., j : j + SENSOR] * (1 - u) + rows[..., j + 1 : j + 1 + SENSOR] * u


def record(x: Tensor, threshold: float, step_us: int, dtype: np.dtype[Any]) -> list[Array]:
    """The events of every digit, in order of time, then place.

    x: uint8 [N, 1, 8, 8]; `threshold` in units of log intensity; `dtype` has fields x, y, t, p.
    """
    screen = scene(x)
    unit = round(threshold * UNIT)
    before = _log(look(screen, *gaze(0)))
    reference = before.clone()  # the log intensity at a pixel's last event
    found: list[tuple[Array, ...]] = []
    for t in range(step_us, 3 * SACCADE_US + 1, step_us):
        now = _log(look(screen, *gaze(t)))
        for polarity, sign in ((1, 1), (0, -1)):
            number = (((now - reference) * sign) // unit).clamp(min=0)
            for k in range(1, int(number.max()) + 1):
                hit = (number >= k).nonzero(as_tuple=True)
                level = reference[hit] + sign * k * unit
                since = (level - before[hit]) * step_us // (now[hit] - before[hit])
                n, row, column = (index.numpy() for index in hit)
                times = t - step_us + since.clamp(0, step_us - 1).numpy()
                found.append((n, column, row, times, np.full(len(n), polarity)))
            reference += sign * number * unit
        before = now
    n, column, row, times, polarities = (np.concatenate(p) for p in zip(*found, strict=True))
    order = np.lexsort((polarities, column, row, times, n))
    events = np.empty(len(n), dtype=dtype)
    events["x"], events["y"], events["t"], events["p"] = column, row, times, polarities
    ends = np.bincount(n, minlength=len(x)).cumsum()
    return np.split(events[order], ends[:-1])


def _log(intensity: Tensor) -> Tensor:
    """Log intensity in units of 1 / UNIT, int64: whole numbers are the same on every machine."""
    return ((intensity + DARK).log() * UNIT).round().long()


class DigitsEvents(EventSet):
    """1,797 real digits seen by a simulated event camera, 16x16, three saccades; no download."""

    @dataclass(frozen=True)
    class Config(FrameConfig):
        """As for all sets of frames; the camera's `threshold` and the simulation's step."""

        # Between no end of events and none at all; the log intensity changes by 2.4 at most.
        threshold: Annotated[float, Ge(0.05), Le(1.5)] = 0.3
        step_us: Annotated[int, Ge(100), Le(SACCADE_US // 3)] = 1_000

    source = "simulated from Alpaydin & Kaynak 1998 (scikit-learn) as in Orchard et al. 2015"
    name = "digits-events"
    classes = 10
    sensor = (SENSOR, SENSOR, 2)
    info = Info(
        "simulated events",
        10,
        (1259, 179, 359),
        "2x16x16",
        "BSD-3-Clause, as part of scikit-learn",
    )
    dtype = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])

    def look(self, root: Path) -> tuple[str, Verdict]:
        """The digits, and not their events: whether they are those known, bit for bit."""
        x, y = images()
        found = digest(x.numpy().tobytes(), y.numpy().tobytes())
        if official(x, y):
            return found, Verdict(True, ["every checksum fits"])
        why = "scikit-learn's digits are not those known"
        return found, Verdict(False, [why], why)

    def verify(self, root: Path) -> Verdict:
        """As `look`: there are no files."""
        return self.look(root)[1]

    def open(self, root: Path) -> Source:
        """The digits of scikit-learn in their three splits, as recordings."""
        x, y = images()
        test, val, train = parts(y)
        c = self.config
        filmed = (record(some, c.threshold, c.step_us, self.dtype) for some in x.split(AT_ONCE))
        events = [one for some in filmed for one in some]
        whole = Recordings([f"digit {i}" for i in range(len(y))], y.numpy(), events.__getitem__)
        train_part, val_part, test_part = (subset(whole, i) for i in (train, val, test))
        return Source(train_part, val_part, test_part)

    def fetch(self, root: Path) -> str:
        """Nothing to do."""
        return "digits-events is simulated from scikit-learn's digits: nothing to download"
