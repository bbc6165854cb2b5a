"""How other libraries make the parts of a layer: synapses with our weights, and the one neuron.

Shapes: T timesteps, B batch.  Libraries run in one of two orders: "multi" does all timesteps of a
layer before the next layer, as we do; "step" does all layers of a timestep before the next
timestep, so that BatchNorm sees one timestep at a time, which is another algorithm.  The neuron is

    v_pre = v / 2 + c,  s = 1 if v_pre >= 1 else 0,  v = v_pre (1 - s),  ds/dv_pre = 1 - |v_pre - 1|

(not below 0), with no gradient through the reset.
"""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snnbench.errors import WorkerError
from snnbench.kernels.pointwise import Pointwise
from snnbench.models.layer import Layer, has_weights, over_time
from snnbench.neurons import LIF, Triangle

NEURON = LIF(decay=0.5, v_th=1.0, reset="hard", detach_reset=True, surrogate=Triangle(width=1.0))
STATES = ("fp16", "fp32")  # of the membrane


def imported(module: str) -> Any:
    """A library's module; raises WorkerError where the library is missing or cannot be imported."""
    library = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library says of its own imports
            return importlib.import_module(module)
    except ImportError as error:
        missing = error.name == library
        why = "is not installed; pip install 'snnbench[peers]'" if missing else "cannot be imported"
        raise WorkerError(f"{library} {why}" + ("" if missing else f": {error}")) from error


class Library:
    """How a library makes the parts of a layer; without a neuron of its own it is plain torch.

    In "multi" a part maps x_TB to c_TB or s_TB, else x_B to c_B or s_B of one timestep.
    """

    module: str | None = None

    def __init__(self, mode: str, code: str | None = None) -> None:
        self.multi, self.code = mode == "multi", code
        # Parameters that hold a multiple of ours, and the factor.
        self.gains: dict[nn.Parameter, float] = {}
        self.load()

    def load(self) -> None:
        """Import what is needed; raises WorkerError."""

    def synapse(self, module: nn.Module, fires: bool) -> nn.Module:
        """The library's counterpart of our synapse, with its weights; `fires` before a neuron."""
        module = copy.deepcopy(module)
        return OverTime(module) if self.multi else module

    def neuron(self, layer: Layer) -> nn.Module:
        """The library's neuron for a layer of ours."""
        raise NotImplementedError

    def rest(self, net: nn.Module) -> None:
        """Bring all neurons to rest."""

    def path(self, device: torch.device, compiled: bool, half: bool) -> str:
        """Which of several codes it runs its neurons on, as it names it; "" if it has only one."""
        return ""


class OverTime(nn.Module):
    """A stateless module on all timesteps at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_TB: Tensor) -> Tensor:
        """[T, B, ...] to [T, B, ...]."""
        return over_time(self.module, x_TB)


class Unrolled(nn.Module):
    """A neuron that knows one timestep, on all of them in turn."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, c_TB: Tensor) -> Tensor:
        """Spikes s_TB."""
        # cat, not stack: it keeps the channels_last layout of the slices.
        s_TB: Tensor = torch.cat([self.cell(c_B) for c_B in c_TB]).unflatten(0, c_TB.shape[:2])
        return s_TB


class SpikingJelly(Library):
    """SpikingJelly: its own layers, LIFNode and reset_net.

    On a GPU version 2 chooses among its CUDA build, Triton and plain torch, unless `code` is
    "triton"; with "fp16" or "fp32", the membrane's type as set through its `precision` module, a
    neuron fed in half precision runs on Triton and not on plain torch.  Version 0 runs plain torch,
    or CuPy if `code` says so.
    """

    def load(self) -> None:
        """Import what is needed; raises WorkerError."""
        if self.code == "triton":  # read when it is imported
            os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = self.code
        name = "spikingjelly.activation_based"
        if self.code == "cupy" and not hasattr(np, "int"):
            # Version 0 asks NumPy for it when it makes CuPy code, and cannot be had without.
            np.int = int  # type: ignore[attr-defined]
        self.layer, self.nodes = imported(f"{name}.layer"), imported(f"{name}.neuron")
        self.surrogate = imported(f"{name}.surrogate")
        self.functional = imported(f"{name}.functional")
        self.step_mode = "m" if self.multi else "s"

    def synapse(self, module: nn.Module, fires: bool) -> nn.Module:
        """Its wrappers of torch's layers. Raises WorkerError where it has no counterpart."""
        if isinstance(module, nn.Sequential):
            return nn.Sequential(*(self.synapse(part, fires) for part in module))
        make = self._counterparts().get(type(module))
        if make is None:
            raise WorkerError(f"spikingjelly has no counterpart of {type(module).__name__}")
        theirs: nn.Module = make(module)
        theirs.load_state_dict(module.state_dict())
        return theirs

    def _counterparts(self) -> dict[type[nn.Module], Callable[[Any], Any]]:
        sj, mode = self.layer, self.step_mode

        def conv(m: nn.Conv2d) -> Any:
            return sj.Conv2d(
                m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding,
                m.dilation, m.groups, m.bias is not None, step_mode=mode,
            )  # fmt: skip

        return {
            nn.Identity: lambda m: nn.Identity(),
            nn.Conv2d: conv,
            Pointwise: conv,
            nn.BatchNorm2d: lambda m: sj.BatchNorm2d(
                m.num_features, m.eps, m.momentum, step_mode=mode
            ),
            nn.AvgPool2d: lambda m: sj.AvgPool2d(
                m.kernel_size, m.stride, m.padding, step_mode=mode
            ),
            nn.MaxPool2d: lambda m: sj.MaxPool2d(
                m.kernel_size, m.stride, m.padding, step_mode=mode
            ),
            nn.AdaptiveAvgPool2d: lambda m: sj.AdaptiveAvgPool2d(m.output_size, step_mode=mode),
            nn.Flatten: lambda m: sj.Flatten(m.start_dim, m.end_dim, step_mode=mode),
            nn.Linear: lambda m: sj.Linear(
                m.in_features, m.out_features, m.bias is not None, step_mode=mode
            ),
        }  # fmt: skip

    def neuron(self, layer: Layer) -> nn.Module:
        """LIFNode with tau = 1 / (1 - decay), the input not scaled.

        Raises WorkerError where it has no CuPy code.
        """
        triangle, options = self.surrogate.PiecewiseQuadratic, {}
        if self.code == "cupy":
            triangle = type("Triangle", (triangle,), {"cuda_codes": _triangle_codes})
            options = {"backend": "cupy"}
        try:
            node: nn.Module = self.nodes.LIFNode(
                tau=1 / (1 - NEURON.decay),
                decay_input=False,
                v_threshold=NEURON.v_th,
                v_reset=0.0,
                surrogate_function=triangle(alpha=1.0),
                detach_reset=True,
                step_mode=self.step_mode,
                **options,
            )
            if self.code in STATES:
                precision = imported("spikingjelly.activation_based.precision")
                config = {"mode": "fp32", "neuron_storage": self.code}
                node = precision.prepare_model_for_precision(node, "cuda", config).model
        except (TypeError, RuntimeError, ImportError) as error:
            raise WorkerError(f"spikingjelly: {self.code} cannot be had: {error}") from error
        return node

    def rest(self, net: nn.Module) -> None:
        """Bring all neurons to rest."""
        self.functional.reset_net(net)

    def path(self, device: torch.device, compiled: bool, half: bool) -> str:
        """What it chose, "cuda", "triton" or "torch"; "" on a CPU, and where it does not tell."""
        if self.code in STATES or self.code == "cupy":
            return "cupy" if self.code == "cupy" else "triton"
        if device.type != "cuda":
            return ""
        if half:  # the membrane is then in half precision too, and only plain torch takes that
            return "torch"
        try:
            choice = importlib.import_module("spikingjelly._ops.lif")._selection
            of = choice._get_compile_selection if compiled else choice._get_cuda_selection
            return str(of(device).name)
        except (ImportError, AttributeError):
            return ""


def _triangle_codes(_: nn.Module, y: str, x: str, dtype: str) -> str:
    """Our surrogate as CUDA code of version 0, which has none of its own for it."""
    below = {
        "float": f"fmaxf(0.0f, 1.0f - fabsf({x}))",
        "half2": f"__hmax2(__float2half2_rn(0.0f), __hsub2(__float2half2_rn(1.0f), __habs2({x})))",
    }
    return f"{y} = {below[dtype]};"


class _Fire(torch.autograd.Function):
    """Threshold at 0 with our surrogate, and no operation more than a library's own."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grads[0] * NEURON.surrogate.grad(u)


class SnnTorch(Library):
    """snnTorch: torch's layers and its Leaky neuron, which delays the reset by a timestep."""

    def load(self) -> None:
        """Import what is needed; raises WorkerError."""
        self.snntorch = imported("snntorch")

    def neuron(self, layer: Layer) -> nn.Module:
        """Leaky, reset to zero; given our surrogate, since its own triangle is another function."""
        cell: nn.Module = self.snntorch.Leaky(
            beta=NEURON.decay,
            threshold=NEURON.v_th,
            reset_mechanism="zero",
            spike_grad=_Fire.apply,
            init_hidden=True,
        )
        return Unrolled(cell) if self.multi else cell

    def rest(self, net: nn.Module) -> None:
        """Bring all neurons to rest."""
        for m in net.modules():
            if isinstance(m, self.snntorch.Leaky):
                m.reset_mem()


class Norse(Library):
    """Norse: torch's layers and its LIFBoxCell, a LIF neuron without synaptic current.

    Its membrane is v + (1 - decay)(c - v): the current has to be larger by 1 / (1 - decay), which
    is written into the weights before a neuron.  It fires above the threshold only, not at it.
    """

    gain = 1 / (1 - NEURON.decay)

    def load(self) -> None:
        """Import what is needed; raises WorkerError."""
        self.boxes = imported("norse.torch.module.lif_box")

    def synapse(self, module: nn.Module, fires: bool) -> nn.Module:
        """Torch's layers; the last one before a neuron is scaled."""
        module = copy.deepcopy(module)
        if fires:
            last = module[-1] if isinstance(module, nn.Sequential) else module
            parameters = dict.fromkeys(last.parameters(), self.gain)
            with torch.no_grad():
                for p in parameters:
                    p.mul_(self.gain)
            self.gains |= parameters
            if not parameters:
                module = nn.Sequential(module, Times(self.gain))
        return OverTime(module) if self.multi else module

    def neuron(self, layer: Layer) -> nn.Module:
        """LIFBoxCell, whose state is kept between calls."""
        cell = NorseNeuron(self.boxes)
        return Unrolled(cell) if self.multi else cell

    def rest(self, net: nn.Module) -> None:
        """Bring all neurons to rest."""
        for m in net.modules():
            if isinstance(m, NorseNeuron):
                m.state = None


class Times(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The input, multiplied."""
        return x * self.factor


def _detached_reset(s: Tensor, v_pre: Tensor, v_reset: Tensor, v_th: Tensor) -> Tensor:
    s = s.detach()
    return (1 - s) * v_pre + s * v_reset


class NorseNeuron(nn.Module):
    """A LIFBoxCell and its state."""

    def __init__(self, boxes: Any) -> None:
        super().__init__()
        parameters = boxes.LIFBoxParameters(
            tau_mem_inv=torch.tensor(1 - NEURON.decay),
            v_th=torch.tensor(NEURON.v_th),
            method="triangle",
            alpha=1.0,
            reset_method=_detached_reset,
        )
        self.cell = boxes.LIFBoxCell(parameters, dt=1.0)
        self.state: Any = None

    def forward(self, c_B: Tensor) -> Tensor:
        """Spikes s_B."""
        s_B: Tensor
        s_B, self.state = self.cell(c_B, self.state)
        return s_B


class Floor(Library):
    """No spiking neuron at all: what the network's other operations cost on T * B images.

    "ann" has ReLU for the neurons, "conv" neither neurons nor BatchNorm.
    """

    def __init__(self, kind: str, code: str | None = None) -> None:
        super().__init__("step")
        self.conv = kind == "conv"

    def synapse(self, module: nn.Module, fires: bool) -> nn.Module:
        """Torch's layers."""
        module = copy.deepcopy(module)
        if not self.conv or not isinstance(module, nn.Sequential):
            return module
        return nn.Sequential(*(m for m in module if not isinstance(m, nn.BatchNorm2d)))

    def neuron(self, layer: Layer) -> nn.Module:
        """ReLU, or nothing."""
        # In place, except where a shortcut alone leads to it: others read that tensor, too.
        return nn.Identity() if self.conv else nn.ReLU(inplace=has_weights(layer.synapses[0]))
