"""Recorded steps: a CUDA graph is stood in for, so that all around it is tested without a GPU.

The stand-in does what matters of a graph: results lie in memory that stays, and are computed anew
from the recording's own inputs; nothing of Python's decisions is taken again but by running it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snnbench import registry, train
from snnbench.errors import RunSkipped
from snnbench.kernels.choice import choose
from snnbench.methods.base import Method
from snnbench.spec import Inherit, RunSpec
from snnbench.training import cost, graph
from snnbench.training.engine import Engine
from snnbench.training.graph import Slot, StepGraph, unchanged
from snnbench.training.oom import more_parts
from tests.test_train import METHODS, assert_same_weights, fixed, make_job

CPU = torch.device("cpu")
GPU = torch.device("cuda")


class Capture(TorchDispatchMode):
    """Nothing may ask for a value on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is asked for while the stream is captured")
        return func(*args, **(kwargs or {}))


def stand_in(run: Callable[[], graph.Found]) -> tuple[graph.Found, Callable[[], Any]]:
    draws = graph.host_generators()
    with Capture():
        found = run()
    graph.refuse_host_numbers(draws)
    held = [None if x is None else x.clone() for x in found]

    def replay() -> None:
        for place, x in zip(held, run(), strict=True):
            assert (place is None) == (x is None)
            if place is not None:
                place.copy_(x)

    for place in held:  # a recording computes nothing yet
        if place is not None:
            place.fill_(float("nan"))
    return held, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stands in for `record`; one entry for each replay."""
    replays: list[int] = []

    def record(run: Callable[[], graph.Found]) -> tuple[graph.Found, Callable[[], Any]]:
        found, replay = stand_in(run)

        def counted() -> None:
            replays.append(1)
            replay()

        return found, counted

    monkeypatch.setattr(graph, "record", record)
    return replays


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_recorded_training_is_training(method, recorder, one_thread):
    plain = make_job(method, label_smoothing=0.1)
    expected = fixed(train.train(plain))
    recorded = make_job(method, label_smoothing=0.1, graph=True)
    got = fixed(train.train(recorded))
    assert len(recorder) == 2 * (200 // 64)
    if method == "shortcut":  # how far training is, is a number in fp32 there
        for name, weight in plain.net.state_dict().items():
            torch.testing.assert_close(recorded.net.state_dict()[name], weight, msg=name)
        return
    assert_same_weights(recorded, plain)
    assert got | {"nulls": {}} == expected | {"nulls": {}}


def test_every_T_of_a_recipe_is_recorded(recorder, one_thread):
    recipe = {"epochs": 2, "inherit": Inherit(T=1, epochs=1)}
    plain, recorded = make_job(**recipe), make_job(**recipe, graph=True)
    train.train(plain)
    train.train(recorded)
    assert sorted(recorded.engine.graphs) == [1, 2]
    assert_same_weights(recorded, plain)


def test_a_resumed_run_is_recorded_with_its_own_loss_scale(recorder, one_thread):
    job = make_job(precision="fp16", graph=True)
    job.engine.take(job.net)
    at = train.begin(job, job.data.train)
    train.record(job, at, job.data.train)
    assert job.engine.graphs
    job.engine.set_loss_scale(8.0)
    assert not job.engine.graphs  # it held the scaler of before
    train.record(job, at, job.data.train)
    x_B, y_B = job.data.train.x[:64], job.data.train.y[:64]
    x_TB = job.data.encode(x_B, 2)
    loss = job.engine.backward(job.method, job.net, x_TB, y_B, 0.0)
    scaled = [p.grad.clone() for p in job.net.parameters()]
    job.engine.graphs.clear()
    job.net.zero_grad(set_to_none=True)
    assert torch.equal(job.engine.backward(job.method, job.net, x_TB, y_B, 0.0), loss)
    for p, grad in zip(job.net.parameters(), scaled, strict=True):
        assert torch.equal(p.grad, grad)


def test_shares_of_what_has_no_bounds_are_null_with_the_reason(recorder, one_thread):
    seen = train.train(make_job(graph=True))
    for part in ("forward_share", "backward_share"):
        assert seen[part] is None
        assert seen["nulls"][part] == "forward and backward are one CUDA graph"
    assert seen["data_share"] > 0
    assert seen["optimizer_share"] > 0


def test_the_memory_of_a_recorded_step_is_not_guessed(recorder, one_thread):
    seen = cost.probe(make_job(graph=True))
    for name in ("peak_bytes", "activations_bytes"):
        assert seen[name] is None
        assert "CUDA graph" in seen["nulls"][name]
    plain = cost.probe(make_job())
    assert plain["peak_bytes"] > 0
    assert seen["saved_bytes"] == plain["saved_bytes"]
    assert len(recorder) == cost.PROBE_STEPS


def test_a_peak_that_cannot_be_reset_is_not_read(monkeypatch, one_thread):
    """As on a system without /proc."""

    def unreadable(device: torch.device) -> dict[str, int]:
        raise FileNotFoundError("/proc/self/status")

    monkeypatch.setattr(cost, "reset_peak", lambda device: "no such file")
    monkeypatch.setattr(cost, "peak_bytes", unreadable)
    seen = cost.probe(make_job())
    for name in ("peak_bytes", "activations_bytes"):
        assert (seen[name], seen["nulls"][name]) == (None, "no such file")


def test_a_cost_run_is_recorded(recorder, one_thread):
    seen = cost.measure(make_job(graph=True, steps=3))
    assert len(recorder) == seen["steps_timed"] == 3
    assert seen["forward_share"] is None


# --- what cannot be recorded ------------------------------------------------------------------


class Scaling(Method):
    """Its loss has a factor that the host decides."""

    source = "a test"

    def __init__(self, factor: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.factor = factor

    def loss(self, logits_TBK: Tensor, target: Tensor, progress: float) -> Tensor:
        loss = super().loss(logits_TBK, target, progress)
        return self.factor(loss.detach()) * loss


HOST = "this method draws random numbers on the host"


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        (lambda loss: torch.rand(()), HOST),
        (lambda loss: random.random(), HOST),
        (lambda loss: np.random.rand(), HOST),
        (lambda loss: 1.0 if loss > 0 else 2.0, "a value is asked for while the stream is captur"),
    ],
)
def test_what_the_host_decides_cannot_be_recorded(factor, why, recorder, one_thread):
    job = make_job(Scaling(factor), graph=True)
    with pytest.raises(RunSkipped, match=f"^train.graph: {why}"):
        train.train(job)


def test_a_lack_of_memory_stays_one(monkeypatch, one_thread):
    def record(run: Callable[[], graph.Found]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(graph, "record", record)
    job = make_job(graph=True)
    with pytest.raises(torch.OutOfMemoryError):
        train.train(job)
    assert more_parts(job.spec) is None  # a graph holds one whole step
    assert more_parts(make_job().spec) == 2


@pytest.mark.parametrize("name", ["devices", "batch_split"])
def test_a_graph_holds_one_whole_step(name):
    with pytest.raises(ValueError, match=f"graph = true holds one whole step: leave {name} at 1"):
        make_job(graph=True, **{name: 2})


def test_without_a_gpu_the_run_is_skipped(bench, tmp_path):
    done = bench.run(
        "run", "smoke", "--set", "train.graph=true", "--set", "axes.seed=[0]", "--set",
        "axes.T=[2]", "--device", "cpu", "--results", tmp_path,
    )  # fmt: skip
    records = [json.loads(p.read_text()) for p in tmp_path.rglob("result.json")]
    assert records, done.stderr
    assert {r["status"] for r in records} == {"skipped"}
    assert {r["reason"] for r in records} == {"train.graph = true needs a CUDA device"}


def test_a_capacity_is_that_of_plain_steps():
    job = make_job(graph=True)
    values = job.spec.to_json() | {"kind": "capacity", "capacity": {"memory_gib": 1.0}}
    values["capacity"] |= {"most_T": 4, "most_batch": 8}
    with pytest.raises(RunSkipped, match="a capacity is that of steps which are not"):
        cost.capacity(RunSpec.from_json(values), lambda _: job, lambda: None, lambda: None)


# --- inputs and what is left behind -----------------------------------------------------------


def test_inputs_lie_where_the_recording_finds_them():
    x = torch.randn(3, 2, 4, 5).to(memory_format=torch.channels_last)
    slot, other = Slot(x, CPU), torch.randn(3, 2, 4, 5)
    assert slot.view.stride() == x.stride()
    where = slot.view.data_ptr()
    slot.fill(other)
    assert torch.equal(slot.view, other)
    assert not torch.equal(slot.view, x)
    assert slot.view.data_ptr() == where
    still = Slot(x.expand(6, *x.shape), CPU)
    assert still.view.stride(0) == 0
    still.fill(other.expand(6, *x.shape))
    assert torch.equal(still.view[5], other)
    number = Slot(0.25, CPU)
    number.fill(0.5)
    assert number.view.item() == 0.5


@pytest.mark.parametrize(
    "wrong", [torch.zeros(5, 2, 3), torch.zeros(4, 3, 3), torch.randn(4, 2, 3)]
)
def test_another_shape_than_the_recorded_is_an_error(wrong):
    slot = Slot(torch.zeros(2, 3).expand(4, 2, 3), CPU)
    with pytest.raises(ValueError, match=r"recorded for \[4, 2, 3\], called with"):
        slot.fill(wrong)


def test_to_record_changes_nothing(recorder):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    generator = torch.get_rng_state()

    def backward(x: Tensor) -> Tensor:
        loss = net(x).sum()
        loss.backward()
        return loss.detach()

    made = StepGraph(backward, net, (x,), CPU)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in net.parameters())
    made(x)
    assert net[1].num_batches_tracked == 1
    with unchanged(net, CPU):
        net[1].running_mean.fill_(7.0)
    assert net[1].running_mean.max() < 7


def test_losses_and_gradients_of_two_calls_are_their_own(recorder):
    net = nn.Linear(3, 1, bias=False)

    def backward(x: Tensor, factor: Tensor) -> Tensor:
        loss = factor * net(x).sum()
        loss.backward()
        return loss.detach()

    made = StepGraph(backward, net, (torch.ones(2, 3), 1.0), CPU)
    first = made(torch.full((2, 3), 2.0), 3.0)
    assert torch.equal(net.weight.grad, torch.full((1, 3), 12.0))
    net.zero_grad(set_to_none=True)
    second = made(torch.full((2, 3), 1.0), 0.5)
    assert torch.equal(net.weight.grad, torch.ones(1, 3))
    torch.testing.assert_close(first, 12 * second)


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", ["bptt", "tet", "shortcut", "rate", "grad_scale"])
def test_a_cuda_graph_trains_as_plain_steps(method, precision):
    backends = {n: found.load() for n, found in registry.components("kernels").items()}

    def job(recorded: bool) -> Any:
        made = make_job(method, precision=precision, graph=recorded, epochs=1)
        choice = choose("auto", backends, GPU)
        made.engine = Engine(GPU, choice, precision)
        return made

    plain, recorded = (train.train(job(flag)) for flag in (False, True))
    assert recorded["order_hash"] == plain["order_hash"]
    a, b = (seen["history"][-1]["train_loss"] for seen in (plain, recorded))
    assert abs(a - b) < 0.05 * abs(a)
    assert recorded["skipped_steps"] == plain["skipped_steps"]


@pytest.mark.gpu
def test_a_look_at_the_device_cannot_be_recorded():
    job = make_job(Scaling(lambda loss: 1.0 if loss > 0 else 2.0), graph=True)
    job.engine = Engine(GPU, choose("reference", {}, GPU), "fp32")
    with pytest.raises(RunSkipped, match=r"^train\.graph: .*captur"):
        train.train(job)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_a_replay_has_the_gradients_of_a_plain_step(method, precision):
    """With frozen BatchNorm: a tie that flips one spike would change the statistics of all."""
    backends = {n: found.load() for n, found in registry.components("kernels").items()}
    job = make_job(method, precision=precision)
    job.engine = Engine(GPU, choose("auto", backends, GPU), precision)
    job.engine.take(job.net).eval()
    batches = [tuple(part[i : i + 32].to(GPU) for part in (job.data.train.x, job.data.train.y))
               for i in (0, 32)]  # fmt: skip

    def gradients(x_B: Tensor, y_B: Tensor) -> list[Tensor]:
        job.net.zero_grad(set_to_none=True)
        job.engine.backward(job.method, job.net, job.data.encode(x_B, 2), y_B, 0.5)
        return [p.grad.clone() for p in job.net.parameters()]

    plain = [gradients(*batch) for batch in batches]
    job.engine.record(
        job.method, job.net, job.net, job.data.encode(batches[0][0], 2), batches[0][1]
    )
    for batch, expected in zip(batches, plain, strict=True):
        for got, want in zip(gradients(*batch), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
