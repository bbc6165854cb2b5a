"""Modelled energy by hand, and energy counters that are read, wrap, lie or are not there."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snnbench.measure import energy, nvml
from snnbench.measure.energy import Joules, access_pj, modelled

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def layer(**figures: float) -> dict[str, Any]:
    keys = (
        "sops_per_sample", "macs_per_sample", "membrane_updates_per_sample", "weights", "inputs",
        "outputs",
    )  # fmt: skip
    return dict.fromkeys(keys, 0) | figures


def test_compute_energy_by_hand():
    seen = modelled({"layers": [layer(sops_per_sample=1000), layer(macs_per_sample=100)]})
    assert seen["energy_ac_mac_nj_per_sample"] == pytest.approx((1000 * 0.9 + 100 * 4.6) / 1000)


def test_energy_with_memory_by_hand():
    """A spiking layer with 2,048 weights (8 KiB: 5 pJ) and 8,192 neurons (32 KiB: 10 pJ)."""
    spiking = layer(
        sops_per_sample=100, membrane_updates_per_sample=50, weights=2048, outputs=8192, inputs=7
    )
    seen = modelled({"layers": [spiking]})
    weights, potentials = 100 * 5, 2 * 150 * 10
    assert seen["energy_parts_nj_per_sample"] == {
        "compute": pytest.approx(0.09),
        "weights": pytest.approx(weights / 1e3),
        "inputs": 0.0,
        "potentials": pytest.approx(potentials / 1e3),
        "outputs": 0.0,
    }
    assert seen["energy_memory_nj_per_sample"] == pytest.approx((90 + weights + potentials) / 1e3)


def test_an_artificial_layer_reads_inputs_and_writes_outputs():
    seen = modelled({"layers": [layer(macs_per_sample=10, weights=2048, inputs=8192, outputs=16)]})
    parts = seen["energy_parts_nj_per_sample"]
    assert parts["weights"] == pytest.approx(10 * 5 / 1e3)
    assert parts["inputs"] == pytest.approx(10 * 10 / 1e3)
    assert parts["outputs"] == pytest.approx(16 * 5 / 1e3)
    assert parts["potentials"] == 0


def test_access_energy_between_the_published_sizes():
    assert access_pj(1) == access_pj(8 * 2**10) == 5
    assert access_pj(20 * 2**10) == pytest.approx(7.5)  # half way from 8 to 32 KiB
    assert access_pj(32 * 2**10) == 10
    assert access_pj(2**20) == access_pj(2**30) == 50


@given(st.integers(1, 2**22), st.integers(1, 2**22))
def test_a_larger_memory_never_costs_less(a, b):
    assert (access_pj(min(a, b))) <= access_pj(max(a, b))


@given(st.lists(st.fixed_dictionaries({k: st.integers(0, 10**6) for k in layer()}), min_size=1))
def test_the_parts_sum_to_the_whole(layers):
    seen = modelled({"layers": layers})
    parts = seen["energy_parts_nj_per_sample"]
    assert sum(parts.values()) == pytest.approx(seen["energy_memory_nj_per_sample"])
    assert parts["compute"] == seen["energy_ac_mac_nj_per_sample"]


# --- RAPL -------------------------------------------------------------------------------------


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    for package in (0, 1):
        zone = tmp_path / f"intel-rapl:{package}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{package}\n")
        (zone / "energy_uj").write_text("1000000")
        (zone / "max_energy_range_uj").write_text("9999999")
    part = tmp_path / "intel-rapl:0:0"  # a part of package 0: counted already
    part.mkdir()
    (part / "name").write_text("core\n")
    (part / "energy_uj").write_text("5")
    platform = tmp_path / "intel-rapl:2"  # the whole machine, packages and all
    platform.mkdir()
    (platform / "name").write_text("psys\n")
    (platform / "energy_uj").write_text("7")
    return tmp_path


def write(rapl: Path, *values: int) -> None:
    for package, value in enumerate(values):
        (rapl / f"intel-rapl:{package}" / "energy_uj").write_text(str(value))


def test_a_counter_that_fails_on_the_way_is_a_reason(rapl: Path) -> None:
    joules = Joules(CPU, rapl)
    joules.start()
    (rapl / "intel-rapl:1" / "energy_uj").unlink()
    assert joules.stop() is None
    assert "could not be read any more" in str(joules.doubt)
    joules.start()
    assert joules.stop() is None


def test_packages_are_summed_and_windows_too(rapl, monkeypatch):
    monkeypatch.setattr(energy, "RAPL_PERIOD_S", 0.0)
    joules = Joules(CPU, rapl)
    joules.start()
    write(rapl, 3_000_000, 1_500_000)
    assert joules.stop() == pytest.approx(2.5)
    write(rapl, 9_000_000, 9_000_000)  # between windows nothing counts
    joules.start()
    write(rapl, 9_000_000, 9_250_000)
    assert joules.stop() == pytest.approx(0.25)
    assert joules.joules == pytest.approx(2.75)
    assert joules.doubt is None


def test_a_counter_that_starts_again_at_zero(rapl):
    joules = Joules(CPU, rapl)
    write(rapl, 9_500_000, 1_000_000)
    joules.start()
    write(rapl, 500_000, 1_000_000)
    assert joules.stop() == pytest.approx(1.0)  # 9,999,999 is followed by 0


def test_a_window_too_short_for_the_counter_is_doubted(rapl):
    joules = Joules(CPU, rapl)
    joules.start()
    joules.stop()
    assert "too short" in str(joules.doubt)


def test_no_counter_is_a_reason_and_no_error(tmp_path):
    joules = Joules(CPU, tmp_path)
    joules.start()
    assert joules.stop() is None
    assert joules.doubt == "this machine offers no RAPL energy counter"


def test_a_counter_that_may_not_be_read_is_a_reason(rapl, monkeypatch):
    def denied(path: Path, *_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert Joules(CPU, rapl).doubt == "the RAPL energy counter cannot be read: Permission denied"


# --- NVML -------------------------------------------------------------------------------------


class Process:
    def __init__(self, pid: int, usedGpuMemory: int | None) -> None:
        self.pid, self.usedGpuMemory = pid, usedGpuMemory


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A driver that can be told what to say."""
    says = types.SimpleNamespace(mj=[10_000, 12_500], processes=[], fails=None)

    class NVMLError(Exception):
        pass

    def answer(name: str) -> Any:
        def function(*_: Any) -> Any:
            if says.fails == name:
                raise NVMLError("Not Supported")
            return {
                "DeviceGetTotalEnergyConsumption": lambda: says.mj.pop(0) if says.mj else 0,
                "DeviceGetComputeRunningProcesses": lambda: says.processes,
                "SystemGetDriverVersion": lambda: "570.1",
            }.get(name, lambda: 7)()

        return function

    fake = types.ModuleType("pynvml")
    for name in (
        "Init", "DeviceGetHandleByUUID", "DeviceGetTotalEnergyConsumption", "DeviceGetClockInfo",
        "DeviceGetComputeRunningProcesses", "SystemGetDriverVersion", "DeviceGetMaxClockInfo",
        "DeviceGetEnforcedPowerLimit", "DeviceGetTemperature",
    ):  # fmt: skip
        setattr(fake, f"nvml{name}", answer(name))
    fake.NVMLError, fake.NVML_CLOCK_SM, fake.NVML_TEMPERATURE_GPU = NVMLError, 1, 0
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return says


def test_gpu_energy_is_the_difference_of_the_counter(driver, monkeypatch):
    monkeypatch.setattr(energy, "NVML_PERIOD_S", 0.0)
    driver.mj = [0, 10_000, 12_500]  # the first is asked to see whether there is one
    joules = Joules(GPU)
    joules.start()
    assert joules.stop() == pytest.approx(2.5)
    assert joules.doubt is None


def test_a_gpu_without_a_counter_is_a_reason(driver):
    driver.fails = "DeviceGetTotalEnergyConsumption"
    assert Joules(GPU).doubt == "NVML: Not Supported"


def test_no_driver_is_a_reason(driver):
    driver.fails = "Init"
    assert Joules(GPU).doubt == "NVML: Not Supported"


def test_memory_of_this_process_and_of_others(driver, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 42)
    driver.processes = [Process(42, 1000), Process(43, 5)]
    gpu = nvml.Gpu(GPU)
    assert (gpu.own_bytes(), gpu.others()) == (1000, [43])
    nobody = 2**22 + 1  # more than Linux ever gives: an id of outside a container
    driver.processes = [Process(nobody, None)]
    assert gpu.others() == []
    driver.processes = [Process(nobody, None), Process(os.getppid(), None)]
    assert gpu.others() == [os.getppid()]
    driver.processes = [Process(7, None)]
    with pytest.raises(nvml.NoNvml, match="does not tell"):
        gpu.own_bytes()


def test_a_question_that_the_driver_does_not_answer_is_null(driver):
    driver.fails = "DeviceGetTemperature"
    seen = nvml.Gpu(GPU).describe()
    assert seen["driver"] == "570.1"
    assert seen["temperature_c"] is None


@pytest.mark.parametrize(
    ("lengths", "doubt"),
    [((10.0, 0.001), None), ((0.02, 0.004), "windows of 0.012 s are too short"), ((), "no train")],
)
def test_windows_are_long_enough_on_average(rapl, monkeypatch, lengths, doubt):
    """The rest of an epoch after a checkpoint may be short: it is one of many."""
    times = iter([t for n, length in enumerate(lengths) for t in (20.0 * n, 20.0 * n + length)])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(times))
    joules = Joules(CPU, rapl)
    for _ in lengths:
        joules.start()
        joules.stop()
    assert joules.doubt is None if doubt is None else doubt in str(joules.doubt)


def test_what_an_earlier_process_measured_counts(rapl):
    joules = Joules(CPU, rapl)
    joules.resume(3, 100.0, None)
    assert joules.doubt is None
    joules.resume(3, 100.0, "no counter there")
    assert joules.doubt == "no counter there"
