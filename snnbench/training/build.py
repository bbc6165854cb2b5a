"""A spec as objects: components from the registry, data, network, engine -> `Job`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snnbench import registry
from snnbench.errors import RunSkipped, WorkerError
from snnbench.kernels.choice import choose
from snnbench.neurons import LIF
from snnbench.spec import RunSpec, sub_seed, validate
from snnbench.training import group
from snnbench.training.engine import Engine, resolve_precision, set_matmul_precision
from snnbench.training.job import Job


@dataclass(frozen=True)
class Context:
    """What belongs to this machine and not to the run: it is no part of the spec."""

    data_root: str
    allow_unverified_data: bool = False
    device: str = "auto"


def build(spec: RunSpec, context: Context, engine: Engine) -> Job:
    """Everything that the spec names; raises RunSkipped where it makes no sense."""
    dataset = component("datasets", spec.dataset, spec.data)
    data = dataset.load(Path(context.data_root), context.allow_unverified_data)
    method = component("methods", spec.method, spec.method_config)
    torch.manual_seed(sub_seed(spec.seed, "init"))
    Model = registry.find("models", spec.model).load()
    options = config(Model.Config, spec.model_options)
    net = Model(options, data.shape, data.classes, method.neuron or config(LIF, spec.neuron))
    if why := method.supports(net, spec.T):
        raise RunSkipped(why)
    return Job(spec, net, method, data, engine)


def make_engine(spec: RunSpec, device: torch.device) -> Engine:
    """Kernel, precision and memory as the run asks for them; RunSkipped where one cannot be."""
    backends = {
        name: found.load() for name, found in registry.components("kernels").items()
        if spec.kernel in (name, "auto")
    }  # fmt: skip
    precision = resolve_precision(spec.precision, device)
    if spec.train.graph and device.type != "cuda":
        raise RunSkipped("train.graph = true needs a CUDA device")
    try:
        choice = choose(spec.kernel, backends, device)
    except RuntimeError as error:
        raise WorkerError(str(error)) from error
    if why := set_matmul_precision(precision, device):
        raise RunSkipped(why)
    # The fastest of cuDNN's algorithms is looked for in the warm-up; it decides the last bits.
    torch.backends.cudnn.benchmark = True
    if spec.train.deterministic:
        make_deterministic()
    return Engine(device, choice, precision, spec.memory)


def make_deterministic() -> None:
    """Let torch take only kernels that give the same bits every time, or fail."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def device_of(name: str) -> torch.device:
    """The device of that name; RunSkipped where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RunSkipped("no CUDA device is available here")
    return torch.device("cuda:0" if name == "cuda" else name)


def current(device: torch.device) -> torch.device:
    """The device, made torch's current one: CUDA's events and caps are those of the current one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def meet(spec: RunSpec, context: Context, rank: int, address: str) -> torch.device:
    """The device of one of the processes that train a run together, which it joins."""
    device, size = device_of(context.device), spec.train.devices
    if size == 1:
        return current(device)
    if device.type == "cuda":
        if torch.cuda.device_count() < size:
            raise RunSkipped(f"train.devices = {size}: there are {torch.cuda.device_count()} GPUs")
        device = current(torch.device("cuda", rank))
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    group.join(rank, size, address, device)
    return device


def component(kind: str, name: str, values: dict[str, Any]) -> Any:
    """A dataset or method with its options."""
    cls = registry.find(kind, name).load()
    return cls(config(cls.Config, values))


def config(cls: Any, values: dict[str, Any]) -> Any:
    """Options as the component's own dataclass; raises ValueError where they do not fit."""
    errors: list[str] = []
    found = validate(cls, values, errors)
    if found is None:
        raise ValueError("; ".join(errors))
    return found
