"""What can be said against a suite's entries before any component is asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from snnbench import registry
from snnbench.spec import did_you_mean

if TYPE_CHECKING:
    from snnbench.suite import Suite


def method_errors(suite: Suite) -> list[str]:
    """Entries of [[method]] whose own keys are wrong, before any component is asked."""
    errors = []
    for i, entry in enumerate(suite.method):
        if not isinstance(entry.get("name"), str):
            what = "give the name of one method, as a string"
            errors.append(f"method[{i}].name: {what if 'name' in entry else 'missing; ' + what}")
        own = entry.get("T", 1)
        for T in own if isinstance(own, list) else [own]:
            if not isinstance(T, int) or isinstance(T, bool) or T < 1:
                errors.append(f"method[{i}].T = {json.dumps(own)}: timesteps are integers from 1")
        for key, value in entry.items():
            if value == []:
                where = f"method[{i}] ({entry.get('name')}).{key}"
                errors.append(f"{where} = []: an empty sweep; give at least one value")
    return errors


def unknown_names(suite: Suite) -> list[str]:
    """Names of methods, models, datasets and kernels that are not installed."""
    errors = []
    wanted = [
        (f"axes.{kind}", f"{kind}s", getattr(suite.axes, kind))
        for kind in ("dataset", "model", "kernel")
    ]
    wanted.append(("method", "methods", [m["name"] for m in suite.method]))
    for key, kind, names in wanted:
        known = {*registry.components(kind), *(["auto"] if kind == "kernels" else [])}
        for name in names:
            errors += [
                f"{key} = {json.dumps(part)}: unknown {kind[:-1]}{did_you_mean(part, known)}"
                for part in (name.split("+") if kind == "methods" else [name])
                if part not in known
            ]
    return errors
