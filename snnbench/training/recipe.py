"""The recipe that all methods of a suite share: phases, optimizer, learning rate, targets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnbench.spec import RunSpec, TrainConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one T, with an optimizer and a schedule of its own."""

    T: int
    recipe: TrainConfig
    first: int  # epoch, from 0
    epochs: int
    steps: int

    @property
    def end(self) -> int:
        """The epoch after the last."""
        return self.first + self.epochs


def phases(spec: RunSpec, epoch_steps: int) -> list[Phase]:
    """One phase; before it, under time inheritance, one at a smaller T."""
    recipe, found = spec.train, []
    if recipe.inherit is not None:
        early = recipe.inherit
        slower = replace(recipe, lr=early.lr or recipe.lr)
        found.append(Phase(early.T, slower, 0, early.epochs, early.epochs * epoch_steps))
    steps = recipe.steps or (recipe.epochs or 0) * epoch_steps  # a recipe has one of them
    first = found[0].end if found else 0
    return [*found, Phase(spec.T, recipe, first, math.ceil(steps / epoch_steps), steps)]


def make_optimizer(config: TrainConfig, trainable: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay on convolution and linear weights only."""
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    # One pass over each parameter instead of one for each operation.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, fused=fused)


def learning_rate(config: TrainConfig, step: int, total: int, epoch_steps: int) -> float:
    """Rate for one step, counted from 0: linear warm-up, then the schedule."""
    warmup = round(config.warmup_epochs * epoch_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.lr * config.step_gamma ** int(step / epoch_steps / config.step_epochs + 1e-9)
    return config.lr


def smooth(y_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets as they are, or class probabilities [B, K] under label smoothing.

    They are class indices [B], or probabilities [B, K] where the samples of a batch are mixed.
    """
    if smoothing == 0:
        return y_B
    probabilities = y_B if y_B.dim() == 2 else F.one_hot(y_B, classes)
    return probabilities * (1 - smoothing) + smoothing / classes
