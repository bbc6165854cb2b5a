"""What the driver says of one NVIDIA GPU; the only door to NVML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class NoNvml(RuntimeError):
    """The driver does not say; the message says why."""


class Gpu:
    """One GPU, found by its UUID: CUDA and NVML may number GPUs differently."""

    def __init__(self, device: torch.device) -> None:
        """Raises NoNvml where there is no NVML, or it does not know the GPU."""
        try:
            import pynvml
        except ImportError as error:
            raise NoNvml("NVML needs the package nvidia-ml-py") from error
        self._nvml: Any = pynvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        self._ask("Init")
        self._handle = self._ask("DeviceGetHandleByUUID", uuid)

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, f"nvml{name}")(*args)
        except self._nvml.NVMLError as error:
            raise NoNvml(f"NVML: {error}") from error

    def energy_mj(self) -> int:
        """Energy since the driver was loaded, mJ."""
        return int(self._ask("DeviceGetTotalEnergyConsumption", self._handle))

    def processes(self) -> dict[int, int | None]:
        """Memory in bytes (None: not told) of every process that computes on the GPU, by id."""
        found = self._ask("DeviceGetComputeRunningProcesses", self._handle)
        return {int(p.pid): p.usedGpuMemory for p in found}

    def own_bytes(self) -> int:
        """Memory that this process holds on the GPU, its context included."""
        seen = self.processes()
        if (used := seen.get(os.getpid())) is None:
            raise NoNvml("NVML does not tell the memory of this process (as in a container)")
        return int(used)

    def others(self) -> list[int]:
        """Ids of other processes that compute on the GPU.

        Where the ids are not those that count here, as in a container, this process would be one
        of the others: those that nobody here has are left out.
        """
        seen, own = self.processes(), os.getpid()
        return sorted(
            pid for pid in seen if pid != own and (own in seen or Path(f"/proc/{pid}").exists())
        )

    def describe(self) -> dict[str, Any]:
        """Driver, clocks, power limit and temperature, as far as they are told."""
        nvml, handle = self._nvml, self._handle
        questions: dict[str, tuple[Any, ...]] = {
            "driver": ("SystemGetDriverVersion",),
            "sm_clock_mhz": ("DeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": ("DeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
            "power_limit_mw": ("DeviceGetEnforcedPowerLimit", handle),
            "temperature_c": ("DeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        }
        seen: dict[str, Any] = {}
        for key, question in questions.items():
            try:
                seen[key] = self._ask(*question)
            except NoNvml:
                seen[key] = None
        return seen
