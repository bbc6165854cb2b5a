"""What one run is made of, and one step of its training.

The method fills `.grad`; everything else of a step happens here, alike for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.data.base import Data, Split
from snnbench.errors import DivergedError
from snnbench.measure.clock import StepClock
from snnbench.measure.health import first_bad_layer
from snnbench.methods.base import Method
from snnbench.models.layer import Network
from snnbench.spec import RunSpec, sub_seed
from snnbench.training import group
from snnbench.training.engine import LOSS_SCALE, Engine
from snnbench.training.recipe import make_optimizer, smooth


@dataclass
class Job:
    """What to train, and where its events and checkpoints go."""

    spec: RunSpec
    net: Network
    method: Method
    data: Data
    engine: Engine
    emit: Callable[[dict[str, Any]], None] = lambda _: None
    save: Callable[[dict[str, Any]], None] = lambda _: None
    checkpoints: Sequence[Path] = ()  # to go on from, the newest first
    stop: Callable[[], None] = lambda: None  # raises where the run shall end early
    checkpoint_every_s: float = 60.0
    place: str = ""  # where, and in how many parts of a batch: times of two places are not one
    shared: str = ""  # why what a counter of the whole device says is not this run's

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.engine.device


def prepare(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with the method's auxiliary parameters, and their optimizer."""
    torch.manual_seed(sub_seed(job.spec.seed, "method"))
    auxiliary = job.method.prepare(job.net)
    trainable = nn.ModuleList([job.net] if auxiliary is None else [job.net, auxiliary])
    trainable.to(job.device)
    return trainable, make_optimizer(job.spec.train, trainable)


@dataclass
class Step:
    """What one update needs besides the batch."""

    trainable: nn.Module
    optimizer: torch.optim.Optimizer
    clock: StepClock
    T: int
    lr: float
    progress: float = 0.0
    look: bool = False  # whether the loss is looked at before the update, which waits for it
    name: str = "a throw-away step"


def train_step(job: Job, at: Step, x_B: Tensor, y_B: Tensor) -> Tensor:
    """One update of the parameters; the loss comes back, detached.

    Raises DivergedError, which names the first bad layer, if the loss is looked at and not finite.
    """
    config = job.spec.train
    with at.clock.part("data"):
        x_TB = job.data.encode(x_B, at.T)
        target = smooth(y_B, job.data.classes, config.label_smoothing)
    with at.clock.part("backward"):
        at.optimizer.zero_grad(set_to_none=True)
        loss = fill_gradients(job, at, x_TB, target)
        group.average_gradients(at.trainable.parameters())
        loss = group.total(loss) / group.size()
    if at.look and not loss.isfinite():
        bad = "not looked for on several devices"
        if group.size() == 1:
            with job.engine.autocast():
                bad = first_bad_layer(job.net, x_TB)
        raise DivergedError(f"the loss became {loss.item()} at {at.name}; not finite first: {bad}")
    with at.clock.part("optimizer"):
        for options in at.optimizer.param_groups:
            options["lr"] = at.lr
        job.engine.update(at.trainable.parameters(), at.optimizer, config.clip_norm)
    return loss


def fill_gradients(job: Job, at: Step, x_TB: Tensor, target: Tensor) -> Tensor:
    """Let the method fill `.grad`; the loss comes back, detached.

    In several parts, gradients and losses are averaged, and memory is that of one part.
    """
    engine, parts = job.engine, job.spec.train.batch_split
    if parts == 1:
        return engine.backward(job.method, job.net, x_TB, target, at.progress)
    sums: dict[nn.Parameter, Tensor] = {}
    mean = torch.zeros((), device=job.device)
    for x, y in zip(x_TB.chunk(parts, 1), target.chunk(parts), strict=True):
        share = len(y) / len(target)
        mean += share * engine.backward(job.method, job.net, x, y, at.progress)
        for p in at.trainable.parameters():
            if p.grad is not None:
                part, p.grad = p.grad.mul_(share), None
                sums[p] = sums[p].add_(part) if p in sums else part
    for p, grad in sums.items():
        p.grad = grad
    return mean


def record_steps(job: Job, trainable: nn.Module, x_B: Tensor, y_B: Tensor) -> None:
    """Let steps on such batches, at every T, be replayed; RunSkipped where that cannot be."""
    job.net.train()
    target = smooth(y_B, job.data.classes, job.spec.train.label_smoothing)
    for T in steps_of(job.spec):
        job.engine.record(job.method, job.net, trainable, job.data.encode(x_B, T), target)


def steps_of(spec: RunSpec) -> tuple[int, ...]:
    """Every T at which the recipe takes steps."""
    early = spec.train.inherit
    return tuple(dict.fromkeys((spec.T, *([early.T] if early else []))))


def shares(parts_ms: dict[str, float], engine: Engine) -> tuple[dict[str, Any], dict[str, str]]:
    """Each part's share of the time; null, with the reasons beside, where it has no bounds."""
    spent_ms, inside = sum(parts_ms.values()), ("forward_share", "backward_share")
    found: dict[str, Any] = {f"{part}_share": ms / spent_ms for part, ms in parts_ms.items()}
    if not engine.graphs:
        return found, {}
    why = "forward and backward are one CUDA graph"
    return found | dict.fromkeys(inside), dict.fromkeys(inside, why)


def warm_up(job: Job, split: Split, steps: int) -> None:
    """Throw-away steps on the first batch, at every T of the recipe; everything is as before
    afterwards.
    """
    before = {k: v.detach().clone() for k, v in job.net.state_dict().items()}
    rng = torch.get_rng_state()
    trainable, optimizer = prepare(job)
    job.net.train()
    size = min(job.spec.train.batch_size, len(split))
    x_B, y_B = group.share(split.x[:size].clone()), group.share(split.y[:size].clone())
    for T in steps_of(job.spec):  # kernels are compiled for each
        at = Step(trainable, optimizer, StepClock(job.device), T, job.spec.train.lr)
        for _ in range(steps):
            train_step(job, at, x_B, y_B)
    job.net.zero_grad(set_to_none=True)
    job.net.load_state_dict(before)
    torch.set_rng_state(rng)
    job.engine.set_loss_scale(LOSS_SCALE)
