"""Is this machine fit to measure on?  What is here, what is wrong with it, and what to do.

`quick` takes no time and is stored with every run; `examine` also builds and tries every kernel.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from snnbench import machine, registry
from snnbench.errors import SnnbenchError
from snnbench.kernels.choice import choose
from snnbench.measure.energy import Joules
from snnbench.measure.memory import reset_peak
from snnbench.measure.nvml import Gpu, NoNvml
from snnbench.models.convnet import ConvNet
from snnbench.neurons import LIF

DISK_GIB, MEMORY_GIB = 5.0, 4.0  # below these a warning is due
CGROUP = Path("/sys/fs/cgroup/cpu.max")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was seen and, where that is bad, what to do."""

    name: str
    seen: str
    action: str | None = None


def quick(device: torch.device) -> list[Check]:
    """What may disturb a measurement on this device now."""
    return [*_processor(), *(_gpu(device) if device.type == "cuda" else [])]


def warnings(checks: list[Check]) -> list[str]:
    """One line for each check that found something."""
    return [f"{c.name}: {c.seen}; {c.action}" for c in checks if c.action]


def examine(device: torch.device, data_root: Path, results: Path) -> dict[str, Any]:
    """Everything, as data: the machine, and the checks."""
    checks = [
        *quick(device),
        _memory(),
        _disk("results folder", results),
        _disk("data root", data_root),
        *_kernels(device),
        _energy(device),
        _peak(device),
        *_data(data_root),
    ]
    return {"machine": machine.describe(device), "checks": [asdict(check) for check in checks]}


def _processor() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores, threads = cores or 1, torch.get_num_threads()
    load = os.getloadavg()[0]
    checks = [
        Check(
            "threads",
            f"{threads} threads on {cores} cores",
            "set OMP_NUM_THREADS to the number of cores" if threads > cores else None,
        ),
        Check(
            "load",
            f"{load:.1f} on {cores} cores",
            "end what else is running: times will be wrong" if load > cores + 1 else None,
        ),
    ]
    if (quota := _quota()) is not None and quota < cores:
        action = f"set OMP_NUM_THREADS={max(1, int(quota))}, or ask for more cores"
        checks.append(Check("quota", f"{quota:g} of {cores} cores may be used", action))
    if (governor := _read(GOVERNOR)) is not None:
        slow = governor not in ("performance", "schedutil")
        action = "cpupower frequency-set -g performance, for steady times"
        checks.append(Check("cpu governor", governor, action if slow else None))
    return checks


def _quota() -> float | None:
    """Cores that a container may use; None without a limit."""
    limit, _, period = (_read(CGROUP) or "max").partition(" ")
    return None if limit == "max" else int(limit) / int(period)


def _gpu(device: torch.device) -> list[Check]:
    try:
        gpu = Gpu(device)
        others, seen = gpu.others(), gpu.describe()
    except NoNvml as error:
        return [Check("driver", str(error), "install nvidia-ml-py; clocks are not recorded")]
    text = ", ".join(f"{key} {value}" for key, value in seen.items() if value is not None)
    return [
        Check("driver", text),
        Check(
            "other GPU processes",
            f"{len(others)} (ids {', '.join(map(str, others))})" if others else "none",
            "end them, or take another GPU: times and memory will be wrong" if others else None,
        ),
    ]


def _memory() -> Check:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    action = "end other programs, or use smaller batches" if free < MEMORY_GIB else None
    return Check("memory", f"{free:.1f} GiB free", action)


def _disk(name: str, folder: Path) -> Check:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        return Check(name, f"{folder}: cannot be written", "name another folder, or its owner")
    free = shutil.disk_usage(place).free / GIB
    action = "free some space" if free < DISK_GIB else None
    return Check(name, f"{folder}: {free:.1f} GiB free", action)


def _kernels(device: torch.device) -> list[Check]:
    """Every kernel, built and run on a small network, beside the reference."""
    checks = []
    for name, found in registry.components("kernels").items():
        began = time.perf_counter()
        try:
            choice = choose(name, {name: found.load()}, device)
            worst = _against_reference(choice.kernel, device)
        except (SnnbenchError, RuntimeError) as error:
            text = " ".join(str(error).split())[:200]
            checks.append(Check(f"kernel {name}", f"cannot be used: {text}"))
            continue
        seen = f"works, {time.perf_counter() - began:.1f} s to build or load and try"
        wrong = "report it, and use kernel = 'reference'" if worst > 1e-3 else None
        checks.append(
            Check(
                f"kernel {name}",
                f"differs from the reference by {worst:.1e}" if wrong else seen,
                wrong,
            )
        )
    return checks


def _against_reference(kernel: Any, device: torch.device) -> float:
    """Largest relative difference of gradients between this kernel and the reference."""
    grads = []
    for used in (kernel, choose("reference", {}, device).kernel):
        torch.manual_seed(0)
        net = ConvNet(ConvNet.Config(width=8), (1, 8, 8), 10, LIF()).to(device)
        for layer in net.layers().values():
            layer.kernel = used
        x_TB = torch.rand(1, 4, 1, 8, 8).expand(4, -1, -1, -1, -1).to(device)
        net(x_TB).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    mine, exact = grads
    return float((mine - exact).norm() / exact.norm())


def _energy(device: torch.device) -> Check:
    why = Joules(device).why
    return Check("energy counter", why or "readable", None)


def _peak(device: torch.device) -> Check:
    why = reset_peak(device)
    return Check("memory peak", why or "can be measured")


def _data(root: Path) -> list[Check]:
    here: list[str] = []
    absent: list[str] = []
    for name, found in registry.components("datasets").items():
        try:
            dataset = found.load()
            (here if dataset(dataset.Config()).present(root) else absent).append(name)
        except Exception as error:  # a guest's may fail in any way
            absent.append(f"{name} ({type(error).__name__})")
    return [
        Check("data", f"here: {', '.join(here) or 'none'}; not here: {', '.join(absent) or 'none'}")
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
