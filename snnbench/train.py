"""The training loop: one network, one method, one dataset, one recipe -> one record.

The clock times training steps only.  Evaluation uses the plain network: after training, the method
is gone.

All randomness is drawn from sub-seeds of (seed, purpose, epoch), so that two methods share their
batches, and a run resumed at any step sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.data.base import Data, Split
from snnbench.errors import DivergedError
from snnbench.measure.clock import PARTS, StepClock, quartiles, synchronize, timing_warning
from snnbench.measure.energy import Joules
from snnbench.measure.health import gradient_norms
from snnbench.spec import digest, sub_seed
from snnbench.training import checkpoint, group
from snnbench.training.evaluate import (
    SPIKES,
    accuracy,
    accuracy_and_spikes,
    accuracy_with_heads,
    attempted,
    compare_gradients,
    count_spikes,
)
from snnbench.training.job import Job, Step, prepare, record_steps, shares, train_step, warm_up
from snnbench.training.recipe import Phase, learning_rate, make_optimizer, phases

WARM_UP_STEPS = 2
AUGMENT_CHUNK = 4096
EPOCH_CHECKPOINT_S = 10.0  # between epochs; a shorter run is done again sooner than it is written
LEAST_SCALE = 2.0**-24  # of an fp16 loss: below it no gradient is left to divide
LOOK_EVERY = 100  # steps between looks at the loss on a GPU, which make it wait


@dataclass
class Progress:
    """How far training is: what it works with, and `state`, which a checkpoint holds."""

    plan: list[Phase]
    trainable: nn.Module
    optimizer: torch.optim.Optimizer
    clock: StepClock
    joules: Joules
    state: dict[str, Any]
    saved_at: float = field(default_factory=time.perf_counter)


def train(job: Job) -> dict[str, Any]:
    """Train and evaluate; the metrics of the record. Raises DivergedError on a non-finite loss."""
    net = job.engine.take(job.net)
    train_split, val, test = (
        split.to(job.device) for split in (job.data.train, job.data.val, job.data.test)
    )
    init_hash = hash_state(net)
    began = time.perf_counter()
    warm_up(job, train_split, WARM_UP_STEPS)
    synchronize(job.device)
    if job.spec.kernel != "auto" and (why := job.engine.fallback):
        job.emit({"event": "warning", "text": why})
    warm_up_s = time.perf_counter() - began

    at = begin(job, train_split)
    if job.spec.train.graph:
        warm_up_s += record(job, at, train_split)
    state = at.state
    if state["epoch"] == state["step"] == 0:
        measure_fidelity(job, train_split, at)
    for phase in at.plan:
        if state["epoch"] == phase.first > 0 and state["step"] == 0:
            at.optimizer = make_optimizer(phase.recipe, at.trainable)
            state["step_ms"], state["parts_ms"] = [], dict.fromkeys(PARTS, 0.0)
        for epoch in range(max(state["epoch"], phase.first), phase.end):
            event = train_epoch(job, at, train_split, phase, epoch)
            event |= evaluate_epoch(job, val, test, phase, epoch)
            state["epoch"], state["step"] = epoch + 1, 0
            state["history"].append(event)
            measure_fidelity(job, train_split, at)
            job.emit(event)
            if time.perf_counter() - at.saved_at > EPOCH_CHECKPOINT_S:
                save(job, at)

    began = time.perf_counter()
    nulls: dict[str, str] = dict(state["nulls"])
    metrics = attempted(lambda: count_spikes(job, test), SPIKES, nulls) or {"layers": []}
    for entry in metrics["layers"]:
        for when in ("grad_norm_init", "grad_norm"):
            entry[when] = state[when].get(entry["layer"])
    heads = attempted(lambda: accuracy_with_heads(job, test), ["test_acc_with_heads"], nulls)
    measure_s = time.perf_counter() - began + sum(seen["measure_s"] for seen in state["fidelity"])
    nulls |= metrics.pop("nulls", {})
    if at.joules.doubt:
        nulls["energy_measured_j"] = at.joules.doubt
    parts, why_not = shares(state["parts_ms"], job.engine)
    nulls |= why_not
    timing = timing_warning(quartiles(state["step_ms"]), job.device)
    if len(state["places"]) > 1:
        timing = f"done in several places, one after another: {'; '.join(state['places'])}"
    return {
        **metrics,
        **summary(state, first=at.plan[-1].first),
        **parts,
        **job.engine.describe(),
        "energy_measured_j": None if at.joules.doubt else state["joules"],
        "timing_warning": timing,
        "images_per_s": state["samples"] / max(sum(e["train_s"] for e in state["history"]), 1e-9),
        "test_acc_with_heads": heads,
        "epochs": at.plan[-1].end,
        "params_train": sum(p.numel() for p in at.trainable.parameters()),
        "params_infer": sum(p.numel() for p in net.parameters()),
        "init_hash": init_hash,
        "order_hash": state["order_hash"],
        "history": state["history"],
        "fidelity": state["fidelity"],
        "warm_up_s": warm_up_s,
        "measure_s": measure_s,
        "nulls": nulls,
    }


def begin(job: Job, split: Split) -> Progress:
    """The start of training, or the place where an earlier process left it."""
    trainable, optimizer = prepare(job)
    batch = min(job.spec.train.batch_size, len(split)) // group.size() * group.size()
    state: dict[str, Any] = {
        "epoch": 0, "step": 0, "order_hash": "", "step_ms": [], "history": [], "fidelity": [],
        "parts_ms": dict.fromkeys(PARTS, 0.0), "samples": 0, "joules": 0.0, "loss_sum": 0.0,
        "train_s": 0.0, "grad_norm_init": {}, "grad_norm": {}, "nulls": {}, "places": [],
        "energy": (0, 0.0, None),
    }  # fmt: skip
    found = checkpoint.unpack(job.checkpoints, job.engine, trainable, optimizer, job.emit)
    state = found or state
    if job.place not in state["places"]:
        state["places"].append(job.place)
    plan = phases(job.spec, len(split) // batch)
    clock, joules = StepClock(job.device), Joules(job.device, why=job.shared)
    joules.resume(*state["energy"])
    return Progress(plan, trainable, optimizer, clock, joules, state)


def record(job: Job, at: Progress, split: Split) -> float:
    """Record a step at every T of the plan, which changes nothing; seconds that it took."""
    began, seed = time.perf_counter(), job.spec.seed
    size = min(job.spec.train.batch_size, len(split))
    feed = batches(job.data, split, epoch_order(seed, 0, len(split)), size, seed, 0)
    record_steps(job, at.trainable, *next(feed))
    synchronize(job.device)
    return time.perf_counter() - began


def save(job: Job, at: Progress) -> None:
    """Write down where training stands."""
    job.save(checkpoint.pack(at.state, job.engine, at.trainable, at.optimizer))
    at.saved_at = time.perf_counter()


def train_epoch(job: Job, at: Progress, split: Split, phase: Phase, epoch: int) -> dict[str, Any]:
    """All steps of one epoch, or those left of it, timed; its event, without accuracies."""
    seed, recipe, state = job.spec.seed, phase.recipe, at.state
    order = epoch_order(seed, epoch, len(split))
    batch = min(recipe.batch_size, len(split)) // group.size() * group.size()
    epoch_steps = len(split) // batch
    first = (epoch - phase.first) * epoch_steps
    last = min(first + epoch_steps, phase.steps)
    total = sum(p.steps for p in at.plan)
    before = sum(p.steps for p in at.plan if p.first < phase.first)
    feed = batches(job.data, split, order, batch, seed, epoch)
    if state["step"] == 0:
        torch.manual_seed(sub_seed(seed, f"method:{epoch}"))
        state["order_hash"] = digest(state["order_hash"], order.numpy().tobytes())[:16]
        state |= {"loss_sum": 0.0, "train_s": 0.0}
    else:
        for _ in range(state["step"]):  # augmented again: the draws of the rest follow from it
            next(feed)
        checkpoint.restore_generators(state.pop("rng"), job.device)
    loss_sum = torch.tensor(state["loss_sum"], device=job.device)
    window = Window(job, at, loss_sum)
    job.net.train()
    with at.clock.watching(job.net):
        for step in range(first + state["step"], last):
            window.rest_if_due()
            with at.clock.part("data"):
                x_B, y_B = next(feed)
            lr = learning_rate(recipe, step, phase.steps, epoch_steps)
            update = Step(
                at.trainable, at.optimizer, at.clock, phase.T, lr,
                progress=(before + step) / total,
                look=job.device.type == "cpu" or step % LOOK_EVERY == 0,
                name=f"step {before + step + 1} of {total}",
            )  # fmt: skip
            with at.clock.step():
                loss_sum += train_step(job, update, group.share(x_B), group.share(y_B))
            state["step"] += 1
            state["samples"] += batch
            if before + step == 0:
                window.close()  # to look at the gradients is no part of training
                state["grad_norm_init"] = gradient_norms(job.net)
                window.open()
    window.close()
    state["grad_norm"] = gradient_norms(job.net)
    where = f"epoch {epoch + 1} of {at.plan[-1].end}"
    if not loss_sum.isfinite():
        raise DivergedError(f"the loss was not finite in {where}")
    if (scale := job.engine.loss_scale) is not None and scale < LEAST_SCALE:
        raise DivergedError(
            f"the fp16 loss scale fell to {scale:.1e} in {where}: gradients overflow at every "
            "step; use bf16 or fp32"
        )
    return {
        "event": "epoch",
        "epoch": epoch + 1,
        "epochs": at.plan[-1].end,
        "T": phase.T,
        "train_loss": loss_sum.item() / (last - first),
        "lr": lr,
        "train_s": state["train_s"],
        "energy_j": None if at.joules.doubt else state["joules"],
        "samples": state["samples"],
    }


class Window:
    """A stretch of undisturbed steps: its times and energy are added to the state at its end."""

    def __init__(self, job: Job, at: Progress, loss_sum: Tensor) -> None:
        self.job, self.at, self.loss_sum = job, at, loss_sum
        self.open()

    def open(self) -> None:
        """Start clock and energy counter."""
        self.at.joules.start()
        self.began = time.perf_counter()

    def close(self) -> None:
        """Wait for the device, and add up."""
        synchronize(self.job.device)
        state, clock = self.at.state, self.at.clock
        state["train_s"] += time.perf_counter() - self.began
        state["joules"] += self.at.joules.stop() or 0.0
        state["energy"] = (self.at.joules.windows, self.at.joules.length_s, self.at.joules.why)
        state["step_ms"] += clock.drain_ms()
        for part, ms in clock.drain_parts_ms().items():
            state["parts_ms"][part] += ms
        state["loss_sum"] = self.loss_sum.item()

    def rest_if_due(self) -> None:
        """Write a checkpoint where one is due, or where the run is asked to end, which it then
        does.
        """
        late = time.perf_counter() - self.at.saved_at > self.job.checkpoint_every_s
        try:
            self.job.stop()
        except Exception:
            raise  # another process of the team has died: the device would wait for it
        except BaseException:
            if self.at.state["step"]:
                self.close()
                save(self.job, self.at)
            raise
        if late and self.at.state["step"]:
            self.close()
            save(self.job, self.at)
            self.open()


def evaluate_epoch(
    job: Job, val: Split, test: Split, phase: Phase, epoch: int
) -> dict[str, float | None]:
    """Accuracies after an epoch where they are due, and spikes where a target asks for them."""
    began = time.perf_counter()
    due = (epoch + 1) % job.spec.train.eval_every == 0 or epoch + 1 == phase.end
    seen: dict[str, float | None] = {"val_acc": None, "test_acc": None, "spikes_per_sample": None}
    if due and job.spec.measure.target is not None:
        seen["val_acc"], seen["spikes_per_sample"] = accuracy_and_spikes(job, val, phase.T)
    elif due:
        seen["val_acc"] = accuracy(job, val, phase.T)
    if due:
        seen["test_acc"] = accuracy(job, test, phase.T)
    return seen | {"eval_s": time.perf_counter() - began}


def measure_fidelity(job: Job, split: Split, at: Progress) -> None:
    """Compare the method's gradient with that of BPTT, where that is due."""
    wanted, epoch, end = job.spec.measure.gradient_fidelity, at.state["epoch"], at.plan[-1].end
    if wanted is None or (epoch % wanted.every and epoch < end):
        return
    phase = next((p for p in at.plan if epoch < p.end), at.plan[-1])
    seen = attempted(
        lambda: compare_gradients(job, split, phase.T, epoch / end),
        ("grad_cos_bptt", "grad_norm_ratio") if epoch else
        ("grad_cos_bptt_init", "grad_norm_ratio_init"),
        at.state["nulls"],
    )  # fmt: skip
    if seen is not None:
        at.state["fidelity"].append(seen | {"epoch": epoch})


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Order of the training samples in one epoch; every method of a seed sees the same."""
    generator = torch.Generator().manual_seed(sub_seed(seed, f"batches:{epoch}"))
    return torch.randperm(n, generator=generator)


def batches(
    data: Data, split: Split, order: Tensor, batch: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches of augmented samples and labels; what remains of the epoch is left out.

    Labels are class indices [B], or probabilities [B, K] where the samples of a batch are mixed.
    """
    generator = torch.Generator().manual_seed(sub_seed(seed, f"augment:{epoch}"))
    for x_B, y_B in split.batches(order, batch, data.augment, generator, AUGMENT_CHUNK):
        yield (x_B, y_B) if data.mix is None else data.mix(x_B, y_B, generator)


def summary(state: dict[str, Any], first: int = 0) -> dict[str, Any]:
    """Accuracy by the three selection rules, among the epochs of the last phase; the times."""
    history = state["history"]
    evaluated = [e for e in history if e["test_acc"] is not None and e["epoch"] > first]
    by_val = max(evaluated, key=lambda e: e["val_acc"])  # the first of equals
    return {
        "test_acc": evaluated[-1]["test_acc"],
        "test_acc_best_val": by_val["test_acc"],
        "best_val_epoch": by_val["epoch"],
        "test_acc_best_test": max(e["test_acc"] for e in evaluated),
        "val_acc": evaluated[-1]["val_acc"],
        "train_s": sum(e["train_s"] for e in history),
        "eval_s": sum(e["eval_s"] for e in history),
        **quartiles(state["step_ms"]),
        "steps_timed": len(state["step_ms"]),
    }


def hash_state(net: nn.Module) -> str:
    """Hash of all weights and buffers, by name and value."""
    parts = [p for k, v in net.state_dict().items() for p in (k, v.cpu().numpy().tobytes())]
    return digest(*parts)[:16]
