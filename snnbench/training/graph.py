"""Forward and backward of a training step as one CUDA graph: recorded once, replayed every step.

A small network spends its step on starting kernels, one by one, from Python; a graph starts all of
them at once.  What is recorded is done again exactly, so shapes must stay, and so must everything
that the host decides.  A method that draws numbers on the host, or looks at a value on the device,
cannot be recorded; what it counts in Python from step to step stands still, and nobody notices.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from snnbench.spec import digest

Found: TypeAlias = list[Any]  # the loss, and the gradient of each parameter or None


class StepGraph:
    """`backward(*inputs)`, which fills gradients and gives a loss, as a recording.

    Called with other inputs of the same shapes, or numbers, it does the same without Python.  To
    record it changes neither weights nor buffers nor torch's generators.  Raises RuntimeError where
    that cannot be done.
    """

    def __init__(
        self,
        backward: Callable[..., Tensor],
        trainable: nn.Module,
        inputs: Sequence[Tensor | float],
        device: torch.device,
    ) -> None:
        self._slots = [Slot(x, device) for x in inputs]
        fed = [slot.view for slot in self._slots]
        with unchanged(trainable, device):
            found, self._replay = record(lambda: _fresh(backward, trainable, fed))
        self._loss, *self._grads = found
        self._parameters = list(trainable.parameters())

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        """The loss; gradients are those of these inputs until the next call."""
        for slot, x in zip(self._slots, inputs, strict=True):
            slot.fill(x)
        self._replay()
        for p, grad in zip(self._parameters, self._grads, strict=True):
            p.grad = grad
        loss: Tensor = self._loss.clone()
        return loss


class Slot:
    """The place where a recording finds an input; all timesteps of a static one share it."""

    def __init__(self, x: Tensor | float, device: torch.device) -> None:
        if not isinstance(x, Tensor):
            x = torch.tensor(x, device=device)
        self._static = x.dim() > 0 and x.stride(0) == 0
        self._held = self._once(x).clone()
        self.view = self._held.expand_as(x)

    def fill(self, x: Tensor | float) -> None:
        """Put another input there, without waiting for the device."""
        if not isinstance(x, Tensor):
            self._held.fill_(x)
        elif x.shape != self.view.shape or (self._static and x.stride(0) != 0):
            raise ValueError(f"recorded for {list(self.view.shape)}, called with {list(x.shape)}")
        else:
            self._held.copy_(self._once(x), non_blocking=True)

    def _once(self, x: Tensor) -> Tensor:
        return x[:1] if self._static else x


def record(run: Callable[[], Found]) -> tuple[Found, Callable[[], Any]]:
    """What `run` finds, and a way to have it computed again, into the same memory.

    Raises RuntimeError where the host takes part in it. It is run twice on one stream, the first
    time so that whatever is made once, a workspace or a compiled kernel, is there.
    """
    draws = host_generators()
    graph, stream, found = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    refuse_host_numbers(draws)
    failure: RuntimeError | None = None
    try:
        # What fails inside makes the end of the capture fail as well, which must not hide it, and
        # would leave the capture's stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            try:
                found = run()
            except RuntimeError as error:
                failure = error
    except RuntimeError as error:
        failure = failure or error
    if failure is not None:
        raise failure
    return found, graph.replay


def host_generators() -> tuple[str, ...]:
    """Where the generators of torch, Python and NumPy are."""
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state(legacy=False)
    with np.printoptions(threshold=sys.maxsize):
        return tuple(digest(repr(state)) for state in states)


def refuse_host_numbers(before: tuple[str, ...]) -> None:
    """Raise RuntimeError if a generator is not where it was: a replay would not draw."""
    if host_generators() != before:
        raise RuntimeError("this method draws random numbers on the host at every step")


@contextmanager
def unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and generators back afterwards, and take the gradients away."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)
            module.zero_grad(set_to_none=True)


def _fresh(backward: Callable[..., Tensor], module: nn.Module, inputs: Sequence[Tensor]) -> Found:
    """Loss and gradients; there are none to add to, so that these are in memory of their own."""
    module.zero_grad(set_to_none=True)
    found = [backward(*inputs), *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)  # what is not recorded can be freed before the next run
    return found
