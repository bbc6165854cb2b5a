"""A worker that says in what state its process came to it."""

from __future__ import annotations

import gc
import sys
from typing import Any

from snnbench import registry


def look(_: dict[str, Any]) -> dict[str, Any]:
    names = list(sys.modules)
    return {
        "errors": [],
        "imported": names[names.index("snnbench.training.warm") + 1 :],
        "frozen": gc.get_freeze_count(),
        "described": registry._read_docs.cache_info().currsize,
    }
