"""One run on several devices: two processes on this CPU compute what one would."""

from __future__ import annotations

import os
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnbench import registry
from snnbench.errors import SnnbenchError
from snnbench.measure.clock import StepClock
from snnbench.models.layer import TdBatchNorm2d
from snnbench.train import batches, epoch_order, train
from snnbench.training import group
from snnbench.training.group import SyncedBatchNorm2d
from snnbench.training.job import Job, Step, prepare, train_step
from snnbench.training.oom import is_out_of_memory, size_asked_for
from snnbench.training.team import team
from tests.conftest import rows, without_timing
from tests.test_train import make_job

CPU = torch.device("cpu")
METHODS = [name for name in registry.BUILT_IN["methods"] if name != "ann"]
STEPS = 20

pytestmark = pytest.mark.usefixtures("one_thread")


def together(size: int, work: Any) -> Any:
    """What process 0 of `size` finds; in processes of their own, since a group is for ever."""
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def each(rank: int, address: str) -> Any:
        group.join(rank, size, address, CPU)
        found = work()
        group.leave()
        return found

    def first() -> None:
        with team(size, each) as (address, _):
            sender.send(each(0, address) if size > 1 else work())

    process = get_context("fork").Process(target=first)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join(30)
        process.kill()


def in_float64(job: Job) -> Job:
    """The same job, so exact that rounding flips no spike."""
    job.net.double()
    encode = job.data.encode
    job.data = type(job.data)(**vars(job.data))
    job.data.encode = lambda x_B, T: encode(x_B, T).double()  # type: ignore[method-assign]
    return job


def losses(job: Job) -> tuple[list[float], dict[str, list[float]]]:
    """Losses of the first steps, and the weights after them."""
    job.engine.take(job.net)
    trainable, optimizer = prepare(job)
    trainable.double() if next(job.net.parameters()).dtype == torch.float64 else None
    job.net.train()
    found: list[float] = []
    epoch = 0
    while len(found) < STEPS:
        order = epoch_order(0, epoch, len(job.data.train))
        for x_B, y_B in batches(job.data, job.data.train, order, 50, 0, epoch):
            at = Step(trainable, optimizer, StepClock(CPU), 3, 0.1, len(found) / STEPS)
            found.append(float(train_step(job, at, group.share(x_B), group.share(y_B))))
        epoch += 1
    # Numbers, not tensors: a tensor sent to another process stays with the sender.
    return found, {k: v.double().flatten().tolist() for k, v in trainable.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_compute_what_one_does(method):
    one, two = (together(size, lambda: losses(in_float64(make_job(method)))) for size in (1, 2))
    assert len(one[0]) >= STEPS
    assert one[0][-1] < one[0][0]
    torch.testing.assert_close(two[0], one[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(two[1], one[1], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_the_native_kernel_agrees_at_the_first_step(method):
    one, two = (
        together(size, lambda: losses(make_job(method, kernel="native"))[0]) for size in (1, 2)
    )
    assert two[0] == pytest.approx(one[0], rel=1e-5)


def test_a_whole_run_of_two_processes():
    """Accuracy is summed over the processes, and the history is that of the whole batch."""

    def run() -> dict[str, Any]:
        seen = train(make_job("bptt", batch_size=50))
        keys = ("test_acc", "val_acc", "order_hash", "init_hash", "epochs")
        return without_timing({k: seen[k] for k in keys})

    one, two = (together(size, run) for size in (1, 2))
    assert two["order_hash"] == one["order_hash"]
    assert two["init_hash"] == one["init_hash"]
    assert two["epochs"] == one["epochs"]
    assert abs(two["test_acc"] - one["test_acc"]) <= 0.1


@pytest.mark.parametrize("kernel", ["reference", "native"])
def test_what_is_computed_again_counts_no_batch_twice(kernel):
    """BatchNorm over several processes is not fused, and would be in the part done again."""

    def statistics(memory: str) -> list[list[float]]:
        job = make_job("bptt", kernel=kernel, memory=memory)
        job.engine.take(job.net)
        x_B, y_B = (part[:20] for part in (job.data.train.x, job.data.train.y))
        x_TB = job.data.encode(group.share(x_B), 2)
        job.engine.backward(job.method, job.net.train(), x_TB, group.share(y_B), 0.0)
        return [b.flatten().tolist() for b in job.net.buffers()]

    def both() -> Any:
        return [statistics(memory) for memory in ("speed", "smallest")]

    speed, smallest = together(2, both)
    assert smallest == speed


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), TdBatchNorm2d(3, 0.7)])
def test_a_synced_norm_alone_is_the_norm(norm):
    torch.manual_seed(0)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    buffers = {k: v.clone() for k, v in norm.named_buffers()}
    x, g = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)

    def through(module: nn.Module) -> list[Tensor]:
        for name, value in buffers.items():
            dict(module.named_buffers())[name].copy_(value)
        y, z = x.clone().requires_grad_(), module.train()
        out = z(y)
        grads = torch.autograd.grad(out, [y, norm.weight, norm.bias], g)
        after = [b.clone() for b in module.buffers()]
        return [out.detach(), *grads, *after, module.eval()(x).detach()]

    for mine, theirs in zip(through(SyncedBatchNorm2d(norm)), through(norm), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def watched(work: Any) -> None:
    """Have it done in a second process, and look after it until it fails."""
    with team(2, work) as (_, check):
        while True:
            check()


def test_a_process_that_fails_is_named():
    def work(rank: int, address: str) -> None:
        raise ValueError("no such luck")

    with pytest.raises(SnnbenchError, match="process 1 of 2: ValueError: no such luck"):
        watched(work)


def test_a_process_that_runs_out_of_memory_is_no_fault_of_the_code():
    def work(rank: int, address: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(RuntimeError, match="process 1 of 2") as caught:
        watched(work)
    assert is_out_of_memory(caught.value)
    assert size_asked_for(caught.value).startswith("out of memory, asked for 20.00 MiB")


def test_a_process_that_dies_is_named():
    with pytest.raises(SnnbenchError, match=r"process 1 of 2: it ended with code 7"):
        watched(lambda *_: os._exit(7))


def test_batches_must_be_divisible(bench, tmp_path):
    done = bench.run("check", "smoke", "--set", "train.devices=3")
    assert done.returncode == 3
    assert "devices = 3: batch_size = 64 cannot be divided by it" in done.stderr


def test_two_devices_from_the_command_line(bench, tmp_path):
    done = bench.run(
        "run", "smoke", "--only", "method=bptt,seed=0", "--set", "train.epochs=1", "--set",
        "train.devices=2", "--results", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "done: test" in done.stderr
    (row,) = rows(tmp_path / "smoke")
    assert row["saved_bytes"] == ""
    assert "BatchNorm over several devices" in row["null_reasons"]
