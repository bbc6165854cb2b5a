"""How a run is computed, not what: device, kernel, precision, memory, layout.

Whatever was asked for and is not possible here is an error or a fallback with its reason; what was
done in the end stands in the record.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.errors import RunSkipped
from snnbench.kernels.choice import Choice
from snnbench.kernels.saved import Keeper, Level
from snnbench.methods.base import Method
from snnbench.models.layer import Network
from snnbench.training import group
from snnbench.training.graph import StepGraph
from snnbench.training.oom import is_out_of_memory

# Gradients of fp16 runs are multiplied by this, and divided again; it halves on an overflow.
LOSS_SCALE = 2.0**10
NEVER = 2**30
TINY = 2.0**-149  # the smallest scale before 0
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Engine:
    """Everything that is the same for all methods of a suite and changes no result by intention."""

    device: torch.device
    choice: Choice
    precision: str = "fp32"
    memory: Level = "speed"

    def __post_init__(self) -> None:
        self.keeper = None if self.memory == "speed" else Keeper(self.memory)
        self.scaler: torch.amp.GradScaler | None = None
        self.paths: set[str] = set()  # who did the layer steps of training
        self.graphs: dict[int, StepGraph] = {}  # of a step, by T; empty: steps are not recorded
        self.set_loss_scale(LOSS_SCALE)

    def set_loss_scale(self, scale: float) -> None:
        """Start, or go on, with this scale; only fp16 has one, and a recording holds the old."""
        self.graphs.clear()
        if self.precision == "fp16":
            self.scaler = torch.amp.GradScaler(
                self.device.type, init_scale=scale, growth_interval=NEVER
            )

    def take(self, net: Network) -> Network:
        """Put the network on the device, in the layout and on the kernel of this engine."""
        group.synchronise(net)
        net.to(self.device).to(memory_format=torch.channels_last)
        for layer in net.layers().values():
            layer.keeper = self.keeper
            layer.kernel = self.choice.kernel
        return net

    @property
    def keeping(self) -> tuple[Callable[..., Any], ...]:
        """What is kept of a saved tensor, and how it comes back; nothing for autograd's own way."""
        return () if self.keeper is None else (self.keeper.pack, self.keeper.unpack)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision where the run asks for it; membranes and statistics stay in fp32."""
        if self.precision in HALF:
            # Without its cache: up to torch 2.10 that gave weights cast without gradient to those
            # that need one.
            return torch.autocast(self.device.type, dtype=HALF[self.precision], cache_enabled=False)
        return contextlib.nullcontext()

    def record(
        self, method: Method, net: Network, trainable: nn.Module, x_TB: Tensor, target: Tensor
    ) -> None:
        """Let `backward` replay a recording for these shapes; RunSkipped where that cannot be."""
        inputs, backward = (x_TB, target, 0.0), partial(self._backward, method, net)
        try:
            self.graphs[len(x_TB)] = StepGraph(backward, trainable, inputs, self.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RunSkipped(f"train.graph: {' '.join(str(error).split())[:200]}") from error

    def backward(
        self, method: Method, net: Network, x_TB: Tensor, target: Tensor, progress: float
    ) -> Tensor:
        """Let the method fill `.grad`; the loss comes back, detached and not scaled."""
        if self.graphs:
            return self.graphs[len(x_TB)](x_TB, target, progress)
        return self._backward(method, net, x_TB, target, progress)

    def _backward(
        self, method: Method, net: Network, x_TB: Tensor, target: Tensor, progress: Any
    ) -> Tensor:
        if self.scaler is not None:
            method.amplify = self.scaler.scale
        with self.autocast(), contextlib.ExitStack() as stack:
            if self.keeper is not None:
                stack.enter_context(self.keeper.hooks())
            self.choice.kernel.steps.clear()
            loss = method.backward(net, x_TB, target, progress)
            self.paths |= set(self.choice.kernel.steps)
            return loss

    def update(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        """One step of the optimizer; left out where an fp16 gradient has overflowed."""
        step: Callable[[], Any] = optimizer.step
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if self.scaler is None:
            step()
        else:
            _start_momentum(optimizer)
            self.scaler.step(optimizer)
            self.scaler.update()

    @property
    def loss_scale(self) -> float | None:
        """The scale as it stands; None where there is none. Waits for the device."""
        return None if self.scaler is None else self.scaler.get_scale()

    @property
    def fallback(self) -> str | None:
        """Why the chosen kernel took none, or not all, of the steps so far; None if it did."""
        name = self.choice.name
        if name == "reference" or self.paths == {name}:
            return None
        return f"{name}: this method, or its neuron, takes its steps in plain torch"

    def describe(self) -> dict[str, Any]:
        """What was done in the end, for the record."""
        fallbacks, scale = list(self.choice.passed_over), self.loss_scale
        if self.fallback is not None:
            fallbacks.append(self.fallback)
        return {
            "kernel_path": "+".join(sorted(self.paths)) or "reference",
            "kernel_fallbacks": fallbacks,
            "precision_path": self.precision,
            # The scale halves for every update that is left out, and never grows.
            "skipped_steps": None
            if scale is None
            else round(math.log2(LOSS_SCALE / max(scale, TINY))),
        }


def resolve_precision(wanted: str, device: torch.device) -> str:
    """The precision that "auto" means here: fp16 on a GPU, fp32 on a CPU."""
    if wanted == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    return wanted


def set_matmul_precision(precision: str, device: torch.device) -> str | None:
    """Set the precision of fp32 matrix products; why it cannot be had here, or None."""
    if precision == "tf32" and device.type != "cuda":
        return "tf32 needs a CUDA device"
    bf16 = precision == "bf16" and device.type == "cuda"
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16: this GPU has no arithmetic for it; fp16 works everywhere"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return None


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD momenta of 0, with which a first step is the same as without any.

    Where fp16 overflows at that step, torch's fused update would leave them as they came from the
    allocator, and use them at the second.
    """
    for options in optimizer.param_groups:
        if options.get("momentum"):
            for p in options["params"]:
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
