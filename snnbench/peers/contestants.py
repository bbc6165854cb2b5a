"""One network, built in one of several libraries from the same weights, stepped, and compared.

Shapes: T timesteps, B batch, K classes.  Every contestant is made from our own `Network`: its
`forward` runs unchanged, and hands each layer to a `run` that calls the library's own modules for
it.  The input is the same image at every timestep; the loss is the cross-entropy of the time-mean
logits; the optimizer is SGD with momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnbench import registry
from snnbench.errors import WorkerError
from snnbench.kernels.choice import choose
from snnbench.kernels.saved import Level
from snnbench.measure.memory import saved_bytes
from snnbench.methods.base import Method
from snnbench.models.layer import Layer, Network
from snnbench.peers.libraries import NEURON, Floor, Library, Norse, SnnTorch, SpikingJelly
from snnbench.spec import sub_seed
from snnbench.training.engine import HALF, Engine, set_matmul_precision
from snnbench.training.graph import StepGraph
from snnbench.training.oom import is_out_of_memory

OURS = ("ours", "published")
LIBRARIES = {"spikingjelly": SpikingJelly, "snntorch": SnnTorch, "norse": Norse, "floor": Floor}
CLASSES = 10
PARITY_IMAGES = 16
LR, MOMENTUM = 1e-3, 0.9  # small: every contestant stays near the same firing rates
RECOMPILE_LIMIT = 128  # torch.compile may compile one function anew for each layer


@dataclass(frozen=True)
class Entry:
    """Who takes part: a library, how it runs, and with which settings."""

    family: str  # spikingjelly, snntorch, norse, ours, published, floor
    kind: str  # multi or step; a kernel of ours; ann, ann-B or conv
    method: str = "bptt"
    channels_last: bool = False
    compiled: bool = False
    precision: str = "fp32"
    memory: Level = "speed"
    graph: bool = False
    code: str | None = None  # that a library is told to run; None: what it chooses

    def library(self) -> Library:
        """The adapter of the library; raises WorkerError where it is missing."""
        return LIBRARIES[self.family](self.kind, self.code)


@dataclass(frozen=True)
class Setup:
    """What all contestants share; `shape` is that of an image, `model` a name in the registry."""

    model: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    T: int
    B: int
    device: str = "cpu"


def network(setup: Setup) -> Network:
    """Our network with its initial weights, the same for all contestants."""
    Model = registry.find("models", setup.model).load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sub_seed(0, "init"))
        net: Network = Model(Model.Config(**setup.options), setup.shape, CLASSES, NEURON)
    return net


def batches(setup: Setup, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of `size` images and labels: real-valued, since zeros would run faster."""
    generator = torch.Generator().manual_seed(sub_seed(0, "batches"))
    return [
        (
            torch.randn(size, *setup.shape, generator=generator).to(setup.device),
            torch.randint(0, CLASSES, (size,), generator=generator).to(setup.device),
        )
        for _ in range(count)
    ]


def neurons(setup: Setup) -> int:
    """Number of neurons of the network."""
    count = 0

    def run(layer: Layer, *x_TB: Tensor) -> Tensor:
        nonlocal count
        s_TB: Tensor = layer(*x_TB)
        count += 0 if layer.physics is None else s_TB.numel()
        return s_TB

    with torch.no_grad():
        network(setup).eval()(torch.zeros(1, 1, *setup.shape), run)
    return count


class Contestant:
    """A network that can be stepped; `seen` collects the spikes of every layer where it is set."""

    def __init__(self, entry: Entry, setup: Setup, net: Network) -> None:
        self.entry, self.net, self.device = entry, net, torch.device(setup.device)
        self.T = 1 if entry.kind == "ann-B" else setup.T
        self.seen: list[tuple[str, Tensor]] | None = None
        self._names = {layer: name for name, layer in net.layers().items()}
        self.engine = engine(entry, self.device)
        self.recorded: StepGraph | None = None
        self._build()
        net.to(self.device).train(net.training)  # new modules are in training mode
        net.to(memory_format=self._format)
        if entry.compiled:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            net.compile(dynamic=False)
        # Without BatchNorm the steps would lead out of the range of numbers.
        lr = 0.0 if entry.kind == "conv" else LR
        self.optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=MOMENTUM, fused=True)

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.entry.channels_last else torch.contiguous_format

    def _build(self) -> None:
        """Give every layer what it runs on."""
        raise NotImplementedError

    def gradients(self, x_B: Tensor, y_B: Tensor) -> Tensor:
        """Fill `.grad` of every parameter; the loss comes back, detached."""
        raise NotImplementedError

    def gains(self) -> Iterable[float]:
        """By how much each parameter is larger than ours."""
        return (1.0 for _ in self.net.parameters())

    def step(self, x_B: Tensor, y_B: Tensor) -> Tensor:
        """One training step on a batch that is laid out; the loss comes back, detached."""
        if self.entry.graph and self.recorded is None:
            self.recorded = self.recorder(x_B, y_B)
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.recorded or self.gradients)(x_B, y_B)
        self.engine.update(self.net.parameters(), self.optimizer, None)
        return loss

    def recorder(self, x_B: Tensor, y_B: Tensor) -> StepGraph:
        """`gradients` recorded on such a batch; raises WorkerError where that cannot be done."""
        try:
            return StepGraph(self.gradients, self.net, (self.laid_out(x_B), y_B), self.device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:200]
            raise WorkerError(f"cannot be recorded: {why}") from error

    def saved_bytes(self, x_B: Tensor, y_B: Tensor) -> int:
        """Bytes that autograd keeps for the backward pass of one step."""
        return saved_bytes(lambda: self.gradients(x_B, y_B), self._known(x_B))

    def _known(self, x_B: Tensor) -> list[Tensor]:
        return [*self.net.parameters(), *self.net.buffers(), x_B]

    def laid_out(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in the contestant's memory layout."""
        return x.contiguous(memory_format=self._format)

    def look(self, layer: Layer, s: Tensor) -> None:
        """Collect the spikes of a layer."""
        if self.seen is not None and layer.physics is not None:
            # In another dtype: a compiler may write over the memory of a plain copy.
            self.seen.append((self._names[layer], s.detach().double()))

    def _repeated(self, x_B: Tensor) -> Tensor:
        """The images once for each timestep, [T * B, C, H, W], laid out."""
        return self.laid_out(x_B.expand(self.T, *x_B.shape).flatten(0, 1))


class Peer(Contestant):
    """Our network in a library's modules, which take the place of each layer's synapses."""

    def _build(self) -> None:
        self.library = self.entry.library()
        for layer in self._names:
            layer.peer = Population(layer, self.library)
            layer.synapses = nn.ModuleList()

    def path(self) -> str:
        """Which code ran the neurons, where that is known."""
        return self.library.path(self.device, self.entry.compiled, self.entry.precision in HALF)

    def gains(self) -> Iterable[float]:
        """By how much each parameter is larger than ours."""
        return (self.library.gains.get(p, 1.0) for p in self.net.parameters())

    def gradients(self, x_B: Tensor, y_B: Tensor) -> Tensor:
        """Fill `.grad` of every parameter; the loss comes back, detached."""
        self.library.rest(self.net)
        with self.engine.autocast():
            loss = F.cross_entropy(self._logits(x_B).mean(0), y_B)
        scaler = self.engine.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    def _logits(self, x_B: Tensor) -> Tensor:
        """Logits of every timestep, [T, B, K]."""
        logits_TBK: Tensor
        if self.entry.family == "floor":
            logits_TBK = self.net(self._repeated(x_B), self._run).unflatten(0, (self.T, len(x_B)))
        elif self.library.multi:
            x_TB = self._repeated(x_B).unflatten(0, (self.T, len(x_B)))
            logits_TBK = self.net(x_TB, self._run)
        else:
            logits_TBK = torch.stack([self.net(x_B, self._run) for _ in range(self.T)])
        return logits_TBK

    def _run(self, layer: Layer, *x: Tensor) -> Tensor:
        peer: Any = layer.peer
        s: Tensor = peer(*x)
        self.look(layer, s)
        return s


class Ours(Contestant):
    """Our network on one of our kernels, trained by one of our methods."""

    def _build(self) -> None:
        self.engine.take(self.net)
        method = registry.find("methods", self.entry.method).load()
        watched = {"observe": lambda _, layer, s_TB: self.look(layer, s_TB)}
        self.method: Method = type(method.__name__, (method,), watched)()

    def path(self) -> str:
        """Which kernel took the layer steps."""
        taken: str = self.engine.describe()["kernel_path"]
        return taken

    def gradients(self, x_B: Tensor, y_B: Tensor) -> Tensor:
        """Fill `.grad` of every parameter; the loss comes back, detached."""
        return self.engine.backward(self.method, self.net, self._encoded(x_B), y_B, 0.0)

    def saved_bytes(self, x_B: Tensor, y_B: Tensor) -> int:
        """Bytes kept for the backward pass of one step, as this level of memory keeps them."""

        def backward() -> Tensor:
            return self.method.backward(self.net, self._encoded(x_B), y_B, 0.0)

        with self.engine.autocast():
            return saved_bytes(backward, self._known(x_B), *self.engine.keeping)

    def _encoded(self, x_B: Tensor) -> Tensor:
        """The input x_TB; published code is not told that all its timesteps are the same."""
        if self.entry.family != "published":
            return x_B.expand(self.T, *x_B.shape)
        x_TB: Tensor = self._repeated(x_B).unflatten(0, (self.T, len(x_B)))
        return x_TB


class Population(nn.Module):
    """A layer in a library's own modules: synapses, their sum, neurons."""

    def __init__(self, layer: Layer, library: Library) -> None:
        super().__init__()
        fires = layer.physics is not None
        self.synapses = nn.ModuleList(library.synapse(f, fires) for f in layer.synapses)
        self.neuron = library.neuron(layer) if fires else None

    def train(self, mode: bool = True) -> Population:
        """Of the neurons nothing is trained: in evaluation some have no gradient at all."""
        super().train(mode)
        if self.neuron is not None:
            self.neuron.train()
        return self

    def forward(self, *x: Tensor) -> Tensor:
        """Spikes, or the current where there is no neuron."""
        first, *rest = (f(x_) for f, x_ in zip(self.synapses, x, strict=True))
        c: Tensor = sum(rest, start=first)
        return c if self.neuron is None else self.neuron(c)


def engine(entry: Entry, device: torch.device) -> Engine:
    """Kernel, precision and memory; peers share the precision.

    Raises UsageError where there is no such kernel, WorkerError where one cannot be had here.
    """
    if entry.graph and device.type != "cuda":
        raise WorkerError("a CUDA graph needs a CUDA device")
    kernel = entry.kind if entry.family in OURS else "reference"
    names = registry.components("kernels") if kernel == "auto" else [kernel]
    try:
        choice = choose(kernel, {n: registry.find("kernels", n).load() for n in names}, device)
    except RuntimeError as error:
        raise WorkerError(str(error)) from error
    if why := set_matmul_precision(entry.precision, device):
        raise WorkerError(why)
    return Engine(device, choice, entry.precision, entry.memory)


def load(entry: Entry) -> None:
    """Import what the contestant needs; raises WorkerError where that is not possible."""
    if entry.family in OURS:
        for component in registry.components("kernels").values():
            component.load()
    else:
        entry.library()


def build(entry: Entry, setup: Setup, net: Network | None = None) -> Contestant:
    """The contestant, with a network's weights (it is used up) or the initial ones.

    Raises WorkerError where the library is missing or cannot build the network, UsageError where
    there is no such kernel or method.
    """
    if entry.kind == "copy":
        raise WorkerError("a copy stands beside one layer, not beside a network")
    contestant = Ours if entry.family in OURS else Peer
    return contestant(entry, setup, network(setup) if net is None else net)


# --------------------------------------------------------------------- parity


@dataclass(frozen=True)
class Parity:
    """How a contestant's spikes and gradients compare with those of our reference kernel.

    Counts are over all layers, timesteps and images; `first` is the first layer whose spikes
    differ, and in how many: its input is still the same, what follows is a cascade.
    `lowest_rate` is the smallest firing rate of a layer, `grad_error` |g - g_ref| / |g_ref|.
    """

    spikes: int
    differing: int
    first: str
    lowest_rate: float
    grad_error: float


def parity(entry: Entry, setup: Setup) -> Parity | None:
    """Compare the contestant with our reference under frozen BatchNorm; None for a floor.

    With statistics of the batch, one membrane that ties with the threshold would change the
    normalisation of all others; frozen, a tie stays one spike in the layer where it happens.
    """
    if entry.family == "floor":
        return None
    ((x_B, y_B),) = batches(setup, 1, PARITY_IMAGES)
    net = frozen(network(setup), x_B.cpu().expand(setup.T, *x_B.shape))
    reference = Entry("ours", "reference", entry.method, channels_last=entry.channels_last)
    expected, g_ref = _observed(build(reference, setup, copy.deepcopy(net)), x_B, y_B)
    found, g = _observed(build(entry, setup, net), x_B, y_B)
    differing = {name: int((found[name] != s_TB).sum()) for name, s_TB in expected.items()}
    first = next((name for name, n in differing.items() if n), None)
    return Parity(
        spikes=sum(s_TB.numel() for s_TB in expected.values()),
        differing=sum(differing.values()),
        first=""
        if first is None
        else f"{differing[first]} of {expected[first].numel()} in {first}",
        lowest_rate=min(float(s_TB.mean()) for s_TB in expected.values()),
        grad_error=float((g - g_ref).norm() / g_ref.norm()),
    )


@torch.no_grad()
def frozen(net: Network, x_TB: Tensor) -> Network:
    """The network in evaluation mode, with statistics near those of the input: all layers fire."""
    generator = torch.Generator().manual_seed(sub_seed(0, "statistics"))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net.train()
    net(x_TB)
    for norm in norms:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        mean += 0.1 * var.sqrt() * torch.randn(mean.shape, generator=generator)
        var *= 0.8 + 0.4 * torch.rand(var.shape, generator=generator)
    return net.eval()


def _observed(contestant: Contestant, x_B: Tensor, y_B: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Spikes of every layer, [T, B, ...], and all gradients in one vector, in our units."""
    seen: list[tuple[str, Tensor]] = []
    contestant.seen = seen
    contestant.gradients(contestant.laid_out(x_B), y_B)
    contestant.seen = None
    if contestant.entry.graph:  # the gradients of a replay, on other images than were recorded
        replay = contestant.recorder(torch.zeros_like(x_B), y_B)
        replay(contestant.laid_out(x_B), y_B)
    scale = contestant.engine.loss_scale or 1.0
    s: dict[str, list[Tensor]] = {}
    for name, spikes in seen:
        s.setdefault(name, []).append(spikes)
    whole = {name: torch.stack(parts) if len(parts) > 1 else parts[0] for name, parts in s.items()}
    gradients = []
    for p, gain in zip(contestant.net.parameters(), contestant.gains(), strict=True):
        assert p.grad is not None
        gradients.append(gain / scale * p.grad.float().flatten())
    return whole, torch.cat(gradients)
