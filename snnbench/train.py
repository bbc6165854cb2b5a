"""The training loop: one network, one method, one dataset, one recipe -> one record.

The method fills `.grad`; everything else happens here, alike for all methods.  The clock times
training steps only.  Evaluation uses the plain network: after training, the method is gone.

All randomness is drawn from sub-seeds of (seed, purpose, epoch), so that two methods share their
batches, and a run resumed at an epoch sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snnbench.data.base import Data, Split
from snnbench.engine import LOSS_SCALE, Engine
from snnbench.errors import DivergedError
from snnbench.measure.clock import StepClock, synchronize
from snnbench.measure.gradients import fidelity
from snnbench.measure.memory import peak_bytes, reset_peak, saved_bytes
from snnbench.measure.spikes import Meter
from snnbench.methods.base import Method
from snnbench.models.layer import Network
from snnbench.recipe import Phase, learning_rate, make_optimizer, phases, smooth
from snnbench.registry import source_hash
from snnbench.spec import RunSpec, digest, sub_seed

PROBE_STEPS = 2
AUGMENT_CHUNK = 4096
CHECKPOINT_EVERY_S = 10.0  # at most; a shorter run is done again sooner than it is written


@dataclass
class Job:
    """What to train, and where its events and checkpoints go."""

    spec: RunSpec
    net: Network
    method: Method
    data: Data
    engine: Engine
    emit: Callable[[dict[str, Any]], None]
    save: Callable[[dict[str, Any]], None]
    checkpoint: Path | None = None
    stop: Callable[[], None] = lambda: None  # raises where the run shall end early

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.engine.device


def train(job: Job) -> dict[str, Any]:
    """Train and evaluate; the metrics of the record. Raises DivergedError on a non-finite loss."""
    net = job.engine.take(job.net)
    splits = {
        name: split.to(job.device)
        for name, split in (
            ("train", job.data.train),
            ("val", job.data.val),
            ("test", job.data.test),
        )
    }
    init_hash = hash_state(net)
    metrics = probe(job, splits["train"])

    trainable, optimizer = prepare(job)
    batch = min(job.spec.train.batch_size, len(splits["train"]))
    plan = phases(job.spec, len(splits["train"]) // batch)
    state: dict[str, Any] = {
        "epoch": 0, "order_hash": "", "step_ms": [], "history": [], "fidelity": [],
    }  # fmt: skip
    if job.checkpoint is not None:
        state = resume(job, job.checkpoint, trainable, optimizer) or state
    if state["epoch"] == 0:
        measure_fidelity(job, splits["train"], plan, state)

    saved_at = time.perf_counter()
    for phase in plan:
        if state["epoch"] == phase.first > 0:
            optimizer = make_optimizer(phase.recipe, trainable)
            state["step_ms"] = []
        for epoch in range(max(state["epoch"], phase.first), phase.end):
            event = train_epoch(
                job, trainable, optimizer, splits["train"], plan, phase, epoch, state
            )
            began = time.perf_counter()
            due = (epoch + 1) % job.spec.train.eval_every == 0 or epoch + 1 == phase.end
            event["val_acc"] = accuracy(job, splits["val"], phase.T) if due else None
            event["test_acc"] = accuracy(job, splits["test"], phase.T) if due else None
            event["eval_s"] = time.perf_counter() - began
            state["epoch"] = epoch + 1
            state["history"].append(event)
            measure_fidelity(job, splits["train"], plan, state)
            job.emit(event)
            if time.perf_counter() - saved_at > CHECKPOINT_EVERY_S:
                parts: dict[str, Any] = {"loss_scale": job.engine.loss_scale}
                parts |= {"trainable": trainable.state_dict(), "optimizer": optimizer.state_dict()}
                job.save(seal(state | parts))
                saved_at = time.perf_counter()

    began = time.perf_counter()
    metrics |= count_spikes(job, splits["test"])
    if metrics["firing_rate"] is None:
        why = "no spiking neuron in the network"
        metrics["nulls"] |= dict.fromkeys(("spikes_per_sample", "firing_rate"), why)
    metrics["test_acc_with_heads"] = accuracy_with_heads(job, splits["test"])
    metrics["measure_s"] += time.perf_counter() - began
    metrics["measure_s"] += sum(at["measure_s"] for at in state["fidelity"])
    return {
        **metrics,
        **summary(state, first=plan[-1].first),
        **job.engine.describe(),
        "epochs": plan[-1].end,
        "params_train": sum(p.numel() for p in trainable.parameters()),
        "params_infer": sum(p.numel() for p in net.parameters()),
        "init_hash": init_hash,
        "order_hash": state["order_hash"],
        "history": state["history"],
        "fidelity": state["fidelity"],
    }


def train_epoch(
    job: Job,
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    plan: list[Phase],
    phase: Phase,
    epoch: int,
    state: dict[str, Any],
) -> dict[str, Any]:
    """All steps of one epoch, timed; its event, without accuracies."""
    began = time.perf_counter()
    seed, recipe = job.spec.seed, phase.recipe
    torch.manual_seed(sub_seed(seed, f"method:{epoch}"))
    order = epoch_order(seed, epoch, len(split))
    state["order_hash"] = digest(state["order_hash"], order.numpy().tobytes())[:16]
    batch = min(recipe.batch_size, len(split))
    epoch_steps = len(split) // batch
    first = (epoch - phase.first) * epoch_steps
    last = min(first + epoch_steps, phase.steps)
    total, before = sum(p.steps for p in plan), sum(p.steps for p in plan if p.first < phase.first)
    clock, loss_sum = StepClock(job.device), torch.zeros((), device=job.device)
    job.net.train()
    feed = batches(job.data, split, order, batch, seed, epoch)
    for step, (x_B, y_B) in zip(range(first, last), feed, strict=False):
        job.stop()
        lr = learning_rate(recipe, step, phase.steps, epoch_steps)
        with clock.step():
            progress = (before + step) / total
            loss = train_step(job, trainable, optimizer, x_B, y_B, phase.T, lr, progress)
        loss_sum += loss
        if (job.device.type == "cpu" or step % 100 == 0) and not loss.isfinite():
            raise DivergedError(
                f"the loss became {loss.item()} at step {before + step + 1} of {total}"
            )
    synchronize(job.device)
    state["step_ms"] += clock.drain_ms()
    if not loss_sum.isfinite():
        raise DivergedError(f"the loss was not finite in epoch {epoch + 1} of {plan[-1].end}")
    return {
        "event": "epoch",
        "epoch": epoch + 1,
        "epochs": plan[-1].end,
        "T": phase.T,
        "train_loss": loss_sum.item() / (last - first),
        "lr": lr,
        "train_s": time.perf_counter() - began,
    }


def prepare(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with the method's auxiliary parameters, and their optimizer."""
    torch.manual_seed(sub_seed(job.spec.seed, "method"))
    auxiliary = job.method.prepare(job.net)
    trainable = nn.ModuleList([job.net] if auxiliary is None else [job.net, auxiliary])
    trainable.to(job.device)
    return trainable, make_optimizer(job.spec.train, trainable)


def train_step(
    job: Job,
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_B: Tensor,
    y_B: Tensor,
    T: int,
    lr: float,
    progress: float,
) -> Tensor:
    """One update of the parameters; the loss comes back, detached."""
    config = job.spec.train
    optimizer.zero_grad(set_to_none=True)
    x_TB = job.data.encode(x_B, T)
    target = smooth(y_B, job.data.classes, config.label_smoothing)
    loss = job.engine.backward(job.method, job.net, x_TB, target, progress)
    for group in optimizer.param_groups:
        group["lr"] = lr
    job.engine.update(trainable.parameters(), optimizer, config.clip_norm)
    return loss


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


@torch.no_grad()
def accuracy(
    job: Job, split: Split, T: int, forward: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Share of samples whose largest time-mean logit is that of their class."""
    job.net.eval()
    correct = torch.zeros((), dtype=torch.int64, device=job.device)
    finite = torch.ones((), dtype=torch.bool, device=job.device)
    size = job.spec.train.eval_batch_size
    for x_B, y_B in zip(split.x.split(size), split.y.split(size), strict=True):
        job.stop()
        with job.engine.autocast():
            logits_TBK = (forward or job.net)(job.data.encode(x_B, T))
        correct += (logits_TBK.mean(0).argmax(1) == y_B).sum()
        finite &= logits_TBK.isfinite().all()
    if not finite:
        raise DivergedError("the logits are not finite at evaluation")
    return correct.item() / len(split)


def accuracy_with_heads(job: Job, split: Split) -> float | None:
    """Accuracy of the logits with the method's auxiliary heads, for information; None without."""
    T = job.spec.T
    with torch.no_grad():
        job.net.eval()
        if job.method.predict(job.net, job.data.encode(split.x[:1], T)) is None:
            return None

    def with_heads(x_TB: Tensor) -> Tensor:
        logits_TBK = job.method.predict(job.net, x_TB)
        assert logits_TBK is not None
        return logits_TBK

    return accuracy(job, split, T, with_heads)


def measure_fidelity(job: Job, split: Split, plan: list[Phase], state: dict[str, Any]) -> None:
    """Compare the method's gradient with that of BPTT on one fixed batch, where that is due."""
    wanted, epoch = job.spec.measure.gradient_fidelity, state["epoch"]
    if wanted is None or (epoch % wanted.every and epoch < plan[-1].end):
        return
    began = time.perf_counter()
    phase = next((p for p in plan if epoch < p.end), plan[-1])
    size = min(job.spec.train.batch_size, len(split))
    x_TB = job.data.encode(split.x[:size], phase.T)
    job.net.train()
    with job.engine.autocast():
        seen = fidelity(job.method, job.net, x_TB, split.y[:size], epoch / plan[-1].end)
    seen |= {"epoch": epoch, "T": phase.T, "measure_s": time.perf_counter() - began}
    state["fidelity"].append(seen)


@torch.no_grad()
def count_spikes(job: Job, split: Split) -> dict[str, Any]:
    """Spikes and operations per sample of the split, in a pass of their own."""
    job.net.eval()
    meter = Meter(job.net)
    for x_B in split.x.split(job.spec.train.eval_batch_size):
        job.stop()
        with job.engine.autocast():
            job.net(job.data.encode(x_B, job.spec.T), meter)
    return meter.totals(len(split))


def probe(job: Job, split: Split) -> dict[str, Any]:
    """Memory of a training step, measured on throw-away steps that also warm the machine up.

    Weights, buffers, optimizer and random state are as before afterwards.
    """
    began = time.perf_counter()
    before = {k: v.detach().clone() for k, v in job.net.state_dict().items()}
    rng = torch.get_rng_state()
    trainable, optimizer = prepare(job)
    job.net.train()
    size = min(job.spec.train.batch_size, len(split))
    x_B, y_B = split.x[:size].clone(), split.y[:size].clone()
    x_TB = job.data.encode(x_B, job.spec.T)

    def backward() -> None:
        job.method.backward(job.net, x_TB, y_B, 0.0)

    known = [*trainable.parameters(), *trainable.buffers(), x_TB, y_B]
    with job.engine.autocast():
        saved = saved_bytes(backward, known, *job.engine.keeping)
    why_not = reset_peak(job.device)
    for _ in range(PROBE_STEPS):
        train_step(job, trainable, optimizer, x_B, y_B, job.spec.T, job.spec.train.lr, 0.0)
    synchronize(job.device)
    peak: dict[str, Any] = {"peak_bytes": None} if why_not else peak_bytes(job.device)

    job.net.zero_grad(set_to_none=True)
    job.net.load_state_dict(before)
    torch.set_rng_state(rng)
    job.engine.set_loss_scale(LOSS_SCALE)
    return {
        "saved_bytes": saved,
        **peak,
        "nulls": {"peak_bytes": why_not} if why_not else {},
        "measure_s": time.perf_counter() - began,
    }


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a digest of its content and of the code that computed it."""
    return {**state, "seal": digest(source_hash(), *_content(state))}


def _content(value: Any) -> Iterator[str | bytes]:
    """Everything in a nested state, in a fixed order."""
    if isinstance(value, Tensor):
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _content(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content(item)
    else:
        yield repr(value)


def resume(
    job: Job, checkpoint: Path, trainable: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the checkpoint, data and never code; what it says of the epochs done.

    None if it is damaged, does not fit, or was written by other code: the run then starts afresh,
    and says so.
    """
    before = copy.deepcopy((trainable.state_dict(), optimizer.state_dict()))
    try:
        saved = torch.load(checkpoint, map_location=job.device, weights_only=True)
        if saved.pop("seal") != seal(saved)["seal"]:
            raise ValueError("not what was written, or written by another version of the code")
        trainable.load_state_dict(saved.pop("trainable"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        job.engine.set_loss_scale(saved.pop("loss_scale"))
        job.emit({"event": "resume", "epoch": saved["epoch"]})
        return dict(saved)
    except Exception as error:
        trainable.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        reason = f"unusable checkpoint: {type(error).__name__}: {error}"
        job.emit({"event": "restart", "reason": " ".join(reason.split())[:300]})
        return None


def summary(state: dict[str, Any], first: int = 0) -> dict[str, Any]:
    """Accuracy by the three selection rules, among the epochs of the last phase; the times."""
    history = state["history"]
    evaluated = [e for e in history if e["test_acc"] is not None and e["epoch"] > first]
    by_val = max(evaluated, key=lambda e: e["val_acc"])  # the first of equals
    p25, p50, p75 = np.percentile(state["step_ms"], [25, 50, 75]).tolist()
    return {
        "test_acc": evaluated[-1]["test_acc"],
        "test_acc_best_val": by_val["test_acc"],
        "best_val_epoch": by_val["epoch"],
        "test_acc_best_test": max(e["test_acc"] for e in evaluated),
        "val_acc": evaluated[-1]["val_acc"],
        "train_s": sum(e["train_s"] for e in history),
        "eval_s": sum(e["eval_s"] for e in history),
        "step_ms_p25": p25,
        "step_ms_p50": p50,
        "step_ms_p75": p75,
        "steps_timed": len(state["step_ms"]),
    }


def hash_state(net: nn.Module) -> str:
    """Hash of all weights and buffers, by name and value."""
    parts = [p for k, v in net.state_dict().items() for p in (k, v.cpu().numpy().tobytes())]
    return digest(*parts)[:16]
