"""What every worker needs and is the same for all, done once: imported by the fork server."""

from __future__ import annotations

from snnbench import registry
from snnbench.spec import RunSpec, TrainConfig

for kind in ("methods", "models", "datasets", "kernels"):
    registry.components(kind)
registry.source_hash()
# The first validation of a spec builds its validator.
RunSpec.from_json(
    RunSpec(
        dataset="", data={}, model="", model_options={}, method="", method_config={}, neuron={},
        T=1, seed=0, train=TrainConfig(epochs=1),
    ).to_json()
)  # fmt: skip
