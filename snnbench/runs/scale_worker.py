"""A worker that does everything but train: for measuring what a run costs beyond training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snnbench import worker
from snnbench.spec import RunSpec
from snnbench.store import RunFolder
from snnbench.worker import check_data as check_data


def main(folder: str, context: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Do one run with nothing in it; ends the process."""
    worker.main(folder, context, send, _nothing)


def nothing(request: dict[str, Any]) -> dict[str, Any]:
    """An answer to no question: what remains is the process."""
    return {"errors": []}


def _nothing(run: RunFolder, spec: RunSpec, *_: Any) -> dict[str, Any]:
    """Figures that look like those of a short run, and differ between runs."""
    accuracy = 0.5 + (spec.seed % 100) / 250 + 0.01 * len(spec.method)
    epoch = {
        "event": "epoch", "epoch": 1, "epochs": 1, "T": spec.T, "train_loss": 1.0, "lr": 0.1,
        "train_s": 0.0, "val_acc": accuracy, "test_acc": accuracy, "eval_s": 0.0,
    }  # fmt: skip
    run.append(epoch)
    return {
        "test_acc": accuracy, "test_acc_best_val": accuracy, "test_acc_best_test": accuracy,
        "best_val_epoch": 1, "val_acc": accuracy, "train_s": 0.0, "eval_s": 0.0, "measure_s": 0.0,
        "step_ms_p25": 1.0, "step_ms_p50": 1.0, "step_ms_p75": 1.0, "steps_timed": 1, "epochs": 1,
        "spikes_per_sample": 1.0, "firing_rate": 0.1, "init_hash": f"{spec.seed}",
        "order_hash": f"{spec.seed}", "data_hash": "0", "data_verified": True, "nulls": {},
        "history": [epoch], "fidelity": [], "layers": [],
    }  # fmt: skip
