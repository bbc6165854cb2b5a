"""What every worker needs and is the same for all, done once: imported last by the fork server.

A run then costs little beyond its own work.
"""

from __future__ import annotations

import gc
import sys

from snnbench import registry
from snnbench.spec import RunSpec, TrainConfig

for kind in ("methods", "models", "datasets", "kernels"):
    for component in registry.components(kind).values():
        if component.module in sys.modules:  # those of the runs to come
            component.describe()
registry.source_hash()
# The first validation of a spec builds its validator.
RunSpec.from_json(
    RunSpec(
        dataset="", data={}, model="", model_options={}, method="", method_config={}, neuron={},
        T=1, seed=0, train=TrainConfig(epochs=1),
    ).to_json()
)  # fmt: skip
# A collection in a child would write to every object of the server, and so copy all its memory.
gc.freeze()
