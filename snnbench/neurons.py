"""Leaky integrate-and-fire dynamics and surrogate gradients: the reference, in plain torch.

Shapes: T timesteps, B batch, ... neuron axes.  c input current, v membrane potential (v_pre before
reset), s spikes in {0, 1}.  One step, from v = 0:

    charge  v_pre = decay * v + c                      (or decay * (v + c): `decay_input`)
    fire    s     = 1 if v_pre >= v_th else 0          (derivative: the surrogate)
    reset   v     = v_pre - v_th * s                   ("soft")
            v     = v_pre * (1 - s)                    ("hard")

By default the input current is not scaled by the decay.  decay = 1 is an integrate-and-fire (IF)
neuron; a decay that is learned for each layer is a parametric LIF (PLIF) neuron.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

Positive: TypeAlias = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Triangle:
    """h(u) = max(0, width - |u|) / width^2: area 1, support 2 * width (TET, section 3.1)."""

    name: Literal["triangle"] = "triangle"
    width: Positive = 1.0

    def grad(self, u: Tensor) -> Tensor:
        """Derivative used for the threshold function at u = v_pre - v_th."""
        return (self.width - u.abs()).clamp_min(0) / self.width**2


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """h(u) = 1 / width where |u| < width / 2, else 0: area 1 (STBP, eq. 24)."""

    name: Literal["rectangle"] = "rectangle"
    width: Positive = 1.0

    def grad(self, u: Tensor) -> Tensor:
        """Derivative used for the threshold function at u = v_pre - v_th."""
        return (u.abs() < self.width / 2).to(u.dtype) / self.width


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """h(u) = slope * q * (1 - q), q = sigmoid(slope * u): area 1, peak slope / 4."""

    name: Literal["sigmoid"] = "sigmoid"
    slope: Positive = 4.0

    def grad(self, u: Tensor) -> Tensor:
        """Derivative used for the threshold function at u = v_pre - v_th."""
        q = torch.sigmoid(self.slope * u)
        return self.slope * q * (1 - q)


@dataclass(frozen=True, kw_only=True)
class ATan:
    """h(u) = slope / 2 / (1 + (pi/2 * slope * u)^2): area 1, peak slope / 2 (PLIF, section 4)."""

    name: Literal["atan"] = "atan"
    slope: Positive = 2.0

    def grad(self, u: Tensor) -> Tensor:
        """Derivative used for the threshold function at u = v_pre - v_th."""
        return self.slope / 2 / (1 + (pi / 2 * self.slope * u).square())


@dataclass(frozen=True, kw_only=True)
class Tanh:
    """h(u) = height * (1 - tanh(u)^2): area 2 * height (shortcut paper, section 3)."""

    name: Literal["tanh"] = "tanh"
    height: Positive = 0.5

    def grad(self, u: Tensor) -> Tensor:
        """Derivative used for the threshold function at u = v_pre - v_th."""
        return self.height * (1 - torch.tanh(u).square())


Surrogate: TypeAlias = Triangle | Rectangle | Sigmoid | ATan | Tanh
SURROGATES: dict[str, type[Surrogate]] = {
    cls().name: cls for cls in (Triangle, Rectangle, Sigmoid, ATan, Tanh)
}


class _Fire(torch.autograd.Function):
    """Heaviside step forward, surrogate derivative backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        fired = (u > 0) if strict else (u >= 0)
        # 0 * u keeps a membrane visible that is not finite: it never passes as a silent neuron.
        return torch.add(fired.to(u.dtype), u, alpha=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.grad(u), None, None


@dataclass(frozen=True)
class LIF:
    """A leaky integrate-and-fire population; every option that papers differ in is a field.

    `detach_reset` cuts the gradient through the reset; `strict` fires above the threshold only,
    not at it (matters for exact ties).  `decay_input` applies the decay after the charge.
    `reset_by` is what a soft reset subtracts (default: v_th).  With `learn_decay` each layer
    learns its own, as sigmoid(w), from this start.
    """

    decay: Annotated[float, Ge(0), Le(1)] = 0.5
    v_th: Positive = 1.0
    reset: Literal["soft", "hard"] = "soft"
    detach_reset: bool = False
    strict: bool = False
    decay_input: bool = False
    reset_by: Positive | None = None
    learn_decay: bool = False
    surrogate: Surrogate = field(default_factory=Triangle)

    def __post_init__(self) -> None:
        if self.learn_decay and self.decay in (0.0, 1.0):
            raise ValueError("learn_decay: start from a decay between 0 and 1, both excluded")

    @property
    def drop(self) -> float:
        """What a soft reset subtracts."""
        return self.v_th if self.reset_by is None else self.reset_by

    @property
    def gain(self) -> float:
        """Derivative of v_pre with respect to the current of the same step."""
        return self.decay if self.decay_input else 1.0

    def fire(self, v_pre: Tensor) -> Tensor:
        """Spikes of v_pre, differentiable through the surrogate."""
        s: Tensor = _Fire.apply(v_pre - self.v_th, self.surrogate, self.strict)
        return s

    def fire_grad(self, v_pre: Tensor) -> Tensor:
        """Surrogate derivative ds / dv_pre."""
        return self.surrogate.grad(v_pre - self.v_th)

    def after_reset(self, v_pre: Tensor, s: Tensor) -> Tensor:
        """Membrane potential after the reset."""
        s = s.detach() if self.detach_reset else s
        return v_pre - self.drop * s if self.reset == "soft" else v_pre * (1 - s)

    def carry(self, v_pre: Tensor, s: Tensor) -> Tensor:
        """Total derivative of the next v_pre with respect to this one (kappa of BPTT)."""
        keep = torch.ones_like(v_pre) if self.reset == "soft" else 1 - s
        if not self.detach_reset:
            drop = self.drop if self.reset == "soft" else v_pre
            keep = keep - drop * self.fire_grad(v_pre)
        return self.decay * keep

    def step(self, c: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One timestep from membrane v (None: at rest): spikes, v before reset, v after reset."""
        c = wide(c) * self.gain if self.decay_input else wide(c)
        v_pre = c if v is None else self.decay * v + c
        s = self.fire(v_pre)
        return s, v_pre, self.after_reset(v_pre, s)

    def scan(self, c_TB: Tensor) -> Tensor:
        """Spikes s_TB of a population at rest that is fed the current c_TB."""
        v: Tensor | None = None
        s_T = []
        for c in c_TB:
            s, _, v = self.step(c, v)
            s_T.append(s)
        # cat, not stack: it keeps the channels_last layout of the slices.
        s_TB: Tensor = torch.cat(s_T).to(c_TB.dtype).unflatten(0, c_TB.shape[:2])
        return s_TB


def wide(c: Tensor) -> Tensor:
    """The current in at least fp32: membranes are never held in half precision."""
    return c.float() if c.dtype in (torch.float16, torch.bfloat16) else c


@dataclass(frozen=True)
class ReLU:
    """The neuron of an artificial twin: no state, no threshold, one timestep."""

    def scan(self, c_TB: Tensor) -> Tensor:
        """Activations max(0, c)."""
        return torch.relu(c_TB)


# The neurons of the papers (methods.md, section 1.2), and two common ones.
PRESETS: dict[str, dict[str, Any]] = {
    "tet": {"decay": 0.5, "reset": "hard", "strict": True, "surrogate": {"name": "triangle"}},
    "shortcut": {"decay": 0.5, "reset": "hard", "strict": True, "surrogate": {"name": "rectangle"}},
    "rate": {
        "decay": 0.2,
        "reset": "soft",
        "detach_reset": True,
        "surrogate": {"name": "sigmoid", "slope": 4.0},
    },
    "grad_scale": {
        "decay": 0.9,
        "decay_input": True,
        "v_th": 0.5,
        "reset": "soft",
        "reset_by": 1.0,
        "surrogate": {"name": "rectangle", "width": 1.0},
    },
    "if": {"decay": 1.0},
    "plif": {"decay": 0.5, "learn_decay": True, "surrogate": {"name": "atan"}},
}


def neuron_options(table: dict[str, Any] | str) -> dict[str, Any]:
    """Options of a neuron given as a table, as a preset's name, or as a preset with changes.

    A surrogate may be given by its name alone. Raises KeyError for an unknown preset.
    """
    table = {"preset": table} if isinstance(table, str) else dict(table)
    preset = table.pop("preset", None)
    options = ({} if preset is None else PRESETS[preset]) | table
    if isinstance(options.get("surrogate"), str):
        options["surrogate"] = {"name": options["surrogate"]}
    return options
