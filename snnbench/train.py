"""The training loop: one network, one method, one dataset, one recipe -> one record.

The method fills `.grad`; everything else happens here, alike for all methods.  The clock times
training steps only.  Evaluation uses the plain network: after training, the method is gone.

All randomness is drawn from sub-seeds of (seed, purpose, epoch), so that two methods share their
batches, and a run resumed at an epoch sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnbench.data.base import Data, Split
from snnbench.errors import DivergedError
from snnbench.measure.clock import StepClock, synchronize
from snnbench.measure.memory import peak_bytes, reset_peak, saved_bytes
from snnbench.measure.spikes import Meter
from snnbench.methods.base import Method
from snnbench.models.layer import Network
from snnbench.spec import RunSpec, TrainConfig, digest, sub_seed

PROBE_STEPS = 3
AUGMENT_CHUNK = 4096
CHECKPOINT_EVERY_S = 10.0  # at most; a shorter run is done again sooner than it is written


@dataclass
class Job:
    """What to train, and where its events and checkpoints go."""

    spec: RunSpec
    net: Network
    method: Method
    data: Data
    device: torch.device
    emit: Callable[[dict[str, Any]], None]
    save: Callable[[dict[str, Any]], None]
    checkpoint: Path | None = None
    stop: Callable[[], None] = lambda: None  # raises where the run shall end early


def train(job: Job) -> dict[str, Any]:
    """Train and evaluate; the metrics of the record. Raises DivergedError on a non-finite loss."""
    spec, config, net = job.spec, job.spec.train, job.net
    net.to(job.device)
    train_split, val, test = (
        s.to(job.device) for s in (job.data.train, job.data.val, job.data.test)
    )
    init_hash = hash_state(net)
    metrics = probe(job, train_split)

    trainable, optimizer = prepare(job)
    batch = min(config.batch_size, len(train_split))
    epoch_steps = len(train_split) // batch
    total = config.steps or config.epochs * epoch_steps  # type: ignore[operator]
    epochs = math.ceil(total / epoch_steps)
    state: dict[str, Any] = {"epoch": 0, "order_hash": "", "step_ms": [], "history": []}
    if job.checkpoint is not None:
        state = resume(job, trainable, optimizer) or state

    clock, saved_at = StepClock(job.device), time.perf_counter()
    for epoch in range(state["epoch"], epochs):
        began = time.perf_counter()
        torch.manual_seed(sub_seed(spec.seed, f"method:{epoch}"))
        order = epoch_order(spec.seed, epoch, len(train_split))
        state["order_hash"] = digest(state["order_hash"], order.numpy().tobytes())[:16]
        loss_sum = torch.zeros((), device=job.device)
        first, last = epoch * epoch_steps, min((epoch + 1) * epoch_steps, total)
        net.train()
        for step, (x_B, y_B) in zip(
            range(first, last),
            batches(job.data, train_split, order, batch, spec.seed, epoch),
            strict=False,
        ):
            job.stop()
            with clock.step():
                lr = learning_rate(config, step, total, epoch_steps)
                loss = train_step(job, trainable, optimizer, x_B, y_B, lr, step / total)
            loss_sum += loss
            if (job.device.type == "cpu" or step % 100 == 0) and not loss.isfinite():
                raise DivergedError(f"the loss became {loss.item()} at step {step + 1} of {total}")
        synchronize(job.device)
        state["step_ms"] += clock.drain_ms()
        train_s = time.perf_counter() - began
        if not loss_sum.isfinite():
            raise DivergedError(f"the loss was not finite in epoch {epoch + 1} of {epochs}")

        began = time.perf_counter()
        evaluates = (epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs
        event = {
            "event": "epoch",
            "epoch": epoch + 1,
            "epochs": epochs,
            "train_loss": loss_sum.item() / (last - first),
            "lr": learning_rate(config, last - 1, total, epoch_steps),
            "val_acc": accuracy(job, val) if evaluates else None,
            "test_acc": accuracy(job, test) if evaluates else None,
            "train_s": train_s,
            "eval_s": time.perf_counter() - began,
        }
        state["history"].append(event)
        state["epoch"] = epoch + 1
        job.emit(event)
        if time.perf_counter() - saved_at > CHECKPOINT_EVERY_S:
            weights = {"trainable": trainable.state_dict(), "optimizer": optimizer.state_dict()}
            job.save(state | weights)
            saved_at = time.perf_counter()

    began = time.perf_counter()
    metrics |= count_spikes(job, test)
    metrics["measure_s"] += time.perf_counter() - began
    return (
        metrics
        | summary(state)
        | {
            "epochs": epochs,
            "params_train": sum(p.numel() for p in trainable.parameters()),
            "params_infer": sum(p.numel() for p in net.parameters()),
            "init_hash": init_hash,
            "order_hash": state["order_hash"],
            "history": state["history"],
        }
    )


def prepare(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with the method's auxiliary parameters, and their optimizer."""
    torch.manual_seed(sub_seed(job.spec.seed, "method"))
    auxiliary = job.method.prepare(job.net)
    trainable = nn.ModuleList([job.net] if auxiliary is None else [job.net, auxiliary])
    trainable.to(job.device)
    return trainable, make_optimizer(job.spec.train, trainable)


def make_optimizer(config: TrainConfig, trainable: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay on convolution and linear weights only."""
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int, total: int, epoch_steps: int) -> float:
    """Rate for one step, counted from 0: linear warm-up, then the schedule."""
    warmup = round(config.warmup_epochs * epoch_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.lr * config.step_gamma ** int(step / epoch_steps / config.step_epochs)
    return config.lr


def train_step(
    job: Job,
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_B: Tensor,
    y_B: Tensor,
    lr: float,
    progress: float,
) -> Tensor:
    """One update of the parameters; the loss comes back, detached."""
    config = job.spec.train
    optimizer.zero_grad(set_to_none=True)
    with autocast(job):
        x_TB = job.data.encode(x_B, job.spec.T)
        target = smooth(y_B, job.data.classes, config.label_smoothing)
        loss = job.method.backward(job.net, x_TB, target, progress)
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(trainable.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss


def smooth(y_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class indices [B], or class probabilities [B, K] under label smoothing."""
    if smoothing == 0:
        return y_B
    return F.one_hot(y_B, classes) * (1 - smoothing) + smoothing / classes


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """Order of the training samples in one epoch; every method of a seed sees the same."""
    generator = torch.Generator().manual_seed(sub_seed(seed, f"batches:{epoch}"))
    return torch.randperm(n, generator=generator)


def batches(
    data: Data, split: Split, order: Tensor, batch: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Full batches of augmented images and labels; what remains of the epoch is left out.

    Images are augmented several batches at a time: each operation of a policy then runs once for
    all the images that drew it.
    """
    generator = torch.Generator().manual_seed(sub_seed(seed, f"augment:{epoch}"))
    order = order[: len(order) // batch * batch].to(split.y.device)
    for chunk in order.split(max(1, AUGMENT_CHUNK // batch) * batch):
        x, y = split.x[chunk], split.y[chunk]
        x = x if data.augment is None else data.augment(x, generator)
        yield from zip(x.split(batch), y.split(batch), strict=True)


def autocast(job: Job) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision where the run asks for it; membranes stay in fp32."""
    if job.spec.precision == "bf16":
        return torch.autocast(job.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def accuracy(job: Job, split: Split) -> float:
    """Share of samples whose largest time-mean logit is that of their class."""
    job.net.eval()
    correct = torch.zeros((), dtype=torch.int64, device=job.device)
    size = job.spec.train.eval_batch_size
    for x_B, y_B in zip(split.x.split(size), split.y.split(size), strict=True):
        job.stop()
        with autocast(job):
            logits_TBK = job.net(job.data.encode(x_B, job.spec.T))
        correct += (logits_TBK.mean(0).argmax(1) == y_B).sum()
    return correct.item() / len(split)


@torch.no_grad()
def count_spikes(job: Job, split: Split) -> dict[str, Any]:
    """Spikes and operations per sample of the split, in a pass of their own."""
    job.net.eval()
    meter = Meter(job.net)
    for x_B in split.x.split(job.spec.train.eval_batch_size):
        job.stop()
        with autocast(job):
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
    x_B, y_B = split.x[:size], split.y[:size]
    x_TB = job.data.encode(x_B, job.spec.T)

    def backward() -> None:
        job.method.backward(job.net, x_TB, y_B, 0.0)

    known = [*trainable.parameters(), *trainable.buffers(), x_TB]
    with autocast(job):
        saved = saved_bytes(backward, known)
    why_not = reset_peak(job.device)
    for _ in range(PROBE_STEPS):
        train_step(job, trainable, optimizer, x_B, y_B, job.spec.train.lr, 0.0)
    synchronize(job.device)
    peak: dict[str, Any] = {"peak_bytes": None} if why_not else peak_bytes(job.device)

    job.net.zero_grad(set_to_none=True)
    job.net.load_state_dict(before)
    torch.set_rng_state(rng)
    return {
        "saved_bytes": saved,
        **peak,
        "nulls": {"peak_bytes": why_not} if why_not else {},
        "measure_s": time.perf_counter() - began,
    }


def resume(
    job: Job, trainable: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the checkpoint, data and never code; what it says of the epochs done.

    None if it cannot be read: the run then starts afresh, and says so.
    """
    try:
        saved = torch.load(job.checkpoint, map_location=job.device, weights_only=True)  # type: ignore[arg-type]
    except Exception as error:
        job.emit({"event": "restart", "reason": f"unreadable checkpoint: {type(error).__name__}"})
        return None
    trainable.load_state_dict(saved.pop("trainable"))
    optimizer.load_state_dict(saved.pop("optimizer"))
    job.emit({"event": "resume", "epoch": saved["epoch"]})
    return dict(saved)


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by the three selection rules, and the times, over all epochs."""
    history = state["history"]
    evaluated = [e for e in history if e["test_acc"] is not None]
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
