"""What a training step costs: its memory, its time, and what fits into a given memory.

Nothing is trained to convergence here, and nothing that is computed here reaches a trained network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.data.base import Split
from snnbench.errors import DataError, RunSkipped
from snnbench.measure.clock import StepClock, quartiles, synchronize, timing_warning
from snnbench.measure.energy import Joules
from snnbench.measure.memory import (
    give_back_freed_memory,
    optimizer_bytes,
    own_gpu_bytes,
    peak_bytes,
    reset_peak,
    saved_bytes,
    tensor_bytes,
    used_bytes,
)
from snnbench.spec import Capacity, RunSpec
from snnbench.training import group
from snnbench.training.evaluate import count_spikes
from snnbench.training.isolated import isolated
from snnbench.training.job import Job, Step, prepare, record_steps, shares, train_step, warm_up
from snnbench.training.oom import is_out_of_memory

PROBE_STEPS = 3
MEMORY = (
    "saved_bytes", "params_bytes", "grads_bytes", "optimizer_bytes", "activations_bytes",
    "peak_bytes", "peak_reserved_bytes", "peak_nvml_bytes",
)  # fmt: skip
GIB = 2**30


class TrialError(RuntimeError):
    """A trial of a capacity run ended for another reason than memory."""


def probe(job: Job) -> dict[str, Any]:
    """Memory of a training step, by what it is for; run it in a process of its own."""
    began = time.perf_counter()
    job.net = job.engine.take(job.net)
    trainable, optimizer = prepare(job)
    job.net.train()
    x_B, y_B = first_batch(job, job.spec.train.batch_size)
    at = Step(trainable, optimizer, StepClock(job.device), job.spec.T, job.spec.train.lr)
    saved = _saved(job, trainable, x_B, y_B)
    train_step(job, at, x_B, y_B)  # makes the optimizer's state
    grads = tensor_bytes(p.grad for p in trainable.parameters())
    optimizer.zero_grad(set_to_none=True)
    synchronize(job.device)
    give_back_freed_memory(job.device)
    nulls: dict[str, str] = {}
    if job.spec.train.graph:
        record_steps(job, trainable, x_B, y_B)
    why_not, at_rest = reset_peak(job.device), used_bytes(job.device)
    if job.engine.graphs:
        why_not = "torch does not count what a CUDA graph uses; peak_reserved_bytes holds it"
    for _ in range(PROBE_STEPS):
        train_step(job, at, x_B, y_B)
    synchronize(job.device)
    peak: dict[str, int | None] = {"peak_bytes": None}
    if not why_not or job.engine.graphs:  # what is reserved is known of a graph, too
        peak |= peak_bytes(job.device)
    if why_not:
        nulls |= dict.fromkeys(("peak_bytes", "activations_bytes"), why_not)
        peak["peak_bytes"] = None
    if "peak_reserved_bytes" not in peak:
        nulls["peak_reserved_bytes"] = "no CUDA allocator in use"
    nvml = own_gpu_bytes(job.device)
    if isinstance(nvml, str):
        nulls["peak_nvml_bytes"] = nvml
    return dict.fromkeys(MEMORY) | {
        "saved_bytes": saved,
        "params_bytes": tensor_bytes([*trainable.parameters(), *trainable.buffers()]),
        "grads_bytes": grads,
        "optimizer_bytes": optimizer_bytes(optimizer),
        **peak,
        "activations_bytes": None
        if peak["peak_bytes"] is None
        else max(0, peak["peak_bytes"] - at_rest),
        "peak_nvml_bytes": None if isinstance(nvml, str) else nvml,
        "nulls": nulls,
        "probe_s": time.perf_counter() - began,
    }


def _saved(job: Job, trainable: nn.Module, x_B: Tensor, y_B: Tensor) -> int:
    """Bytes that a step keeps for its backward pass; that of one part, where it is split."""
    parts = job.spec.train.batch_split
    x_TB, y_B = job.data.encode(x_B, job.spec.T).chunk(parts, 1)[0], y_B.chunk(parts)[0]
    known = [*trainable.parameters(), *trainable.buffers(), x_TB, y_B]
    with job.engine.autocast():
        return saved_bytes(
            lambda: job.method.backward(job.net, x_TB, y_B, 0.0), known, *job.engine.keeping
        )


def probed(make: Callable[[], Job], check: Callable[[], None]) -> dict[str, Any]:
    """`probe` in a process of its own; where it fails, figures are null with the reason."""
    began = time.perf_counter()
    seen = isolated(lambda: probe(make()), check)
    if "error" in seen:
        why = f"the memory pass failed: {seen['error']}"
        return unknown_memory(why) | {"probe_s": time.perf_counter() - began}
    return seen


def unknown_memory(why: str) -> dict[str, Any]:
    """All figures of the memory pass, null with the reason."""
    return dict.fromkeys(MEMORY) | {"nulls": dict.fromkeys(MEMORY, why)}


def first_batch(job: Job, size: int) -> tuple[Tensor, Tensor]:
    """Real samples and labels on the device, repeated where the data has fewer."""
    split: Split = job.data.train
    index = torch.arange(size) % len(split)
    return split.x[index].to(job.device), split.y[index].to(job.device)


def measure(job: Job) -> dict[str, Any]:
    """Times of `train.steps` steps after a warm-up; the metrics of a cost run.

    Weights move, as in training, but only for these steps; accuracy is not asked for.
    """
    steps = job.spec.train.steps
    assert steps is not None, "a suite of kind 'cost' gives steps"
    job.net = job.engine.take(job.net)
    began = time.perf_counter()
    split = Split(*first_batch(job, job.spec.train.batch_size))
    warm_up(job, split, PROBE_STEPS)
    trainable, optimizer = prepare(job)
    x_B, y_B = group.share(split.x), group.share(split.y)
    if job.spec.train.graph:
        record_steps(job, trainable, x_B, y_B)
    synchronize(job.device)
    warm_up_s = time.perf_counter() - began

    clock, joules = StepClock(job.device), Joules(job.device, why=job.shared)
    at = Step(trainable, optimizer, clock, job.spec.T, job.spec.train.lr)
    job.net.train()
    joules.start()
    began = time.perf_counter()
    with clock.watching(job.net):
        for _ in range(steps):
            job.stop()
            with clock.step():
                train_step(job, at, x_B, y_B)
    synchronize(job.device)
    train_s = time.perf_counter() - began
    spent = joules.stop()
    times, parts = clock.drain_ms(), clock.drain_parts_ms()
    why = "not trained: kind = 'cost'"
    untrained = (
        "test_acc", "val_acc", "test_acc_best_val", "test_acc_best_test", "epochs",
        "best_val_epoch", "test_acc_with_heads", "order_hash",
    )  # fmt: skip
    counted = count_spikes(
        job, Split(*(part[: job.spec.train.eval_batch_size] for part in (split.x, split.y)))
    )
    nulls = counted.pop("nulls") | dict.fromkeys(untrained, why)
    of_parts, why_not = shares(parts, job.engine)
    nulls |= why_not
    if joules.doubt:
        nulls["energy_measured_j"] = joules.doubt
    return {
        **dict.fromkeys(untrained),
        **counted,
        **quartiles(times),
        **of_parts,
        **job.engine.describe(),
        "steps_timed": len(times),
        "train_s": train_s,
        "eval_s": 0.0,
        "measure_s": 0.0,
        "images_per_s": steps * len(split) / train_s,
        "energy_measured_j": None if joules.doubt else spent,
        "timing_warning": timing_warning(quartiles(times), job.device),
        "warm_up_s": warm_up_s,
        "params_train": sum(p.numel() for p in trainable.parameters()),
        "params_infer": sum(p.numel() for p in job.net.parameters()),
        "history": [],
        "fidelity": [],
        "nulls": nulls,
    }


def capacity(
    spec: RunSpec,
    make: Callable[[RunSpec], Job],
    check: Callable[[], None],
    progressed: Callable[[], None],
) -> dict[str, Any]:
    """The largest T at the recipe's batch, and the largest batch at the recipe's T, that fit.

    Each trial is a process of its own: a few training steps under the given memory. On a GPU the
    allocator refuses more; on a CPU the resident set must not grow by more, code that is loaded on
    the way included. T is exact; a batch is found to within 1 / 32.  Raises RunSkipped where not
    even the run's own T can be tried; another T that cannot leaves largest_T without an answer.
    """
    wanted, began = spec.capacity, time.perf_counter()
    assert wanted is not None, "a suite of kind 'capacity' has this table"
    if spec.train.graph:
        raise RunSkipped("train.graph: a capacity is that of steps which are not recorded")
    trials: list[dict[str, Any]] = []
    nulls: dict[str, str] = {}

    def attempt(trial: RunSpec) -> dict[str, Any]:
        try:
            return try_steps(make(trial), wanted)
        except (RunSkipped, DataError) as error:
            return {"refused": str(error)}

    def fits(T: int, batch: int) -> bool:
        recipe = replace(spec.train, batch_size=batch, batch_split=1, devices=1)
        trial = replace(spec, T=T, train=recipe)
        seen = isolated(lambda: attempt(trial), check)
        if "refused" in seen:
            raise RunSkipped(seen["refused"])
        # A kernel that runs out of memory ends a process; whatever else ends one says nothing of
        # memory, and would be taken for a small capacity.
        if "fits" not in seen and "SIGKILL" not in seen["error"]:
            raise TrialError(f"the trial of T = {T}, batch {batch} failed: {seen['error']}")
        trials.append({"T": T, "batch_size": batch, **seen})
        progressed()
        return bool(seen.get("fits"))

    def search(name: str, fits: Callable[[int], bool], most: int, parts: int) -> int | None:
        found = largest(fits, most, parts)
        if found is None:
            nulls[name] = f"not even 1 fits: {trials[-1].get('error', 'more memory was used')}"
        return found

    largest_batch = search("largest_batch", lambda n: fits(spec.T, n), wanted.most_batch, 32)
    largest_T = None
    try:
        largest_T = search("largest_T", lambda T: fits(T, spec.train.batch_size), wanted.most_T, 1)
    except RunSkipped as error:
        nulls["largest_T"] = f"not every T can be tried: {error}"
    return {
        "largest_T": largest_T,
        "largest_batch": largest_batch,
        "capacity_bound": ", ".join(
            name
            for name, found, most in (
                ("T", largest_T, wanted.most_T),
                ("batch", largest_batch, wanted.most_batch),
            )
            if found == most
        )
        or None,
        "trials": trials,
        "nulls": nulls,
        "history": [],
        "fidelity": [],
        "measure_s": time.perf_counter() - began,
    }


def largest(fits: Callable[[int], bool], most: int, parts: int) -> int | None:
    """The largest size up to `most` that fits, to within 1 / parts of it; None if not even 1."""
    good, bad, size = 0, most + 1, 1
    while good < most and size < bad:
        if fits(size):
            good = size
            size = min(2 * size, most)
        else:
            bad = size
    while bad - good > max(1, good // parts if parts > 1 else 1):
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good or None


def try_steps(job: Job, wanted: Capacity) -> dict[str, Any]:
    """Whether two training steps stay within the memory, and what they used."""
    limit = wanted.memory_gib * GIB
    if job.device.type == "cuda":
        total = torch.cuda.get_device_properties(job.device).total_memory
        if limit > total:
            has = f"the GPU has {total / GIB:.1f}"
            raise RunSkipped(f"capacity.memory_gib = {wanted.memory_gib:g}: {has}")
        torch.cuda.set_per_process_memory_fraction(limit / total, job.device)
    elif why_not := reset_peak(job.device):
        return {"fits": False, "error": why_not}
    idle = used_bytes(job.device)
    try:
        job.net = job.engine.take(job.net)
        trainable, optimizer = prepare(job)
        job.net.train()
        batch = first_batch(job, job.spec.train.batch_size)
        at = Step(trainable, optimizer, StepClock(job.device), job.spec.T, job.spec.train.lr)
        for _ in range(2):
            train_step(job, at, *batch)
        synchronize(job.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False}
    used = peak_bytes(job.device)["peak_bytes"] - (idle if job.device.type == "cpu" else 0)
    return {"fits": used <= limit, "used_bytes": used}
