"""What a figure was measured on: hardware, driver and versions.

No host name, user name, path or environment variable is recorded.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from snnbench import __version__
from snnbench.spec import canonical, digest

PACKAGES = ("torch", "torchvision", "triton", "numpy", "tonic")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, with `machine_id`: the same for equal machines."""
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "device": device.type,
        "threads": torch.get_num_threads(),  # they change the order of sums, and so results
    }
    label = f"cpu-{hardware['cores']}c"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_gib"] = round(properties.total_memory / 2**30)
        label = "-".join(properties.name.lower().replace("nvidia", "").split())
    return {
        **hardware,
        "machine_id": f"{label}-{digest(canonical(hardware))[:6]}",
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "snnbench": __version__,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
