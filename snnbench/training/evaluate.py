"""Looking at a network while it trains and afterwards: accuracy, spikes, gradients.

Nothing here changes a weight, a running statistic or the random state.  T timesteps, B batch, K
classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from snnbench.data.base import Split
from snnbench.errors import DivergedError
from snnbench.measure.energy import modelled
from snnbench.measure.gradients import fidelity
from snnbench.measure.health import dead_layers, window_shares
from snnbench.measure.spikes import Meter
from snnbench.neurons import LIF
from snnbench.training import group
from snnbench.training.job import Job

WINDOW_SAMPLES = 64  # whose membranes are looked at
Answer = TypeVar("Answer")


@torch.no_grad()
def accuracy(
    job: Job, split: Split, T: int, forward: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Share of samples whose largest time-mean logit is that of their class."""
    job.net.eval()
    correct = torch.zeros((), dtype=torch.int64, device=job.device)
    finite = torch.ones((), dtype=torch.bool, device=job.device)
    size = job.spec.train.eval_batch_size
    for i, (x_B, y_B) in enumerate(zip(split.x.split(size), split.y.split(size), strict=True)):
        job.stop()
        if i % group.size() != group.rank():
            continue  # another process looks at it
        with job.engine.autocast():
            logits_TBK = (forward or job.net)(job.data.encode(x_B, T))
        correct += (logits_TBK.mean(0).argmax(1) == y_B).sum()
        finite &= logits_TBK.isfinite().all()
    correct, bad = group.total(correct), group.total((~finite).int())
    if bad:
        raise DivergedError("the logits are not finite at evaluation")
    return correct.item() / len(split)


def accuracy_and_spikes(job: Job, split: Split, T: int) -> tuple[float, float | None]:
    """Accuracy, and spikes per sample; None of a network that does not spike."""
    meter = Meter(job.net)
    found = accuracy(job, split, T, lambda x_TB: job.net(x_TB, meter))
    spikes = group.total(meter.spikes().to(job.device)).item() / len(split)
    spiking = any(isinstance(layer.physics, LIF) for layer in job.net.layers().values())
    return found, spikes if spiking else None


SPIKES = (
    "spikes_per_sample", "firing_rate", "silent_share", "saturated_share", "sops_per_sample",
    "macs_per_sample", "dense_macs_per_sample", "membrane_updates_per_sample",
    "energy_ac_mac_nj_per_sample", "energy_memory_nj_per_sample",
)  # fmt: skip


def attempted(
    measure: Callable[[], Answer], names: Iterable[str], nulls: dict[str, str]
) -> Answer | None:
    """What a pass beside training measured; if it fails, None, and why in `nulls`.

    What was trained stays.  Processes that train together must end together: there it is raised.
    """
    try:
        return measure()
    except DivergedError:
        raise
    except Exception as error:
        if group.size() > 1:
            raise
        why = str(error).partition("\n")[0]
        nulls.update(dict.fromkeys(names, f"its measurement failed: {type(error).__name__}: {why}"))
        return None


def accuracy_with_heads(job: Job, split: Split) -> float | None:
    """Accuracy of the logits with the method's auxiliary heads, for information; None without."""
    T = job.spec.T
    with torch.no_grad():
        job.net.eval()
        if job.method.predict(job.net, job.data.encode(split.x[:1], T)) is None:
            return None

    def with_heads(x_TB: Tensor) -> Tensor:
        logits_TBK = job.method.predict(job.net, x_TB)
        assert logits_TBK is not None
        return logits_TBK

    return accuracy(job, split, T, with_heads)


def compare_gradients(job: Job, split: Split, T: int, progress: float) -> dict[str, Any]:
    """The method's gradient beside that of BPTT, on one fixed batch."""
    began = time.perf_counter()
    recipe = job.spec.train  # what one step holds at a time fits into the memory
    size = min(recipe.batch_size // (recipe.batch_split * recipe.devices), len(split))
    x_TB = job.data.encode(split.x[:size], T)
    job.net.train()
    with job.engine.autocast():
        seen = fidelity(job.method, job.net, x_TB, split.y[:size], progress)
    return seen | {"T": T, "measure_s": time.perf_counter() - began}


@torch.no_grad()
def count_spikes(job: Job, split: Split) -> dict[str, Any]:
    """Spikes, operations and modelled energy per sample of the split, in a pass of their own."""
    job.net.eval()
    meter = Meter(job.net)
    for x_B in split.x.split(job.spec.train.eval_batch_size):
        job.stop()
        with job.engine.autocast():
            job.net(job.data.encode(x_B, job.spec.T), meter)
    totals = meter.totals()
    with job.engine.autocast():
        shares = window_shares(job.net, job.data.encode(split.x[:WINDOW_SAMPLES], job.spec.T))
    for entry in totals["layers"]:
        entry["window_share"] = shares.get(entry["layer"])
    nulls = {}
    if totals["firing_rate"] is None:
        why = "no spiking neuron in the network"
        spiking = ("spikes_per_sample", "firing_rate", "silent_share", "saturated_share")
        nulls = dict.fromkeys(spiking, why)
    dead = dead_layers(totals["layers"])
    return totals | modelled(totals) | {"dead_layers": dead, "nulls": nulls}
