"""Results folders made by hand: records as the worker and the runner leave them behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from snnbench.spec import RunSpec, TrainConfig
from snnbench.store import RunFolder, SuiteFolder
from snnbench.tables import Writer

HOSTILE = "né | `x` <script>alert(1)</script> C:\\tmp *b* [l](u) # \u2028 end\nline two"
SPEC = RunSpec(
    dataset="digits",
    data={"train_limit": None},
    model="convnet",
    model_options={"width": 16},
    method="bptt",
    method_config={},
    neuron={"decay": 0.5},
    T=4,
    seed=0,
    train=TrainConfig(epochs=2),
)
MACHINE = {
    "cpu": "Testium 3000",
    "machine_id": "cpu-2c-123456",
    "versions": {"torch": "2.10.0"},
    "snnbench": "0.1.0",
}


def measured(spec: RunSpec, acc: float, **more: Any) -> dict[str, Any]:
    """The result of a run that is done."""
    return {
        "schema": 1,
        "run_id": spec.run_id,
        "status": "done",
        "reason": "",
        "spec": spec.to_json(),
        "machine": MACHINE,
        "epochs": 2,
        "test_acc": acc,
        "test_acc_best_val": acc - 0.01,
        "test_acc_best_test": acc + 0.01,
        "best_val_epoch": 1,
        "spikes_per_sample": 1234.5,
        "firing_rate": 0.125,
        "sops_per_sample": 2.5e6,
        "macs_per_sample": 9216,
        "step_ms_p50": 2.5,
        "step_ms_p25": 2.25,
        "step_ms_p75": 3.0,
        "steps_timed": 36,
        "train_s": 1.5,
        "eval_s": 0.25,
        "measure_s": 0.125,
        "peak_bytes": 300 * 2**20,
        "saved_bytes": 3 * 2**19,
        "params_train": 5000,
        "params_infer": 4990,
        "init_hash": f"12e4567{spec.seed}",
        "order_hash": f"00{spec.seed}",
        "data_hash": "1234567890123456",
        "data_verified": True,
        "kernel_path": "reference",
        "kernel_fallbacks": ["native: no compiler"],
        "precision_path": "fp32",
        "setup_s": 0.5,
        "allocator": "unchanged: not glibc",
        "source_hash": "0000000000000001",
        "history": [
            {"epoch": n, "lr": 0.1, "train_loss": 1 / n, "val_acc": None, "test_acc": acc,
             "train_s": 0.75, "eval_s": 0.125}
            for n in (1, 2)
        ],
    } | more  # fmt: skip


def add(folder: SuiteFolder, spec: RunSpec, result: dict[str, Any] | None = None) -> RunFolder:
    """A run as the worker and the runner leave it behind."""
    run = folder.run(spec.run_id)
    run.create(spec)
    run.append({"event": "start", "run_id": spec.run_id, "pid": 1, "time": 0.0})
    if result is not None:
        run.append({"event": "exit", "wall_s": 2.0})
        run.finish(result)
    return run


def done(folder: SuiteFolder, spec: RunSpec, acc: float, **more: Any) -> RunFolder:
    return add(folder, spec, measured(spec, acc, **more))


def ended(folder: SuiteFolder, spec: RunSpec, status: str, reason: str) -> RunFolder:
    """A run that left no figures, as the runner records it."""
    result = {"schema": 1, "run_id": spec.run_id, "spec": spec.to_json(), "source_hash": "1" * 16,
              "status": status, "reason": reason}  # fmt: skip
    return add(folder, spec, result)


def write(folder: SuiteFolder) -> SuiteFolder:
    Writer(folder.path.name, folder).write()
    return folder


def tet(lamb: float, T: int, seed: int) -> RunSpec:
    return replace(SPEC, method="tet", method_config={"lamb": lamb, "phi": 1.0}, T=T, seed=seed)
