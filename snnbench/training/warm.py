"""What every worker needs and is the same for all, done once: imported last by the fork server.

A run then costs little beyond its own work: most of a fork, and of the end of a process, is the
handling of the server's memory page by page.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

from snnbench import registry
from snnbench.spec import RunSpec, TrainConfig

LARGE = 2 << 20  # bytes of a large page


def _use_large_pages() -> None:
    """Gather the memory used so far in large pages, where the system can (Linux 6.1).

    There are 512 times fewer to copy.  Memory that is asked for later is as it always was.
    """
    madv_collapse = 25
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, *_, inode = line.split(maxsplit=5)[:5]
            first, end = (int(x, 16) for x in span.split("-"))
            first, end = -(-first // LARGE) * LARGE, end // LARGE * LARGE
            if access == "rw-p" and inode == "0" and first < end:
                advise(first, end - first, madv_collapse)


for kind in ("methods", "models", "datasets", "kernels"):
    for component in registry.components(kind).values():
        if component.module in sys.modules:  # those of the runs to come
            component.describe()
registry.source_hash()
# The first validation of a spec builds its validator.
RunSpec.from_json(
    RunSpec(
        dataset="", data={}, model="", model_options={}, method="", method_config={}, neuron={},
        T=1, seed=0, train=TrainConfig(epochs=1),
    ).to_json()
)  # fmt: skip
_use_large_pages()
# A collection in a child would write to every object of the server, and so copy all its memory.
gc.freeze()
