"""Memory in a process of its own, cost runs, the search for what fits, and isolation."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snnbench.errors import RunSkipped
from snnbench.measure.clock import PARTS, StepClock, timing_warning
from snnbench.measure.spikes import Meter
from snnbench.models.layer import Layer
from snnbench.neurons import LIF
from snnbench.spec import Capacity
from snnbench.training import cost
from snnbench.training.cost import MEMORY, capacity, largest, measure, probe, probed
from snnbench.training.isolated import isolated
from snnbench.training.job import Job
from tests.test_measure import Chain, awake, linear
from tests.test_train import make_job

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def never() -> None:
    pass


# --- isolation --------------------------------------------------------------------------------


def test_an_answer_comes_back_and_nothing_else():
    seen: list[int] = []

    def work() -> dict[str, Any]:
        seen.append(1)
        return {"pid": os.getpid()}

    assert isolated(work)["pid"] != os.getpid()
    assert seen == []


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
        (lambda: os._exit(3), "ended with code 3"),
        (lambda: torch.empty(2**60), "RuntimeError"),
    ],
    ids=["raises", "killed", "exits", "memory"],
)
def test_work_that_fails_says_why(work, why):
    assert why in isolated(work)["error"]


def test_a_check_that_raises_ends_the_work():
    class Stop(BaseException):
        pass

    def check() -> None:
        raise Stop

    began = time.monotonic()
    with pytest.raises(Stop):
        isolated(lambda: time.sleep(60) or {}, check)
    assert time.monotonic() - began < 20


# --- the probe --------------------------------------------------------------------------------


def test_the_parts_of_the_memory_by_hand():
    job = make_job("bptt", optimizer="adamw")
    seen = probe(job)
    parameters = sum(p.numel() for p in job.net.parameters())
    buffers = sum(b.numel() * b.element_size() for b in job.net.buffers())
    assert seen["params_bytes"] == 4 * parameters + buffers
    assert seen["grads_bytes"] == 4 * parameters
    steps = 4 * len(list(job.net.parameters()))  # adam counts its steps
    assert seen["optimizer_bytes"] == 2 * 4 * parameters + steps
    assert 0 < seen["activations_bytes"] < seen["peak_bytes"]
    assert seen["nulls"] == {
        "peak_reserved_bytes": "no CUDA allocator in use",
        "peak_nvml_bytes": "no GPU in use",
    }


def test_the_order_of_the_cells_does_not_change_the_memory_figures():
    cells = [("bptt", 4), ("rate", 4), ("bptt", 1)]

    def round_of(order: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
        return {
            cell: probed(lambda cell=cell: make_job(cell[0], T=cell[1]), never) for cell in order
        }

    there, back = round_of(cells), round_of(cells[::-1])
    for cell in cells:
        for name in ("saved_bytes", "params_bytes", "grads_bytes", "optimizer_bytes"):
            assert there[cell][name] == back[cell][name]
        assert there[cell]["peak_bytes"] == pytest.approx(back[cell]["peak_bytes"], rel=0.02)


def test_a_memory_pass_that_fails_is_null_with_the_reason():
    def broken() -> Job:
        raise RuntimeError("no memory today")

    seen = probed(broken, never)
    assert all(seen[name] is None for name in MEMORY)
    assert set(seen["nulls"]) == set(MEMORY)
    assert "no memory today" in seen["nulls"]["peak_bytes"]


def test_batches_in_parts_keep_less():
    whole, parts = (probe(make_job(batch_split=k))["saved_bytes"] for k in (1, 4))
    assert parts < whole / 3


# --- kind = "cost" ----------------------------------------------------------------------------


def test_a_cost_run_times_its_steps_and_trains_nothing():
    job = make_job("bptt", steps=7)
    seen = measure(job)
    assert seen["steps_timed"] == 7
    assert seen["test_acc"] is None
    assert seen["nulls"]["test_acc"] == "not trained: kind = 'cost'"
    assert 0 < seen["step_ms_p25"] <= seen["step_ms_p50"] <= seen["step_ms_p75"]
    assert sum(seen[f"{part}_share"] for part in PARTS) == pytest.approx(1)
    assert seen["sops_per_sample"] > 0


# --- kind = "capacity" ------------------------------------------------------------------------


@given(limit=st.integers(0, 300), most=st.integers(1, 300))
def test_the_largest_size_is_found_exactly(limit, most):
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(fits, most, 1) == (min(limit, most) or None)
    assert len(tried) == len(set(tried)) <= 20
    assert max(tried) <= most


@given(limit=st.integers(0, 10**6), most=st.integers(1, 10**6), parts=st.integers(2, 64))
def test_the_largest_size_is_found_to_within_a_share(limit, most, parts):
    found = largest(lambda size: size <= limit, most, parts)
    best = min(limit, most)
    if best == 0:
        assert found is None
    else:
        assert found is not None
        assert best - max(1, best // parts) <= found <= best


def test_more_memory_holds_more(monkeypatch):
    job = make_job("bptt")
    found = {}
    for gib in (0.0625, 0.25):
        limit = Capacity(memory_gib=gib, most_T=64, most_batch=1)
        spec = dataclasses.replace(job.spec, kind="capacity", capacity=limit)
        found[gib] = capacity(
            spec, lambda of: dataclasses.replace(make_job("bptt", T=of.T), spec=of), never, never
        )
    assert found[0.0625]["largest_T"] <= found[0.25]["largest_T"]
    assert found[0.25]["largest_batch"] == 1
    assert "batch" in found[0.25]["capacity_bound"]


def test_nothing_fits_into_no_memory():
    limit = Capacity(memory_gib=1e-9, most_T=4, most_batch=4)
    spec = dataclasses.replace(make_job().spec, kind="capacity", capacity=limit)
    found = capacity(spec, lambda of: dataclasses.replace(make_job(), spec=of), never, never)
    assert found["largest_T"] is None
    assert "not even 1 fits" in found["nulls"]["largest_T"]


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError(), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("no such file"), None),
    ],
    ids=["cublas", "cpu", "python", "shapes", "disk"],
)
def test_only_a_lack_of_memory_bounds_the_capacity(monkeypatch, error, fits):
    """A trial that fails for another reason ends the run, and is no capacity."""

    def step(*_):
        raise error

    monkeypatch.setattr(cost, "train_step", step)
    limit = Capacity(memory_gib=1.0, most_T=1, most_batch=1)
    spec = dataclasses.replace(make_job().spec, kind="capacity", capacity=limit)

    def found():
        return capacity(spec, lambda of: dataclasses.replace(make_job(), spec=of), never, never)

    if fits is None:
        with pytest.raises(cost.TrialError, match=re.escape(f"{type(error).__name__}: {error}")):
            found()
    else:
        assert (found()["largest_T"], found()["largest_batch"]) == (None, None)


def refusing(which: set[int]) -> Any:
    """Jobs at every T but these."""

    def make(of: Any) -> Job:
        if of.T in which:
            raise RunSkipped(f"T = {of.T} makes no sense")
        return dataclasses.replace(make_job("bptt", T=of.T), spec=of)

    return make


def test_another_T_that_cannot_be_tried_leaves_the_batch_its_answer():
    limit = Capacity(memory_gib=1.0, most_T=4, most_batch=2)
    spec = dataclasses.replace(make_job(T=2).spec, kind="capacity", capacity=limit)
    found = capacity(spec, refusing({1}), never, never)
    assert (found["largest_batch"], found["largest_T"]) == (2, None)
    assert found["nulls"] == {"largest_T": "not every T can be tried: T = 1 makes no sense"}
    with pytest.raises(RunSkipped, match="T = 2 makes no sense"):
        capacity(spec, refusing({2}), never, never)


# --- the clock and the meter ------------------------------------------------------------------


def test_parts_of_a_step_are_timed_apart():
    net = Chain(Layer(linear([[1.0]]), neuron=LIF()))
    slow = net.forward

    def forward(*x: Any) -> Any:
        time.sleep(0.03)
        return slow(*x)

    net.forward = forward  # type: ignore[method-assign]
    clock = StepClock(CPU)
    with clock.watching(net):
        for _ in range(2):
            with clock.part("data"):
                time.sleep(0.01)
            with clock.step(), clock.part("backward"):
                net(torch.ones(1, 1, 1))
                time.sleep(0.02)
    net(torch.ones(1, 1, 1))  # no longer watched
    parts = clock.drain_parts_ms()
    assert 20 <= parts["data"] < 60
    assert 60 <= parts["forward"] < 120
    assert 40 <= parts["backward"] < 100
    assert parts["optimizer"] == 0
    assert all(ms >= 50 for ms in clock.drain_ms())
    assert clock.drain_parts_ms()["forward"] == 0


def test_restless_times_are_doubted(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    calm = {"step_ms_p25": 9.5, "step_ms_p50": 10.0, "step_ms_p75": 10.5}
    assert timing_warning(calm, CPU) is None
    assert "spread by 40%" in str(timing_warning(calm | {"step_ms_p75": 13.5}, CPU))
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert "other processes were busy" in str(timing_warning(calm, CPU))


def test_the_meter_holds_less_than_a_hundredth_of_the_activations():
    net, _ = awake("vgg11")
    batch = 64
    x_TB = torch.rand(4, batch, *net.shape)
    meter = Meter(net)
    activations = 0

    def run(layer: Layer, *x: Any) -> Any:
        nonlocal activations
        out = meter(layer, *x)
        activations += out.numel() * 4
        return out

    with torch.no_grad():
        net(x_TB, run)
    counts = meter._counts.values()
    held = sum(
        t.numel() * t.element_size()
        for t in (
            *(c.by_neuron for c in counts if c.by_neuron is not None),
            *(c.by_step for c in counts if c.by_step is not None),
            *meter._fan_out.values(),
        )
    )
    assert held < activations / 100


@pytest.mark.parametrize("piece", [1, 1000])
def test_the_size_of_the_pieces_changes_no_count(monkeypatch, piece):
    net, x_TB = awake("resnet18")

    def totals() -> dict[str, Any]:
        meter = Meter(net)
        with torch.no_grad():
            net(x_TB, meter)
        return meter.totals()

    whole = totals()
    monkeypatch.setattr("snnbench.measure.spikes.PIECE", piece)
    assert totals() == whole


def test_cost_names_every_memory_figure():
    assert set(MEMORY) <= set(probe(make_job()))
    assert cost.PROBE_STEPS >= 2
