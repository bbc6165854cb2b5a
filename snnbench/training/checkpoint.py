"""Where training stands, as data that can be written down and taken up again, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnbench.registry import source_hash
from snnbench.spec import digest
from snnbench.training.engine import Engine


def pack(
    state: dict[str, Any], engine: Engine, trainable: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state with weights, optimizer, loss scale and generators, sealed."""
    rng = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.device)
    return seal(
        state
        | {
            "loss_scale": engine.loss_scale,
            "rng": rng,
            "trainable": trainable.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
    )


def unpack(
    checkpoints: Sequence[Path],
    engine: Engine,
    trainable: nn.Module,
    optimizer: torch.optim.Optimizer,
    emit: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Take up the first checkpoint that can be used, data and never code; its state.

    None if there is none: damaged, of another network, or written by other code. What was wrong
    with each is said as an event.
    """
    before = copy.deepcopy((trainable.state_dict(), optimizer.state_dict()))
    for path in checkpoints:
        try:
            saved = torch.load(path, map_location=engine.device, weights_only=True)
            if saved.pop("seal") != seal(saved)["seal"]:
                raise ValueError("not what was written, or written by another version of the code")
            trainable.load_state_dict(saved.pop("trainable"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            engine.set_loss_scale(saved.pop("loss_scale"))
            emit({"event": "resume", "epoch": saved["epoch"], "step": saved["step"]})
            return dict(saved)
        except Exception as error:
            trainable.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            reason = f"unusable checkpoint: {type(error).__name__}: {error}"
            emit({"event": "restart", "reason": " ".join(reason.split())[:300]})
    return None


def restore_generators(rng: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's generators where they were."""
    torch.set_rng_state(rng["cpu"].cpu())
    if "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"].cpu(), device)


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a digest of its content and of the code that computed it."""
    return {**state, "seal": digest(source_hash(), *_content(state))}


def _content(value: Any) -> Iterator[str | bytes]:
    """Everything in a nested state, in a fixed order."""
    if isinstance(value, Tensor):
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _content(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _content(item)
    else:
        yield repr(value)
