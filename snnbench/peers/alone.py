"""One spiking layer alone: how near its forward and backward are to the bandwidth of a plain copy.

The layer has T timesteps of B feature maps [C, H, W] as input current x_TB, or as what BatchNorm
makes that of; the gradient of the spikes is given.  All arrays are in the contestant's precision.
The steps of a slice wait until the last of them is queued, so what the host needs to start them is
not in their time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from snnbench.errors import WorkerError
from snnbench.measure.clock import Stretches, synchronize
from snnbench.measure.memory import saved_bytes
from snnbench.models.layer import Layer
from snnbench.peers.contestants import Entry, Parity, Population, Setup, engine
from snnbench.peers.libraries import NEURON
from snnbench.spec import sub_seed
from snnbench.training.engine import HALF

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "lif": lambda C: nn.Identity(),
    "bn-lif": nn.BatchNorm2d,
}
SETTLE_S = 0.25
HOLD_CYCLES = 100_000_000  # of the GPU's clock, which are 50 ms
STEPS = 20  # that wait: a GPU queues about a thousand kernels
REPEATS = 3


def batches(setup: Setup, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """`count` pairs of input and spikes' gradient, [T, size, C, H, W] and fp32."""
    generator = torch.Generator().manual_seed(sub_seed(0, "batches"))
    shape = (setup.T, size, *setup.shape)

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator).to(setup.device)

    return [(drawn(), drawn()) for _ in range(count)]


def neurons(setup: Setup) -> int:
    """Number of neurons for one image."""
    return torch.Size(setup.shape).numel()


def build(entry: Entry, setup: Setup) -> Alone:
    """The contestant; raises WorkerError where it cannot be had here."""
    return Alone(entry, setup)


class Alone:
    """A layer that can be stepped, by our kernels, by a library, or a copy in its place."""

    def __init__(self, entry: Entry, setup: Setup) -> None:
        self.entry, self.T, self.device = entry, setup.T, torch.device(setup.device)
        if entry.graph or entry.method != "bptt" or entry.memory != "speed":
            raise WorkerError("a layer alone has no such setting")
        self.engine = engine(entry, self.device)
        self.copies: dict[int, Tensor] = {}
        layer = Layer(LAYERS[setup.model](setup.shape[0]), neuron=NEURON)
        self.rest: Callable[[], None] = lambda: None
        self.path: Callable[[], str] = lambda: ""
        if entry.family == "ours":
            layer.kernel = self.engine.choice.kernel
            layer.to(self.device)
            self.run: Callable[[Tensor], Tensor] = layer
            self.path = lambda: self.engine.choice.name
        elif entry.kind != "copy":
            library = entry.library()
            if not library.multi:
                raise WorkerError("a layer alone runs all its timesteps at once")
            population = Population(layer, library).to(self.device)
            self.rest = lambda: library.rest(population)
            self.path = lambda: library.path(self.device, entry.compiled, entry.precision in HALF)
            self.run = torch.compile(population, dynamic=False) if entry.compiled else population

    def laid_out(self, x_TB: Tensor) -> Tensor:
        """An array in the contestant's layout and precision."""
        to = torch.channels_last if self.entry.channels_last else torch.contiguous_format
        x_TB = x_TB.to(HALF.get(self.entry.precision, torch.float32))
        flat = x_TB.flatten(0, 1).contiguous(memory_format=to)
        return flat.view(x_TB.shape[:2] + flat.shape[1:])

    def step(self, x_TB: Tensor, g_TB: Tensor) -> Tensor:
        """Forward and backward of the layer; one of the spikes comes back, detached."""
        s_TB, _ = self.pass_(x_TB, g_TB)
        return s_TB[(0,) * s_TB.dim()]

    def pass_(self, x_TB: Tensor, g_TB: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes, and the gradient of the input."""
        if self.entry.kind == "copy":
            key = x_TB.data_ptr()  # to a place of its own: one place would stay in the cache
            if key not in self.copies:
                self.copies[key] = torch.empty_like(x_TB)
            return self.copies[key].copy_(x_TB), x_TB
        self.rest()
        x_TB = x_TB.detach().requires_grad_()
        s_TB: Tensor = self.run(x_TB)
        s_TB.backward(g_TB)
        assert x_TB.grad is not None
        return s_TB.detach(), x_TB.grad

    def time_ms(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """Milliseconds of one of many steps that follow each other without a gap."""
        began = time.monotonic()
        while time.monotonic() - began < SETTLE_S:  # an idle GPU has a low clock
            self.step(*pairs[0]).item()
        clock = Stretches(self.device)
        for _ in range(REPEATS):
            if self.device.type == "cuda":
                torch.cuda._sleep(HOLD_CYCLES)
            begin = clock.mark()
            for i in range(STEPS):
                self.step(*pairs[i % len(pairs)])
            clock.add(begin)
            synchronize(self.device)
        return statistics.median(clock.drain_ms()) / STEPS

    def saved_bytes(self, x_TB: Tensor, g_TB: Tensor) -> int:
        """Bytes that autograd keeps for the backward pass; the input is one of them."""
        return saved_bytes(lambda: self.step(x_TB, g_TB), [])


def parity(entry: Entry, setup: Setup) -> Parity | None:
    """Compare spikes and input gradient with our reference on the same rounded input."""
    if entry.kind == "copy":
        return None
    ((x_TB, g_TB),) = batches(setup, 1, 2)
    contestant = build(entry, setup)
    x_TB, g_TB = contestant.laid_out(x_TB), contestant.laid_out(g_TB)
    s_TB, gx_TB = contestant.pass_(x_TB, g_TB)
    reference = build(Entry("ours", "reference"), setup)
    wanted, g_wanted = reference.pass_(x_TB.float(), g_TB.float())
    differing = int((s_TB != wanted).sum())
    return Parity(
        spikes=wanted.numel(),
        differing=differing,
        first=f"{differing} of {wanted.numel()} in the layer" if differing else "",
        lowest_rate=float(wanted.mean()),
        grad_error=float((gx_TB - g_wanted).norm() / g_wanted.norm()),
    )
